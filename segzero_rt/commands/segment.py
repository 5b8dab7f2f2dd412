"""`segzero segment IMAGE --box …`: the segmenter alone, for a prompt given by hand."""

from __future__ import annotations

import argparse

from segzero_rt.commands.options import add_bundle_options, add_output_options, load_pipeline, numbers
from segzero_rt.commands.output import check_output_path, print_document, print_segmentation, write_picture
from segzero_rt.errors import PromptError

NAME = "segment"
HELP = "mask what a box and points, given by hand, point at"

_EPILOG = """examples:
  segzero segment table.png --box 40,60,120,180 --out mask.png
  segzero segment table.png --box 40,60,120,180 --point 80,110 --point 90,150 --json
  segzero segment table.png --box 40,60,120,180 --box 200,60,260,120

Pixels of the picture, from its upper left corner; write --box=-5,0,20,20 when the first number is negative."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("image", metavar="IMAGE", help="PNG, JPEG, WebP, BMP, TIFF, GIF or PPM")
    parser.add_argument(
        "--box", type=_box, action="append", required=True, metavar="X0,Y0,X1,Y1", help="an object's box; may repeat"
    )
    parser.add_argument(
        "--point", type=_point, action="append", default=[], metavar="X,Y", help="a point on the object; may repeat"
    )
    add_output_options(parser)
    add_bundle_options(parser)


def execute(arguments: argparse.Namespace) -> int:
    from segzero_rt.answer import Prompt
    from segzero_rt.image import load_image

    if len(arguments.box) > 1 and arguments.point:
        raise PromptError(f"expected points with one box only, got {len(arguments.box)} boxes; ask for one at a time")
    prompts = [Prompt(box_xyxy=box, points_xy=tuple(arguments.point)) for box in arguments.box]
    check_output_path(arguments.out, arguments.image)
    image_rgb = load_image(arguments.image)
    segmentation = load_pipeline(arguments).segment(image_rgb, prompts)
    if arguments.out:
        from segzero_rt.overlay import draw_overlay

        write_picture(arguments.out, draw_overlay(image_rgb, segmentation, caption=False))
    if arguments.json:
        print_document(segmentation.to_json())
    else:
        print_segmentation(segmentation, with_thinking=False)
    return 0


def _box(text: str) -> tuple[float, ...]:
    return numbers(text, 4, "a box as x0,y0,x1,y1")


def _point(text: str) -> tuple[float, ...]:
    return numbers(text, 2, "a point as x,y")
