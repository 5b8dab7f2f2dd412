"""Which build of the kernels is used: chosen once by name, readable, forceable.

"reference" is the Python code that defines the operations, always there. "host" is the C++ source compiled by g++, with
the same results: as it was installed with the package, or else compiled now into the user's cache. "auto" takes the
host's build where either can be had, and the reference elsewhere. The environment variable `SEGZERO_KERNELS` forces one
for a whole process; a forced build that cannot be had is an error, never a silent fall-back. Device builds are compiled
by the tests where nvcc is, and are not run by this package yet.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from segzero_rt.errors import BackendError
from segzero_rt.kernels.build import host_library, installed_module, load_module

KERNELS_VARIABLE = "SEGZERO_KERNELS"
KERNEL_BACKENDS = ("auto", "reference", "host")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """One build of the operations. Prints as its name."""

    name: str
    """"reference" or "host"."""
    detail: str
    """Where the module is and whether it was installed or compiled here, or why there is none."""
    module: ModuleType | None = field(default=None, repr=False, compare=False)
    """The host's build as a Python module: replies. None for the reference."""
    library: ctypes.CDLL | None = field(default=None, repr=False, compare=False)
    """The same file's C functions: masks. None for the reference."""

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
    return chosen_kernels(chosen)


@functools.cache
def chosen_kernels(name: str) -> Kernels:
    if name == "reference":
        return Kernels(name="reference", detail="Python and NumPy, as asked for")
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


@functools.cache
def answer_reader() -> Callable[..., Any] | None:
    """The host's `parse_answer(text, answer_format, input_size_hw, source_size_hw, finished, mode)`, chosen once.

    It returns None for a request that it does not take. None instead of the function: the reference is used.
    """
    module = resolve_kernels().module
    if module is None:
        return None
    from segzero_rt.kernels.parse_prompts_host import bound_reader

    return bound_reader(module)
