"""Files that commands write: checked before any work is done, whole or absent afterwards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from segzero_rt.errors import OutputError


def check_output_file(out: str | None, suffixes: Collection[str], *, source: str | None = None) -> None:
    """Refuses a name that could not be written.

    Args:
        out: as it was given; None is always right.
        suffixes: lower case; the name may be in upper case.
        source: a file that must not be overwritten.

    Raises:
        OutputError: another suffix, no such folder, a folder itself, no right to write there, or the source.
    """
    if out is None:
        return
    path, shown = Path(out), out[:200] or "''"
    if path.suffix.lower() not in suffixes:
        raise OutputError(f"{shown}: expected a name that ends in {', '.join(suffixes)}")
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise OutputError(f"{shown}: expected a file in a folder that exists")
        taken = path.exists()
        if taken and source is not None and os.path.exists(source) and path.samefile(source):  # noqa: PTH110 - False for any bad name
            raise OutputError(f"{shown}: this is the picture itself; choose another name")
        if taken and not path.is_file():  # a device or a pipe would be replaced by a plain file
            raise OutputError(f"{shown}: expected a plain file or a new name")
    except OSError as error:
        raise OutputError(f"{shown}: cannot be written: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{shown}: its folder cannot be written to")


def write_text(out: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8.

    Raises:
        OutputError: the disk or the folder refuses.
    """
    # A model may write half a surrogate pair; a report of that must not fail at its last step.
    write_bytes(out, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(out: str | Path, data: bytes | memoryview) -> None:
    """Writes under a temporary name and renames it over `out`: readers see a whole file or none.

    Raises:
        OutputError: the disk or the folder refuses.
    """
    path = Path(out)
    temporary = None
    try:
        # A fixed short prefix: the file's own name may be as long as a name can be.
        handle, temporary = tempfile.mkstemp(prefix=".segzero-", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(temporary).chmod(0o644)  # mkstemp's files are private to their owner
        os.replace(temporary, path)  # noqa: PTH105 - says that an existing file is replaced, which Path.replace hides
        temporary = None
    except OSError as error:
        raise OutputError(f"{str(out)[:200]}: cannot be written: {error.strerror}") from error
    finally:
        if temporary is not None:  # an interrupt ends here, too
            Path(temporary).unlink(missing_ok=True)
