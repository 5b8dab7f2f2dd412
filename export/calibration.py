"""What goes into a policy's products over whole conversations, from its checkpoint in PyTorch, a layer at a time.

A conversation is a picture, a question and the reply: ranges of the reply's tokens are other ones than those of a
prompt. Large checkpoints, which nobody waits for to say replies one token after the other here, are read with prompts
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer_format import FORMATS
from segzero_rt.chat import Chat
from segzero_rt.manifest import PolicyManifest
from segzero_rt.policy import Policy

from .gate_layers import few_windows, graph_products, torch_inputs
from .lazy_weight import Floats
from .policy_checkpoint import PolicyCheckpoint
from .reference import TorchPolicy
from .reference_layers import LayeredReference

if TYPE_CHECKING:
    from segzero_rt.graph import Graph

ROWS_PER_CONVERSATION = 64
"""Kept of each product's input, evenly spread; scales are searched on them."""

Question = tuple[NDArray[np.uint8], str]
"""A picture, [H, W, 3] of any size, and what is asked about it."""


@dataclass(slots=True)
class Held:
    """What one product's input held, over all tokens of all conversations."""

    largest: Floats
    """Magnitude by channel, [channels]."""
    rows: list[Floats] = field(default_factory=list)
    """Some of its rows, [rows, channels] each, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured over all conversations."""

    held: dict[str, Held]
    """By path of a product in the graphs, "vision/blocks.3/down"."""
    largest: dict[str, float]
    """Magnitude that went into or came out of each product, by transformers' name of it."""


def questions_of(pictures: Sequence[NDArray[np.uint8]], questions: Sequence[str]) -> list[Question]:
    """Every question on every picture."""
    return [(picture, question) for picture in pictures for question in questions]


def calibrate(
    checkpoint: PolicyCheckpoint,
    manifest: PolicyManifest,
    *,
    questions: Sequence[Question],
    answer_format: str,
    max_new_tokens: int = 0,
    adapter: Path | None = None,
    keep_rows: bool = False,
) -> Calibration:
    """Watches all products of a policy.

    Args:
        max_new_tokens: of a reply, said by the whole checkpoint in PyTorch; 0 for prompts alone, over a small picture.
        keep_rows: keep rows too.
    """
    host = _host(manifest if max_new_tokens else few_windows(manifest), checkpoint.folder, answer_format)
    speaker = TorchPolicy(checkpoint.folder, host, adapter=adapter) if max_new_tokens else None
    conversations = []
    for picture, question in questions:
        tokens = [*host.prefix_tokens, *host.question_tokens(question)]
        if speaker is not None:
            speaker.set_picture(picture)
            reply = speaker.ask(question, max_new_tokens)[0]
            tokens += takewhile(lambda token: token != manifest.image_token_id, reply)  # there is one picture
        conversations.append((picture, tokens))
    del speaker
    watched = _Watched(keep_rows)
    reference = LayeredReference(checkpoint, watch=watched.see)
    for picture, tokens in conversations:
        reference.logits(torch_inputs(host, picture, tokens), rows=1)
    return Calibration(watched.held, reference.largest)


def _host(manifest: PolicyManifest, folder: Path, answer_format: str) -> Policy:
    """The runtime's host code without graphs: prompts and patches."""
    nothing = cast("Graph", None)
    chat, form = Chat(folder / "tokenizer.json"), FORMATS[answer_format]
    return Policy(
        manifest, chat, vision=nothing, embedding=nothing, decoder=nothing, answer_format=form, draft_tokens=0
    )


class _Watched:
    """Collects what `LayeredReference` sees."""

    def __init__(self, keep_rows: bool) -> None:
        self.held: dict[str, Held] = {}
        self._keep_rows = keep_rows

    def see(self, place: str, x: Any) -> None:
        """One product's input, [..., channels]; `place` is transformers' name of it."""
        rows = x.detach().reshape(-1, x.shape[-1])
        largest = rows.abs().amax(dim=0).numpy()
        kept = rows[:: max(1, len(rows) // ROWS_PER_CONVERSATION)].numpy().copy() if self._keep_rows else None
        for product in graph_products(place):
            one = self.held.setdefault(product, Held(np.zeros_like(largest)))
            one.largest = np.maximum(one.largest, largest)
            if kept is not None and not place.endswith(("k_proj", "v_proj")):  # they read what q_proj reads
                one.rows.append(kept)
