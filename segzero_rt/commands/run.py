"""`segzero run IMAGE "QUESTION"`: the main job."""

from __future__ import annotations

import argparse
import sys

from segzero_rt.answer import Answer, AnswerStatus
from segzero_rt.commands.options import (
    add_bundle_options,
    add_output_options,
    add_policy_options,
    add_resident_option,
    load_any_pipeline,
)
from segzero_rt.commands.output import (
    ThinkingStream,
    check_output_path,
    print_document,
    print_segmentation,
    write_picture,
)

NAME = "run"
HELP = "answer a question about a picture with thinking, boxes and masks"

_EPILOG = """examples:
  segzero run table.png "the red mug" --out overlay.png
  segzero run table.png "something to cut paper with" --json
  segzero run photo.jpg "the largest dog" --bundle seg-zero-7b --format seg_zero"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("image", metavar="IMAGE", help="PNG, JPEG, WebP, BMP, TIFF, GIF or PPM")
    parser.add_argument("question", metavar="QUESTION", help="what to find, in words")
    add_output_options(parser)
    add_policy_options(parser)
    add_bundle_options(parser)
    add_resident_option(parser)


def execute(arguments: argparse.Namespace) -> int:
    from segzero_rt.image import load_image

    check_output_path(arguments.out, arguments.image)
    image_rgb = load_image(arguments.image)
    pipeline = load_any_pipeline(arguments)
    stream = ThinkingStream() if sys.stderr.isatty() and not arguments.json else None
    try:
        segmentation = pipeline(
            image_rgb,
            arguments.question,
            answer_format=arguments.format,
            max_new_tokens=arguments.max_new_tokens,
            on_token=stream,
        )
    except KeyboardInterrupt:
        from segzero_rt.segmentation import Segmentation

        cancelled = Answer(status=AnswerStatus.CANCELLED, text=stream.text if stream else "")
        segmentation = Segmentation.empty(cancelled, (image_rgb.shape[0], image_rgb.shape[1]))
    finally:
        if stream:
            stream.close()
    if arguments.out:
        from segzero_rt.overlay import draw_overlay

        write_picture(arguments.out, draw_overlay(image_rgb, segmentation, arguments.question))
    if arguments.json:
        print_document(segmentation.to_json())
    else:
        print_segmentation(segmentation, with_thinking=stream is None or not sys.stdout.isatty())
    return 0 if segmentation.status in (AnswerStatus.OK, AnswerStatus.NONE_FOUND) else 3
