"""What the machine has for the check: device, driver, toolkit, packages; clear errors where something is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from segzero_rt.environment import environment_card

from .errors import GpuCheckError
from .stages import Context

PACKAGES = (
    *("numpy", "torch", "triton", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "pycuda", "cupy-cuda13x"),
    *("tensorrt", "tensorrt-rtx-cu13", "nvidia-cudnn-cu13", "nvidia-cublas", "opencv-python-headless", "pillow"),
)
_TOOLKITS = ("/usr/local/cuda/bin", "/opt/cuda/bin")


def find_nvcc() -> str:
    """Path of nvcc.

    Raises:
        GpuCheckError: there is none.
    """
    found = shutil.which("nvcc") or next((path for one in _TOOLKITS if (path := shutil.which("nvcc", path=one))), None)
    if found is None:
        raise GpuCheckError("expected nvcc on the path or in /usr/local/cuda/bin, found none; install the CUDA toolkit")
    return found


def check_device(context: Context) -> None:
    """Refuses a machine that the chosen device is not on.

    Raises:
        GpuCheckError: no PyTorch, or no CUDA device that it can use.
    """
    if importlib.util.find_spec("torch") is None:
        raise GpuCheckError(f"expected PyTorch in {sys.executable}, found none; run with the Python that has it")
    if context.device == "cpu":
        return
    import torch

    if torch.version.cuda is None:
        raise GpuCheckError(f"expected PyTorch with CUDA, got {torch.__version__}; choose --device cpu, or install it")
    if not torch.cuda.is_available():
        raise GpuCheckError("expected a CUDA device, PyTorch sees none; check nvidia-smi, or choose --device cpu")


def device_name(context: Context) -> str:
    """The GPU's name as the driver gives it; "cpu" where that is the device."""
    if context.device == "cpu":
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name(0))


def file_word(name: str) -> str:
    """A device's name as a part of a file's: "NVIDIA H100 80GB HBM3" is "h100_80gb_hbm3"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "_".join(word for word in words if word not in ("nvidia", "geforce")) or "unknown"


def machine_card(context: Context) -> dict[str, Any]:
    """The environment card with what matters about the GPU; what is not there is None."""
    card: dict[str, Any] = environment_card(PACKAGES)
    card["device"] = device_name(context)
    card["nvcc"] = _said([shutil.which("nvcc") or f"{_TOOLKITS[0]}/nvcc", "--version"], r"release ([\d.]+)")
    card["driver"] = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"([\d.]+)")
    if context.device == "cuda":
        import torch

        facts = torch.cuda.get_device_properties(0)
        card["gpu"] = {
            "name": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory_bytes": facts.total_memory,
            "l2_bytes": getattr(facts, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }
    return card


def carried_packages(context: Context) -> dict[str, str]:
    """Versions of what was carried and installed: steps use these before the machine's own."""
    found = importlib.metadata.distributions(path=[str(context.site)])
    return dict(sorted((one.metadata["Name"], one.version) for one in found))


def library_folders() -> list[Path]:
    """Folders of the CUDA libraries that Python packages brought: ONNX Runtime finds cuDNN and cuBLAS by them."""
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return sorted({path.parent for path in site.glob("**/lib/*.so*")}) if site.is_dir() else []


def _said(command: list[str], pattern: str) -> str | None:
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, said)
    return found[1] if found else None
