"""Which graphs a segmenter becomes: their specs with every width a number, and their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from segzero_rt.graph_spec import GraphSpec
from segzero_rt.graph_spec_segmenter import image_encoder_spec, mask_decoder_spec, mask_prompt_spec

if TYPE_CHECKING:
    from transformers import Sam2Model


class SegmenterSpecs(NamedTuple):
    """Of a checkpoint's graphs."""

    encoder: GraphSpec
    decoder: GraphSpec
    mask_prompt: GraphSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterFiles:
    """Where the graphs are."""

    encoder: Path
    decoder: Path
    mask_prompt: Path | None = None
    """None where the checkpoint never learnt to take masks in."""


def segmenter_specs(model: Sam2Model) -> SegmenterSpecs:
    """Specs of a checkpoint's graphs."""
    side, hidden_size = int(model.prompt_encoder.input_image_size), int(model.mask_decoder.hidden_size)
    mask_size_hw = (side // 4, side // 4)
    return SegmenterSpecs(
        encoder=image_encoder_spec(input_size_hw=(side, side), mask_size_hw=mask_size_hw, hidden_size=hidden_size),
        decoder=mask_decoder_spec(mask_size_hw=mask_size_hw, hidden_size=hidden_size),
        mask_prompt=mask_prompt_spec(mask_size_hw, hidden_size),
    )
