"""Text for overlay pictures: Pillow's own scalable font, wrapped, with what the font cannot draw replaced.

OpenCV's Hershey strokes look rough and know ASCII only; fonts of the system differ from machine to machine. Pillow has
carried a small outline font since 10.1, so pictures come out the same everywhere.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
_MISSING = "?"
_ELLIPSIS = "..."
_INVISIBLE = ("Cc", "Cf", "Cs", "Mn", "Me")  # controls, direction marks, surrogates, accents that stand alone
_MAX_CHARS = 4000  # nobody reads more in a caption, and wrapping stays fast for a 10,000-character question


@lru_cache(maxsize=16)
def load_font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font at a pixel size."""
    return ImageFont.load_default(size=size_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paragraph:
    """One piece of caption text."""

    text: str
    color: Color
    size_px: int
    max_lines: int


def drawable(text: str) -> str:
    """One line of text that the font can draw: white space collapsed, controls dropped, other signs brought near.

    The font has little beyond ASCII, so accents go and what has no plain form becomes a question mark.
    """
    return "".join(sign if _has_glyph(sign) else _plain(sign) for sign in " ".join(text[:_MAX_CHARS].split()))


def _plain(sign: str) -> str:
    category = unicodedata.category(sign)
    if category in _INVISIBLE:
        return ""
    if category == "Pd":
        return "-"
    parts = unicodedata.normalize("NFKD", sign.casefold() if len(sign.casefold()) > 1 else sign)
    return "".join(part for part in parts if _has_glyph(part)) or _MISSING


@lru_cache(maxsize=4096)
def _has_glyph(sign: str) -> bool:
    if " " <= sign <= "~":
        return True
    font = load_font(16)
    if not isinstance(font, ImageFont.FreeTypeFont) or unicodedata.category(sign) in _INVISIBLE:
        return False
    # A sign without glyph is drawn as the font's `.notdef`, which is also what an unassigned code point gets.
    return bytes(font.getmask(sign)) != bytes(font.getmask("\U0010ffff"))


def wrap(text: str, *, size_px: int, width_px: int, max_lines: int) -> list[str]:
    """Lines of at most `width_px`; words longer than a line are cut, and what exceeds `max_lines` ends in dots."""
    font = load_font(size_px)
    lines: list[str] = []
    line = ""
    for word in drawable(text).split(" "):
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width_px:
            line = candidate
            continue
        if line:
            lines.append(line)
        pieces = _cut(word, size_px, width_px)
        lines.extend(pieces[:-1])
        line = pieces[-1]
        if len(lines) > max_lines:
            break
    lines.append(line)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + _ELLIPSIS) > width_px:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + _ELLIPSIS
    return [line for line in lines if line]


def _cut(word: str, size_px: int, width_px: int) -> list[str]:
    font = load_font(size_px)
    pieces = [""]
    for sign in word:
        if pieces[-1] and font.getlength(pieces[-1] + sign) > width_px:
            pieces.append("")
        pieces[-1] += sign
    return pieces


def draw_caption(paragraphs: list[Paragraph], *, width_px: int, margin_px: int, background: Color) -> Image.Image:
    """A bar of `width_px` that is as high as its text needs."""
    inner = max(1, width_px - 2 * margin_px)
    blocks = []
    for one in paragraphs:
        if lines := wrap(one.text, size_px=one.size_px, width_px=inner, max_lines=one.max_lines):
            blocks.append((one, lines))
    height = 2 * margin_px + sum(_line_px(one) * len(lines) for one, lines in blocks)
    height += _gap_px(margin_px) * max(0, len(blocks) - 1)
    bar = Image.new("RGB", (width_px, height), background)
    draw = ImageDraw.Draw(bar)
    top = margin_px
    for one, lines in blocks:
        for line in lines:
            # "ls": left end, on the base line, so that lines stand evenly whatever their letters.
            draw.text((margin_px, top + one.size_px), line, font=load_font(one.size_px), fill=one.color, anchor="ls")
            top += _line_px(one)
        top += _gap_px(margin_px)
    return bar


def _line_px(paragraph: Paragraph) -> int:
    return round(paragraph.size_px * 1.35)


def _gap_px(margin_px: int) -> int:
    return max(1, margin_px // 3)
