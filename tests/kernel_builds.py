"""The kernels' builds as parameters of tests: the host's is skipped only where there is no C++ compiler."""

from __future__ import annotations

import pytest

from segzero_rt.kernels.build import find_compiler

NEEDS_COMPILER = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler (g++, c++ or CXX)")
BUILDS = [pytest.param("reference"), pytest.param("host", marks=NEEDS_COMPILER)]
