"""A machine without a GPU and one with, as the preflight sees them."""

from __future__ import annotations

from segzero_rt.preflight.gpu import Gpu
from segzero_rt.preflight.machine import Machine

MACHINE = Machine(
    architecture="x86_64",
    model=None,
    jetpack=None,
    gpus=(),
    gpu_problem=None,
    driver=None,
    cuda=None,
    tensorrt={},
    memory_bytes=8 << 30,
    memory_available_bytes=4 << 30,
    disk_free_bytes=1 << 30,
)


def gpu(capability: str) -> Gpu:
    """A small device of that compute capability."""
    return Gpu(name="GPU", capability=capability, multiprocessors=1, memory_bytes=1 << 30, integrated=False)
