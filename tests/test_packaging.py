"""What is installed: one top-level name, the embedded bundle, types, commands; no weights of training runs."""

from __future__ import annotations

import configparser
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kernel_builds import NEEDS_COMPILER

REPOSITORY = Path(__file__).resolve().parent.parent
_COPIED = ("segzero_rt", "export", "training", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")

_KERNEL_SOURCES = {".cpp", ".cu", ".cuh", ".hpp"}

STALE = "left_by_an_earlier_build.py"


def _build_wheel(folder: Path, **variables: str) -> zipfile.ZipFile:
    """The wheel, built from a copy: building in the checkout would leave `build/` and an egg-info behind."""
    source, target = folder / "source", folder / "wheel"
    source.mkdir()
    for name in _COPIED:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(path, source / name)
    stale = source / "build/lib/segzero_rt" / STALE
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(target)]
    environment = {**os.environ, **variables}
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=300, env=environment)
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel for any platform."""
    return _build_wheel(tmp_path_factory.mktemp("any"), SEGZERO_EXTENSION="0")


def _modules(wheel: zipfile.ZipFile) -> list[str]:
    return [name for name in wheel.namelist() if name.endswith(".so")]


def test_without_the_extension_the_wheel_is_for_any_platform(wheel: zipfile.ZipFile) -> None:
    assert str(wheel.filename).endswith("-py3-none-any.whl") and _modules(wheel) == []


def test_a_compiler_that_is_not_there_is_no_reason_to_fail(tmp_path: Path) -> None:
    built = _build_wheel(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert str(built.filename).endswith("-py3-none-any.whl") and _modules(built) == []


def test_a_compiler_that_fails_is_no_reason_to_fail(tmp_path: Path) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    built = _build_wheel(tmp_path, CXX=str(compiler), CC=str(compiler))
    assert _modules(built) == [] and "segzero_rt/kernels/host_module.cpp" in built.namelist()


@pytest.mark.slow
@NEEDS_COMPILER
def test_the_extension_is_built_where_a_compiler_is_and_found_where_it_is_installed(tmp_path: Path) -> None:
    built = _build_wheel(tmp_path)
    fast = platform.machine() == "x86_64"
    assert len(_modules(built)) == 1 + 2 * fast, "the kernels, once more for recent x86, and its operators"
    built.extractall(tmp_path / "site")
    code = "from segzero_rt.kernels.backend import resolve_kernels; print(resolve_kernels('host').detail)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "SEGZERO_CACHE": str(tmp_path / "cache")}
    environment["CXX"] = "no-such-compiler"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(str(tmp_path / "site")) and "(installed)" in run.stdout
    assert not (tmp_path / "cache").exists()
    found = "from segzero_rt.operators.library import resolve_operators; print(resolve_operators().detail)"
    run = subprocess.run(
        [sys.executable, "-c", found], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    installed = run.stdout.startswith(str(tmp_path / "site")) and "(installed)" in run.stdout
    assert installed or "expected a processor with AMX" in run.stdout
    changed = tmp_path / "site/segzero_rt/kernels/masks.cuh"
    changed.write_text(changed.read_text("utf-8") + "// changed\n", "utf-8")
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "expected a C++ compiler" in run.stderr, "a module of other sources does not count"


def test_the_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    """A top-level `training` would overwrite that of another distribution. Optimum's namespace is made to be shared."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"segzero_rt", "optimum"}
    assert len(tops) == 3
    shared = [name for name in wheel.namelist() if name.startswith("optimum/")]
    assert shared == ["optimum/commands/register/segzero.py"], "an __init__.py would hide all of Optimum"


def test_nothing_of_an_earlier_build_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert f"segzero_rt/{STALE}" not in wheel.namelist()


def test_every_module_of_the_checkout_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    folders = {"segzero_rt": "segzero_rt", "export": "segzero_rt/export", "training": "segzero_rt/training"}
    for folder, installed in folders.items():
        for path in (REPOSITORY / folder).rglob("*.py"):
            if path.is_relative_to(REPOSITORY / "export/optimum"):
                continue  # installed elsewhere, see above
            assert f"{installed}/{path.relative_to(REPOSITORY / folder).as_posix()}" in names


def test_the_embedded_bundle_and_the_types_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "segzero_rt/py.typed" in names
    for path in (REPOSITORY / "segzero_rt/bundles").rglob("*"):
        if path.is_file():
            assert path.relative_to(REPOSITORY).as_posix() in names


def test_the_launch_configurations_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    files = sorted((REPOSITORY / "training/accelerate").iterdir())
    assert [path.name for path in files] == ["deepspeed_zero3.yaml", "fsdp.yaml", "fsdp_cpu.yaml"]
    for path in files:
        assert f"segzero_rt/training/accelerate/{path.name}" in names


def test_the_kernels_sources_are_in_the_wheel_and_nothing_compiled(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {path.name for path in (REPOSITORY / "segzero_rt/kernels").iterdir() if path.suffix in _KERNEL_SOURCES}
    assert {"parse_prompts.cu", "postprocess_masks.cu", "host_module.cpp", "components.hpp"} <= sources
    assert {f"segzero_rt/kernels/{name}" for name in sources} <= names
    operators = {
        path.name for path in (REPOSITORY / "segzero_rt/operators").iterdir() if path.suffix in (".cpp", ".hpp")
    }
    assert operators and {f"segzero_rt/operators/{name}" for name in operators} <= names
    assert not any(name.endswith((".so", ".o", ".cubin", ".ptx", ".failed")) for name in names)


def test_nothing_else_heavy_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    for info in wheel.infolist():
        inside_bundle = info.filename.startswith("segzero_rt/bundles/")
        assert inside_bundle or info.file_size < 300_000, f"{info.filename}: {info.file_size} bytes"
        assert not info.filename.endswith((".safetensors", ".pt", ".pth", ".pkl", ".npz", ".pyc"))
    assert sum(info.file_size for info in wheel.infolist()) < 30 << 20


def test_the_metadata_names_licence_extras_and_python(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(path).decode()
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.M))
    runtime = {"cpu", "gpu", "tensorrt", "tensorrt-rtx", "cuda", "ros"}
    assert extras == runtime | {"export", "optimum", "train", "qlora", "deepspeed", "vllm", "eval", "plot", "dev"}
    assert re.search(r"^Requires-Python: >=3\.10$", metadata, re.M)
    assert re.search(r"^Version: 0\.1\.0$", metadata, re.M)
    core = {line for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.M) if "extra ==" not in line}
    assert {re.split(r"[<>=\[; ]", line)[0].lower() for line in core} == {
        *("numpy", "opencv-python-headless", "pillow")
    }, "the core names no backend: extras can only add"
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    assert any(name.endswith("/NOTICE") for name in wheel.namelist())


def test_the_entry_points_resolve_to_files_of_the_wheel(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(path).decode())
    assert dict(entries["console_scripts"]) == {"segzero": "segzero_rt.cli:main"}
    for target in entries["segzero.commands"].values():
        assert target.partition(":")[0].replace(".", "/") + ".py" in wheel.namelist()
