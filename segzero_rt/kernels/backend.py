"""Which build of the kernels is used: chosen once by name, readable, forceable.

"reference" is the Python code that defines the operations, always there. "host" is the C++ source compiled by g++, with
the same results: as it was installed with the package, or else compiled now into the user's cache. "cuda" is the same
source compiled by nvcc for the device that is here. "auto" takes the host's build where either can be had, and the
reference elsewhere: what lies in the host's memory is sooner read there than copied. Only for many replies at once it
takes the device, see `kernels_for`. The environment variable `SEGZERO_KERNELS` forces one for a whole process; a forced
build that cannot be had is an error, never a silent fall-back.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from segzero_rt.errors import BackendError
from segzero_rt.kernels.build import host_library, installed_module, load_module

if TYPE_CHECKING:
    from segzero_rt.kernels.device_kernels import DeviceKernels

KERNELS_VARIABLE = "SEGZERO_KERNELS"
KERNEL_BACKENDS = ("auto", "reference", "host", "cuda")
MANY_REPLIES = 100
"""From so many replies on, "auto" takes a device that has nothing to compile any more."""
_CHOOSING = threading.RLock()
"""Two threads that ask first at one time get the same build: one device, one pool of its memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """One build of the operations. Prints as its name."""

    name: str
    """"reference", "host" or "cuda"."""
    detail: str
    """Where the module is and whether it was installed or compiled here, or why there is none."""
    module: ModuleType | None = field(default=None, repr=False, compare=False)
    """The host's build as a Python module: replies. None for the others."""
    library: ctypes.CDLL | None = field(default=None, repr=False, compare=False)
    """The same file's C functions: masks. None for the others."""
    device: DeviceKernels | None = field(default=None, repr=False, compare=False)
    """The device's build. None for the others."""

    def __str__(self) -> str:
        return self.name


def resolve_kernels(name: str | None = None) -> Kernels:
    """Finds a build by name; None is what `SEGZERO_KERNELS` says, or else "auto". May compile, once per machine.

    Raises:
        BackendError: the name is unknown, or a forced build cannot be had.
    """
    chosen = name or os.environ.get(KERNELS_VARIABLE) or "auto"
    if chosen not in KERNEL_BACKENDS:
        raise BackendError(
            f"expected kernels of {', '.join(KERNEL_BACKENDS)}, got {chosen[:40]!r}; change {KERNELS_VARIABLE} or the "
            "argument"
        )
    with _CHOOSING:
        return chosen_kernels(chosen)


@functools.cache
def chosen_kernels(name: str) -> Kernels:
    if name == "reference":
        return Kernels(name="reference", detail="Python and NumPy, as asked for")
    if name == "cuda":
        return open_device()
    try:
        return _loaded()
    except (BackendError, ImportError) as error:
        if name == "host":
            if isinstance(error, BackendError):
                raise
            raise BackendError(f"expected the compiled kernels to load, the system says: {error}") from error
        return Kernels(name="reference", detail=f"Python and NumPy, since {error}")


def _loaded() -> Kernels:
    module, origin = installed_module(), "installed"
    if module is None:
        module, origin = load_module(host_library()), "compiled here"
    path = str(module.__file__)
    return Kernels(name="host", detail=f"{path} ({origin})", module=module, library=ctypes.CDLL(path))


def open_device() -> Kernels:
    """The kernels on the first CUDA device, all loaded; compiles what is not compiled yet.

    Raises:
        BackendError: no pycuda, no device, or no nvcc where something has to be compiled.
    """
    from segzero_rt.device import Device
    from segzero_rt.kernels.device_kernels import DeviceKernels

    device = Device.open()
    kernels = DeviceKernels(device)
    kernels.load()
    return Kernels(name="cuda", detail=f"{device} (compute capability {device.capability})", device=kernels)


def kernels_for(num_replies: int) -> Kernels:
    """As `resolve_kernels`; where nothing is forced and there are `MANY_REPLIES` or more, a device for which everything
    is compiled already. A process without one asks once."""
    chosen = os.environ.get(KERNELS_VARIABLE) or "auto"
    found = _ready_device() if chosen == "auto" and num_replies >= MANY_REPLIES else None
    return found or resolve_kernels()


@functools.cache
def _ready_device() -> Kernels | None:
    from segzero_rt.device import Device
    from segzero_rt.kernels.device_build import find_nvcc, is_compiled

    if find_nvcc() is None:
        return None
    try:
        return resolve_kernels("cuda") if is_compiled(Device.open().capability) else None
    except BackendError:
        return None


@functools.cache
def answer_reader() -> Callable[..., Any] | None:
    """A compiled `parse_answer(text, answer_format, input_size_hw, source_size_hw, finished, mode)`, chosen once.

    It returns None for a request that it does not take. None instead of the function: the reference is used.
    """
    chosen = resolve_kernels()
    if chosen.device is not None:
        from segzero_rt.kernels.parse_prompts_device import device_reader

        return device_reader(chosen.device)
    if chosen.module is None:
        return None
    from segzero_rt.kernels.parse_prompts_host import bound_reader

    return bound_reader(chosen.module)
