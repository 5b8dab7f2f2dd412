"""Errors of the disk that an export writes to."""

from __future__ import annotations

import errno
from pathlib import Path

from segzero_rt.errors import ExportError

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSES = (*FULL, errno.EFBIG, errno.EROFS)
"""What only writing meets."""


class DiskFullError(ExportError):
    """No room is left; what is written so far is whole, and the same export goes on from there."""


def disk_error(error: OSError, path: Path) -> ExportError:
    """What to say when a file cannot be written."""
    if error.errno in FULL:
        return DiskFullError(
            f"expected room for {path.name}, but the disk of {path.parent} is full; free some and run the same command "
            "again, it goes on from there"
        )
    return ExportError(f"expected to write {path}, got: {error.strerror or error}")


def readable(num_bytes: float) -> str:
    """A size for people: megabytes, and gigabytes from the first one on."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
