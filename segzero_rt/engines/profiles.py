"""Optimisation profiles: which shapes an engine must serve, from the sizes in the manifest.

Every dynamic axis of a `GraphSpec` has a name; a profile gives each name a least, usual and largest length. The decoder
has two: `prefill`, for many tokens at once, and `decode`, for one, where almost all of the time goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from segzero_rt.engines.record import ProfileRecord, ShapeRange
from segzero_rt.errors import EngineError
from segzero_rt.graph_spec import GraphSpec
from segzero_rt.graph_spec_segmenter import image_encoder_spec, mask_decoder_spec, mask_prompt_spec
from segzero_rt.kv_cache import ReturnedRowsCache
from segzero_rt.manifest import Manifest, PolicyManifest
from segzero_rt.policy import policy_specs
from segzero_rt.positions import window_index

Length = tuple[int, int, int]
"""Least, usual and largest length of one axis."""
Declared = Mapping[str, tuple[int, ...]]
"""Shapes as a parsed file declares them, -1 where an axis is dynamic."""

QUESTION_TOKENS = 64
"""Usual length of a question with its instructions; with the picture's tokens it makes the usual prefill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileLimits:
    """How far the axes may go that no manifest bounds."""

    batch: int = 1
    """Questions or pictures in one run."""
    objects: int = 16
    """Prompts that the mask decoder takes in one run."""
    points: int = 16
    """Labelled points of one prompt; a box is two, and one ends every prompt."""
    prefill: int | None = None
    """Tokens that the decoder takes in one run; all that the cache holds by default. Less saves working memory."""
    separate: bool = True
    """Prefill and decode each have a profile. TensorRT-RTX 1.7 then stores the weights once for each; one profile for
    both halves the engine, and is tuned for one token."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.objects < 1 or self.points < 3 or (self.prefill is not None and self.prefill < 1):
            raise EngineError(
                "expected batch, objects and prefill from 1 and points from 3 (a box is two, one ends the prompt), "
                f"got {self.batch}, {self.objects}, {self.prefill} and {self.points}"
            )


def bundle_specs(manifest: Manifest) -> dict[str, tuple[str, GraphSpec]]:
    """Path and spec of every graph of a bundle, by the graph's name."""
    policy, segmenter = manifest.policy, manifest.segmenter
    specs = {name: (str(getattr(policy.graphs, name)), spec) for name, spec in policy_specs(policy).items()}
    mask_size_hw = segmenter.mask_size_hw
    encoder = image_encoder_spec(input_size_hw=segmenter.input_size_hw, mask_size_hw=mask_size_hw)
    specs[encoder.name] = (segmenter.graphs.encoder, encoder)
    decoder = mask_decoder_spec(mask_size_hw=mask_size_hw)
    specs[decoder.name] = (segmenter.graphs.decoder, decoder)
    if segmenter.graphs.mask_prompt is not None:
        prompt = mask_prompt_spec(mask_size_hw)
        specs[prompt.name] = (segmenter.graphs.mask_prompt, prompt)
    return specs


def axis_lengths(manifest: Manifest, limits: ProfileLimits) -> dict[str, dict[str, dict[str, Length]]]:
    """Graph to profile to axis to lengths."""
    batch = (1, 1, limits.batch)
    policy = manifest.policy
    new, capacity = _prefill_lengths(policy, limits), _capacities(policy)
    prefill = {"batch": batch, "new": new, "rows": (0, 1, 1), "capacity": capacity}
    decode = {"batch": batch, "new": (1, 1, 1), "rows": (1, 1, 1), "capacity": capacity}
    for lengths in (prefill, decode):
        added = zip(lengths["capacity"], lengths["new"], strict=True)
        least, usual, most = (rows + tokens for rows, tokens in added)
        lengths["capacity_and_new"] = (least, usual, most)
    objects, points = (1, 1, limits.objects), (2, min(5, limits.points), limits.points)
    decoder, embedding = {"prefill": prefill, "decode": decode}, {"prefill": {"batch": batch, "new": new}}
    if limits.separate:
        embedding["decode"] = {"batch": batch, "new": (1, 1, 1)}
    else:
        decoder = {"any": {axis: (least, decode[axis][1], most) for axis, (least, _, most) in prefill.items()}}
    return {
        "vision": {"picture": {"batch": batch, **_vision_lengths(policy)}},
        "embedding": embedding,
        "decoder": decoder,
        "image_encoder": {"picture": {"batch": batch}},
        "mask_decoder": {"prompts": {"batch": batch, "objects": objects, "points": points}},
        "mask_prompt": {"picture": {"batch": batch}},
    }


def make_profiles(
    spec: GraphSpec, declared: Declared, lengths: Mapping[str, Mapping[str, Length]]
) -> tuple[ProfileRecord, ...]:
    """Profiles of one graph.

    Args:
        spec: names the axes.
        declared: of the inputs, from the parsed file: an axis that is static there needs no range.
        lengths: profile to axis to lengths.

    Raises:
        EngineError: an axis is dynamic in the file, and neither the spec nor `lengths` knows how long it may be.
    """
    return tuple(
        ProfileRecord(
            name=name,
            shapes={
                tensor.name: _ranges(spec, tensor.name, declared[tensor.name], axes)
                for tensor in spec.inputs
                if -1 in declared[tensor.name]
            },
        )
        for name, axes in lengths.items()
    )


def _ranges(spec: GraphSpec, name: str, declared: tuple[int, ...], axes: Mapping[str, Length]) -> ShapeRange:
    wanted = spec.tensor(name).shape
    columns: list[Length] = []
    for axis, length in enumerate(declared):
        known = wanted[axis]
        if length != -1:
            columns.append((length, length, length))
        elif isinstance(known, int):
            columns.append((known, known, known))
        elif known in axes:
            columns.append(axes[known])
        else:
            raise EngineError(
                f"graph {spec.label}: expected a known length of axis {axis} ({known}) of {name}, which the file "
                "leaves open; export the bundle again"
            )
    least, usual, most = zip(*columns, strict=True)
    return least, usual, most


def _vision_lengths(policy: PolicyManifest) -> dict[str, Length]:
    """The one size of picture that the bundle knows: nothing varies."""
    cell = policy.patch_size * policy.merge_size
    lengths = window_index(_grid_hw(policy), policy.window_size // cell)[1]
    tokens, unit = int(lengths.sum()), policy.merge_size**2
    fixed = {"patches": tokens * unit, "windows": len(lengths), "slots": int(lengths.max()) * unit, "tokens": tokens}
    return {axis: (length, length, length) for axis, length in fixed.items()}


def _grid_hw(policy: PolicyManifest) -> tuple[int, int]:
    """Rows and columns of merged tokens."""
    cell = policy.patch_size * policy.merge_size
    return policy.input_size_hw[0] // cell, policy.input_size_hw[1] // cell


def _prefill_lengths(policy: PolicyManifest, limits: ProfileLimits) -> Length:
    most = min(limits.prefill or policy.max_length, policy.max_length)
    rows, columns = _grid_hw(policy)
    return 1, min(rows * columns + QUESTION_TOKENS, most), most


def _capacities(policy: PolicyManifest) -> Length:
    """Rows of the cache's buffers, which grow in strides."""
    stride = ReturnedRowsCache.STRIDE
    least = min(stride, policy.max_length)
    rows, columns = _grid_hw(policy)
    prefix = rows * columns + QUESTION_TOKENS + policy.max_new_tokens
    return least, min(-(-prefix // stride) * stride, policy.max_length), policy.max_length
