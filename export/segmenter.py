"""A SAM 2 checkpoint of transformers to the segmenter's two ONNX files, gated against the checkpoint itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim
from transformers import Sam2Model

from segzero_rt.errors import ExportError
from segzero_rt.graph import Graph
from segzero_rt.graph_spec import GraphSpec
from segzero_rt.graph_spec_segmenter import (
    LABEL_BOTTOM_RIGHT,
    LABEL_INSIDE,
    LABEL_NOTHING,
    LABEL_TOP_LEFT,
    NUM_MASK_TOKENS,
    image_encoder_spec,
    mask_decoder_spec,
)
from segzero_rt.manifest import SegmenterGraphs, SegmenterManifest

from .graph_builder import STORAGES, float_storage
from .onnx_weights import store_weights_fp16
from .segmenter_encoder import build_image_encoder
from .segmenter_graphs import MaskDecoderGraph

OPSET, IR_VERSION = 18, 8
"""Of the mask decoder: what ONNX Runtime 1.23 and TensorRT 10.3 both load."""

ENCODER_FILE, DECODER_FILE = "segmenter/image_encoder.onnx", "segmenter/mask_decoder.onnx"
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""SAM 2's normalisation, that of ImageNet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterGateLimits:
    """What an export must reach, over all gate pictures and prompts."""

    max_logit_error: float
    """Largest `|graph - reference|` of a mask logit, over the reference's standard deviation."""
    max_score_error: float
    """Largest difference of a predicted IoU."""
    min_mask_iou: float
    """Lowest IoU of a graph's chosen mask with the reference's, among masks of at least `MIN_GATE_PIXELS`."""
    mean_mask_iou: float


EXACT = SegmenterGateLimits(max_logit_error=1e-3, max_score_error=1e-3, min_mask_iou=0.98, mean_mask_iou=0.995)
"""Weights stored as they are."""
ROUNDED = SegmenterGateLimits(max_logit_error=0.2, max_score_error=0.02, min_mask_iou=0.95, mean_mask_iou=0.99)
"""Weights rounded to fp16, arithmetic in fp32."""
QUANTIZED = SegmenterGateLimits(max_logit_error=0.2, max_score_error=0.02, min_mask_iou=0.9, mean_mask_iou=0.98)
"""The encoder's products in int8; on the gate's noise and random boxes masks are small, true boxes agree better."""

MIN_GATE_PIXELS = 16
"""At the mask decoder's own size: one pixel of a smaller mask is already several percent of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterExport:
    """What an export gives to the bundle."""

    files: dict[str, Path]
    """Path inside the bundle -> file on disk."""
    manifest: SegmenterManifest
    gate: dict[str, Any]


def load_checkpoint(hf_folder: Path) -> Sam2Model:
    """Reads a transformers folder of `Sam2Model` in float32.

    Raises:
        ExportError: no such checkpoint, or one of another architecture.
    """
    try:
        model = Sam2Model.from_pretrained(hf_folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"expected a SAM 2 checkpoint (config.json, model.safetensors) in {hf_folder}: {reason}"
        ) from error
    if model.mask_decoder.num_mask_tokens != NUM_MASK_TOKENS:
        raise ExportError(
            f"expected {NUM_MASK_TOKENS} mask tokens as in SAM 2, got {model.mask_decoder.num_mask_tokens}"
        )
    return model.eval()


def segmenter_manifest(model: Sam2Model) -> SegmenterManifest:
    """The segmenter's part of a bundle's manifest."""
    side = int(model.prompt_encoder.input_image_size)
    return SegmenterManifest(
        family="sam2",
        input_size_hw=(side, side),
        resampler="pillow_bilinear",
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        mask_size_hw=(side // 4, side // 4),
        graphs=SegmenterGraphs(encoder=ENCODER_FILE, decoder=DECODER_FILE),
    )


def export_segmenter(
    hf_folder: Path,
    out_dir: Path,
    *,
    storage: str = "float16",
    flavour: str = "ort",
    pictures: Sequence[NDArray[np.uint8]] = (),
) -> SegmenterExport:
    """Writes both graphs under `out_dir` and measures them against the checkpoint.

    Args:
        hf_folder: transformers folder of a `Sam2Model` of any size.
        out_dir: gets `segmenter/*.onnx`.
        storage: "float16" (large weights rounded, arithmetic in float32), "float32", or "int8" (the encoder's products
            in int8, flavour "ort" alone; all else as "float16").
        flavour: of the encoder: "ort" uses ONNX Runtime's own operators, "portable" only those of opset 17.
        pictures: uint8 [H, W, 3] to gate on; noise is always tried too.

    Raises:
        ExportError: not such a checkpoint, a weight beyond fp16, or the graphs differ too much from it.
    """
    if storage not in STORAGES:
        raise ExportError(f"expected weights stored as {', '.join(STORAGES)}, got {storage!r}")
    model = load_checkpoint(hf_folder)
    manifest = segmenter_manifest(model)
    encoder_path, decoder_path = out_dir / ENCODER_FILE, out_dir / DECODER_FILE
    encoder_path.parent.mkdir(parents=True, exist_ok=True)
    encoder_spec, _ = segmenter_specs(model)
    build_image_encoder(model, encoder_spec, flavour=flavour, storage=storage).save(encoder_path)
    export_mask_decoder(model, decoder_path, storage=float_storage(storage))
    limits = {"float32": EXACT, "float16": ROUNDED, "int8": QUANTIZED}[storage]
    gate = gate_segmenter(model, encoder_path, decoder_path, pictures=pictures, limits=limits)
    files = {ENCODER_FILE: encoder_path, DECODER_FILE: decoder_path}
    return SegmenterExport(files=files, manifest=manifest, gate=gate | {"storage": storage, "flavour": flavour})


def segmenter_specs(model: Sam2Model) -> tuple[GraphSpec, GraphSpec]:
    """Specs of a checkpoint's encoder and decoder, with every width a number."""
    side, hidden_size = int(model.prompt_encoder.input_image_size), int(model.mask_decoder.hidden_size)
    mask_size_hw = (side // 4, side // 4)
    encoder = image_encoder_spec(input_size_hw=(side, side), mask_size_hw=mask_size_hw, hidden_size=hidden_size)
    return encoder, mask_decoder_spec(mask_size_hw=mask_size_hw, hidden_size=hidden_size)


def export_mask_decoder(model: Sam2Model, path: Path, *, storage: str) -> None:
    """Writes the decoder's graph: features and prompts to masks, for any number of pictures, objects and points."""
    _, spec = segmenter_specs(model)
    lengths = {"batch": 2, "objects": 3, "points": 5}
    example = []
    for tensor in spec.inputs:
        shape = [lengths.get(length, length) for length in tensor.shape]
        example.append(torch.zeros(shape, dtype=torch.int64 if tensor.dtype == "int64" else torch.float32))
    _write(MaskDecoderGraph(model), tuple(example), spec, path, storage)


def _write(module: nn.Module, example: tuple[Tensor, ...], spec: GraphSpec, path: Path, storage: str) -> None:
    dims = {name: Dim(name) for tensor in spec.inputs for name in tensor.dynamic_axes.values()}
    shapes = tuple({axis: dims[name] for axis, name in tensor.dynamic_axes.items()} for tensor in spec.inputs)
    program = torch.onnx.export(
        module.eval(),
        example,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(spec.input_names),
        output_names=list(spec.output_names),
        dynamic_shapes=shapes,
        verbose=False,
    )
    buffer = io.BytesIO()
    onnx.save(program.model_proto, buffer)
    model = onnx.load_from_string(buffer.getvalue())
    model.ir_version = IR_VERSION
    if storage == "float16":
        store_weights_fp16(model)
    onnx.checker.check_model(model)
    temporary = path.with_suffix(".partial")
    onnx.save(model, str(temporary))
    temporary.replace(path)


def gate_segmenter(
    model: Sam2Model,
    encoder_path: Path,
    decoder_path: Path,
    *,
    pictures: Sequence[NDArray[np.uint8]],
    limits: SegmenterGateLimits,
) -> dict[str, Any]:
    """Runs both graphs and the checkpoint on the same pictures and prompts, at several numbers of objects and points.

    Returns:
        figures for the manifest, and the limits.

    Raises:
        ExportError: a figure is beyond its limit.
    """
    encoder_spec, decoder_spec = segmenter_specs(model)
    encoder = Graph.load(encoder_path, encoder_spec, backend="cpu")
    decoder = Graph.load(decoder_path, decoder_spec, backend="cpu")
    rng = np.random.default_rng(0)
    logit_errors: list[float] = []
    score_errors: list[float] = []
    ious: list[float] = []
    for pixels in _gate_pixels(rng, encoder_spec, pictures):
        features = encoder.run({"pixel_values": pixels})
        for objects, points in ((1, 0), (1, 1), (4, 0), (3, 2)):
            points_xy, labels = _gate_prompts(rng, encoder_spec.inputs[0].shape[-1], (len(pixels), objects, points))
            ours = decoder.run({**features, "points_xy": points_xy, "labels": labels})
            with torch.no_grad():  # transformers adds the filler point itself
                theirs = model(
                    pixel_values=torch.from_numpy(pixels),
                    input_points=torch.from_numpy(points_xy[:, :, :-1]),
                    input_labels=torch.from_numpy(labels[:, :, :-1]),
                    multimask_output=True,
                )
            reference, scores = theirs.pred_masks.numpy(), theirs.iou_scores.numpy()
            difference = np.abs(ours["mask_logits"][:, :, 1:] - reference).max()
            logit_errors.append(float(difference / reference.std()))
            score_errors.append(float(np.abs(ours["iou_scores"][:, :, 1:] - scores).max()))
            ious += _gate_ious(ours["mask_logits"][:, :, 1:], reference, scores)
    record = {
        "max_logit_error": float(np.max(logit_errors)),  # np.max keeps a NaN, which max() may pass over
        "max_score_error": float(np.max(score_errors)),
        "min_mask_iou": min(ious, default=1.0),
        "mean_mask_iou": float(np.mean(ious)) if ious else 1.0,
        "masks": len(ious),
        "limits": asdict(limits),
    }
    _check(record, limits)
    return record


def _check(record: dict[str, Any], limits: SegmenterGateLimits) -> None:
    too_far = [name for name in ("max_logit_error", "max_score_error") if not record[name] <= getattr(limits, name)]
    too_far += [name for name in ("min_mask_iou", "mean_mask_iou") if not record[name] >= getattr(limits, name)]
    if too_far:
        figures = ", ".join(f"{name} {record[name]:.2e} (limit {getattr(limits, name):g})" for name in too_far)
        raise ExportError(
            f"expected the segmenter's graphs to do as the checkpoint does, got {figures}; no bundle was written"
        )


def _gate_pixels(
    rng: np.random.Generator, spec: GraphSpec, pictures: Sequence[NDArray[np.uint8]]
) -> list[NDArray[np.float32]]:
    """Two pictures of noise in one batch, then each gate picture alone."""
    from segzero_rt.resampling import resize

    size_hw = spec.inputs[0].shape[-2:]
    batches = [rng.normal(0, 1, (2, 3, *size_hw)).astype(np.float32)]
    mean, std = np.float32(IMAGE_MEAN), np.float32(IMAGE_STD)
    for picture in pictures:
        pixels = (resize(picture, size_hw, "pillow_bilinear").astype(np.float32) / 255 - mean) / std
        batches.append(pixels.transpose(2, 0, 1)[None].copy())
    return batches


def _gate_prompts(
    rng: np.random.Generator, side: int, shape: tuple[int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    batch, objects, points = shape
    corners = np.sort(rng.uniform(0, side, (batch, objects, 2, 2)), axis=2)
    inside = rng.uniform(corners[:, :, :1], corners[:, :, 1:], (batch, objects, points, 2))
    nothing = np.zeros((batch, objects, 1, 2))
    labels = np.array([LABEL_TOP_LEFT, LABEL_BOTTOM_RIGHT, *[LABEL_INSIDE] * points, LABEL_NOTHING], np.int64)
    points_xy = np.concatenate([corners, inside, nothing], axis=2).astype(np.float32)
    return points_xy, np.tile(labels, (batch, objects, 1))


def _gate_ious(ours: NDArray[np.float32], reference: NDArray[np.float32], scores: NDArray[np.float32]) -> list[float]:
    """IoU of ours with the reference's best scored mask of each object, tiny ones left out."""
    best = scores.argmax(axis=2)[:, :, None, None, None]
    one = np.take_along_axis(ours, best, axis=2)[:, :, 0] > 0
    other = np.take_along_axis(reference, best, axis=2)[:, :, 0] > 0
    joint = np.count_nonzero(one | other, axis=(2, 3))
    shared = np.count_nonzero(one & other, axis=(2, 3))
    return [float(s / j) for s, j in zip(shared.ravel(), joint.ravel(), strict=True) if j >= MIN_GATE_PIXELS]
