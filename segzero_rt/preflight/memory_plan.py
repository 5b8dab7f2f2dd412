"""How much memory a bundle will take, from its manifest and its files' headers: nothing is loaded.

The parts are weights, the KV cache, what the segmenter and the policy work with, and the libraries. Weights and cache
are counted. Working memory is estimated from the widest tensors of each graph, which are named below; the constants
were set on ONNX Runtime 1.31 (x86-64), and a test holds the sum to measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from segzero_rt.bundle import Bundle
from segzero_rt.manifest import Manifest, PolicyManifest
from segzero_rt.onnx_summary import OnnxSummary, Weight, computed_types, read_summary
from segzero_rt.operators import DOMAIN
from segzero_rt.operators.library import resolve_operators

FLOAT_BYTES = 4
"""Graphs compute in float32, whatever their weights are stored in."""
LIBRARIES_BYTES = 70 << 20
"""Python, NumPy, OpenCV and ONNX Runtime, before the first graph is loaded."""
SESSION_BYTES = 5 << 19
"""2.5 MiB: what ONNX Runtime adds for each graph."""
NUM_GRAPHS = 5
PACKED_COPIES = {"int8": 2, "uint8": 2, "int4": 1, "uint4": 1}
"""int8 weights stay beside the layout that their kernels read."""
SPLIT_OPERATORS = tuple(f"{DOMAIN}:{name}" for name in ("SplitLinear", "SplitProduct", "SplitMlp"))
"""Where they are compiled, they keep each weight as a pair of bfloat16 beside what ONNX Runtime keeps."""
CACHE_STRIDE = 256
QUESTION_TOKENS = 192
"""Of a prompt, beyond the picture."""
POLICY_WIDE_TENSORS, SCORE_TENSORS = 6, 2
"""Tensors of the width of a block's inner product, and of attention scores, that are alive at once."""
ENCODER_WIDE_TENSORS = 14
"""Tensors of the first stage's size that are alive at once: four of them make the block's inner product alone."""
BUILD_LIBRARIES_BYTES = 360 << 20
"""Python, TensorRT-RTX 1.7 and its builder, before the first graph."""
BUILD_COPIES = 4
"""Copies of the weights, as they are computed with, while an engine is built: network, optimiser, engine, file.
TensorRT-RTX 1.7 came to 3.5 times the 5.2 GiB of the decoder of 3B's true sizes in float16."""
_HALVES = frozenset({"float16", "bfloat16"})
_FLOATS = frozenset({"float32", *_HALVES})
_PRODUCTS = frozenset({"MatMul", "Gemm"})


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes by purpose. On a device that shares the system's memory they all come from one place."""

    libraries_bytes: int
    policy_weights_bytes: int
    kv_cache_bytes: int
    segmenter_weights_bytes: int
    segmenter_bytes: int
    """What the segmenter works with."""
    workspace_bytes: int
    """What the policy works with, vision tower and prefill."""
    build_peak_bytes: int
    """Of `segzero build`, a process of its own: the largest graph's."""

    @property
    def run_bytes(self) -> int:
        """Peak of a process that answers questions."""
        return (
            self.libraries_bytes
            + self.policy_weights_bytes
            + self.kv_cache_bytes
            + self.segmenter_weights_bytes
            + self.segmenter_bytes
            + self.workspace_bytes
        )

    def as_dict(self) -> dict[str, int]:
        """Plain numbers, with `run_bytes`."""
        names = ("libraries", "policy_weights", "kv_cache", "segmenter_weights", "segmenter", "workspace", "build_peak")
        return {f"{name}_bytes": getattr(self, f"{name}_bytes") for name in names} | {"run_bytes": self.run_bytes}


def plan_memory(bundle: Bundle) -> MemoryPlan:
    """The plan for one question at a time.

    Raises:
        GraphError: a graph cannot be read.
    """
    manifest = bundle.manifest
    policy, segmenter = manifest.policy.graphs, manifest.segmenter.graphs
    vision, embedding, decoder = (
        read_summary(bundle.file(n)) for n in (policy.vision, policy.embedding, policy.decoder)
    )
    encoder, mask_decoder = (read_summary(bundle.file(name)) for name in (segmenter.encoder, segmenter.decoder))
    graphs = {
        policy.vision: vision,
        policy.embedding: embedding,
        policy.decoder: decoder,
        segmenter.encoder: encoder,
        segmenter.decoder: mask_decoder,
    }
    largest_file = max(summary.weight_bytes for summary in graphs.values())
    largest_engine = max(engine_bytes(bundle.file(name), summary) for name, summary in graphs.items())
    return MemoryPlan(
        libraries_bytes=LIBRARIES_BYTES + NUM_GRAPHS * SESSION_BYTES,
        # While a graph is loaded, its file is in memory beside the weights that were made of it.
        policy_weights_bytes=computed_bytes(vision) + embedding.weight_bytes + computed_bytes(decoder) + largest_file,
        kv_cache_bytes=kv_cache_bytes(manifest.policy),
        segmenter_weights_bytes=computed_bytes(encoder) + split_bytes(encoder) + computed_bytes(mask_decoder),
        segmenter_bytes=_encoder_bytes(manifest, encoder) + _mask_bytes(manifest),
        workspace_bytes=_vision_bytes(manifest.policy, vision) + _prefill_bytes(manifest.policy, decoder),
        build_peak_bytes=BUILD_LIBRARIES_BYTES + BUILD_COPIES * largest_engine,
    )


def computed_bytes(summary: OnnxSummary) -> int:
    """Weights as ONNX Runtime keeps them: floats as float32, integers as they are stored and as they are read."""
    return sum(_computed(weight) for weight in summary.weights)


def engine_bytes(path: Path, summary: OnnxSummary) -> int:
    """Weights as a strongly typed engine keeps them: in 16 bits where products compute in those.

    Raises:
        GraphError: the graph cannot be read.
    """
    types = {dtype for name, dtype in computed_types(path).items() if name.rpartition(":")[2] in _PRODUCTS}
    if not types & _HALVES:
        return computed_bytes(summary)
    whole = sum(weight.elements for weight in summary.weights if weight.dtype in _FLOATS)
    return computed_bytes(summary) - whole * FLOAT_BYTES // 2


def split_bytes(summary: OnnxSummary) -> int:
    """What compiled operators keep of a graph's floats beside ONNX Runtime; 0 where they are not compiled."""
    if not any(name in summary.operators for name in SPLIT_OPERATORS) or resolve_operators().path is None:
        return 0
    return sum(_computed(weight) for weight in summary.weights if "float" in weight.dtype and len(weight.shape) == 2)


def kv_cache_bytes(policy: PolicyManifest) -> int:
    """Keys and values of the whole context."""
    numbers = 2 * policy.num_layers * policy.num_kv_heads * policy.head_dim * policy.max_length
    return numbers * (2 if policy.cache_dtype == "float16" else FLOAT_BYTES)


def picture_tokens(policy: PolicyManifest) -> int:
    """Merged tokens of a picture, as the decoder sees them."""
    cell = policy.patch_size * policy.merge_size
    return (policy.input_size_hw[0] // cell) * (policy.input_size_hw[1] // cell)


def vision_width(policy: PolicyManifest, vision: OnnxSummary) -> int:
    """Width of the vision tower: what one patch's numbers are projected to."""
    patch_dim = 3 * policy.patch_size**2
    found = [other for shape in _matrices(vision) if patch_dim in shape for other in shape if other != patch_dim]
    return found[0] if found else policy.hidden_size


def inner_width(summary: OnnxSummary, width: int) -> int:
    """Widest product of a block with inputs of `width`."""
    return max((max(shape) for shape in _matrices(summary) if width in shape), default=width)


def _computed(weight: Weight) -> int:
    if weight.dtype in PACKED_COPIES:
        return weight.num_bytes * PACKED_COPIES[weight.dtype]
    return weight.elements * FLOAT_BYTES if "float" in weight.dtype else weight.num_bytes


def _vision_bytes(policy: PolicyManifest, vision: OnnxSummary) -> int:
    patches = picture_tokens(policy) * policy.merge_size**2
    width = vision_width(policy, vision)
    heads = max(1, width // policy.vision_head_dim)
    wide = min(inner_width(vision, width), 6 * width)  # the merger's rows are fewer and wider
    return FLOAT_BYTES * (POLICY_WIDE_TENSORS * patches * wide + SCORE_TENSORS * heads * patches**2)


def _prefill_bytes(policy: PolicyManifest, decoder: OnnxSummary) -> int:
    tokens = min(picture_tokens(policy) + QUESTION_TOKENS, policy.max_length)
    matrices = (shape for shape in _matrices(decoder) if policy.vocab_size not in shape)
    wide = max((max(shape) for shape in matrices), default=policy.hidden_size)
    seen = {"portable": tokens + CACHE_STRIDE, "trt11": policy.max_length}.get(policy.flavour, tokens)
    scores = SCORE_TENSORS * policy.num_heads * tokens * seen
    return FLOAT_BYTES * (POLICY_WIDE_TENSORS * tokens * wide + scores)


def _encoder_bytes(manifest: Manifest, encoder: OnnxSummary) -> int:
    """Hiera's first stage is the largest: a token for each 4 by 4 pixels."""
    height, width = manifest.segmenter.input_size_hw
    first = next((weight.shape[0] for weight in encoder.weights if len(weight.shape) == 4), 96)
    return FLOAT_BYTES * ENCODER_WIDE_TENSORS * (height // 4) * (width // 4) * first


def _mask_bytes(manifest: Manifest) -> int:
    """Features at three scales, and four masks of an object, upsampled."""
    height, width = manifest.segmenter.mask_size_hw
    return FLOAT_BYTES * height * width * (64 + 4)


def _matrices(summary: OnnxSummary) -> Iterable[tuple[int, ...]]:
    return [weight.shape for weight in summary.weights if len(weight.shape) == 2]
