"""What commands print and write: one JSON document, a readable summary, an overlay picture that is whole or absent."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.errors import ImageError

if TYPE_CHECKING:  # annotations only: `--help` must not import numpy
    from segzero_rt.image import ImageRgb
    from segzero_rt.segmentation import Segmentation

_PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LARGEST_SIDE_PX = {"JPEG": 65_500, "WEBP": 16_383}  # asked beforehand: libjpeg writes its complaint to stderr itself


def print_document(document: Mapping[str, Any]) -> None:
    """Prints one JSON document on stdout, on one line."""
    print(json.dumps(document, allow_nan=False))


def printable(text: str) -> str:
    """`text` on one line without control characters: a model may write escape sequences, a terminal would obey them."""
    return "".join(char if char.isprintable() else "�" for char in " ".join(text.split()))


def check_output_path(out: str | None, source: str) -> None:
    """Refuses a path that could not be written, before any work is done.

    Raises:
        ImageError: unknown suffix, no such folder, a folder itself, or the source picture.
    """
    if out is None:
        return
    path = Path(out)
    if path.suffix.lower() not in _PICTURE_FORMATS:
        raise ImageError(f"--out {out}: expected a name that ends in {', '.join(_PICTURE_FORMATS)}")
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise ImageError(f"--out {out}: expected a file in a folder that exists")
        if path.exists() and os.path.exists(source) and path.samefile(source):  # noqa: PTH110 - False for any bad name
            raise ImageError(f"--out {out}: this is the picture itself; choose another name")
    except OSError as error:
        raise ImageError(f"--out {out[:200]}: cannot be written: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise ImageError(f"--out {out}: its folder cannot be written to")


def write_picture(out: str, image_rgb: ImageRgb) -> None:
    """Writes a picture under a temporary name and renames it: readers see a whole picture or none.

    Raises:
        ImageError: too large for the format, or the disk or the folder refuses.
    """
    from PIL import Image

    path = Path(out)
    chosen = _PICTURE_FORMATS[path.suffix.lower()]
    height, width = image_rgb.shape[:2]
    if max(height, width) > _LARGEST_SIDE_PX.get(chosen, max(height, width)):
        raise ImageError(
            f"--out {out}: {chosen} holds at most {_LARGEST_SIDE_PX[chosen]} pixels a side, got {width}x{height}; "
            "write a .png"
        )
    encoded = io.BytesIO()
    Image.fromarray(image_rgb).save(encoded, chosen)
    try:
        # A fixed short prefix: the file's own name may be as long as a name can be.
        handle, temporary = tempfile.mkstemp(prefix=".segzero-", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise ImageError(f"--out {out}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(encoded.getbuffer())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)  # noqa: PTH105 - says that an existing file is replaced, which Path.replace hides
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise ImageError(f"--out {out}: cannot be written: {error.strerror}") from error


def print_segmentation(segmentation: Segmentation, *, with_thinking: bool) -> None:
    """The readable summary of a result, one fact a line."""
    rows = [("status", segmentation.status.value)]
    if with_thinking and segmentation.thinking:
        rows.append(("thinking", printable(segmentation.thinking)))
    for index, prompt in enumerate(segmentation.answer.prompts):
        box = ",".join(f"{value:g}" for value in segmentation.boxes_xyxy[index])
        points = " ".join(f"{x:g},{y:g}" for x, y in prompt.points_xy) or "none"
        area = int(segmentation.masks[index].sum())
        score = segmentation.scores[index]
        rows.append((f"object {index + 1}", f"box {box}  points {points}  score {score:.2f}  area {area} px"))
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in segmentation.timings_ms.items())
    rows.append(("timings", f"{stages} (ms)"))
    print("\n".join(f"{name:<9} {value}" for name, value in rows))


class ThinkingStream:
    """Shows the thinking on stderr while it is being written; the tags and the answer's JSON are left out."""

    def __init__(self, open_tag: str = "<think>", close_tag: str = "</think>") -> None:
        self.text = ""
        """Everything that the policy has written so far."""
        self._tags = (open_tag, close_tag)
        self._shown = 0

    def __call__(self, piece: str) -> None:
        """Takes the next piece of text."""
        self.text += piece
        open_tag, close_tag = self._tags
        start = self.text.find(open_tag)
        if start < 0:
            return
        thinking, _, rest = self.text[start + len(open_tag) :].partition(close_tag)
        # A tag may arrive in pieces: what could be its beginning waits.
        end = len(thinking) if rest else thinking.rfind("<") if "<" in thinking[-len(close_tag) :] else len(thinking)
        if end > self._shown:
            sys.stderr.write("".join(c if c.isprintable() or c == "\n" else "�" for c in thinking[self._shown : end]))
            sys.stderr.flush()
            self._shown = end

    def close(self) -> None:
        """Ends the line."""
        if self._shown:
            print(file=sys.stderr)
