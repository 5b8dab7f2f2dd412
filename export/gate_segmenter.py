"""Compares a segmenter's graphs with its checkpoint in PyTorch, and refuses the export when they differ too much.

Features of each picture, then masks and scores of several numbers of objects and points, with boxes and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Sam2Model

from segzero_rt.errors import ExportError
from segzero_rt.graph import Graph
from segzero_rt.graph_spec import GraphSpec
from segzero_rt.graph_spec_segmenter import (
    LABEL_BOTTOM_RIGHT,
    LABEL_INSIDE,
    LABEL_NOTHING,
    LABEL_OUTSIDE,
    LABEL_TOP_LEFT,
)
from segzero_rt.operators.library import resolve_operators

from .operators import uses_operators
from .segmenter_specs import SegmenterFiles, segmenter_specs

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""SAM 2's normalisation, that of ImageNet."""

NOISE_PICTURES = 2
MIN_GATE_PIXELS = 16
"""At the mask decoder's own size: one pixel of a smaller mask is already several percent of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterGateLimits:
    """What an export must reach, over all gate pictures and prompts."""

    max_feature_error: float
    """Largest `|graph - reference| / |reference|` of one output of the image encoder."""
    max_logit_error: float
    """Largest `|graph - reference|` of a mask logit, over the reference's standard deviation."""
    max_score_error: float
    """Largest difference of a predicted IoU."""
    min_mask_iou: float
    """Lowest IoU of a graph's chosen mask with the reference's, among masks of at least `MIN_GATE_PIXELS`."""
    mean_mask_iou: float


EXACT = SegmenterGateLimits(
    max_feature_error=1e-4, max_logit_error=1e-3, max_score_error=1e-3, min_mask_iou=0.98, mean_mask_iou=0.995
)
"""Weights stored as they are."""
ROUNDED = SegmenterGateLimits(
    max_feature_error=2e-2, max_logit_error=0.2, max_score_error=0.02, min_mask_iou=0.95, mean_mask_iou=0.99
)
"""Weights rounded to fp16, arithmetic in fp32."""
QUANTIZED = SegmenterGateLimits(
    max_feature_error=0.2, max_logit_error=0.2, max_score_error=0.02, min_mask_iou=0.9, mean_mask_iou=0.98
)
"""The encoder's products in int8; on the gate's noise and random boxes masks are small, true boxes agree better."""


HALVED = {
    "float16": ROUNDED,
    "bfloat16": SegmenterGateLimits(
        max_feature_error=0.1, max_logit_error=0.5, max_score_error=0.05, min_mask_iou=0.9, mean_mask_iou=0.97
    ),
}
"""The encoder's products in 16 bits; bfloat16 has 8 of them for the digits, an eighth of float16's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """How prompts of one run look."""

    objects: int
    points: int
    """Per object; of several the last lies outside."""
    box: bool = True
    mask: bool = False
    """With one object: a mask changes the picture's features."""


_CASES = (
    _Case(objects=1, points=0),
    _Case(objects=1, points=1),
    _Case(objects=3, points=2),
    _Case(objects=2, points=1, box=False),
    _Case(objects=1, points=1, mask=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompts:
    points_xy: NDArray[np.float32]  # (B, N, P, 2)
    labels: NDArray[np.int64]  # (B, N, P)
    mask_logits: NDArray[np.float32] | None  # (B, 1, h, w)


def gate_segmenter(
    model: Sam2Model,
    files: SegmenterFiles,
    *,
    pixels: Sequence[NDArray[np.float32]],
    limits: SegmenterGateLimits,
    optimized: bool = True,
) -> dict[str, Any]:
    """Runs the graphs and the checkpoint on the same pictures and prompts.

    Args:
        pixels: batches of pictures as the encoder takes them, see `gate_pixels`.
        optimized: let ONNX Runtime change the encoder's graph; not where each rounding of it must stay.

    Returns:
        figures for the manifest, and the limits.

    Raises:
        ExportError: a figure is beyond its limit.
    """
    specs = segmenter_specs(model)
    encoders: list[Graph | AsWritten] = [AsWritten(files.encoder)]
    if optimized:
        # with compiled operators where they are, and without as on any other processor: either is to pass
        builds = [False, *([True] if resolve_operators().path and uses_operators(files.encoder) else [])]
        encoders = [Graph.load(files.encoder, specs.encoder, backend="cpu", operators=one) for one in builds]
    decoder = Graph.load(files.decoder, specs.decoder, backend="cpu")
    masks = Graph.load(files.mask_prompt, specs.mask_prompt, backend="cpu") if files.mask_prompt else None
    rng = np.random.default_rng(0)
    figures = _Figures()
    for batch in pixels:
        each = [encoder.run({"pixel_values": batch}) for encoder in encoders]
        with torch.no_grad():
            embeddings = model.get_image_embeddings(torch.from_numpy(batch))
        for features in each:
            figures.add_features(features, embeddings)
        for case in _CASES:
            if case.mask and masks is None:
                continue
            prompts = _gate_prompts(rng, batch.shape[-1], len(batch), case)
            reference = _reference_masks(model, embeddings, prompts)
            for features in each:
                figures.add_masks(_answer(decoder, masks, features, prompts), *reference)
    record = figures.record() | {"limits": asdict(limits)}
    _check(record, limits)
    return record


def _answer(
    decoder: Graph, masks: Graph | None, features: dict[str, NDArray[Any]], prompts: _Prompts
) -> dict[str, NDArray[Any]]:
    if prompts.mask_logits is not None and masks is not None:
        inputs = {"image_embeddings": features["image_embeddings"], "mask_logits": prompts.mask_logits}
        features = {**features, "image_embeddings": masks.run(inputs)["prompted_embeddings"]}
    return decoder.run({**features, "points_xy": prompts.points_xy, "labels": prompts.labels})


class _Figures:
    """Collects what is compared."""

    def __init__(self) -> None:
        self._features: list[float] = []
        self._logits: list[float] = []
        self._masks: list[float] = []
        self._scores: list[float] = []
        self._ious: list[float] = []

    def add_features(self, ours: dict[str, NDArray[Any]], embeddings: Sequence[torch.Tensor]) -> None:
        names = ("high_res_features_0", "high_res_features_1", "image_embeddings")
        for name, theirs in zip(names, embeddings, strict=True):
            want = theirs.numpy()
            self._features.append(float(np.linalg.norm(ours[name] - want) / np.linalg.norm(want)))

    def add_masks(self, ours: dict[str, NDArray[Any]], masks: NDArray[Any], scores: NDArray[Any]) -> None:
        """All four masks of each prompt, and their scores."""
        difference = np.abs(ours["mask_logits"] - masks).max()
        self._logits.append(float(difference / masks.std()))
        self._masks.append(float(np.linalg.norm(ours["mask_logits"] - masks) / np.linalg.norm(masks)))
        self._scores.append(float(np.abs(ours["iou_scores"] - scores).max()))
        self._ious += _gate_ious(ours["mask_logits"][:, :, 1:], masks[:, :, 1:], scores[:, :, 1:])

    def record(self) -> dict[str, Any]:
        return {
            "max_feature_error": float(np.max(self._features)),  # np.max keeps a NaN, which max() may pass over
            "mask_error": float(np.max(self._masks)),
            "max_logit_error": float(np.max(self._logits)),
            "max_score_error": float(np.max(self._scores)),
            "min_mask_iou": min(self._ious, default=1.0),
            "mean_mask_iou": float(np.mean(self._ious)) if self._ious else 1.0,
            "masks": len(self._ious),
        }


def _reference_masks(
    model: Sam2Model, embeddings: Sequence[torch.Tensor], prompts: _Prompts
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All four masks and scores of the checkpoint, single mask first."""
    inputs: dict[str, Any] = {
        "image_embeddings": list(embeddings),
        "input_points": torch.from_numpy(prompts.points_xy[:, :, :-1]),  # transformers adds the filler point itself
        "input_labels": torch.from_numpy(prompts.labels[:, :, :-1]),
    }
    if prompts.mask_logits is not None:
        inputs["input_masks"] = torch.from_numpy(prompts.mask_logits)
    decoder = model.mask_decoder
    chooses = decoder.dynamic_multimask_via_stability
    decoder.dynamic_multimask_via_stability = False  # the single mask as it is: choosing is the host's
    try:
        with torch.no_grad():
            parts = [model(**inputs, multimask_output=several) for several in (False, True)]
    finally:
        decoder.dynamic_multimask_via_stability = chooses
    masks, scores = ([getattr(part, name).numpy() for part in parts] for name in ("pred_masks", "iou_scores"))
    return np.concatenate(masks, axis=2), np.concatenate(scores, axis=2)


def _check(record: dict[str, Any], limits: SegmenterGateLimits) -> None:
    """Comparisons are written so that a NaN fails."""
    most, least = ("max_feature_error", "max_logit_error", "max_score_error"), ("min_mask_iou", "mean_mask_iou")
    too_far = [name for name in most if not record[name] <= getattr(limits, name)]
    too_far += [name for name in least if not record[name] >= getattr(limits, name)]
    if too_far:
        figures = ", ".join(f"{name} {record[name]:.2e} (limit {getattr(limits, name):g})" for name in too_far)
        raise ExportError(
            f"expected the segmenter's graphs to do as the checkpoint does, got {figures}; no bundle was written"
        )


class AsWritten:
    """A graph that ONNX Runtime runs node by node."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


def gate_pixels(
    spec: GraphSpec, pictures: Sequence[NDArray[np.uint8]] = (), *, noise: int = NOISE_PICTURES
) -> list[NDArray[np.float32]]:
    """What to gate on: `noise` pictures of noise in one batch, then each of `pictures`, uint8 [H, W, 3], alone."""
    from segzero_rt.resampling import resize

    size_hw = spec.inputs[0].shape[-2:]
    batches = [np.random.default_rng(0).normal(0, 1, (noise, 3, *size_hw)).astype(np.float32)] if noise else []
    mean, std = np.float32(IMAGE_MEAN), np.float32(IMAGE_STD)
    for picture in pictures:
        pixels = (resize(picture, size_hw, "pillow_bilinear").astype(np.float32) / 255 - mean) / std
        batches.append(pixels.transpose(2, 0, 1)[None].copy())
    return batches


def _gate_prompts(rng: np.random.Generator, side: int, batch: int, case: _Case) -> _Prompts:
    corners = np.sort(rng.uniform(0, side, (batch, case.objects, 2, 2)), axis=2)
    points = rng.uniform(corners[:, :, :1], corners[:, :, 1:], (batch, case.objects, case.points, 2))
    nothing = np.zeros((batch, case.objects, 1, 2))
    inside = [LABEL_INSIDE] * case.points
    if case.points > 1:
        inside[-1] = LABEL_OUTSIDE
    box = [LABEL_TOP_LEFT, LABEL_BOTTOM_RIGHT] if case.box else []
    points_xy = np.concatenate([*([corners] if case.box else []), points, nothing], axis=2).astype(np.float32)
    labels = np.array([*box, *inside, LABEL_NOTHING], np.int64)
    mask = rng.normal(0, 5, (batch, 1, side // 4, side // 4)).astype(np.float32) if case.mask else None
    return _Prompts(points_xy=points_xy, labels=np.tile(labels, (batch, case.objects, 1)), mask_logits=mask)


def _gate_ious(ours: NDArray[np.float32], reference: NDArray[np.float32], scores: NDArray[np.float32]) -> list[float]:
    """IoU of ours with the reference's best scored mask of each object, tiny ones left out."""
    best = scores.argmax(axis=2)[:, :, None, None, None]
    one = np.take_along_axis(ours, best, axis=2)[:, :, 0] > 0
    other = np.take_along_axis(reference, best, axis=2)[:, :, 0] > 0
    joint = np.count_nonzero(one | other, axis=(2, 3))
    shared = np.count_nonzero(one & other, axis=(2, 3))
    return [float(s / j) for s, j in zip(shared.ravel(), joint.ravel(), strict=True) if j >= MIN_GATE_PIXELS]
