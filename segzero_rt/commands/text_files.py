"""Text files that commands write: checked before any work is done, whole or absent afterwards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from segzero_rt.errors import SegZeroError


class OutputError(SegZeroError):
    """A file cannot be written where it was asked for."""


def check_output_file(out: str | None, suffixes: Sequence[str]) -> None:
    """Refuses a name that could not be written.

    Raises:
        OutputError: another suffix than `suffixes`, no such folder, a folder itself, or no right to write there.
    """
    if out is None:
        return
    path = Path(out)
    if path.suffix not in suffixes:
        raise OutputError(f"{out}: expected a name that ends in {' or '.join(suffixes)}")
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise OutputError(f"{out}: expected a file in a folder that exists")
    except OSError as error:
        raise OutputError(f"{out[:200]}: cannot be written: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{out}: its folder cannot be written to")


def write_text(out: str | Path, text: str) -> None:
    """Writes UTF-8 under a temporary name and renames it over `out`.

    Raises:
        OutputError: the disk or the folder refuses.
    """
    path = Path(out)
    # A model may write half a surrogate pair; a report of that must not fail at its last step.
    data = text.encode("utf-8", errors="backslashreplace")
    try:
        handle, temporary = tempfile.mkstemp(prefix=".segzero-", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(temporary).chmod(0o644)  # mkstemp's files are private to their owner
        os.replace(temporary, path)  # noqa: PTH105 - says that an existing file is replaced, which Path.replace hides
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
