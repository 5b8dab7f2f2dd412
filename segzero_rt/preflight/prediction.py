"""Whether a bundle would fit a Jetson, and how fast it could be there at best. Predictions; nothing here was measured.

Fit: the memory plan, with weights as they are stored, against the module's memory less a reserve. Latency: a roofline,
the larger of "all bytes at the memory's full bandwidth" and "all products at the tensor cores' full dense 16-bit rate".
A real engine is slower than its roofline; one whose graphs compute in float32 is several times slower.

Module figures: NVIDIA's module comparison (https://developer.nvidia.com/embedded/jetson-modules) for memory, bandwidth,
tensor cores and clocks; Thor: https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-thor/. NVIDIA
gives sparse 8-bit rates on Orin (67 to 170 TOPS on the GPU) and sparse 4-bit ones on Thor; a dense 16-bit rate is a
quarter of the former and an eighth of the latter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from segzero_rt.bundle import Bundle
from segzero_rt.manifest import PolicyManifest
from segzero_rt.onnx_summary import OnnxSummary, read_summary
from segzero_rt.preflight.memory_plan import (
    QUESTION_TOKENS,
    MemoryPlan,
    kv_cache_bytes,
    picture_tokens,
    plan_memory,
    vision_width,
)
from segzero_rt.preflight.type_needs import type_needs

RESERVE_BYTES = 1536 << 20
"""Assumed for the system, CUDA's context and TensorRT's libraries."""
REPLY_TOKENS = 128
"""Tokens of the reply that the prediction counts: a short thought and one object."""
_STAGE_RATIO = 4
"""Hiera halves each side of its grid from stage to stage, and doubles its width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """One Jetson module, in its fastest power mode."""

    name: str
    memory_bytes: int
    bandwidth: float
    """Bytes a second."""
    dense_flops: float
    """Of the GPU's tensor cores at 16 bits, without sparsity."""
    capability: str


def _module(name: str, gigabytes: int, gb_per_s: float, tflops: float, capability: str = "8.7") -> Module:
    return Module(
        name=name,
        memory_bytes=gigabytes << 30,
        bandwidth=gb_per_s * 1e9,
        dense_flops=tflops * 1e12,
        capability=capability,
    )


MODULES = (
    _module("Orin Nano 4GB", 4, 51, 8.5),
    _module("Orin Nano 8GB", 8, 102, 16.8),
    _module("Orin NX 8GB", 8, 102, 16.8),
    _module("Orin NX 16GB", 16, 102, 19.2),
    _module("AGX Orin 32GB", 32, 204.8, 26.6),
    _module("AGX Orin 64GB", 64, 204.8, 42.5),
    _module("Thor T4000", 64, 273, 150, "11.0"),
    _module("Thor T5000", 128, 273, 259, "11.0"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one stage of a question has to do at least."""

    num_bytes: float
    """Weights and cache that are read."""
    flops: float

    def seconds(self, module: Module) -> float:
        return max(self.num_bytes / module.bandwidth, self.flops / module.dense_flops)


def question_work(bundle: Bundle) -> dict[str, Work]:
    """Stage to its work: "vision", "prefill", "token" (one of the reply), "mask_encode".

    Raises:
        GraphError: a graph cannot be read.
    """
    policy = bundle.manifest.policy
    vision = read_summary(bundle.file(policy.graphs.vision))
    decoder = read_summary(bundle.file(policy.graphs.decoder))
    encoder = read_summary(bundle.file(bundle.manifest.segmenter.graphs.encoder))
    tokens = picture_tokens(policy) + QUESTION_TOKENS
    cache = kv_cache_bytes(policy) * min(1.0, tokens / policy.max_length)
    per_token = 2.0 * _matrix_elements(decoder)
    attention = 4.0 * policy.num_layers * policy.num_heads * policy.head_dim * tokens
    return {
        "vision": Work(num_bytes=vision.weight_bytes, flops=_vision_flops(policy, vision)),
        "prefill": Work(num_bytes=decoder.weight_bytes, flops=tokens * (per_token + attention / 2)),
        "token": Work(num_bytes=decoder.weight_bytes + cache, flops=per_token + attention),
        "mask_encode": Work(num_bytes=encoder.weight_bytes, flops=_encoder_flops(bundle, encoder)),
    }


def predict(bundle: Bundle, modules: tuple[Module, ...] = MODULES) -> list[dict[str, Any]]:
    """For each module: whether the bundle fits its memory and its number types, and milliseconds per stage at best.

    Raises:
        GraphError: a graph cannot be read.
    """
    needed = _engine_bytes(bundle, plan_memory(bundle))
    work, needs = question_work(bundle), type_needs(bundle)
    rows = []
    for module in modules:
        missing = [need.dtype for need in needs if not need.met_by(module.capability)]
        stages = {name: round(1e3 * stage.seconds(module), 2) for name, stage in work.items()}
        policy_ms = stages["vision"] + stages["prefill"] + REPLY_TOKENS * stages["token"]
        rows.append(
            {
                "module": module.name,
                "compute_capability": module.capability,
                "memory_bytes": module.memory_bytes,
                "needed_bytes": needed,
                "missing_types": missing,
                "fits": not missing and needed + RESERVE_BYTES <= module.memory_bytes,
                "stages_ms": stages,
                "question_ms": round(max(policy_ms, stages["mask_encode"]), 1),
            }
        )
    return rows


def _engine_bytes(bundle: Bundle, plan: MemoryPlan) -> int:
    """Weights as they are stored, with cache and working memory; libraries are in the reserve."""
    policy, segmenter = bundle.manifest.policy.graphs, bundle.manifest.segmenter.graphs
    graphs = (policy.vision, policy.embedding, policy.decoder, segmenter.encoder, segmenter.decoder)
    weights = sum(read_summary(bundle.file(name)).weight_bytes for name in graphs)
    return weights + plan.kv_cache_bytes + plan.segmenter_bytes + plan.workspace_bytes


def _matrix_elements(summary: OnnxSummary) -> int:
    """Numbers that a token is multiplied with."""
    return sum(weight.elements for weight in summary.weights if len(weight.shape) == 2)


def _vision_flops(policy: PolicyManifest, vision: OnnxSummary) -> float:
    """Products of every patch with every matrix; the merger's see one row for each token."""
    patches = picture_tokens(policy) * policy.merge_size**2
    width = vision_width(policy, vision)
    blocks = [w for w in vision.weights if len(w.shape) == 2 and max(w.shape) < width * policy.merge_size**2]
    merger = [w for w in vision.weights if len(w.shape) == 2 and max(w.shape) >= width * policy.merge_size**2]
    return 2.0 * (patches * sum(w.elements for w in blocks) + picture_tokens(policy) * sum(w.elements for w in merger))


def _encoder_flops(bundle: Bundle, encoder: OnnxSummary) -> float:
    """Each matrix of Hiera with the tokens of its stage, which its smaller side tells."""
    height, width = bundle.manifest.segmenter.input_size_hw
    first = next((weight.shape[0] for weight in encoder.weights if len(weight.shape) == 4), 96)
    tokens = (height // 4) * (width // 4)
    flops = 0.0
    for weight in encoder.weights:
        if len(weight.shape) == 2:
            stage = max(0, round(math.log2(max(1, min(weight.shape)) / first)))
            flops += 2.0 * weight.elements * tokens / _STAGE_RATIO**stage
    return flops
