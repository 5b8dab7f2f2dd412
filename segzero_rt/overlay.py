"""Draws a `Segmentation` over its picture: instances, boxes, points, scores, and a caption with question and thinking.

Every measure follows the picture's size, so that 280 pixels and 4K look alike. Small pictures are enlarged first: text
and contours need pixels. Outlines come from a signed distance to the mask, which gives even, anti-aliased lines at any
width.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw

from segzero_rt.answer import AnswerStatus
from segzero_rt.caption import Color, Paragraph, draw_caption, drawable, load_font

if TYPE_CHECKING:  # the drawing needs only its fields
    from segzero_rt.segmentation import Segmentation

MIN_SIDE_PX = 720
"""The longer side of the drawn picture is at least this."""
_MIN_WIDTH_PX = 400  # of the caption, under a picture that is a narrow strip
_PIXEL_ART_SIDE_PX = 64  # below this, enlarging keeps the pixels square: there is nothing to smooth
_PALETTE: tuple[Color, ...] = (
    (0, 200, 255),
    (255, 72, 138),
    (255, 190, 11),
    (120, 224, 70),
    (168, 112, 255),
    (255, 122, 48),
    (0, 214, 170),
    (240, 98, 240),
)
_INK: Color = (16, 18, 24)
_PAPER: Color = (22, 24, 31)
_WHITE: Color = (245, 246, 250)
_GREY: Color = (164, 170, 184)
_WARNING: Color = (255, 190, 11)

_STATUS_NOTES = {
    AnswerStatus.OK: "",
    AnswerStatus.NONE_FOUND: "nothing found",
    AnswerStatus.TRUNCATED: "answer truncated",
    AnswerStatus.MALFORMED: "answer malformed",
    AnswerStatus.CANCELLED: "cancelled",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """The canvas to draw on and how source pixels map to it."""

    canvas_rgb: np.ndarray
    """uint8 [H', W', 3], drawn in place."""
    scale_xy: tuple[float, float]
    unit_px: float
    """Width of a thin line."""

    @property
    def font_px(self) -> int:
        return max(12, round(self.unit_px * 13))

    def to_canvas(self, x: float, y: float) -> tuple[float, float]:
        return x * self.scale_xy[0], y * self.scale_xy[1]


def instance_color(index: int) -> Color:
    """RGB of instance `index`: a fixed palette, then hues spread by the golden ratio."""
    if index < len(_PALETTE):
        return _PALETTE[index]
    red, green, blue = colorsys.hsv_to_rgb((0.11 + index * 0.618034) % 1.0, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_overlay(
    image_rgb: np.ndarray, segmentation: Segmentation, question: str = "", *, caption: bool = True
) -> np.ndarray:
    """Returns a new uint8 [H', W', 3] RGB picture; the input is not changed.

    Args:
        image_rgb: uint8 [H, W, 3], the picture that was segmented, any size from 1x1.
        segmentation: its result; masks must have the picture's size.
        question: shown in the caption.
        caption: whether to add the bar with question, thinking and status below the picture.
    """
    if image_rgb.dtype != np.uint8 or image_rgb.ndim != 3 or image_rgb.shape[2] != 3:
        raise ValueError(f"expected a uint8 [H, W, 3] picture, got {image_rgb.dtype} {image_rgb.shape}")
    if segmentation.masks.shape[1:] != image_rgb.shape[:2]:
        raise ValueError(f"expected masks of size {image_rgb.shape[:2]}, got {segmentation.masks.shape[1:]}")
    frame = _enlarge(image_rgb)
    count = len(segmentation.masks)
    _quieten(frame, segmentation.masks)
    # Largest first, so that small things stay visible where masks overlap.
    for index in sorted(range(count), key=lambda one: -int(np.count_nonzero(segmentation.masks[one]))):
        _draw_mask(frame, segmentation.masks[index], instance_color(index))
    for index in range(len(segmentation.boxes_xyxy)):
        _draw_box(frame, segmentation.boxes_xyxy[index], instance_color(index))
    for index, prompt in enumerate(segmentation.answer.prompts):
        for point in prompt.points_xy:
            _draw_point(frame, frame.to_canvas(*point), instance_color(index))
    picture = Image.fromarray(frame.canvas_rgb)
    _draw_tags(picture, frame, segmentation)
    if note := _STATUS_NOTES[segmentation.answer.status]:
        _draw_note(picture, frame, note)
    return np.array(_add_caption(picture, frame, segmentation, question) if caption else picture)


def _enlarge(image_rgb: np.ndarray) -> _Frame:
    height, width = image_rgb.shape[:2]
    factor = max(1.0, MIN_SIDE_PX / max(height, width))
    new_width, new_height = max(1, round(width * factor)), max(1, round(height * factor))
    canvas = image_rgb.copy()
    if factor > 1.0:
        method = cv2.INTER_NEAREST if max(height, width) < _PIXEL_ART_SIDE_PX else cv2.INTER_CUBIC
        canvas = cv2.resize(canvas, (new_width, new_height), interpolation=method).astype(np.uint8)
    # The geometric mean of the sides: a long strip gets neither hair lines nor beams.
    unit_px = max(1.0, float(np.sqrt(new_width * new_height)) / 640)
    return _Frame(canvas_rgb=canvas, scale_xy=(new_width / width, new_height / height), unit_px=unit_px)


def _quieten(frame: _Frame, masks: np.ndarray) -> None:
    """Takes some light and colour from what was not asked for, so that what was stands out."""
    if not masks.any():
        return
    height, width = frame.canvas_rgb.shape[:2]
    found = cv2.resize(np.asarray(masks.any(axis=0), np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    for top in range(0, height, 256):  # in stripes: floats of a whole 4K picture would take 300 MB
        stripe = frame.canvas_rgb[top : top + 256]
        grey = stripe.mean(axis=2, keepdims=True, dtype=np.float32)
        quiet = (stripe * np.float32(0.65) + grey * np.float32(0.35)) * np.float32(0.78)
        share = found[top : top + 256, :, None]
        stripe[:] = np.rint(stripe * share + quiet * (1 - share)).astype(np.uint8)


def _draw_mask(frame: _Frame, mask: np.ndarray, color: Color) -> None:
    """Translucent fill and an outline of two tones, which reads on light and dark ground alike."""
    if not mask.any():
        return
    line_px = 2.2 * frame.unit_px
    rows, columns = _canvas_window(frame, mask, margin_px=int(np.ceil(line_px * 2 + 3)))
    distance = _signed_distance(frame, mask, rows, columns)
    region = frame.canvas_rgb[rows, columns]
    tint = np.array(color, dtype=np.float32)
    paint = region.astype(np.float32)
    for alpha, tone in (
        (0.40 * np.clip(distance + 0.5, 0, 1), tint),
        (0.45 * np.clip(line_px * 1.1 + 0.5 - np.abs(distance), 0, 1), np.array(_INK, dtype=np.float32)),
        (np.clip(line_px * 0.5 + 0.5 - np.abs(distance), 0, 1), tint),
    ):
        paint += (tone - paint) * alpha[..., None]
    region[:] = np.rint(paint).astype(np.uint8)


def _canvas_window(frame: _Frame, mask: np.ndarray, margin_px: int) -> tuple[slice, slice]:
    """Rows and columns of the canvas that the mask and its outline can touch."""
    height, width = frame.canvas_rgb.shape[:2]
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = frame.to_canvas(float(xs[0]), float(ys[0]))
    right, bottom = frame.to_canvas(float(xs[-1] + 1), float(ys[-1] + 1))
    return (
        slice(max(0, int(top) - margin_px), min(height, int(bottom) + margin_px + 1)),
        slice(max(0, int(left) - margin_px), min(width, int(right) + margin_px + 1)),
    )


def _signed_distance(frame: _Frame, mask: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """float32 window of distances to the mask's edge in canvas pixels, positive inside."""
    scale_x, scale_y = frame.scale_xy
    # Samples the source mask at the window's pixel centres, half a pixel being the usual offset between grids.
    matrix = np.array(
        [
            [1 / scale_x, 0, (columns.start + 0.5) / scale_x - 0.5],
            [0, 1 / scale_y, (rows.start + 0.5) / scale_y - 0.5],
        ]
    )
    size_wh = (columns.stop - columns.start, rows.stop - rows.start)
    soft = cv2.warpAffine(
        mask.astype(np.float32),
        matrix,
        size_wh,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    if scale_x > 1.2:  # enlarged: round the stairs of the source pixels
        rounded = cv2.GaussianBlur(soft, (0, 0), 0.45 * scale_x)
        soft = rounded if (rounded >= 0.5).any() else soft
    inside = (soft >= 0.5).astype(np.uint8)
    if not inside.any():  # thinner than a canvas pixel
        inside = (soft > 0).astype(np.uint8)
    if inside.all():  # the window holds no edge
        return np.full(inside.shape, 1e3, dtype=np.float32)
    to_edge = cv2.distanceTransform(inside, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5)
    # Distances to pixel centres jump from 1 to -1 at the edge, which lies half way.
    return np.asarray(cv2.GaussianBlur(to_edge - 0.5 * np.sign(to_edge), (0, 0), 0.8), dtype=np.float32)


def _draw_box(frame: _Frame, box_xyxy: np.ndarray, color: Color) -> None:
    height, width = frame.canvas_rgb.shape[:2]
    left, top = frame.to_canvas(float(box_xyxy[0]), float(box_xyxy[1]))
    right, bottom = frame.to_canvas(float(box_xyxy[2]), float(box_xyxy[3]))
    left, right = np.clip([left, right], 0, width - 1)
    top, bottom = np.clip([top, bottom], 0, height - 1)
    unit = frame.unit_px
    _strokes(frame, [((left, top), (right, top)), ((right, top), (right, bottom))], color, unit, alpha=0.5)
    _strokes(frame, [((right, bottom), (left, bottom)), ((left, bottom), (left, top))], color, unit, alpha=0.5)
    arm = max(2.0, min(22 * unit, 0.3 * (right - left), 0.3 * (bottom - top)))
    corners = []
    for x, inward_x in ((left, arm), (right, -arm)):
        for y, inward_y in ((top, arm), (bottom, -arm)):
            corners += [((x, y), (x + inward_x, y)), ((x, y), (x, y + inward_y))]
    _strokes(frame, corners, color, 3.2 * unit, alpha=1.0)


Stroke = tuple[tuple[float, float], tuple[float, float]]


def _strokes(frame: _Frame, strokes: list[Stroke], color: Color, width_px: float, alpha: float) -> None:
    """Straight anti-aliased lines; thin ones blend by `alpha`."""
    thickness = max(1, round(width_px))
    for start, end in strokes:
        points = np.array([start, end])
        low = np.maximum(0, np.floor(points.min(axis=0)).astype(int) - thickness - 2)
        high = np.ceil(points.max(axis=0)).astype(int) + thickness + 3
        region = frame.canvas_rgb[low[1] : high[1], low[0] : high[0]]
        layer = np.ascontiguousarray(region)
        _line(layer, points - low, color, thickness)
        region[:] = layer if alpha >= 1 else cv2.addWeighted(layer, alpha, np.ascontiguousarray(region), 1 - alpha, 0)


_SHIFT = 4  # fractional bits of OpenCV's drawing coordinates


def _line(layer: np.ndarray, points: np.ndarray, color: Color, thickness: int) -> None:
    start, end = np.rint(points * (1 << _SHIFT)).astype(int).tolist()
    cv2.line(layer, tuple(start), tuple(end), color, thickness, cv2.LINE_AA, _SHIFT)


def _draw_point(frame: _Frame, center_xy: tuple[float, float], color: Color) -> None:
    height, width = frame.canvas_rgb.shape[:2]
    if not (0 <= center_xy[0] <= width and 0 <= center_xy[1] <= height):
        return  # a policy may point outside; fixed-point coordinates overflow far out
    center = tuple(round(value * (1 << _SHIFT)) for value in center_xy)
    for radius, tone in ((7.2, _INK), (6.0, _WHITE), (4.0, color)):
        radius_fixed = round(radius * frame.unit_px * (1 << _SHIFT))
        cv2.circle(frame.canvas_rgb, center, radius_fixed, tone, cv2.FILLED, cv2.LINE_AA, _SHIFT)


def _draw_tags(picture: Image.Image, frame: _Frame, segmentation: Segmentation) -> None:
    """Number and score of each instance beside its box, without two tags on one spot."""
    draw = ImageDraw.Draw(picture)
    taken: list[tuple[float, float, float, float]] = []
    for index, box in enumerate(segmentation.boxes_xyxy):
        score = float(segmentation.scores[index])
        text = f"{index + 1}   {score:.2f}" if len(segmentation.boxes_xyxy) > 1 else f"{score:.2f}"
        size = _pill_size(frame, text)
        left, top = frame.to_canvas(float(box[0]), float(box[1]))
        place = _free_place(left, top - size[1] - 4 * frame.unit_px, size, picture.size, taken)
        taken.append(place)
        _pill(draw, frame, place, text, fill=instance_color(index), ink=_INK)


def _free_place(
    left: float,
    top: float,
    size_wh: tuple[float, float],
    canvas_wh: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    width, height = size_wh
    left = max(0.0, min(left, canvas_wh[0] - width))
    top = max(0.0, min(top, canvas_wh[1] - height))
    for _ in range(len(taken) + 1):
        place = (left, top, left + width, top + height)
        hit = next((other for other in taken if _overlap(place, other)), None)
        if hit is None or hit[3] + height > canvas_wh[1]:
            break
        top = hit[3] + 1
    return left, top, left + width, top + height


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _pill_size(frame: _Frame, text: str) -> tuple[float, float]:
    return load_font(frame.font_px).getlength(text) + frame.font_px * 1.1, frame.font_px * 1.6


def _pill(
    draw: ImageDraw.ImageDraw,
    frame: _Frame,
    place: tuple[float, float, float, float],
    text: str,
    *,
    fill: Color,
    ink: Color,
) -> None:
    left, top, right, bottom = place
    draw.rounded_rectangle(place, radius=frame.font_px * 0.45, fill=fill)
    center = ((left + right) / 2, (top + bottom) / 2)
    draw.text(center, text, font=load_font(frame.font_px), fill=ink, anchor="mm")


def _draw_note(picture: Image.Image, frame: _Frame, note: str) -> None:
    """The status in the upper left corner, where there is no instance to look at."""
    size = _pill_size(frame, note)
    margin = 8 * frame.unit_px
    place = (margin, margin, margin + size[0], margin + size[1])
    _pill(ImageDraw.Draw(picture), frame, place, note, fill=_WARNING, ink=_INK)


def _add_caption(picture: Image.Image, frame: _Frame, segmentation: Segmentation, question: str) -> Image.Image:
    size_px = max(15, round(frame.unit_px * 16))
    width = max(picture.width, _MIN_WIDTH_PX)
    paragraphs = []
    if drawable(question):
        paragraphs.append(Paragraph(text=question, color=_WHITE, size_px=round(size_px * 1.15), max_lines=3))
    if drawable(segmentation.answer.thinking):
        paragraphs.append(Paragraph(text=segmentation.answer.thinking, color=_GREY, size_px=size_px, max_lines=8))
    if not paragraphs and width == picture.width:
        return picture
    bar = draw_caption(paragraphs, width_px=width, margin_px=size_px, background=_PAPER)
    whole = Image.new("RGB", (width, picture.height + bar.height), _PAPER)
    whole.paste(picture, ((width - picture.width) // 2, 0))
    whole.paste(bar, (0, picture.height))
    return whole
