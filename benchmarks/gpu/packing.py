"""Downloads what a bare CUDA machine lacks, cuts it into loads of pieces, and plans the calls that carry them.

The machine is taken to have PyTorch, onnx, pytest and what these need. A load is a folder that one call carries: it
holds `contents.json` and as many pieces as the transfer has room for beside the checkout.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels import REAL
from segzero_rt.bundle import Bundle
from segzero_rt.commands.progress import Progress

from .calls import plan_calls
from .errors import GpuCheckError
from .pieces import MAX_PIECE_BYTES, Carried, Piece, split, write_contents
from .stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PACKED_PYTHON = "3.12"
WHEELS = ("onnxruntime-gpu", "pytools", "platformdirs", "siphash24", "mako", "pycocotools")
"""ONNX Runtime with CUDA 13; what pycuda imports; what the masks' tests compare with."""
SOURCES = ("pycuda",)
"""Without wheels: they compile on the machine."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LEFT_BEHIND = ("training/checkpoints",)
"""Tracked folders that the check does not read, and that would fill a transfer."""
_SPARE_BYTES = 1 << 20
"""Of a transfer, for names and what an archive adds."""
_LOAD = "load"

Tell = Callable[[str], None]


def pack(options: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """Downloads, cuts and plans; returns loads and calls.

    Raises:
        GpuCheckError: pip cannot get a package, or the transfer has no room for a piece.
    """
    checkout = checkout_bytes(ROOT, LEFT_BEHIND)
    room = load_room(checkout, transfer_bytes=options.transfer_bytes, piece_bytes=options.piece_bytes)
    tell(f"checkout: {checkout / 1e6:.1f} MB without {', '.join(LEFT_BEHIND)}; room for {room / 1e6:.1f} MB a call")
    with tempfile.TemporaryDirectory(prefix="segzero-pack-") as scratch:
        folder = Path(scratch)
        if options.wheels is None:
            with Progress(2, "downloads") as progress:
                download((*WHEELS, *options.add), folder, python=options.python, source=False)
                progress.step("wheels")
                download((*SOURCES, *options.add_source), folder, python=options.python, source=True)
                progress.step("sources")
        files = sorted(path for path in (options.wheels or folder).iterdir() if path.is_file())
        files += [*options.file, *([REAL] if REAL.is_file() else [])]
        if options.bundle is not None:
            (folder / "bundle").mkdir(exist_ok=True)
            files.append(archive(options.bundle, folder / "bundle" / "bundle.tar"))
        loads = write_loads(files, options.folder, room)
    for number, load in enumerate(loads, start=1):
        num_bytes = sum(piece.num_bytes for piece in load)
        tell(f"{_LOAD}{number}: {num_bytes / 1e6:.1f} MB: {', '.join(piece.name for piece in load)}")
    calls = plan_calls(STAGES, loads=[f"{options.folder}/{_LOAD}{index + 1}" for index in range(len(loads))])
    for call in calls:
        tell(call.shown())
    return {
        "checkout_bytes": checkout,
        "load_bytes": room,
        "loads": [[piece.name for piece in load] for load in loads],
        "calls": [{"carry": call.carry, "command": call.command, "minutes": call.minutes} for call in calls],
    }


def archive(bundle: Path, target: Path) -> Path:
    """A bundle's folder as one file.

    Raises:
        BundleError: it is none.
    """
    Bundle.open(bundle, verify="size")
    with tarfile.open(target, "w") as stream:
        stream.add(bundle, arcname="bundle")
    return target


def download(names: Sequence[str], folder: Path, *, python: str, source: bool) -> None:
    """Gets packages without their requirements: wheels for the GPU's machine, or source packages.

    Raises:
        GpuCheckError: pip says no.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    if source:
        command += ["--no-binary=:all:", "--no-build-isolation"]  # pip asks a source package for its metadata
    else:
        command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    run = subprocess.run([*command, "-d", str(folder), *names], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        said = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        raise GpuCheckError(f"expected pip to download {', '.join(names)}, it says: {' '.join(said)[-500:]}")


def write_loads(files: Sequence[Path], folder: Path, room: int) -> list[list[Piece]]:
    """Cuts files and fills load after load, small files first: what is needed early arrives early.

    Args:
        room: bytes that one load may have.

    Raises:
        GpuCheckError: two files of one name, or a folder of something else in the way.
    """
    names = [path.name for path in files]
    if len(set(names)) < len(names):
        raise GpuCheckError(f"expected files of different names, got {sorted(names)}; rename one")
    if folder.exists() and any(not one.name.startswith(_LOAD) for one in folder.iterdir()):
        raise GpuCheckError(f"expected a folder of loads or none, {folder} holds other things; choose another")
    shutil.rmtree(folder, ignore_errors=True)
    cut = folder / f"{_LOAD}.unfinished"
    cut.mkdir(parents=True)
    carried: list[Carried] = []
    for path in sorted(files, key=lambda path: path.stat().st_size):
        left = room - sum(piece.num_bytes for piece in fill(carried, room)[-1]) if carried else room
        carried.append(split(path, cut, room, first_bytes=left or room))
    loads = fill(carried, room)
    for number, load in enumerate(loads, start=1):
        target = folder / f"{_LOAD}{number}"
        target.mkdir()
        write_contents(target, carried)
        for piece in load:
            (cut / piece.name).replace(target / piece.name)
    cut.rmdir()
    return loads


def fill(carried: Sequence[Carried], room: int) -> list[list[Piece]]:
    """Pieces in loads of at most `room` bytes, in the order they come."""
    loads: list[list[Piece]] = []
    left = 0
    for piece in (piece for one in carried for piece in one.pieces):
        if not loads or piece.num_bytes > left:
            loads.append([])
            left = room
        loads[-1].append(piece)
        left -= piece.num_bytes
    return loads


def load_room(checkout: int, *, transfer_bytes: int, piece_bytes: int) -> int:
    """Bytes that a load may have beside the checkout.

    Raises:
        GpuCheckError: there is room for less than a megabyte, or a piece would be too large.
    """
    if not 1 <= piece_bytes <= MAX_PIECE_BYTES:
        raise GpuCheckError(f"expected pieces of 1 to {MAX_PIECE_BYTES} bytes, got {piece_bytes}")
    room = min(piece_bytes, transfer_bytes - checkout - _SPARE_BYTES)
    if room < min(piece_bytes, 1_000_000):
        raise GpuCheckError(
            f"expected room for pieces beside the checkout, got a transfer of {transfer_bytes} bytes and {checkout} of "
            "the checkout; leave more of it behind, or raise --transfer-bytes"
        )
    return room


def checkout_bytes(root: Path, left_behind: Sequence[str]) -> int:
    """Bytes of the files that travel: tracked and new ones, without ignored ones and what is left behind.

    Raises:
        GpuCheckError: not a checkout.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise GpuCheckError(f"expected a git checkout in {root}, git says: {run.stderr.strip()[-200:]}")
    names = {name for name in run.stdout.split("\0") if name}
    kept = [name for name in names if not any(name.startswith(f"{folder}/") for folder in left_behind)]
    return sum((root / name).stat().st_size for name in kept if (root / name).is_file())
