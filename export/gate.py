"""Compares exported policy graphs with PyTorch in float32, and refuses the export when they differ too much.

Per graph: features of the vision tower, and logits of the decoder with PyTorch's own reply forced upon both. Then end
to end: the tokens that both choose by themselves. Where storing changed no weight, those must be the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.errors import ExportError
from segzero_rt.graph import Graph
from segzero_rt.kv_cache import KVCache
from segzero_rt.policy import Policy

from .reference import TorchPolicy

QUESTIONS = ("the red cup", "what would you use to cut paper?", "everything that is left of the largest object")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateLimits:
    """What an export must reach."""

    max_vision_error: float = 1e-4
    """`|graph - reference| / |reference|` of one picture's features."""
    max_decoder_error: float = 1e-4
    """The same of what goes from layer to layer of the decoder, and of its logits, where that is compared."""
    max_kl: float = 1e-6
    """Largest Kullback-Leibler divergence of one place of a reply, in nats."""
    max_kl_mean: float = 1e-6
    """Its mean over all places."""
    min_top1: float = 1.0
    """Share of places where both prefer the same token."""
    same_tokens: bool = True
    """Replies must be equal to the last token."""


EXACT = GateLimits()
"""For weights that are stored without loss."""
ROUNDED = GateLimits(
    max_vision_error=2e-2, max_decoder_error=2e-2, max_kl=2e-2, max_kl_mean=2e-3, min_top1=0.98, same_tokens=False
)
"""For weights that storing rounds to 16 bits."""
QUANTIZED = GateLimits(
    max_vision_error=0.1, max_decoder_error=0.2, max_kl=5.0, max_kl_mean=0.03, min_top1=0.9, same_tokens=False
)
"""For 8 bits: catches faults. What quantisation costs is for an evaluation with labelled questions to say. A place
where a trained policy is of two minds can differ by a nat and mean nothing, so it is the mean that must stay small."""


COARSE = replace(ROUNDED, max_vision_error=0.1, max_decoder_error=0.1, max_kl=0.5, max_kl_mean=0.03, min_top1=0.9)
"""For weights that storing rounds to bfloat16, which has 8 bits; those of a bfloat16 checkpoint stay as they are."""
FOUR_BITS = replace(QUANTIZED, max_decoder_error=0.9, max_kl=20.0, max_kl_mean=0.5, min_top1=0.5)
"""For 4 bits: a fault leaves no agreement at all, and an error of about 1.4, as between any two directions."""


def default_limits(storage: str, *, lossless: bool, computed: str = "float32") -> GateLimits:
    """Limits for weights stored and products computed like that; `lossless` when storing changed no weight."""
    by_storage = {"int8": QUANTIZED, "fp8": QUANTIZED, "int4": FOUR_BITS, "nvfp4": FOUR_BITS}
    if storage in by_storage:
        return by_storage[storage]
    if lossless:
        return EXACT if computed == "float32" else ROUNDED
    return COARSE if storage == "bfloat16" else ROUNDED


def gate_policy(
    hf_folder: Path,
    policy: Policy,
    *,
    pictures: Sequence[NDArray[np.uint8]],
    questions: Sequence[str] = QUESTIONS,
    limits: GateLimits = EXACT,
    max_new_tokens: int = 64,
    adapter: Path | None = None,
    towers: Sequence[Graph] = (),
) -> dict[str, Any]:
    """Measures a policy against its checkpoint in PyTorch, every question on every picture. PEFT merges an adapter.

    Args:
        towers: other builds of the vision graph, whose features are held to the same limit.

    Returns:
        figures for the manifest: `vision_error`, `kl_mean`, `kl_max`, `top1`, `max_abs_logit`, `same_tokens` (share of
        equal replies), how many were tried, and the limits.

    Raises:
        ExportError: a figure is beyond its limit.
    """
    if not pictures or not questions:
        raise ExportError(f"expected pictures and questions for the gate, got {len(pictures)} and {len(questions)}")
    reference = TorchPolicy(hf_folder, policy, adapter=adapter)
    vision_errors: list[float] = []
    places: list[Places] = []
    equal = 0
    for picture in pictures:
        view = policy.look(picture)
        features = reference.look(picture)
        vision_errors.append(relative_error(policy.features(picture), features))
        for tower in towers:
            twin = copy.copy(policy)
            twin.vision = tower
            vision_errors.append(relative_error(twin.features(picture), features))
        for question in questions:
            reply, logits = reference.ask(question, max_new_tokens)
            places.append(compare_logits(_forced_logits(policy, view.cache, question, reply), logits))
            generation = policy.ask(view, question, max_new_tokens=max_new_tokens)
            equal += list(generation.token_ids) == [t for t in reply if t not in policy.manifest.eos_token_ids]
    record = {
        "pictures": len(pictures),
        "questions": len(places),
        "vision_error": float(np.max(vision_errors)),
        "kl_mean": float(np.mean([place.kl.mean() for place in places])),
        "kl_max": float(np.max([place.kl.max() for place in places])),
        "top1": float(np.mean(np.concatenate([place.agree for place in places]))),
        "max_abs_logit": float(np.max([place.max_abs for place in places])),
        "same_tokens": equal / len(places),
        "limits": asdict(limits),
    }
    _check(record, limits)
    return record


def plain_pictures(count: int = 2, size_hw: tuple[int, int] = (240, 320)) -> list[NDArray[np.uint8]]:
    """Pictures of coloured patches with some noise, for an export without pictures of its own."""
    pictures = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        patches = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((size_hw[0] // 4, size_hw[1] // 4, 1)))
        pictures.append(np.clip(patches + rng.normal(0, 8, patches.shape), 0, 255).astype(np.uint8))
    return pictures


@dataclass(frozen=True, slots=True)
class Places:
    """Comparison at each place of one reply."""

    kl: NDArray[np.float64]
    agree: NDArray[np.bool_]
    max_abs: float


def _forced_logits(policy: Policy, cache: KVCache, question: str, reply: list[int]) -> NDArray[np.float32]:
    """The graphs' logits at each place of `reply`, in one run."""
    prompt = policy.question_tokens(question)
    cache.truncate(len(policy.prefix_tokens))
    rows = np.arange(len(prompt) - 1, len(prompt) + len(reply) - 1, dtype=np.int64)[None]
    return cache.extend(policy.embed([*prompt, *reply[:-1]]), rows)[0]


def compare_logits(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> Places:
    """Compares logits [places, vocab] place by place."""
    got, want = _log_softmax(logits), _log_softmax(reference)
    return Places(
        kl=np.maximum((np.exp(want) * (want - got)).sum(axis=-1), 0.0),
        agree=logits.argmax(axis=-1) == reference.argmax(axis=-1),
        max_abs=float(np.abs(logits - reference).max()),
    )


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def relative_error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """`|got - want| / |want|`, over all numbers."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _check(record: dict[str, Any], limits: GateLimits) -> None:
    """Comparisons are written so that a NaN fails; the record keeps NaNs, since np.max does and max() may not."""
    failures = [
        f"{name} {record[name]:.3g} (limit {limit:.3g})"
        for name, limit, passed in (
            ("vision_error", limits.max_vision_error, record["vision_error"] <= limits.max_vision_error),
            ("kl_max", limits.max_kl, record["kl_max"] <= limits.max_kl),
            ("kl_mean", limits.max_kl_mean, record["kl_mean"] <= limits.max_kl_mean),
            ("top1", limits.min_top1, record["top1"] >= limits.min_top1),
            ("same_tokens", 1.0, record["same_tokens"] == 1.0 or not limits.same_tokens),
        )
        if not passed
    ]
    if failures:
        raise ExportError(
            f"the policy's graphs differ from PyTorch: {', '.join(failures)}; nothing was kept. Export with float32 "
            "storage to tell rounding from a fault"
        )
