"""What this machine is, from files and drivers alone: model, JetPack, CUDA devices, TensorRT, memory.

Every source can be replaced, so that recorded machines can be read by the same code: files below another root, shared
objects by another loader.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from segzero_rt.errors import BackendError
from segzero_rt.preflight.gpu import Gpu, Loader, driver_cuda_version, read_gpus

_TEGRA_RELEASE, _MODEL = "etc/nv_tegra_release", "proc/device-tree/model"
_DRIVER, _MEMORY = "proc/driver/nvidia/version", "proc/meminfo"
_JETPACK_OF_L4T = {35: 5, 36: 6, 38: 7, 39: 7}
"""Major release of Jetson Linux to that of the JetPack it belongs to (NVIDIA's JetPack archive)."""
_INFER_LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so")
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt_rtx"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class JetPack:
    """NVIDIA's system for Jetsons."""

    jetson_linux: str
    """Release of Jetson Linux, such as "36.4.3"."""
    major: int | None
    """JetPack's own number; None for a release that is not known here."""

    def __str__(self) -> str:
        name = "JetPack" if self.major is None else f"JetPack {self.major}"
        return f"{name}, Jetson Linux {self.jetson_linux}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What was found; None and empty where a machine does not tell."""

    architecture: str
    model: str | None
    """Board, where a device tree names it."""
    jetpack: JetPack | None
    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    """Why the driver that is there tells nothing."""
    driver: str | None
    """Version of NVIDIA's kernel driver."""
    cuda: str | None
    """Newest CUDA that the driver serves."""
    tensorrt: dict[str, str]
    """Target of `segzero build` to the version that is installed."""
    memory_bytes: int | None
    memory_available_bytes: int | None
    disk_free_bytes: int | None
    """Where bundles are built: the present folder's disk."""

    @property
    def gpu_free_bytes(self) -> int | None:
        """Free memory for the first device: its own, or the system's where it shares that."""
        if not self.gpus:
            return None
        return self.memory_available_bytes if self.gpus[0].integrated else self.gpus[0].free_bytes


def read_machine(
    root: Path = Path("/"),
    *,
    load: Loader = ctypes.CDLL,
    version_of: Callable[[str], str] = importlib.metadata.version,
    architecture: str | None = None,
) -> Machine:
    """Reads this machine, or a recorded one below `root`. Never raises: what fails is what the report is about."""
    memory = _memory(_text(root / _MEMORY))
    gpus: tuple[Gpu, ...] = ()
    problem = None
    try:
        gpus = read_gpus(load)
    except BackendError as error:
        problem = str(error)
    return Machine(
        architecture=architecture or platform.machine(),
        model=(_text(root / _MODEL) or "").strip("\0\n ") or None,
        jetpack=parse_jetpack(_text(root / _TEGRA_RELEASE)),
        gpus=gpus,
        gpu_problem=problem,
        driver=parse_driver(_text(root / _DRIVER)),
        cuda=driver_cuda_version(load),
        tensorrt=_tensorrt_versions(load, version_of),
        memory_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        disk_free_bytes=_disk_free(),
    )


def parse_jetpack(release: str | None) -> JetPack | None:
    """From the contents of /etc/nv_tegra_release; None where there is no such file or its first line says nothing."""
    match = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", release or "")
    if match is None:
        return None
    major = int(match[1])
    return JetPack(jetson_linux=f"{major}.{match[2]}", major=_JETPACK_OF_L4T.get(major))


def parse_driver(version: str | None) -> str | None:
    """From the contents of /proc/driver/nvidia/version: the first number with dots after the module's name."""
    match = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", version or "")
    return match[1] if match else None


def parse_infer_version(number: int) -> str:
    """TensorRT's own number, such as 100300 for 10.3.0; releases before 10 counted in hundreds."""
    if number < 10000:
        return f"{number // 1000}.{number // 100 % 10}.{number % 100}"
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _tensorrt_versions(load: Loader, version_of: Callable[[str], str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for target, names in _DISTRIBUTIONS.items():
        for name in names:
            try:
                found.setdefault(target, version_of(name))
            except importlib.metadata.PackageNotFoundError:
                continue
    if "tensorrt" not in found and (version := _infer_library_version(load)):
        found["tensorrt"] = version
    return found


def _infer_library_version(load: Loader) -> str | None:
    """Of the library itself, as JetPack installs it where a virtual environment does not see its Python module."""
    for name in _INFER_LIBRARIES:
        try:
            return parse_infer_version(int(load(name).getInferLibVersion()))
        except (OSError, AttributeError):  # absent, or a stub without that function
            continue
    return None


def _memory(text: str | None) -> dict[str, int]:
    """/proc/meminfo to bytes."""
    rows = re.findall(r"^(\w+):\s+(\d+) kB$", text or "", re.M)
    return {name: int(kib) * 1024 for name, kib in rows}


def _disk_free() -> int | None:
    try:
        return shutil.disk_usage(os.curdir).free
    except OSError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
