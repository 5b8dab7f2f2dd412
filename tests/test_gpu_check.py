"""The GPU check as it is run: without a GPU, at small sizes, each stage in its own process."""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.errors import GpuCheckError
from benchmarks.gpu.install import unpack
from benchmarks.gpu.packing import write_loads
from benchmarks.gpu_check import main
from segzero_rt.bundle import EMBEDDED, Bundle


def check(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit status and document of a command."""
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def write_wheel(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    """A wheel of one module that says where it was found."""
    path = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "PLACE = __file__\n")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def test_what_was_carried_is_installed_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pieces over two calls, then pip without a network, into a folder that only the check's steps see."""
    (tmp_path / "replies.jsonl.gz").write_bytes(b"not a package")
    files = [write_wheel(tmp_path, "segzero_carried_probe"), tmp_path / "replies.jsonl.gz"]
    loads = write_loads(files, tmp_path / "carried", 500)
    assert len(loads) > 1
    work, install = tmp_path / "work", ["run", "install", "--device", "cpu", "--work", str(tmp_path / "work")]
    status, document = check(*install, "--pieces", f"{tmp_path}/carried/load1", "--receive-only", capsys=capsys)
    assert (status, document["arrived"]) == (0, [piece.name for piece in loads[0]]) and document["missing"]
    status, document = check(*install, capsys=capsys)
    (outcome,) = document["outcomes"]["install"].values()
    assert status == 1 and "missing: " in outcome["said"] and loads[1][0].name in outcome["said"]
    for number in range(2, len(loads) + 1):
        status, document = check(*install, "--pieces", f"{tmp_path}/carried/load{number}", capsys=capsys)
    (outcome,) = document["outcomes"]["install"].values()
    assert status == 0 and outcome["figures"]["wheels"] == [files[0].name], outcome
    assert (work / "site" / "segzero_carried_probe.py").is_file()
    assert (work / "data" / "replies.jsonl.gz").read_bytes() == b"not a package"
    (path,) = document["results"].values()
    result = json.loads(Path(path).read_text())
    assert result["steps"]["packages"]["status"] == "done"
    assert result["environment"]["carried_packages"] == {"segzero_carried_probe": "1.0"}


def test_a_wheel_for_another_python_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = write_wheel(tmp_path, "probe", "cp27-cp27m-manylinux2014_x86_64")
    write_loads([wheel], tmp_path / "carried", 10_000)
    options = ["--device", "cpu", "--work", str(tmp_path / "work"), "--pieces", f"{tmp_path}/carried/load1"]
    status, document = check("run", "install", *options, capsys=capsys)
    said = document["outcomes"]["install"]["packages"]["said"]
    assert status == 1 and wheel.name in said and f"--python 3.{sys.version_info.minor}" in said


def test_peaks_are_measured_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["run", "peaks", "--device", "cpu", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    status, document = check(*options, "--dry-run", capsys=capsys)
    assert status == 0 and document["plan"][0]["before"] is None and not (tmp_path / "out").exists()
    status, document = check(*options, capsys=capsys)
    figures = document["outcomes"]["peaks"]["peaks"]["figures"]
    assert status == 0 and figures["bytes_per_second"] > 1e8 and all(rate > 1e8 for rate in figures["flops"].values())
    (path,) = (tmp_path / "out").iterdir()
    result = json.loads(path.read_text())
    assert path.name.startswith("gpu_peaks_cpu_") and result["size"] == "tiny" and result["environment"]["cores"]
    assert check(*options, "--dry-run", capsys=capsys)[1]["plan"][0]["before"] == "done"


def test_stages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, document = check("list", capsys=capsys)
    assert status == 0 and {stage["name"] for stage in document["stages"]} >= {"install", "build", "tests", "peaks"}
    assert main(["list"]) == 0 and "minutes" not in capsys.readouterr().err


def test_packing_files_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "probe")
    options = ["--folder", str(tmp_path / "carried"), "--wheels", str(tmp_path / "wheels"), "--bundle", str(EMBEDDED)]
    status, document = check("pack", *options, "--transfer-bytes", str(1 << 30), capsys=capsys)
    assert status == 0 and (tmp_path / "carried" / "load1" / "contents.json").is_file()
    assert document["loads"][0][0] == "probe-1.0-py3-none-any.whl.1of1"
    assert document["calls"][-1]["command"].startswith("python3 -m benchmarks.gpu_check run")
    install = ["run", "install", "--device", "cpu", "--work", str(tmp_path / "work")]
    assert check(*install, "--pieces", f"{tmp_path}/carried/load1", capsys=capsys)[0] == 0
    assert Bundle.open(tmp_path / "work" / "data" / "bundle").manifest.name == Bundle.open(EMBEDDED).manifest.name


def test_archives_that_reach_outside(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bundle.tar", "w") as stream:
        stream.addfile(tarfile.TarInfo("../outside"))
    for name, content in (("bundle.tar", None), ("other.tar", b"no archive")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(GpuCheckError, match=f"a folder in {name}"):
            unpack(tmp_path / name, tmp_path / "data")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["run", "nothing", "--device", "cpu"], "expected stages of install", id="no such stage"),
        pytest.param(["run", "--device", "cpu", "--minutes", "0"], "a time above 0 minutes", id="no time"),
        pytest.param(["run", "peaks"], "--device cpu", id="no GPU"),
        pytest.param(["pack", "--piece-bytes", "60000001"], "pieces of 1 to 60000000", id="a piece too large"),
        pytest.param(["pack", "--transfer-bytes", "1000"], "leave more of it behind", id="no room"),
        pytest.param(["pack", "--wheels", ".", "--bundle", "tests"], "manifest.json", id="no bundle"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if arguments == ["run", "peaks"] and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    folder = ["--work", str(tmp_path)] if arguments[0] == "run" else ["--folder", str(tmp_path / "carried")]
    assert main([*arguments, *folder]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("gpu_check: ") and error.count("\n") == 1
