"""Putting a rough mask into a picture's features, as a module that exports to ONNX.

It holds the checkpoint's own submodules of transformers' `Sam2Model`, whatever its size. Masks as prompts are a graph
of their own, because no policy gives them: the mask decoder (`segmenter_decoder.py`) adds the "no mask" embedding, and
this graph takes it off again.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import Sam2Model


class MaskPromptGraph(nn.Module):
    """Features of B pictures and one mask each -> features that the decoder takes in their place."""

    def __init__(self, model: Sam2Model) -> None:
        super().__init__()
        self.embed = model.prompt_encoder.mask_embed
        self.no_mask = nn.Buffer(model.prompt_encoder.no_mask_embed.weight.detach().reshape(1, -1, 1, 1))

    def forward(self, image_embeddings: Tensor, mask_logits: Tensor) -> Tensor:
        return image_embeddings + (self.embed(mask_logits) - self.no_mask)
