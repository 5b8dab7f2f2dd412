"""What nvcc makes of the kernels for each device: `python -m benchmarks.kernel_registers`. Needs nvcc, and no GPU.

Registers, stack and spills of each kernel, as ptxas tells them, for every architecture asked for; warnings are errors.
`parse_prompts.cu` takes about half a minute of one core for each.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import write_result
from segzero_rt.kernels.device_build import DEVICE_SOURCES, find_nvcc
from segzero_rt.kernels.sources import DEVICE_FLAGS, HERE

SOURCES = tuple(DEVICE_SOURCES)
ARCHITECTURES = ("80", "86", "87", "89", "90", "100", "110", "120")
FLAGS = (*DEVICE_FLAGS, "-Werror", "all-warnings")
_NAME, _REGISTERS = re.compile(r"\w+"), re.compile(r"Used (\d+) registers")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def read_ptxas(report: str) -> dict[str, dict[str, int]]:
    """Of each kernel in what `ptxas -v` says: registers, bytes of stack, bytes spilled in it and in what it calls.

    Raises:
        ValueError: a kernel without its figures.
    """
    kernels = {}
    for section in report.split("Compiling entry function '")[1:]:
        name, registers = _NAME.match(section), _REGISTERS.search(section)
        frames = [tuple(map(int, frame.groups())) for frame in _FRAME.finditer(section)]
        if name is None or registers is None or not frames:
            raise ValueError(f"expected registers and stack of a kernel, ptxas says: {section[:300]}")
        kernels[name[0]] = {
            "registers": int(registers[1]),
            "stack_bytes": frames[0][0],
            "spill_store_bytes": sum(stores for _, stores, _ in frames),
            "spill_load_bytes": sum(loads for *_, loads in frames),
        }
    return kernels


def compile_for(nvcc: str, source: str, architecture: str) -> dict[str, dict[str, int]]:
    """Compiles one source to machine code.

    Raises:
        RuntimeError: nvcc refuses it; the message is nvcc's.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.cubin"
        command = [nvcc, *FLAGS, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-o", str(target)]
        run = subprocess.run([*command, str(HERE / source)], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"expected {source} to compile for sm_{architecture}, nvcc says: {run.stderr[-1500:]}")
    return read_ptxas(run.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="N", help="such as 87 for Orin")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("expected nvcc on the path, found none; install the CUDA toolkit", file=sys.stderr)
        return 2
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    kernels: dict[str, Any] = {}
    for architecture in options.architectures:
        for source in SOURCES:
            for kernel, facts in compile_for(nvcc, source, architecture).items():
                kernels.setdefault(kernel, {})[f"sm_{architecture}"] = facts
                print(f"{kernel} sm_{architecture}: {facts}", flush=True)
    document = {"nvcc": version, "flags": FLAGS, "kernels": kernels}
    path = write_result("kernel_registers", document)
    print(f"result: {path}")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
