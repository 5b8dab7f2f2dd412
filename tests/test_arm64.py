"""The runtime on Debian arm64, emulated by qemu-user: its wheel, its kernels, its answers, and tests of its own.

`make test` makes the machine where it can and runs what is quick enough here; `make test-arm64` runs all of the
runtime's tests. Floats differ a little from x86's, since other instructions add in another order.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import emulated_arm64
from benchmarks.arm64_tests import (
    QUESTIONS,
    ask,
    facts,
    likeness,
    read_report,
    run_each,
    run_tests,
    runtime_tests,
    segment,
)
from benchmarks.emulated_arm64 import EmulatedArm64, MachineError, make_machine, processor_info, requirements
from segzero_rt.mask import encode_rle

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("SEGZERO_ARM64", REPOSITORY / ".venv-arm64"))
SEGZERO = Path(sys.executable).parent / "segzero"
QUICK = ("test_answer_format", "test_bundle", "test_preflight")
"""Files that are quick enough for every run; `make test-arm64` has the others."""
MIN_MASK_IOU = 0.9
MAX_BOX_DIFFERENCE_PX = 8.0
"""Of sides of about 100. A step of the coordinates that the policy writes is 1.2 pixels of this picture; where two
digits are nearly as likely, another order of additions chooses the other (seen: five steps)."""
LIMIT_S = 1200


@pytest.fixture(scope="module")
def machine() -> EmulatedArm64:
    """The machine with this checkout's wheel installed, or a skip that says why there is none."""
    try:
        machine = EmulatedArm64.open(FOLDER)
    except MachineError as error:
        pytest.skip(f"no emulated arm64 machine (qemu-user, Debian's arm64 packages): {error}")
    machine.install_project()
    return machine


@pytest.mark.slow
def test_the_wheel_brings_its_kernels_compiled_for_arm64(machine: EmulatedArm64) -> None:
    seen = facts(machine)
    assert seen["environment"]["architecture"] == "aarch64"
    assert seen["kernels"].startswith("lib/python") and seen["kernels"].endswith("-aarch64-linux-gnu.so (installed)")


@pytest.mark.slow
def test_a_question_gets_the_answer_of_x86(machine: EmulatedArm64) -> None:
    alike = likeness(ask(SEGZERO, QUESTIONS[0]), ask(machine.segzero, QUESTIONS[0], machine))
    assert alike["status"] == ["ok", "ok"] and alike["objects"] == [1, 1], alike
    assert alike["box_difference_px"] <= MAX_BOX_DIFFERENCE_PX and alike["mask_iou"] >= MIN_MASK_IOU, alike


@pytest.mark.slow
def test_without_compiled_kernels_the_masks_are_the_same(machine: EmulatedArm64) -> None:
    compiled = segment(machine.segzero, machine)
    reference = segment(machine.segzero, machine, kernels="reference")
    assert compiled["objects"] == reference["objects"]
    alike = likeness(segment(SEGZERO), compiled)
    assert alike["objects"] == [1, 1] and alike["mask_iou"] >= MIN_MASK_IOU, alike


@pytest.mark.slow
def test_the_runtimes_own_tests_pass(
    machine: EmulatedArm64, tiny_bundle_path: Path, portable_bundle_path: Path, tmp_path: Path
) -> None:
    for name, path in (("tiny", tiny_bundle_path), ("portable", portable_bundle_path)):
        (tmp_path / name).symlink_to(path)
    files = [REPOSITORY / f"tests/{name}.py" for name in QUICK]
    result = run_tests(machine, files, tmp_path, timeout_s=LIMIT_S)
    assert result["failures"] == {}
    assert set(result["files"]) == set(QUICK)
    assert all(outcomes["passed"] > outcomes["skipped"] for outcomes in result["files"].values()), result


def test_which_tests_are_the_runtimes() -> None:
    names = {path.stem for path in runtime_tests()}
    assert set(QUICK) | {"test_cli", "test_pipeline", "test_parse_prompts", "test_postprocess_masks"} <= names
    others = {"test_policy_export": "torch", "test_rewards": "training", "test_baseline": "benchmarks"}
    assert not names & {*others, "test_arm64", "test_engine_build", "test_readers_parquet"}


def test_the_machine_has_what_the_runtime_asks_for() -> None:
    assert {line.split(">")[0].lower() for line in requirements()} == {
        *("numpy", "opencv-python-headless", "pillow", "onnxruntime")
    }


def test_the_processor_is_told_once_for_each_core() -> None:
    lines = processor_info(3).splitlines()
    assert [line for line in lines if line.startswith("processor")] == [f"processor\t: {number}" for number in range(3)]
    (features,) = {line.partition(": ")[2] for line in lines if line.startswith("Features")}
    assert {"asimd", "asimddp", "fphp"} <= set(features.split())


@pytest.mark.parametrize(
    ("system", "tools", "files", "free_bytes", "message"),
    [
        pytest.param(
            ("Linux", "aarch64"), True, [], 1 << 40, "expected Linux on x86-64.*make test", id="already arm64"
        ),
        pytest.param(("Darwin", "x86_64"), True, [], 1 << 40, "this is Darwin", id="another system"),
        pytest.param(("Linux", "x86_64"), False, [], 1 << 40, "found no apt-get, dpkg-deb, tar", id="no Debian"),
        pytest.param(
            ("Linux", "x86_64"), True, ["notes.txt"], 1 << 40, "it holds other things", id="somebody's folder"
        ),
        pytest.param(("Linux", "x86_64"), True, [], 1 << 20, "1.5 GB of free disk.*found 0.0 GB", id="full disk"),
    ],
)
def test_where_it_cannot_be_made_it_says_why(
    system: tuple[str, str],
    tools: bool,
    files: list[str],
    free_bytes: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in files:
        (tmp_path / name).write_text("mine")
    monkeypatch.setattr("platform.system", lambda: system[0])
    monkeypatch.setattr("platform.machine", lambda: system[1])
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if tools else None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free_bytes}))
    with pytest.raises(MachineError, match=message):
        make_machine(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_programs_keep_a_compiler_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is emulated may start Python again with another one; the host's own never gets in."""
    for name in ("root/usr/bin", "tools/usr/bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root/usr/bin/python3").symlink_to("python3.11")
    qemu = tmp_path / "tools/usr/bin/qemu-aarch64-static"
    qemu.write_text('#!/bin/sh\necho "$CC $CXX"\n')
    qemu.chmod(0o755)
    (tmp_path / "emulated_arm64").touch()
    (tmp_path / "finished").write_text(emulated_arm64._recipe([]))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("CXX", "the-hosts")
    machine = make_machine(tmp_path)
    own = f"{machine.folder}/bin/c++"

    def told(**environment: str) -> list[str]:
        return machine.run([machine.python], timeout_s=60, environment=environment).stdout.split()

    assert told() == [own, own] and told(CXX="mine") == [own, "mine"]
    assert (
        subprocess.run([machine.python], capture_output=True, text=True, env={}, check=True).stdout.split() == [own] * 2
    )


def test_a_step_that_fails_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    """As without a network: apt knows no package, and its own words are passed on."""
    for name, script in {"apt-get": 'echo "E: Unable to locate package python3" >&2; exit 100', "dpkg-deb": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 40}))
    folder = tmp_path / "machine"
    assert emulated_arm64.main([str(folder)]) == 2
    assert not (folder / "finished").exists()
    with pytest.raises(MachineError, match="Unable to locate package python3"):
        make_machine(folder)
    with pytest.raises(MachineError, match="expected an emulated arm64 machine"):
        EmulatedArm64.open(folder)


def _document(status: str, *objects: tuple[list[float], str]) -> dict[str, object]:
    masks = {"left": np.array([[True, False]] * 2), "none": np.zeros((2, 2), bool)}
    return {
        "status": status,
        "thinking": "",
        "objects": [{"box_xyxy": box, "mask_rle": encode_rle(masks[mask])} for box, mask in objects],
    }


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        pytest.param(
            _document("ok", ([0, 0, 1, 1], "left")), _document("ok", ([0, 0, 1, 1], "left")), (0.0, 1.0), id="the same"
        ),
        pytest.param(
            _document("ok", ([0, 0, 1, 1], "left")), _document("ok", ([0, 3, 1, 1], "none")), (3.0, 0.0), id="elsewhere"
        ),
        pytest.param(_document("ok", ([0, 0, 1, 1], "left")), _document("none_found"), (0.0, 1.0), id="nothing there"),
    ],
)
def test_likeness_is_that_of_the_worst_object(
    one: dict[str, object], other: dict[str, object], expected: tuple[float, float]
) -> None:
    alike = likeness(one, other)
    assert (alike["box_difference_px"], alike["mask_iou"]) == expected
    assert alike["objects"] == [len(one["objects"]), len(other["objects"])]  # type: ignore[arg-type]


def test_a_stopped_run_goes_on_behind_the_last_file_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    slow = {"test_two"}

    def run_one(machine: object, files: list[Path], bundles: Path, *, timeout_s: float) -> dict[str, object]:
        name = files[0].stem
        asked.append(name)
        if name in slow:
            raise MachineError(f"expected {name} to end")
        counts = {"passed": 2, "skipped": 1}
        return {"seconds": 3, "total": counts, "files": {name: counts}, "skipped": {"no GPU": 1}, "failures": {}}

    monkeypatch.setattr("benchmarks.arm64_tests.run_tests", run_one)
    files = [tmp_path / f"test_{name}.py" for name in ("one", "two", "three")]
    for path in files:
        path.write_text(f"# {path.stem}")
    machine = EmulatedArm64(folder=tmp_path)

    def run() -> dict[str, object]:
        return run_each(machine, files, tmp_path, timeout_s=1)

    first = run()
    assert first["failures"] == {"test_two": "expected test_two to end"} and first["seconds"] == 6
    assert first["total"] == {"passed": 4, "skipped": 2, "error": 1} and first["skipped"] == {"no GPU": 2}
    slow.clear()
    assert run()["total"] == {"passed": 6, "skipped": 3}
    assert asked == ["test_one", "test_two", "test_three", "test_two"], "what ended is not run again"
    files[0].write_text("# changed")
    run()
    (tmp_path / "installed_project").write_text("another wheel")
    run()
    assert asked[4:] == ["test_one", "test_one", "test_two", "test_three"]


def test_a_report_counts_outcomes_by_file_and_keeps_what_failed() -> None:
    read = read_report(
        "<testsuites><testsuite>"
        '<testcase classname="tests.test_a" name="one"/>'
        '<testcase classname="tests.test_a" name="two"><failure message="assert 1 == 2"/></testcase>'
        '<testcase classname="tests.test_b" name="three"><skipped message="no compiler"/></testcase>'
        '<testcase classname="" name="tests.test_c"><error message="collection failure"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert read["total"] == {"passed": 1, "failure": 1, "skipped": 1, "error": 1}
    assert read["files"]["test_a"] == {"passed": 1, "failure": 1}
    assert read["skipped"] == {"no compiler": 1}
    assert read["failures"] == {"test_a::two": "assert 1 == 2", "tests.test_c::tests.test_c": "collection failure"}
