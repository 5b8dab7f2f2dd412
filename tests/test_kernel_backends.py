"""Which build of the kernels is used, how it comes to be, and what happens where it cannot be had."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_builds import NEEDS_COMPILER, ONLY_COMPILER, device_on_host, forget_choice

from segzero_rt.answer_format import VISION_REASONER
from segzero_rt.answer_parser import parse_answer
from segzero_rt.commands.build import compile_kernels
from segzero_rt.errors import BackendError
from segzero_rt.kernels.backend import KERNELS_VARIABLE, MANY_REPLIES, kernels_for, resolve_kernels
from segzero_rt.kernels.build import CACHE_VARIABLE, COMPILER_VARIABLE, host_library, library_path
from segzero_rt.kernels.device_build import (
    DEVICE_SOURCES,
    NVCC_VARIABLE,
    TOOLKIT_VARIABLES,
    device_code,
    find_nvcc,
    is_compiled,
)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test resolves for itself, and none sees what the environment forces."""
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    forget_choice()
    yield
    forget_choice()


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package was installed without a compiler."""
    monkeypatch.setattr("segzero_rt.kernels.backend.installed_module", lambda: None)


def _compiler(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_reference_is_always_there() -> None:
    chosen = resolve_kernels("reference")
    assert (str(chosen), chosen.library) == ("reference", None)


@NEEDS_COMPILER
def test_auto_takes_the_hosts_build_where_there_is_a_compiler() -> None:
    chosen = resolve_kernels()
    assert str(chosen) == "host" and chosen.library is not None and chosen.module is not None
    assert Path(chosen.library._name) == Path(str(chosen.module.__file__)), "one file for replies and masks"
    assert resolve_kernels("auto").detail == resolve_kernels("host").detail


def test_a_choice_can_be_forced_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    assert str(resolve_kernels()) == "reference"


@pytest.mark.parametrize("name", ["gpu", "Host", "gcc", "host ", "cuda_on_host"])
def test_an_unknown_name_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="auto, reference, host, cuda"):
        resolve_kernels(name)
    monkeypatch.setenv(KERNELS_VARIABLE, name)
    with pytest.raises(BackendError, match=KERNELS_VARIABLE):
        resolve_kernels()


@pytest.mark.usefixtures("nothing_installed")
def test_without_a_compiler_auto_is_the_reference_and_force_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPILER_VARIABLE, "no-such-compiler")
    chosen = resolve_kernels()
    assert str(chosen) == "reference" and COMPILER_VARIABLE in chosen.detail
    with pytest.raises(BackendError, match="expected a C\\+\\+ compiler"):
        resolve_kernels("host")
    answer = parse_answer(
        "<answer>[]</answer>", answer_format=VISION_REASONER, input_size_hw=(9, 9), source_size_hw=(9, 9)
    )
    assert answer.status.value == "none_found", "everything works without one"


@pytest.mark.usefixtures("nothing_installed")
def test_a_compiler_that_fails_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    script = f'echo x >> "{asked}"; echo "kernels.cu:1: error: no such header" >&2; exit 1'
    monkeypatch.setenv(COMPILER_VARIABLE, str(_compiler(tmp_path / "cxx", script)))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for _ in range(2):
        forget_choice()
        chosen = resolve_kernels()
        assert str(chosen) == "reference" and "no such header" in chosen.detail
    with pytest.raises(BackendError, match="no such header"):
        resolve_kernels("host")
    assert asked.read_text() == "x\n"
    (failure,) = (tmp_path / "cache").iterdir()
    assert str(failure) in chosen.detail, "it says what to remove to try again"


@NEEDS_COMPILER
@pytest.mark.usefixtures("nothing_installed")
def test_without_pythons_headers_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segzero_rt.kernels.build.sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert "Python.h" in resolve_kernels().detail
    with pytest.raises(BackendError, match="python3-dev"):
        resolve_kernels("host")


@pytest.mark.usefixtures("nothing_installed")
def test_a_library_that_does_not_load_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'while [ "$1" != "-o" ]; do shift; done; echo "no library" > "$2"'
    monkeypatch.setenv(COMPILER_VARIABLE, str(_compiler(tmp_path / "cxx", script)))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert str(resolve_kernels()) == "reference"
    with pytest.raises(BackendError, match="expected the compiled kernels to load"):
        resolve_kernels("host")


@NEEDS_COMPILER
@pytest.mark.usefixtures("nothing_installed")
def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    monkeypatch.setenv(CACHE_VARIABLE, str(blocker / "cache"))
    assert CACHE_VARIABLE in resolve_kernels().detail
    with pytest.raises(BackendError, match="cannot be written"):
        resolve_kernels("host")


def test_the_cache_tells_builds_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = library_path(str(_compiler(tmp_path / "one", "exit 0")))
    assert one == library_path(str(tmp_path / "one"))
    assert one != library_path(str(_compiler(tmp_path / "two", "exit 0"))), "another compiler"
    monkeypatch.setattr("segzero_rt.kernels.build.NATIVE_FLAGS", ("-O0",))
    assert one != library_path(str(tmp_path / "one")), "other flags"


@NEEDS_COMPILER
def test_a_build_is_made_once_and_by_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f'echo x >> "{tmp_path / "asked"}"; while [ "$1" != "-o" ]; do shift; done; echo built > "$2"'
    compiler = _compiler(tmp_path / "cxx", script)
    cache = tmp_path / "cache"
    code = "from segzero_rt.kernels.build import host_library; print(host_library())"
    environment = {**os.environ, COMPILER_VARIABLE: str(compiler), CACHE_VARIABLE: str(cache)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    paths = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert len(paths) == 1 and [path.suffix for path in cache.iterdir()] == [".so"], "nothing half-made is left"
    monkeypatch.setenv(COMPILER_VARIABLE, str(compiler))
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    asked = (tmp_path / "asked").read_text()
    assert str(host_library()) in paths
    assert (tmp_path / "asked").read_text() == asked, "what is there is not built again"


def test_importing_the_kernels_compiles_and_loads_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, segzero_rt.kernels, segzero_rt.kernels.backend; "
        "print(sorted({'numpy', 'cv2', 'torch', 'pycuda'} & set(sys.modules)))"
    )
    environment = {**os.environ, CACHE_VARIABLE: str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]" and not (tmp_path / "cache").exists()


@pytest.mark.skipif(importlib.util.find_spec("pycuda") is not None, reason="pycuda is installed")
def test_a_device_that_is_not_there_is_an_error_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "cuda")
    with pytest.raises(BackendError, match=r"segzero-rt\[cuda\]"):
        resolve_kernels()
    with pytest.raises(BackendError, match=r"segzero-rt\[cuda\]"):
        kernels_for(1)


@ONLY_COMPILER
def test_auto_takes_a_device_for_many_replies_where_nothing_is_left_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segzero_rt.kernels.backend.open_device", device_on_host)
    monkeypatch.setattr("segzero_rt.device.Device.open", lambda: device_on_host().device.device)
    monkeypatch.setattr("segzero_rt.kernels.device_build.find_nvcc", lambda: "nvcc")
    for name, compiled, forced, count, chosen in (
        ("few", True, None, MANY_REPLIES - 1, "host"),
        ("many", True, None, MANY_REPLIES, "cuda"),
        ("not compiled", False, None, MANY_REPLIES, "host"),
        ("another forced", True, "reference", MANY_REPLIES, "reference"),
        ("forced for one", False, "cuda", 1, "cuda"),
    ):
        forget_choice()
        monkeypatch.setattr("segzero_rt.kernels.device_build.is_compiled", lambda capability, answer=compiled: answer)
        monkeypatch.setenv(KERNELS_VARIABLE, forced or "auto")
        assert str(kernels_for(count)) == chosen, name


def _nvcc(folder: Path, script: str) -> Path:
    folder.mkdir()
    return _compiler(folder / "nvcc", script)


def test_machine_code_is_compiled_once_for_each_device_and_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    script = f'echo "$@" >> "{asked}"; while [ "$1" != "-o" ]; do shift; done; echo code > "$2"'
    monkeypatch.setenv(NVCC_VARIABLE, str(_nvcc(tmp_path / "one", script)))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert not is_compiled("8.7")
    for _ in range(2):
        for source in DEVICE_SOURCES:
            assert device_code(source, "8.7") == b"code\n"
    assert is_compiled("8.7") and not is_compiled("9.0")
    lines = asked.read_text().splitlines()
    assert len(lines) == len(DEVICE_SOURCES) and all("-arch=sm_87" in line for line in lines)
    device_code("preprocess.cu", "12.0")
    monkeypatch.setenv(NVCC_VARIABLE, str(_nvcc(tmp_path / "two", script)))
    assert not is_compiled("8.7"), "another toolkit"
    device_code("preprocess.cu", "12.0")
    assert [line.count("-arch=sm_120") for line in asked.read_text().splitlines()[-2:]] == [1, 1]


def test_building_for_a_device_compiles_its_kernels_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = 'while [ "$1" != "-o" ]; do shift; done; echo code > "$2"'
    monkeypatch.setenv(NVCC_VARIABLE, str(_nvcc(tmp_path / "bin", script)))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for lines in (len(DEVICE_SOURCES), 0):
        assert compile_kernels("8.7") == {"capability": "8.7", "status": "compiled"} and is_compiled("8.7")
        assert capsys.readouterr().err.count("8.7") == lines, "what is there is not compiled again"
    monkeypatch.setenv(NVCC_VARIABLE, "no-such-nvcc")
    told = compile_kernels("8.7")
    assert told["status"] == "not_compiled" and NVCC_VARIABLE in told["reason"]
    assert told["reason"] in capsys.readouterr().err


def test_without_nvcc_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NVCC_VARIABLE, "no-such-nvcc")
    with pytest.raises(BackendError, match=f"CUDA toolkit.*{NVCC_VARIABLE}"):
        device_code("preprocess.cu", "8.7")
    assert not is_compiled("8.7")


def test_an_nvcc_that_fails_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f'echo x >> "{tmp_path / "asked"}"; echo "nvcc fatal: error: Unsupported gpu architecture" >&2; exit 1'
    monkeypatch.setenv(NVCC_VARIABLE, str(_nvcc(tmp_path / "bin", script)))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(BackendError, match="Unsupported gpu architecture"):
            device_code("preprocess.cu", "8.7")
    assert (tmp_path / "asked").read_text() == "x\n"


def test_nvcc_is_found_in_the_toolkits_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NVCC_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "toolkit").mkdir()
    nvcc = _nvcc(tmp_path / "toolkit" / "bin", "exit 0")
    for variable in TOOLKIT_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(TOOLKIT_VARIABLES[1], str(tmp_path / "toolkit"))
    assert find_nvcc() == str(nvcc)


@pytest.mark.gpu
def test_a_device_is_named_by_its_capability() -> None:
    chosen = resolve_kernels("cuda")
    assert str(chosen) == "cuda" and chosen.device is not None
    assert chosen.device.device.capability in chosen.detail
