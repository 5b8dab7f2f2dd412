"""Compiles the kernels for this host with g++, once per source, compiler and processor, into the user's cache.

The package's own folder is never written to. A build that failed is remembered with the compiler's message, so that
`auto` does not try again at every start; `forget_failure` is for whoever has mended the compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from segzero_rt.errors import BackendError

COMPILER_VARIABLE = "CXX"
CACHE_VARIABLE = "SEGZERO_CACHE"
HERE = Path(__file__).parent
SOURCES = ("parse_prompts.cu", "postprocess_masks.cu")
# No contraction: a fused multiply-add stands exactly where the source says `fmaf`, as in the reference and on a device.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
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


def library_path(compiler: str) -> Path:
    """Where the library of this source, compiler and processor is, or would be."""
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    stat = Path(compiler).resolve().stat()  # asking the compiler for its version would start it each time
    facts = (*FLAGS, compiler, stat.st_size, stat.st_mtime_ns, platform.machine(), _processor())
    digest.update(repr(facts).encode())
    return cache_folder() / f"kernels_{digest.hexdigest()[:24]}.so"


def host_library() -> Path:
    """The compiled library, built now if it is not there.

    Raises:
        BackendError: no compiler, an earlier or present build failed, or the cache cannot be written.
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
    failure = library.with_suffix(".failed")
    if failure.is_file():
        raise BackendError(
            f"expected the host kernels to compile, {compiler} failed before: {failure.read_text('utf-8')}; "
            f"mend it and remove {failure}"
        )
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            message = compile_library(compiler, built)
            if message is not None:
                failure.write_text(message, "utf-8")
                raise BackendError(f"expected the host kernels to compile, {compiler} says: {message}")
            built.replace(library)  # another process may have been faster: the file is the same
    except OSError as error:
        raise BackendError(
            f"expected a folder for compiled kernels, {library.parent} cannot be written ({error.strerror}); "
            f"name another in {CACHE_VARIABLE}"
        ) from error
    return library


def compile_library(
    compiler: str, target: Path, flags: tuple[str, ...] = FLAGS, sources: tuple[str, ...] = SOURCES
) -> str | None:
    """Compiles the sources to a shared library; returns the compiler's first complaint, None if it had none."""
    command = [compiler, *flags, "-shared", "-o", str(target), "-x", "c++", *(str(HERE / name) for name in sources)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {_TIMEOUT_S} s"
    if run.returncode == 0:
        return None
    complaints = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
    return complaints[0][:300] if complaints else f"exit status {run.returncode}"


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by machines of different age."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text("utf-8", "replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
