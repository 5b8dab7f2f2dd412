"""Every kernel compiles for every device that is promised, spills nothing, takes the registers that are recorded."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks.kernel_registers import ARCHITECTURES, SOURCES, compile_for, main, read_ptxas
from benchmarks.readme_table import newest
from segzero_rt.kernels.device_build import DEVICE_SOURCES, find_nvcc

REPORT = """ptxas info    : 42 bytes gmem
ptxas info    : Compiling entry function 'parse_prompts_kernel' for 'sm_90'
ptxas info    : Function properties for parse_prompts_kernel
    2832 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 134 registers, used 0 barriers, 2832 bytes cumulative stack size
ptxas info    : Function properties for _ZN7segzero4readEv
    0 bytes stack frame, 4 bytes spill stores, 32 bytes spill loads
ptxas info    : Compiling entry function 'upsample_masks_kernel' for 'sm_90'
ptxas info    : Function properties for upsample_masks_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""


def test_spills_of_called_functions_count() -> None:
    assert read_ptxas(REPORT) == {
        "parse_prompts_kernel": {
            "registers": 134,
            "stack_bytes": 2832,
            "spill_store_bytes": 12,
            "spill_load_bytes": 48,
        },
        "upsample_masks_kernel": {
            "registers": 30,
            "stack_bytes": 0,
            "spill_store_bytes": 0,
            "spill_load_bytes": 0,
        },
    }


def test_a_kernel_without_figures_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected registers"):
        read_ptxas("ptxas info    : Compiling entry function 'x' for 'sm_90'\n")
    assert read_ptxas("") == {}


def test_without_nvcc_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda *arguments, **options: None)
    assert main([]) == 2 and "CUDA toolkit" in capsys.readouterr().err
    assert len(ARCHITECTURES) == 8


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_without_spills_into_the_registers_that_are_recorded(source: str, architecture: str) -> None:
    """Warnings are errors. Another nvcc may need other registers; running them needs a GPU."""
    nvcc = str(find_nvcc())
    kernels = compile_for(nvcc, source, architecture)
    assert set(kernels) == set(DEVICE_SOURCES[source])
    for name, facts in kernels.items():
        assert facts["spill_store_bytes"] == facts["spill_load_bytes"] == 0, name
    _, recorded = newest("kernel_registers")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    if version == recorded["nvcc"]:
        assert kernels == {name: recorded["kernels"][name][f"sm_{architecture}"] for name in kernels}
