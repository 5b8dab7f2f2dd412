"""Reasoning segmentation without PyTorch: `SegZero.load(bundle)(image, "question")` gives thinking and masks.

Names are imported on first use, so that `import segzero_rt` costs nothing and pulls in no backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what tools and readers see; at run time `__getattr__` below does the same, one name at a time
    from segzero_rt.answer import Answer as Answer
    from segzero_rt.answer import AnswerStatus as AnswerStatus
    from segzero_rt.answer import Prompt as Prompt
    from segzero_rt.answer_format import FORMATS as FORMATS
    from segzero_rt.answer_format import AnswerFormat as AnswerFormat
    from segzero_rt.answer_parser import parse_answer as parse_answer
    from segzero_rt.bundle import Bundle as Bundle
    from segzero_rt.errors import SegZeroError as SegZeroError
    from segzero_rt.image import load_image as load_image
    from segzero_rt.pipeline import SegZero as SegZero
    from segzero_rt.policy import Policy as Policy
    from segzero_rt.segmentation import Segmentation as Segmentation
    from segzero_rt.segmenter import ImageEncoder as ImageEncoder
    from segzero_rt.segmenter import MaskDecoder as MaskDecoder

__version__ = "0.1.0"

_MODULE_OF = {
    "FORMATS": "answer_format",
    "Answer": "answer",
    "AnswerFormat": "answer_format",
    "AnswerStatus": "answer",
    "Bundle": "bundle",
    "ImageEncoder": "segmenter",
    "MaskDecoder": "segmenter",
    "Policy": "policy",
    "Prompt": "answer",
    "SegZero": "pipeline",
    "SegZeroError": "errors",
    "Segmentation": "segmentation",
    "load_image": "image",
    "parse_answer": "answer_parser",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'segzero_rt' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"segzero_rt.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
