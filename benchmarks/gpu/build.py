"""Builds what must be built on the machine: kernels for its processor and its device, engines where TensorRT is."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from segzero_rt.kernels.backend import resolve_kernels
from segzero_rt.kernels.device_build import DEVICE_SOURCES, NVCC_VARIABLE, device_code

from .errors import GpuCheckError, NotHereError
from .machine import find_nvcc
from .stages import Context, Figures

TARGETS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Targets of `segzero build` by the module that each needs."""


def host_kernels(context: Context) -> Figures:
    """The C++ build, compiled here where none was installed."""
    start = time.perf_counter()
    kernels = resolve_kernels("host")
    return {"seconds": time.perf_counter() - start, "detail": kernels.detail}


def device_kernels(context: Context) -> Figures:
    """Every kernel by nvcc for the device present, into the cache that later steps read; loaded where pycuda is.

    Registers and spills of each architecture need no device: `benchmarks.kernel_registers` tells them.

    Raises:
        NotHereError: the check runs on the processor.
        BackendError: no nvcc, or it refuses, or the device does not take what it made.
    """
    if context.device == "cpu":
        raise NotHereError("no device to compile kernels for: the check runs on the processor")
    import torch

    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    os.environ.setdefault(NVCC_VARIABLE, find_nvcc())
    seconds, sizes = {}, {}
    for source in DEVICE_SOURCES:
        start = time.perf_counter()
        sizes[source] = len(device_code(source, capability))
        seconds[source] = time.perf_counter() - start
    loaded = importlib.util.find_spec("pycuda") is not None
    detail = resolve_kernels("cuda").detail if loaded else "not loaded: pycuda is not installed"
    return {"capability": capability, "seconds": seconds, "bytes": sizes, "detail": detail}


def engines(context: Context) -> Figures:
    """Engines of the carried bundle's graphs, gated, by each TensorRT that is here.

    Raises:
        NotHereError: there is none, or no bundle of portable graphs was carried.
        GpuCheckError: a build fails.
    """
    found = [target for target, module in TARGETS.items() if importlib.util.find_spec(module) is not None]
    if not found or context.device == "cpu":
        raise NotHereError("no TensorRT for Python here, or no device: no engines")
    source = carried_bundle(context)
    if source is None:
        raise NotHereError(f"no bundle in {context.work}/data: pack one of portable graphs with --bundle")
    built: Figures = {}
    for target in found:
        bundle = engine_bundle(context, target)
        if not bundle.is_dir():
            shutil.copytree(source, bundle)
        command = [sys.executable, "-m", "segzero_rt.cli", "build", str(bundle), "--target", target, "--json"]
        start = time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise GpuCheckError(f"expected engines for {target}, segzero build says: {run.stderr.strip()[-800:]}")
        built[target] = {"seconds": time.perf_counter() - start, **json.loads(run.stdout.splitlines()[-1])}
    return built


def carried_bundle(context: Context) -> Path | None:
    """The bundle that was carried here; None without one."""
    path = context.work / "data" / "bundle"
    return path if path.is_dir() else None


def engine_bundle(context: Context, target: str) -> Path:
    """Where that bundle with a target's engines is."""
    return context.work / f"bundle-{target}"
