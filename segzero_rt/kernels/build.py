"""Finds the kernels that were installed with the package, or compiles them with g++ into the user's cache.

`setup.py` builds the module where a compiler is, for any processor and once more for recent x86. Where that was not
done, or from other source files than these, it is compiled when it is first needed: once per source, Python, compiler
and processor. The package's own folder is never written to. A build that failed is remembered with the compiler's
message, so that `auto` does not try again at every start; the error says which file to remove.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from segzero_rt.errors import BackendError
from segzero_rt.kernels.sources import (
    FAST_FEATURES,
    FAST_MODULE_NAME,
    FLAGS,
    HERE,
    MODULE_NAME,
    MODULE_SOURCE,
    macros,
    source_digest,
)

COMPILER_VARIABLE = "CXX"
CACHE_VARIABLE = "SEGZERO_CACHE"
NATIVE_FLAGS = (*FLAGS, "-march=native", *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()))
_TIMEOUT_S = 300


def find_compiler() -> str | None:
    """Path of the C++ compiler: `CXX`, else g++ or c++; None if there is none."""
    chosen = os.environ.get(COMPILER_VARIABLE)
    return shutil.which(chosen) if chosen else shutil.which("g++") or shutil.which("c++")


def cache_folder() -> Path:
    """Where builds are kept: `SEGZERO_CACHE`, else `segzero-rt` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "segzero-rt"


def installed_module() -> ModuleType | None:
    """The module that was built with the package, the fastest that this processor takes; None if there is none.

    One that was built from other source files than these does not count: in a checkout they change.
    """
    names = [MODULE_NAME]
    if platform.machine() in ("x86_64", "AMD64") and processor_features() >= FAST_FEATURES:
        names.insert(0, FAST_MODULE_NAME)
    for name in names:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = HERE / f"{name}{suffix}"
            if path.is_file():
                try:
                    module = load_module(path, name)
                except ImportError:
                    continue  # of another Python's make
                if source_digest() == module.SOURCES:
                    return module
    return None


def load_module(path: Path, name: str = MODULE_NAME) -> ModuleType:
    """Loads a compiled module from its file.

    Raises:
        ImportError: the file is no such module, or the system cannot load it.
    """
    loader = importlib.machinery.ExtensionFileLoader(f"segzero_rt.kernels.{name}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def library_path(compiler: str) -> Path:
    """Where the library of this source, Python, compiler and processor is, or would be."""
    digest = hashlib.sha256(source_digest().encode())
    stat = Path(compiler).resolve().stat()  # asking the compiler for its version would start it each time
    python = sysconfig.get_config_var("EXT_SUFFIX")
    facts = (*NATIVE_FLAGS, compiler, stat.st_size, stat.st_mtime_ns, platform.machine(), _processor(), python)
    digest.update(repr(facts).encode())
    return cache_folder() / f"kernels_{digest.hexdigest()[:24]}.so"


def host_library() -> Path:
    """The compiled library, built now if it is not there.

    Raises:
        BackendError: no compiler, no headers of Python, an earlier or present build failed, or the cache cannot be
            written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BackendError(
            "expected a C++ compiler for the host kernels, found neither g++ nor c++; install one, or name it in "
            f"{COMPILER_VARIABLE}"
        )
    library = library_path(compiler)
    if library.is_file():
        return library
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        raise BackendError(
            f"expected Python's C headers to compile the host kernels, found no Python.h in {headers}; install them "
            "(python3-dev)"
        )
    return build_once(library, compiler, lambda built: compile_library(compiler, built))


def build_once(target: Path, compiler: str, compile_to: Callable[[Path], str | None]) -> Path:
    """The file at `target`, made now if it is not there: whole or not at all, however many processes want it.

    Args:
        target: in a folder that may have to be made.
        compiler: its path, for messages.
        compile_to: writes the file it is given; returns the compiler's complaint, None if it had none.

    Raises:
        BackendError: an earlier or present build failed, or the folder cannot be written.
    """
    if target.is_file():
        return target
    failure = target.with_suffix(".failed")
    if failure.is_file():
        raise BackendError(
            f"expected the kernels to compile, {compiler} failed before: {failure.read_text('utf-8')}; "
            f"mend it and remove {failure}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            message = compile_to(built)
            if message is not None:
                failure.write_text(message, "utf-8")
                raise BackendError(f"expected the kernels to compile, {compiler} says: {message}")
            built.replace(target)  # another process may have been faster: the file is the same
    except OSError as error:
        raise BackendError(
            f"expected a folder for compiled kernels, {target.parent} cannot be written ({error.strerror}); "
            f"name another in {CACHE_VARIABLE}"
        ) from error
    return target


def compile_library(compiler: str, target: Path, flags: tuple[str, ...] = NATIVE_FLAGS) -> str | None:
    """Compiles the module to a shared library; returns the compiler's first complaint, None if it had none."""
    defined = [f"-D{key}={value}" for key, value in macros(MODULE_NAME)]
    headers = sysconfig.get_paths()["include"]
    return compiled(
        [compiler, *flags, *defined, "-I", headers, "-shared", "-o", str(target), str(HERE / MODULE_SOURCE)]
    )


def compiled(command: list[str]) -> str | None:
    """Runs a compiler; returns its first complaint, None if it had none."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {_TIMEOUT_S} s"
    if run.returncode == 0:
        return None
    complaints = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
    return complaints[0][:300] if complaints else f"exit status {run.returncode}"


def processor_features() -> frozenset[str]:
    """What the processor can do, by Linux's names; empty where that is not known."""
    for line in _processor().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by machines of different age."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text("utf-8", "replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
