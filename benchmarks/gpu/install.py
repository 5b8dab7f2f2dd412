"""Installs what was carried, without a network, into a folder of its own: the machine's packages stay as they are.

Wheels and source packages go through pip without their requirements, since what a machine with PyTorch has need not be
carried. Other carried files, such as recorded replies, are put into `WORK/data`, folders unpacked.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

from .errors import GpuCheckError, NotHereError
from .pieces import join, missing, read_contents
from .stages import Context, Figures
from .toolkit import pycuda_environment

WHEEL, SOURCE, FOLDER = ".whl", (".tar.gz", ".zip"), ".tar"
_PYCUDA = re.compile(r"^pycuda-", re.IGNORECASE)


def packages(context: Context) -> Figures:
    """Joins, checks and installs everything; returns what went where.

    Raises:
        NotHereError: nothing was carried here.
        GpuCheckError: pieces are missing or damaged, a wheel is for another Python, or pip refuses.
    """
    carried = read_contents(context.kept)
    if not carried:
        raise NotHereError(f"nothing was carried to {context.kept}: the packages of the machine are used")
    if gone := [piece for one in carried for piece in missing(one, context.kept)]:
        raise GpuCheckError(f"expected all pieces in {context.kept}, missing: {', '.join(gone)}; carry them here")
    for one in carried:
        check_wheel(one.name)
    joined = context.work / "joined"
    for folder in (joined, context.site, context.work / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    files = {one.name: join(one, context.kept, joined / one.name) for one in carried}
    wheels = [path for name, path in files.items() if name.endswith(WHEEL)]
    sources = [path for name, path in files.items() if name.endswith(SOURCE)]
    if wheels:
        install(context, wheels)
    for path in sources:
        install(context, [path])
    data = [name for name in files if not name.endswith((WHEEL, *SOURCE))]
    for name in data:
        if name.endswith(FOLDER):
            unpack(files[name], context.work / "data")
        else:
            files[name].replace(context.work / "data" / name)
    return {
        "wheels": [path.name for path in wheels],
        "built_from_source": [path.name for path in sources],
        "data": data,
        "bytes": sum(one.num_bytes for one in carried),
    }


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a folder that was carried; nothing of it may lie outside `folder`.

    Raises:
        GpuCheckError: it is no archive, or would reach outside.
    """
    try:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise GpuCheckError(f"expected a folder in {path.name}, got {error}; pack it again") from error


def check_wheel(name: str) -> None:
    """Refuses a wheel that this Python cannot load; other files pass.

    Raises:
        GpuCheckError: the wheel is for another Python or system, or has no wheel's name.
    """
    if not name.endswith(WHEEL):
        return
    from packaging.tags import sys_tags
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        tags = parse_wheel_filename(name)[3]
    except InvalidWheelFilename as error:
        raise GpuCheckError(f"expected a wheel's name, got {name[:120]}; pack it again") from error
    if tags.isdisjoint(sys_tags()):
        shown = next(iter(sys_tags()))
        raise GpuCheckError(
            f"expected a wheel for {shown.interpreter} on {shown.platform}, got {name}; pack with --python "
            f"{sys.version_info.major}.{sys.version_info.minor}"
        )


def install(context: Context, files: list[Path]) -> None:
    """Installs files into the check's own folder; a source package is compiled against the toolkit here.

    Raises:
        GpuCheckError: no toolkit for what needs it, or pip refuses.
    """
    environment = dict(os.environ)
    # Whatever the machine's configuration says, nothing is asked of a network.
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    if any(_PYCUDA.match(path.name) for path in files):
        environment |= pycuda_environment(context.work / "pycuda")
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"),
        *("--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(context.site)),
        *map(str, files),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        names = ", ".join(path.name for path in files)
        raise GpuCheckError(f"expected pip to install {names}, it says: {' '.join(run.stderr.split())[-500:]}")
