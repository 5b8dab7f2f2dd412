"""The kernels' builds as parameters of tests: the host's is skipped only where there is no C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from segzero_rt.kernels import backend
from segzero_rt.kernels.build import find_compiler, installed_module

NEEDS_COMPILER = pytest.mark.skipif(
    find_compiler() is None and installed_module() is None, reason="there is no C++ compiler (g++, c++ or CXX)"
)
BUILDS = [pytest.param("reference"), pytest.param("host", marks=NEEDS_COMPILER)]


def forget_choice() -> None:
    """Lets this process choose its build of the kernels anew."""
    backend.chosen_kernels.cache_clear()
    backend.answer_reader.cache_clear()


@contextmanager
def forced_kernels(name: str) -> Iterator[None]:
    """Within it, this process uses the build of that name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backend.KERNELS_VARIABLE, name)
        forget_choice()
        yield
    forget_choice()
