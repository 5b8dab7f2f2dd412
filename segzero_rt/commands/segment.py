"""`segzero segment IMAGE --box …`: the segmenter alone, for a prompt given by hand."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from segzero_rt.commands.options import add_bundle_options, add_output_options, load_pipeline, numbers
from segzero_rt.commands.output import check_output_path, print_document, print_segmentation, write_picture
from segzero_rt.errors import PromptError

if TYPE_CHECKING:  # `--help` must not import numpy
    import numpy as np
    from numpy.typing import NDArray

NAME = "segment"
HELP = "mask what a box, points or a rough mask, given by hand, point at"

_EPILOG = """examples:
  segzero segment table.png --box 40,60,120,180 --out mask.png
  segzero segment table.png --box 40,60,120,180 --point 80,110 --outside 45,65 --json
  segzero segment table.png --box 40,60,120,180 --box 200,60,260,120
  segzero segment table.png --point 80,110 --single-mask
  segzero segment table.png --box 40,60,120,180 --mask rough.png

Pixels of the picture, from its upper left corner; write --box=-5,0,20,20 when the first number is negative."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("image", metavar="IMAGE", help="PNG, JPEG, WebP, BMP, TIFF, GIF or PPM")
    parser.add_argument(
        "--box", type=_box, action="append", default=[], metavar="X0,Y0,X1,Y1", help="an object's box; may repeat"
    )
    parser.add_argument(
        "--point", type=_point, action="append", default=[], metavar="X,Y", help="a point on the object; may repeat"
    )
    parser.add_argument(
        "--outside", type=_point, action="append", default=[], metavar="X,Y", help="a point off the object; may repeat"
    )
    parser.add_argument(
        "--mask", metavar="PICTURE", help="a rough mask to go from, as large as IMAGE: what is not black is the object"
    )
    parser.add_argument(
        "--single-mask",
        action="store_true",
        help="the one mask for a clear prompt, unless it is unstable (default: the best of three readings)",
    )
    add_output_options(parser)
    add_bundle_options(parser)


def execute(arguments: argparse.Namespace) -> int:
    from segzero_rt.image import load_image
    from segzero_rt.segmenter_prompt import SegmenterPrompt, logits_of_mask

    points, outside = tuple(arguments.point), tuple(arguments.outside)
    if not (arguments.box or points or outside or arguments.mask):
        raise PromptError("expected --box, --point, --outside or --mask, got none; say what to segment")
    if len(arguments.box) > 1 and (points or outside or arguments.mask):
        raise PromptError(
            f"expected points and a mask with one box only, got {len(arguments.box)} boxes; ask for one at a time"
        )
    if not arguments.mask:  # a prompt that is none shows before anything is loaded
        boxes = arguments.box or [None]
        prompts = [SegmenterPrompt(box_xyxy=box, points_xy=points, outside_xy=outside) for box in boxes]
    check_output_path(arguments.out, arguments.image)
    image_rgb = load_image(arguments.image)
    mask = _mask(arguments.mask, image_rgb.shape[:2]) if arguments.mask else None
    pipeline = load_pipeline(arguments)
    if mask is not None:
        logits = logits_of_mask(mask, pipeline.decoder.manifest.mask_size_hw)
        box = arguments.box[0] if arguments.box else None
        prompts = [SegmenterPrompt(box_xyxy=box, points_xy=points, outside_xy=outside, mask_logits=logits)]
    segmentation = pipeline.segment(image_rgb, prompts, multimask=not arguments.single_mask)
    if arguments.out:
        from segzero_rt.overlay import draw_overlay

        write_picture(arguments.out, draw_overlay(image_rgb, segmentation, caption=False))
    if arguments.json:
        print_document(segmentation.to_json())
    else:
        print_segmentation(segmentation, with_thinking=False)
    return 0


def _mask(path: str, size_hw: tuple[int, ...]) -> NDArray[np.bool_]:
    """A mask's picture, bool [H, W]."""
    import numpy as np

    from segzero_rt.image import load_image

    picture = load_image(path)
    if picture.shape[:2] != size_hw:
        height, width = size_hw
        raise PromptError(
            f"--mask {path}: expected a picture of {width}x{height}, as large as IMAGE, "
            f"got {picture.shape[1]}x{picture.shape[0]}"
        )
    return np.asarray(picture.any(axis=2), np.bool_)


def _box(text: str) -> tuple[float, ...]:
    return numbers(text, 4, "a box as x0,y0,x1,y1")


def _point(text: str) -> tuple[float, ...]:
    return numbers(text, 2, "a point as x,y")
