"""The gate of an engine: it is run beside ONNX Runtime on the same inputs, in each of its profiles.

Inputs are drawn with a fixed seed, but are of the kind that the graph meets: patches laid out as pictures are, tokens
after others under a causal mask, features of the segmenter's own encoder. The figure is `||engine - reference|| /
||reference||` of each output; it does not depend on what the weights were trained for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.bundle import Bundle
from segzero_rt.engines.profiles import bundle_specs
from segzero_rt.engines.record import EngineRecord
from segzero_rt.errors import EngineError, GraphError
from segzero_rt.graph import Array, Graph
from segzero_rt.graph_spec import MASKED
from segzero_rt.graph_spec_segmenter import LABEL_BOTTOM_RIGHT, LABEL_INSIDE, LABEL_NOTHING, LABEL_TOP_LEFT
from segzero_rt.manifest import GATE_NOT_RUN, GATE_PASSED, PolicyManifest
from segzero_rt.positions import PictureSpan, policy_layout, policy_rotary

FLOAT32_LIMIT, NARROW_LIMIT = 1e-3, 3e-2
"""Largest relative error of an engine that computes in float32 alone, and of one that computes in 16 bits or fewer."""
_SEED = 20
_PAST_ROWS = 40
"""Rows of the cache that hold tokens in a decode step; the rest is masked."""


def gate_engine(bundle: Bundle, name: str, record: EngineRecord, engine: Graph) -> dict[str, Any]:
    """Compares an engine with its graph under ONNX Runtime; the record of the gate.

    Where no CPU can run the graph, as one with weights of 4-bit floats, the gate was not run, and the record says why.

    Raises:
        EngineError: an output differs by more than its precision explains, or is not finite.
    """
    path, spec = bundle_specs(bundle.manifest)[name]
    try:
        reference = Graph.load(bundle.file(path), spec, backend="cpu")
    except GraphError as refusal:
        return {"status": GATE_NOT_RUN, "reason": f"nothing to compare with on a CPU: {refusal}"}
    limit = NARROW_LIMIT if set(record.precisions) & {"float16", "bfloat16", "float8", "float4"} else FLOAT32_LIMIT
    errors: dict[str, float] = {}
    for inputs in example_inputs(bundle, name, record):
        expected, found = reference.run(inputs), engine.run(inputs)
        for output, error in relative_errors(expected, found).items():
            errors[output] = max(error, errors.get(output, 0.0))
    worst = max(errors, key=lambda output: errors[output])
    if not errors[worst] <= limit:  # not a number is no pass either
        raise EngineError(
            f"expected the engine of {path} within {limit:g} of ONNX Runtime, {worst} differs by {errors[worst]:.2g}; "
            "it was not recorded; export the bundle with wider types, or report this version of the library"
        )
    return {"status": GATE_PASSED, "limit": limit, "relative_error": errors[worst], "worst_output": worst}


def relative_errors(expected: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, float]:
    """`||found - expected|| / ||expected||` of each output; infinite where one is not finite, 0 for empty ones."""
    errors: dict[str, float] = {}
    for name, reference in expected.items():
        difference = np.linalg.norm(np.asarray(found[name], np.float64) - reference)
        scale = np.linalg.norm(np.asarray(reference, np.float64))
        error = float(difference / scale) if scale else float(difference)
        errors[name] = error if np.isfinite(error) else float("inf")
    return errors


def example_inputs(bundle: Bundle, name: str, record: EngineRecord) -> list[dict[str, Array]]:
    """One set of inputs for each profile of an engine, at its usual shapes."""
    rng = np.random.default_rng(_SEED)
    policy = bundle.manifest.policy
    sets = []
    for profile in record.profiles:
        shapes = {tensor: usual for tensor, (_, usual, _) in profile.shapes.items()}
        if name == "vision":
            sets.append(_vision(policy, rng))
        elif name == "embedding":
            sets.append({"input_ids": rng.integers(0, policy.vocab_size, shapes["input_ids"])})
        elif name == "decoder":
            sets.append(_decoder(bundle, shapes, rng))
        elif name == "image_encoder":
            sets.append({"pixel_values": _pixels(bundle, rng)})
        elif name == "mask_decoder":
            sets.append(_prompts(bundle, shapes["points_xy"], rng))
        else:
            height, width = bundle.manifest.segmenter.mask_size_hw
            features = _features(bundle, rng)
            masks = rng.normal(0, 4, (1, 1, height, width)).astype(np.float32)
            sets.append({"image_embeddings": features["image_embeddings"], "mask_logits": masks})
    return sets


def _vision(policy: PolicyManifest, rng: np.random.Generator) -> dict[str, Array]:
    layout = policy_layout(policy)
    patches = rng.normal(0, 1, (1, len(layout.patch_order), 3 * policy.patch_size**2)).astype(np.float32)
    return {"patches": patches, **layout.inputs()}


def _decoder(bundle: Bundle, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, Array]:
    """New tokens after as many in the cache as it holds, and the whole of a prefill after none."""
    policy = bundle.manifest.policy
    spec = bundle_specs(bundle.manifest)["decoder"][1]
    batch, new, _ = shapes["inputs_embeds"]
    capacity = next(shape[2] for name, shape in shapes.items() if name.startswith("past_"))
    held = min(_PAST_ROWS, capacity) if new == 1 else 0
    cos, sin = policy_rotary(policy).rows(PictureSpan(start=0, grid_hw=(2, 2)))
    places = np.minimum(held + np.arange(new), policy.max_length - 1)
    written = policy.flavour == "trt11"  # new rows stand in the cache before it is read
    bias = np.full((batch, 1, new, capacity if written else capacity + new), MASKED, np.float32)
    bias[..., :held] = 0.0
    first = held if written else capacity
    bias[..., first : first + new] = np.triu(np.full((new, new), MASKED, np.float32), k=1)
    inputs: dict[str, Array] = {
        "inputs_embeds": _embeds(bundle, (batch, new), rng),
        "logits_rows": np.full((batch, 1), new - 1, np.int64),
        "attention_bias": bias,
        "rotary_cos": np.tile(cos[places], (batch, 1, 1)),
        "rotary_sin": np.tile(sin[places], (batch, 1, 1)),
    }
    if written:
        inputs["write_indices"] = np.full(batch, held, np.int64)
    for tensor in spec.inputs:
        if tensor.name.startswith("past_"):
            past = np.zeros(shapes[tensor.name], tensor.dtype)
            past[:, :, :held] = rng.normal(0, 1, (*past.shape[:2], held, past.shape[3]))
            inputs[tensor.name] = past
    return inputs


def _embeds(bundle: Bundle, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Rows of the token table: their scale is the one that the decoder knows."""
    path, spec = bundle_specs(bundle.manifest)["embedding"]
    ids = rng.integers(0, bundle.manifest.policy.vocab_size, shape)
    rows: NDArray[np.float32] = Graph.load(bundle.file(path), spec, backend="cpu").run({"input_ids": ids})[
        "inputs_embeds"
    ]
    return rows


def _pixels(bundle: Bundle, rng: np.random.Generator) -> NDArray[np.float32]:
    """Blocks of colour with noise, normalised."""
    height, width = bundle.manifest.segmenter.input_size_hw
    blocks = np.kron(rng.normal(0, 1, (3, 4, 4)), np.ones((-(-height // 4), -(-width // 4))))[:, :height, :width]
    return (blocks + rng.normal(0, 0.1, blocks.shape))[None].astype(np.float32)


def _features(bundle: Bundle, rng: np.random.Generator) -> dict[str, Array]:
    path, spec = bundle_specs(bundle.manifest)["image_encoder"]
    return Graph.load(bundle.file(path), spec, backend="cpu").run({"pixel_values": _pixels(bundle, rng)})


def _prompts(bundle: Bundle, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, Array]:
    """A box and points for each object."""
    _, objects, points, _ = shape
    height, width = bundle.manifest.segmenter.input_size_hw
    labels = np.array([LABEL_TOP_LEFT, LABEL_BOTTOM_RIGHT, *[LABEL_INSIDE] * points])[: points - 1]
    points_xy = np.sort(rng.uniform(0, 1, (1, objects, points, 2)), axis=2) * (width, height)
    points_xy[:, :, -1] = 0
    return {
        **_features(bundle, rng),
        "points_xy": points_xy.astype(np.float32),
        "labels": np.tile(np.array([*labels, LABEL_NOTHING], np.int64), (1, objects, 1)),
    }
