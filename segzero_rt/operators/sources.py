"""What the compiled operators are made of: files, compiler flags, and a digest that tells their states apart.

`setup.py` runs this file by its path before the package exists, so it imports nothing of it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = "library.cpp"
"""The one file that a compiler is given; it includes the others."""
LIBRARY_NAME = "_operators"
"""Of the library that is installed with the package, before the system's suffix."""

FEATURES = frozenset(
    {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "fma", "bmi2"}
)
"""What Linux calls the features that a processor must have: Intel's server processors since Sapphire Rapids do."""

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # GCC 12 warns of its own header: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    *("-mfma", "-mbmi2"),
)


def source_digest() -> str:
    """A hash of every source file; a library that was built from other files does not count as this one."""
    digest = hashlib.sha256()
    for path in sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".hpp")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def macros() -> tuple[tuple[str, str], ...]:
    """What the source wants defined."""
    return (("SEGZERO_SOURCES", f'"{source_digest()}"'),)
