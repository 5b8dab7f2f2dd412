"""Options that several commands share, with one spelling and one help text."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from segzero_rt.answer_format import FORMATS
from segzero_rt.errors import BackendError

if TYPE_CHECKING:  # the pipeline pulls in numpy and a backend: only when a command runs
    from segzero_rt.pipeline import SegZero
    from segzero_rt.resident.pipeline import ResidentSegZero


def add_bundle_options(parser: argparse.ArgumentParser) -> None:
    """`--bundle`, `--backend`, `--threads`, `--allow-ungated`."""
    parser.add_argument("--bundle", metavar="DIR", help="the bundle to run (default: the embedded `tabletop`)")
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help="cpu, cuda, tensorrt, ...; one that is not there is an error"
    )
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="CPU threads (default: the cores)")
    parser.add_argument(
        "--allow-ungated", action="store_true", help="run engines that were never compared with their reference"
    )


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """`--format`, `--max-new-tokens`, `--draft-tokens`, `--constrained`."""
    parser.add_argument(
        "--format", choices=tuple(FORMATS), help="prompt and answer format (default: the one that the bundle names)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_integer, metavar="N", help="token budget (default: the bundle's)"
    )
    parser.add_argument(
        "--draft-tokens",
        type=draft_tokens,
        metavar="N",
        help="tokens to guess ahead, for speed alone; 0 for none (default: 5 on the CPU)",
    )
    parser.add_argument(
        "--constrained", action="store_true", help="hold replies to the format's grammar, so that each can be read"
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """`--out`, `--json`."""
    parser.add_argument("--out", metavar="PICTURE", help="write an overlay picture here (.png, .jpg or .webp)")
    parser.add_argument("--json", action="store_true", help="print one JSON document (masks as COCO RLE)")


def load_pipeline(arguments: argparse.Namespace) -> SegZero:
    """`SegZero` from the options of `add_bundle_options`."""
    from segzero_rt.pipeline import SegZero

    return SegZero.load(
        arguments.bundle,
        backend=arguments.backend,
        threads=arguments.threads,
        allow_ungated=arguments.allow_ungated,
        draft_tokens=getattr(arguments, "draft_tokens", None),  # `segment` has no policy to ask
        constrained=getattr(arguments, "constrained", False),
    )


def add_resident_option(parser: argparse.ArgumentParser) -> None:
    """`--resident`."""
    parser.add_argument(
        "--resident",
        action="store_true",
        help="on a CUDA device, from the picture to the masks, with one wait of the host (--backend cuda by default)",
    )


def load_any_pipeline(arguments: argparse.Namespace) -> SegZero | ResidentSegZero:
    """`SegZero`, or with `--resident` what answers in its place.

    Raises:
        BackendError: an option that such a pipeline does not take.
    """
    if not arguments.resident:
        return load_pipeline(arguments)
    if arguments.threads is not None or arguments.draft_tokens:
        raise BackendError("expected neither --threads nor --draft-tokens with --resident; leave them out")
    from segzero_rt.resident.load import load_resident

    return load_resident(
        arguments.bundle,
        backend="cuda" if arguments.backend == "auto" else arguments.backend,
        allow_ungated=arguments.allow_ungated,
        constrained=arguments.constrained,
    )


def positive_integer(text: str) -> int:
    """An argparse type."""
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0 and below 10^9, got {text[:40]!r}")
    return value


def draft_tokens(text: str) -> int:
    """An argparse type."""
    from segzero_rt.policy import MAX_DRAFT_TOKENS

    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if not 0 <= value <= MAX_DRAFT_TOKENS:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {MAX_DRAFT_TOKENS}, got {text[:40]!r}")
    return value


def numbers(text: str, count: int, meaning: str) -> tuple[float, ...]:
    """`count` finite numbers with commas between them, for an argparse type."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"expected {meaning}, got {text[:60]!r}")
    return values
