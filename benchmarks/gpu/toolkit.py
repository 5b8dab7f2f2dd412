"""Where CUDA's compiler, headers and driver library are, as far as compiling pycuda needs to know."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import GpuCheckError
from .machine import find_nvcc

_DRIVER = "libcuda.so"
_DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/wsl/lib", "/usr/lib64")
_TOP = re.compile(r"^#\$ TOP=(.*)$", re.MULTILINE)
_DEFAULTS = ".aksetup-defaults.py"
"""What pycuda's setup reads in the home folder; without any it pauses, and guesses."""


def toolkit_root(nvcc: str) -> Path:
    """The toolkit's folder by nvcc's own account: what is on the path may be a script that calls it.

    Raises:
        GpuCheckError: nvcc does not tell.
    """
    run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    found = _TOP.search(run.stderr) or _TOP.search(run.stdout)
    if found is None:
        raise GpuCheckError(f"expected {nvcc} to name its toolkit, it says: {run.stderr.strip()[-300:]}")
    return Path(found[1]).resolve()


def driver_folder(root: Path, scratch: Path, more: Sequence[Path] = ()) -> Path:
    """A folder with `libcuda.so` for the linker; a link to the driver's own file where only that is there.

    Args:
        root: of the toolkit, which may bring a stub.
        scratch: where a link may be made.
        more: folders to look in as well.

    Raises:
        GpuCheckError: there is neither stub nor driver.
    """
    stubs = [root / "lib64/stubs", root / "lib/stubs", *root.glob("targets/*/lib/stubs")]
    named = [Path(one) for one in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if one]
    folders = [*more, *stubs, *named, *map(Path, _DRIVER_FOLDERS)]
    for folder in folders:
        if (folder / _DRIVER).is_file():
            return folder
    for folder in folders:
        for driver in sorted(folder.glob(f"{_DRIVER}.*")):
            scratch.mkdir(parents=True, exist_ok=True)
            link = scratch / _DRIVER
            link.unlink(missing_ok=True)
            link.symlink_to(driver)
            return scratch
    raise GpuCheckError(f"expected {_DRIVER} in {', '.join(map(str, folders[:6]))} …, found none; install the driver")


def pycuda_environment(scratch: Path) -> dict[str, str]:
    """Variables under which pycuda compiles: its settings lie in a home folder of their own.

    Random numbers and OpenGL are left out: their libraries are not in every toolkit, and nothing here uses them.

    Raises:
        GpuCheckError: no nvcc, no headers or no driver.
    """
    root = toolkit_root(find_nvcc())
    headers = next(
        (one for one in (root / "include", *root.glob("targets/*/include")) if (one / "cuda.h").is_file()), None
    )
    if headers is None:
        raise GpuCheckError(f"expected cuda.h in {root}/include, found none; install the toolkit's headers")
    home = scratch / "home"
    home.mkdir(parents=True, exist_ok=True)
    settings = {
        "CUDA_ROOT": str(root),
        "CUDA_INC_DIR": [str(headers)],
        "CUDADRV_LIB_DIR": [str(driver_folder(root, scratch / "driver"))],
        "CUDA_ENABLE_CURAND": False,
        "CUDA_ENABLE_GL": False,
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    (home / _DEFAULTS).write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(root / "bin"), os.environ.get("PATH", "")])
    # Optimising a wrapper takes most of the time that compiling it takes.
    return {"HOME": str(home), "PATH": path, "CFLAGS": "-O1", "CXXFLAGS": "-O1"}
