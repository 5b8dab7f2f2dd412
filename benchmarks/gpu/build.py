"""Builds what must be built on the machine: kernels for its processor and its device, engines where TensorRT is."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time

from benchmarks.kernel_registers import FLAGS, SOURCES, read_ptxas
from segzero_rt.bundle import EMBEDDED
from segzero_rt.kernels.backend import resolve_kernels
from segzero_rt.kernels.sources import HERE

from .errors import GpuCheckError, NotHereError
from .machine import find_nvcc
from .stages import Context, Figures

_TARGETS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Targets of `segzero build` by the module that each needs."""


def host_kernels(context: Context) -> Figures:
    """The C++ build, compiled here where none was installed."""
    start = time.perf_counter()
    kernels = resolve_kernels("host")
    return {"seconds": time.perf_counter() - start, "detail": kernels.detail}


def device_kernels(context: Context) -> Figures:
    """Every kernel by nvcc for the device present: registers, stack and spills; warnings are errors.

    Raises:
        NotHereError: the check runs on the processor.
        GpuCheckError: no nvcc, or it refuses.
    """
    if context.device == "cpu":
        raise NotHereError("no device to compile kernels for: the check runs on the processor")
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    nvcc, folder = find_nvcc(), context.work / "cubins"
    folder.mkdir(parents=True, exist_ok=True)
    kernels: Figures = {}
    start = time.perf_counter()
    for source in SOURCES:
        target = folder / source.replace(".cu", f"_sm_{major}{minor}.cubin")
        command = [nvcc, *FLAGS, f"-arch=sm_{major}{minor}", "-cubin", "-Xptxas", "-v", "-o", str(target)]
        run = subprocess.run([*command, str(HERE / source)], capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise GpuCheckError(f"expected {source} to compile for sm_{major}{minor}, nvcc says: {run.stderr[-1500:]}")
        kernels |= read_ptxas(run.stderr)
    return {"architecture": f"sm_{major}{minor}", "seconds": time.perf_counter() - start, "kernels": kernels}


def engines(context: Context) -> Figures:
    """Engines of the embedded bundle's graphs, gated, by each TensorRT that is here.

    Raises:
        NotHereError: there is none.
        GpuCheckError: a build fails.
    """
    found = [target for target, module in _TARGETS.items() if importlib.util.find_spec(module) is not None]
    if not found or context.device == "cpu":
        raise NotHereError("no TensorRT for Python here, or no device: no engines")
    built: Figures = {}
    for target in found:
        bundle = context.work / f"bundle-{target}"
        if not bundle.is_dir():
            shutil.copytree(EMBEDDED, bundle)
        command = [sys.executable, "-m", "segzero_rt.cli", "build", str(bundle), "--target", target, "--json"]
        start = time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise GpuCheckError(f"expected engines for {target}, segzero build says: {run.stderr.strip()[-800:]}")
        built[target] = {"seconds": time.perf_counter() - start, **json.loads(run.stdout.splitlines()[-1])}
    return built
