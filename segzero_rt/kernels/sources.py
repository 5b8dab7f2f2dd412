"""What the compiled kernels are made of: files, compiler flags, and a digest that tells their states apart.

`setup.py` runs this file by its path before the package exists, so it imports nothing of it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

HERE = Path(__file__).parent
MODULE_SOURCE = "host_module.cpp"
"""The one file that a compiler is given; it includes the others."""
SUFFIXES = (".cpp", ".cu", ".cuh", ".hpp")
# No contraction: a fused multiply-add stands exactly where the source says `fmaf`, as in the reference and on a device.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")

DEVICE_FLAGS = ("-std=c++17", "-fmad=false")
"""Of nvcc; no contraction there either. Tests add that warnings are errors, which they are not for users' compilers."""

MODULE_NAME = "_host"
FAST_MODULE_NAME = "_host_avx2"
"""The same source once more, for processors with `FAST_FEATURES`; an installed module may run on another machine."""
FAST_FLAGS = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mlzcnt")
FAST_FEATURES = frozenset({"avx2", "fma", "bmi1", "bmi2", "abm"})
"""What Linux calls the features that `FAST_FLAGS` use."""


def source_digest() -> str:
    """A hash of every source file; a module that was built from other files does not count as this one."""
    digest = hashlib.sha256()
    for path in sorted(path for path in HERE.iterdir() if path.suffix in SUFFIXES):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def macros(name: str) -> tuple[tuple[str, str], ...]:
    """What the source wants defined for a module called `name`."""
    return ("SEGZERO_MODULE", name), ("SEGZERO_SOURCES", f'"{source_digest()}"')
