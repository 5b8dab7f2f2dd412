"""The environment card: what a figure was measured on. Every benchmark document carries one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.graph import default_threads
from segzero_rt.manifest import MANIFEST_NAME

if TYPE_CHECKING:  # a card of the machine alone opens no bundle
    from segzero_rt.bundle import Bundle

_PACKAGES = ("segzero-rt", "numpy", "onnxruntime", "onnxruntime-gpu", "opencv-python-headless", "pillow")


def environment_card(packages: tuple[str, ...] = _PACKAGES) -> dict[str, Any]:
    """Machine and versions as plain JSON types; what this machine does not tell is None, never a guess."""
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": default_threads(),
        "memory_bytes": _total_memory_bytes(),
        "load_average": _load_average(),
        "scheduling_group_nice": _scheduling_group_nice(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name)) is not None},
    }


def device_card() -> dict[str, Any]:
    """GPUs, how the machine is set to trade speed for power, and the checkout's commit; None and empty as above."""
    from segzero_rt.preflight.machine import read_machine

    folder = str(Path(__file__).parent)
    # A package installed into an environment that lies in somebody's checkout is no part of that checkout.
    tracked = _first_line_of(["git", "-C", folder, "ls-files", "--error-unmatch", Path(__file__).name])
    return {
        "gpus": [f"{gpu.name} (compute capability {gpu.capability})" for gpu in read_machine().gpus],
        "power_mode": _first_line_of(["nvpmodel", "-q"]),
        "cpu_governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        # Marked when files differ from it.
        "commit": _first_line_of(["git", "-C", folder, "describe", "--always", "--dirty"]) if tracked else None,
    }


def bundle_card(bundle: Bundle) -> dict[str, str]:
    """Name of a bundle and the hash of its manifest, which holds the hash of every file in it."""
    manifest_bytes = (bundle.root / MANIFEST_NAME).read_bytes()
    return {"name": bundle.manifest.name, "sha256": hashlib.sha256(manifest_bytes).hexdigest()}


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # `ru_maxrss` of a child begins with what its parent had when it was started
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key == "VmHWM":
                return int(value.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or None
    # x86 says "model name"; ARM kernels say "Model" or nothing at all.
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return None


def _total_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def _first_line_of(command: list[str]) -> str | None:
    """What a program says; None where it is absent or refuses."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0] if said else None


def _load_average() -> list[float] | None:
    """Over 1, 5 and 15 minutes: tells whether something else was running."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None


def _scheduling_group_nice() -> int | None:
    """Linux shares processors among sessions first: -20 is the most, 19 the least, and 0 what everybody has."""
    group, _, nice = (_read(Path("/proc/self/autogroup")) or "").partition(" nice ")
    return int(nice) if group else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
