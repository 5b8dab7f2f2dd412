"""Where an export writes: a folder beside its bundle that one process owns, and what of it outlives that process."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segzero_rt.errors import ExportError, SegZeroError
from segzero_rt.manifest import MANIFEST_NAME

from .disk import REFUSES, DiskFullError, disk_error

RESUMABLE_FROM_BYTES = 1 << 30
"""Checkpoints of more are exported so that a killed export can go on."""


@contextmanager
def workplace(out: Path, policy: Path | None) -> Iterator[Path]:
    """A folder to write in, gone afterwards; on the bundle's own disk, so that its files need not be copied.

    For a large policy what is whole stays when the export is killed, stopped by Ctrl-C or out of disk space, so that
    the same command goes on from there. What a killed one left of a bundle is removed.

    Args:
        out: where the bundle will be.
        policy: the policy's folder, None without one.

    Raises:
        ExportError: nothing can be written beside `out`, or another export to it is running.
    """
    num_bytes = sum(path.stat().st_size for path in policy.glob("*.safetensors")) if policy else 0
    resumable = num_bytes >= RESUMABLE_FROM_BYTES
    work = out.absolute().with_name(f".{out.absolute().name}.export")
    with _owned(work):
        _remove_leftovers(out.absolute())
        shutil.rmtree(work / "trial", ignore_errors=True)
        if not resumable or _is_finished(work):
            _empty(work)
        stays = resumable
        try:
            yield work
            stays = False
        except SegZeroError as error:  # what the same command would meet again
            stays = stays and isinstance(error, DiskFullError)
            raise
        except OSError as error:
            if error.errno not in REFUSES:
                raise
            raise disk_error(error, Path(error.filename or out.absolute())) from error
        finally:
            if not stays:
                shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _owned(work: Path) -> Iterator[None]:
    """Makes the folder and holds the right to it, as far as the file system knows such rights."""
    descriptor = _claimed(work)
    try:
        yield
    finally:
        os.close(descriptor)


def _claimed(work: Path) -> int:
    while True:
        descriptor = _opened(work)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ExportError(
                f"expected to be alone at {work.parent}, but another export is writing the same bundle; wait for "
                "it to end, or choose another --out"
            ) from error
        except OSError:  # a network's file system without locks
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), work.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # another export ended meanwhile, and took the folder with it


def _opened(work: Path) -> int:
    try:
        work.mkdir(parents=True, exist_ok=True)
        return os.open(work, os.O_RDONLY)
    except OSError as error:
        raise ExportError(
            f"expected to write into {work.parent}, got: {error.strerror or error}; choose another --out"
        ) from error


def _remove_leftovers(out: Path) -> None:
    """What a killed export left beside `out`: halves of bundles, and a bundle that it was about to replace."""
    half = re.compile(rf"\.{re.escape(out.name)}\.\w{{8}}\.(tmp|old)")
    for path in [path for path in out.parent.iterdir() if half.fullmatch(path.name)]:
        if path.suffix == ".old" and not out.exists() and (path / MANIFEST_NAME).is_file():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_finished(work: Path) -> bool:
    """Files of a finished bundle have a second name there, and are not to be written to any more."""
    return any(path.is_file() and path.stat().st_nlink > 1 for path in work.rglob("*"))


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
