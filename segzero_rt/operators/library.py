"""Finds the compiled operators that were installed with the package, or compiles them into the user's cache.

A graph that uses them carries each one's meaning as a function of ONNX Runtime's own operators. Where the library is
registered with a session, its kernels take their place: products in AMX tiles of bfloat16, with norm, activation,
softmax and sum done on what is in the cache already. Everywhere else, on other processors or without a compiler, ONNX
Runtime runs the functions. `SEGZERO_OPERATORS` forces one for a whole process: "reference" or "compiled"; the latter is
an error where it cannot be had.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from segzero_rt.errors import BackendError
from segzero_rt.kernels.build import build_once, cache_folder, compiled, find_compiler, processor_features
from segzero_rt.operators.sources import FEATURES, FLAGS, HERE, LIBRARY_NAME, SOURCE, macros, source_digest

OPERATORS_VARIABLE = "SEGZERO_OPERATORS"
OPERATORS_CHOICES = ("auto", "reference", "compiled")


@dataclass(frozen=True, kw_only=True, slots=True)
class Operators:
    """What graphs' operators run as. Prints as its name."""

    name: str
    """"reference" or "compiled"."""
    detail: str
    """Where the library is, or why there is none."""
    path: Path | None = None
    """The library to register with sessions on the CPU; None for the reference."""

    def __str__(self) -> str:
        return self.name


def resolve_operators() -> Operators:
    """What `SEGZERO_OPERATORS` says, or else the library where it can be had. May compile, once per machine.

    Raises:
        BackendError: the variable names something else, or the library is forced and cannot be had.
    """
    chosen = os.environ.get(OPERATORS_VARIABLE) or "auto"
    if chosen not in OPERATORS_CHOICES:
        raise BackendError(
            f"expected operators of {', '.join(OPERATORS_CHOICES)}, got {chosen[:40]!r}; change {OPERATORS_VARIABLE}"
        )
    return _chosen(chosen)


@functools.cache
def _chosen(name: str) -> Operators:
    if name == "reference":
        return Operators(name="reference", detail="ONNX Runtime's own, as asked for")
    try:
        return _found()
    except BackendError as error:
        if name == "compiled":
            raise
        return Operators(name="reference", detail=f"ONNX Runtime's own, since {error}")


def _found() -> Operators:
    if missing := FEATURES - processor_features():
        raise BackendError(
            f"expected a processor with AMX for the operators, this one lacks {', '.join(sorted(missing))}"
        )
    path, origin = installed_library(), "installed"
    if path is None:
        path, origin = _compiled_library(), "compiled here"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"expected the compiled operators to load, the system says: {error}") from error
    if not library.segzero_tiles_allowed():
        raise BackendError("expected Linux to lend AMX's registers to this process, it refuses")
    return Operators(name="compiled", detail=f"{path} ({origin})", path=path)


def installed_library() -> Path | None:
    """The library that was built with the package; None if there is none, or of other source files than these."""
    path = HERE / f"{LIBRARY_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.is_file() or f"segzero sources {source_digest()}".encode() not in path.read_bytes():
        return None
    return path


def _compiled_library() -> Path:
    compiler = find_compiler()
    if compiler is None:
        raise BackendError("expected a C++ compiler for the operators, found neither g++ nor c++; install one")
    stat = Path(compiler).resolve().stat()
    facts = (source_digest(), *FLAGS, compiler, stat.st_size, stat.st_mtime_ns)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    target = cache_folder() / f"operators_{digest}.so"
    return build_once(target, compiler, lambda built: compile_operators(compiler, built))


def compile_operators(compiler: str, target: Path, flags: tuple[str, ...] = FLAGS) -> str | None:
    """Compiles the library; returns the compiler's first complaint, None if it had none."""
    defined = [f"-D{key}={value}" for key, value in macros()]
    return compiled([compiler, *flags, *defined, "-shared", "-o", str(target), str(HERE / SOURCE)])
