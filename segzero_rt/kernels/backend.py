"""Which build of the kernels is used: chosen once by name, readable, forceable.

"reference" is the Python code that defines the operations, always there. "host" is the C++ source compiled by g++, with
the same results. "auto" takes the host's build where there is a compiler, and the reference elsewhere. The environment
variable `SEGZERO_KERNELS` forces one for a whole process; a forced build that cannot be had is an error, never a
silent fall-back. Device builds are compiled by the tests where nvcc is, and are not run by this package yet.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass, field

from segzero_rt.errors import BackendError
from segzero_rt.kernels.build import host_library

KERNELS_VARIABLE = "SEGZERO_KERNELS"
KERNEL_BACKENDS = ("auto", "reference", "host")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """One build of the operations. Prints as its name."""

    name: str
    """"reference" or "host"."""
    detail: str
    """Where the library is, or why there is none."""
    library: ctypes.CDLL | None = field(default=None, repr=False, compare=False)
    """The host's build; None for the reference."""

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
    return _resolved(chosen)


@functools.cache
def _resolved(name: str) -> Kernels:
    if name == "reference":
        return Kernels(name="reference", detail="Python and NumPy, as asked for")
    try:
        path = host_library()
        return Kernels(name="host", detail=str(path), library=ctypes.CDLL(str(path)))
    except (BackendError, OSError) as error:
        if name == "host":
            if isinstance(error, BackendError):
                raise
            raise BackendError(f"expected the compiled kernels to load, the system says: {error}") from error
        return Kernels(name="reference", detail=f"Python and NumPy, since {error}")
