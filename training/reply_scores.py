"""Log-probabilities and entropies of replies under a policy, each prompt and picture read once.

Replies are taken in order of length, a few at a time, so that little is computed on padding.

Shapes: R replies, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .shared_prompt import PADDING, Prompts, SharedPromptPolicy

REPLIES_AT_ONCE = 16
"""Replies of like length that are padded to one."""


def score_replies(
    policy: SharedPromptPolicy,
    prompts: Prompts,
    prompt_of: Sequence[int],
    replies: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scores given replies; gradients flow back into the policy.

    Args:
        prompt_of: number of each reply's prompt, [R].
        replies: tokens of each reply, with the one that ended it; a reply may be empty.
        temperature: logits are divided by it, above 0.

    Returns:
        Log-probabilities of the tokens and entropies (in nats) of what they were drawn from, both float32 [R, T], 0
        behind a reply's end.

    Raises:
        ValueError: not one prompt for each reply, or a temperature that is not above 0.
    """
    if len(prompt_of) != len(replies):
        raise ValueError(f"expected one prompt for each of {len(replies)} replies, got {len(prompt_of)}")
    if not temperature > 0.0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    state = policy.read(prompts)
    longest = max(map(len, replies), default=0)
    order = sorted((row for row in range(len(replies)) if replies[row]), key=lambda row: len(replies[row]))
    logprobs, entropies = [], []
    for start in range(0, len(order), REPLIES_AT_ONCE):
        rows = order[start : start + REPLIES_AT_ONCE]
        tokens, real = _padded([replies[row] for row in rows], policy.device)
        here = state.select(torch.tensor([prompt_of[row] for row in rows], device=policy.device))
        hidden = here.hidden[:, None]
        if tokens.shape[1] > 1:  # the last token of a reply predicts nothing that counts
            hidden = torch.cat([hidden, policy.reply(here, tokens[:, None, :-1])[:, 0]], 1)
        scores = torch.log_softmax(policy.logits(hidden) / temperature, -1)
        fill = (0, longest - tokens.shape[1])
        chosen = scores.gather(-1, tokens[..., None])[..., 0]
        entropy = -(scores.exp() * scores).sum(-1)
        logprobs.append(torch.nn.functional.pad(chosen.masked_fill(~real, 0.0), fill))
        entropies.append(torch.nn.functional.pad(entropy.masked_fill(~real, 0.0), fill))
    return _in_order(logprobs, order, len(replies), longest, policy), _in_order(
        entropies, order, len(replies), longest, policy
    )


def _padded(replies: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [R, T] and bool [R, T], False on padding at the right."""
    lengths = torch.tensor([len(reply) for reply in replies])
    tokens = torch.full((len(replies), int(lengths.max())), PADDING)
    for row, reply in enumerate(replies):
        tokens[row, : len(reply)] = torch.tensor(reply)
    return tokens.to(device), (torch.arange(tokens.shape[1]) < lengths[:, None]).to(device)


def _in_order(
    parts: list[Tensor], order: Sequence[int], count: int, longest: int, policy: SharedPromptPolicy
) -> Tensor:
    """Rows back in their places; empty replies have zeros."""
    whole = torch.zeros(count, longest, device=policy.device)
    return whole.index_copy(0, torch.tensor(order, device=policy.device), torch.cat(parts)) if parts else whole
