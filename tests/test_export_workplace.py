"""Where exports write: what stays when one is stopped or killed, and that two of them do not mix."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from export import workplace as workplaces
from export.disk import DiskFullError
from export.workplace import workplace
from segzero_rt.errors import ExportError

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = REPOSITORY / "training/checkpoints/tabletop/policy"
ERRORS: dict[str, BaseException] = {
    "refused": ExportError("x"),
    "full disk": DiskFullError("x"),
    "stopped": KeyboardInterrupt(),
}


@pytest.fixture(params=["large", "small"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the published policy counts as one whose export goes on."""
    if request.param == "large":
        monkeypatch.setattr(workplaces, "RESUMABLE_FROM_BYTES", 1)
    return bool(request.param == "large")


@pytest.mark.parametrize(
    ("end", "stays"), [("done", False), ("refused", False), ("full disk", True), ("stopped", True)]
)
def test_the_work_on_a_large_policy_stays_when_it_can_go_on(tmp_path: Path, large: bool, end: str, stays: bool) -> None:
    with (
        pytest.raises(type(ERRORS[end])) if end in ERRORS else nullcontext(),
        workplace(tmp_path / "bundle", PUBLISHED) as work,
    ):
        (work / "policy").mkdir()
        if end in ERRORS:
            raise ERRORS[end]
    assert work == tmp_path / ".bundle.export"
    assert work.exists() is (stays and large)
    with workplace(tmp_path / "bundle", PUBLISHED) as again:
        assert again == work
        assert (again / "policy").exists() is (stays and large)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_leaves_is_taken_up_or_removed(tmp_path: Path, large: bool) -> None:
    program = (
        f"import os, sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path\n"
        "from export import workplace as w\n"
        f"w.RESUMABLE_FROM_BYTES = {1 if large else 1 << 30}\n"
        f"with w.workplace(Path({str(tmp_path / 'bundle')!r}), Path({str(PUBLISHED)!r})) as work:\n"
        "    (work / 'policy').mkdir()\n"
        "    (work.parent / '.bundle.ab12_xyz.tmp').mkdir()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == -9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle.ab12_xyz.tmp", ".bundle.export"]
    with workplace(tmp_path / "bundle", PUBLISHED) as work:
        assert [path.name for path in tmp_path.iterdir()] == [".bundle.export"]
        assert [path.name for path in work.iterdir()] == (["policy"] if large else [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (".bundle.ab12_xyz.tmp", False),
        (".bundle.ab12_xyz.old", False),
        (".bundle.mine", True),
        (".bundle2.ab12_xyz.tmp", True),
        (".bundle.ab12_xyz.tmp2", True),
        ("bundle.ab12_xyz.tmp", True),
    ],
)
def test_only_halves_of_this_bundle_are_removed(tmp_path: Path, left: str, kept: bool) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / left).mkdir()
    (tmp_path / left / "manifest.json").write_text("{}")
    with workplace(tmp_path / "bundle", None):
        assert (tmp_path / left).exists() is kept


def test_a_bundle_that_was_moved_aside_when_the_export_was_killed_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".a [b].ab12_xyz.old").mkdir()
    (tmp_path / ".a [b].ab12_xyz.old/manifest.json").write_text("{}")
    with workplace(tmp_path / "a [b]", None):
        assert (tmp_path / "a [b]/manifest.json").read_text() == "{}"


def test_files_that_a_finished_bundle_shares_are_not_written_to_again(tmp_path: Path, large: bool) -> None:
    work = tmp_path / ".bundle.export"
    (work / "policy").mkdir(parents=True)
    (tmp_path / "bundle").mkdir()
    (work / "policy/decoder.data").write_bytes(b"weights")
    (tmp_path / "bundle/decoder.data").hardlink_to(work / "policy/decoder.data")
    with workplace(tmp_path / "bundle", PUBLISHED):
        assert list(work.iterdir()) == []
    assert (tmp_path / "bundle/decoder.data").read_bytes() == b"weights"


def test_two_exports_to_one_bundle_do_not_mix(tmp_path: Path, large: bool) -> None:
    with workplace(tmp_path / "bundle", PUBLISHED) as work:
        (work / "mine").write_text("1")
        with (
            pytest.raises(ExportError, match="another export is writing the same bundle; wait"),
            workplace(tmp_path / "bundle", PUBLISHED),
        ):
            pytest.fail("both went on")
        assert (work / "mine").read_text() == "1"
        with workplace(tmp_path / "other", PUBLISHED):
            pass
    with workplace(tmp_path / "bundle", PUBLISHED):
        pass


def test_a_place_that_vanishes_while_it_is_claimed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another export may end, and take the folder with it, between opening the folder and locking it."""
    lock, times = fcntl.flock, iter([True, False])

    def late(descriptor: int, operation: int) -> None:
        if next(times):
            shutil.rmtree(tmp_path / ".bundle.export")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with workplace(tmp_path / "bundle", None) as work:
        (work / "mine").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with workplace(tmp_path / "bundle", None) as work:
        (work / "mine").write_text("1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, DiskFullError, "is full; free some and run the same command again"),
        (errno.EFBIG, ExportError, "expected to write .*decoder.data, got: File too large"),
        (errno.EROFS, ExportError, "Read-only"),
        (errno.EACCES, PermissionError, "Permission denied"),
    ],
    ids=["full", "no large files", "read-only", "something else"],
)
def test_a_disk_that_refuses_is_told_as_such(
    tmp_path: Path, large: bool, code: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), workplace(tmp_path / "bundle", PUBLISHED) as work:
        raise OSError(code, os.strerror(code), str(work / "decoder.data"))


@pytest.mark.skipif(sys.platform != "linux", reason="writes to /proc")
def test_a_place_that_takes_nothing_is_told_before_the_work() -> None:
    with (
        pytest.raises(ExportError, match=r"expected to write into /proc.*choose another --out"),
        workplace(Path("/proc/bundle"), PUBLISHED),
    ):
        pytest.fail("began to export")
