"""What commands print and write: one JSON document, a readable summary, an overlay picture that is whole or absent."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.commands.output_files import check_output_file, write_bytes
from segzero_rt.errors import OutputError

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
    """Refuses a picture's path that could not be written, before any work is done.

    Raises:
        OutputError: unknown suffix, no such folder, a folder itself, or the source picture.
    """
    check_output_file(out, _PICTURE_FORMATS, source=source)


def write_picture(out: str, image_rgb: ImageRgb) -> None:
    """Writes a picture, in the format that its name ends in.

    Raises:
        OutputError: too large for the format, or the disk or the folder refuses.
    """
    from PIL import Image

    chosen = _PICTURE_FORMATS[Path(out).suffix.lower()]
    height, width = image_rgb.shape[:2]
    if max(height, width) > _LARGEST_SIDE_PX.get(chosen, max(height, width)):
        raise OutputError(
            f"{out}: {chosen} holds at most {_LARGEST_SIDE_PX[chosen]} pixels a side, got {width}x{height}; "
            "write a .png"
        )
    encoded = io.BytesIO()
    Image.fromarray(image_rgb).save(encoded, chosen)
    write_bytes(out, encoded.getbuffer())


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
