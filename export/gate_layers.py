"""Compares exported policy graphs with PyTorch in float32 layer by layer, where neither side fits into memory whole.

Both go from layer to layer by themselves, over one picture and one prompt; each layer's input is compared. The first
layer that goes wrong is named: that of a fault, or of an activation that 16 bits cannot hold.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer_format import FORMATS
from segzero_rt.chat import Chat
from segzero_rt.errors import ExportError
from segzero_rt.manifest import PolicyManifest
from segzero_rt.operators.library import resolve_operators
from segzero_rt.policy import Policy

from .gate import QUESTIONS, GateLimits, compare_logits, plain_pictures, relative_error
from .layerwise import LayerwiseGraph
from .operators import uses_operators
from .policy_checkpoint import PolicyCheckpoint

if TYPE_CHECKING:
    from segzero_rt.graph import Graph
    from segzero_rt.positions import PictureSpan

    from .policy_graphs import PolicyGraphWriter

LOGIT_ROWS = 16
"""Places at the prompt's end whose logits are compared."""
QUESTION_TOKENS = 48
"""Of the question's prompt: more would only take longer."""
LARGEST_FLOAT16 = 65504.0
_PLAIN = " without compiled operators"
"""Behind a layer's name where a processor that has them runs the tower as others do."""

_PRODUCTS = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "linear_fc1": "fc1",
    "linear_fc2": "fc2",
    "0": "fc1",
    "2": "fc2",
}
"""transformers' names of products that the graphs call otherwise; the rest loses its "_proj"."""


def gate_policy_layers(
    checkpoint: PolicyCheckpoint,
    manifest: PolicyManifest,
    graphs: PolicyGraphWriter,
    *,
    limits: GateLimits,
    answer_format: str = "vision_reasoner",
) -> dict[str, Any]:
    """Measures the graphs in `graphs.folder` against their checkpoint.

    Returns:
        figures for the manifest: `layers` (how many were compared), `vision_error`, `decoder_error` (largest
        `|graph - reference| / |reference|` of a layer's input or the end), `worst_layer`, `kl_mean`, `kl_max`, `top1`,
        `max_abs_logit`, and the limits.

    Raises:
        ExportError: a figure is beyond its limit, or an activation beyond float16; the layer is named.
    """
    from .reference_layers import LayeredReference

    policy, towers = _policy(manifest, graphs, answer_format)
    picture = plain_pictures(1)[0]
    tokens = [*policy.prefix_tokens, *policy.question_tokens(QUESTIONS[0])[:QUESTION_TOKENS]]
    features, logits = _ask(policy, picture, tokens)
    plain = _without_operators(graphs, policy, picture)
    reference = LayeredReference(checkpoint)
    expected = reference.logits(torch_inputs(policy, picture, tokens), LOGIT_ROWS)
    if graphs.precision.computed == "float16":
        check_float16_range(reference.largest, graphs.precision.float32_products)
    if not checkpoint.vision.gated:  # only Qwen2.5-VL's own code brings patches into the order of windows, as ours does
        order = policy.layout.patch_order
        reference.hidden |= {
            name: values[order] for name, values in reference.hidden.items() if name in towers["vision"].hidden
        }
    errors = {
        f"{name}/{label}": _error(values, reference.hidden[label])
        for name, tower in towers.items()
        for label, values in tower.hidden.items()
    }
    errors["vision/end"] = _error(features, reference.features)
    errors["decoder/end"] = _error(logits, expected)
    num_layers = len(errors)
    wanted = reference.hidden | {"end": reference.features}
    errors |= {f"vision/{label}{_PLAIN}": _error(values, wanted[label]) for label, values in plain.items()}
    places = compare_logits(logits, expected)
    record = {
        "method": "layer by layer",
        "layers": num_layers,
        "vision_error": _largest(errors, "vision/"),
        "decoder_error": _largest(errors, "decoder/"),
        "worst_layer": max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf)),
        "kl_mean": float(places.kl.mean()),
        "kl_max": float(places.kl.max()),
        "top1": float(places.agree.mean()),
        "max_abs_logit": places.max_abs,
        "limits": asdict(limits),
    }
    _check(record, errors, limits)
    return record


def _ask(
    policy: Policy, picture: NDArray[np.uint8], tokens: list[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features of the picture, [tokens, hidden], and logits of the prompt's last places, [rows, vocab]."""
    view = policy.look(picture, ahead=False)
    prefix, span = cast("NDArray[np.float32]", view.pending), cast("PictureSpan", view.cache.picture)
    embeds = np.concatenate([prefix, policy.embed(tokens[prefix.shape[1] :])], axis=1)
    wanted = np.arange(len(tokens) - LOGIT_ROWS, len(tokens), dtype=np.int64)[None]
    return prefix[0, span.start : span.end], view.cache.extend(embeds, wanted)[0]


def torch_inputs(policy: Policy, picture: NDArray[np.uint8], tokens: list[int]) -> dict[str, Any]:
    """What transformers' forward takes for the same picture and prompt."""
    import torch

    patches = policy.preprocessor.patches(picture)
    frames = np.repeat(patches.reshape(len(patches), 3, 1, -1), policy.manifest.temporal_patch_size, axis=2)
    rows, columns = (length * policy.manifest.merge_size for length in policy.preprocessor.grid_hw)
    ids = torch.tensor([tokens])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.from_numpy(frames.reshape(len(patches), -1)),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
        "mm_token_type_ids": (ids == policy.manifest.image_token_id).int(),
    }


def _error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Relative error; where the graph went on with the last places alone, of those."""
    flat, expected = got.reshape(-1, got.shape[-1]), want.reshape(-1, want.shape[-1])
    return relative_error(flat, expected[-len(flat) :])


def _policy(
    manifest: PolicyManifest, graphs: PolicyGraphWriter, answer_format: str
) -> tuple[Policy, dict[str, LayerwiseGraph]]:
    """A policy whose towers are run layer by layer, over a picture of a few windows."""
    folder = graphs.folder
    towers = {name: LayerwiseGraph(folder / f"{name}.onnx", graphs.builders[name]) for name in ("vision", "decoder")}
    small = few_windows(manifest)
    embedding = LayerwiseGraph(folder / "embedding.onnx", graphs.builders["embedding"])  # not held while layers run
    policy = Policy(
        small,
        Chat(folder / "tokenizer.json"),
        vision=cast("Graph", towers["vision"]),
        embedding=cast("Graph", embedding),
        decoder=cast("Graph", towers["decoder"]),
        answer_format=FORMATS[answer_format],
    )
    return policy, towers


def few_windows(manifest: PolicyManifest) -> PolicyManifest:
    """The same policy over a picture of two by two windows, and what a window more or less leaves of its size."""
    window = manifest.window_size
    small_hw = tuple(min(side, 2 * window + side % window) for side in manifest.input_size_hw)
    return replace(manifest, input_size_hw=cast("tuple[int, int]", small_hw), max_length=min(manifest.max_length, 1024))


def _without_operators(
    graphs: PolicyGraphWriter, policy: Policy, picture: NDArray[np.uint8]
) -> dict[str, NDArray[np.float32]]:
    """What enters and leaves the tower's layers on processors without compiled operators, where this one has some.

    Either is to pass: where a bundle is made says nothing of where it will run.
    """
    path = graphs.folder / "vision.onnx"
    if resolve_operators().path is None or not uses_operators(path):
        return {}
    tower = LayerwiseGraph(path, graphs.builders["vision"], operators=False)
    twin = copy.copy(policy)
    twin.vision = cast("Graph", tower)
    end = twin.features(picture)
    return tower.hidden | {"end": end}


def _largest(errors: Mapping[str, float], prefix: str) -> float:
    return float(np.max([error for name, error in errors.items() if name.startswith(prefix)]))


def check_float16_range(largest: Mapping[str, float], float32_products: tuple[str, ...]) -> None:
    """Refuses activations that float16 cannot hold, but for products that are kept in float32.

    Args:
        largest: magnitude by transformers' name of a product, as `LayeredReference.largest`.

    Raises:
        ExportError: names the product.
    """
    for place, value in largest.items():
        product = next((one for one in graph_products(place) if one not in float32_products), None)
        if not value <= LARGEST_FLOAT16 and product is not None:
            raise ExportError(
                f"expected activations within float16's range of {LARGEST_FLOAT16:.0f}, {product} reaches {value:.3g} "
                f"in PyTorch; keep it in float32 with --float32-product {product}"
            )


def graph_products(place: str) -> list[str]:
    """A linear layer's place in transformers, "vision/blocks.3.mlp.down_proj", as the graphs call it.

    The towers' packed projection is three products there.
    """
    graph, _, path = place.partition("/")
    parts = path.split(".")
    scope = parts[0] if parts[0] == "merger" else ".".join(parts[:2])
    name = _PRODUCTS.get(parts[-1], parts[-1].removesuffix("_proj"))
    names = "qkv" if (graph, name) == ("vision", "qkv") else [name]
    return [f"{graph}/{scope}/{one}" for one in names]


def _check(record: dict[str, Any], errors: Mapping[str, float], limits: GateLimits) -> None:
    """Comparisons are written so that a NaN fails."""
    for graph, limit in (("vision", limits.max_vision_error), ("decoder", limits.max_decoder_error)):
        for name, error in errors.items():
            if name.startswith(graph) and not error <= limit:
                raise ExportError(
                    f"the policy's graphs differ from PyTorch: what enters {name} by {error:.3g} (limit {limit:.3g}); "
                    "nothing was kept. Export with float32 storage to tell rounding from a fault"
                )
    if not record["kl_mean"] <= limits.max_kl_mean:  # not top1: places of a prompt are often of two minds
        raise ExportError(
            f"the policy's graphs differ from PyTorch: kl_mean {record['kl_mean']:.3g} (limit "
            f"{limits.max_kl_mean:.3g}); nothing was kept"
        )
