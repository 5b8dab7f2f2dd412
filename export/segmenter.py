"""A SAM 2 checkpoint to the segmenter's ONNX files, gated against the checkpoint itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
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
from segzero_rt.graph_spec import GraphSpec
from segzero_rt.graph_spec_segmenter import image_encoder_spec, mask_decoder_spec
from segzero_rt.manifest import SegmenterGraphs, SegmenterManifest

from .gate_segmenter import EXACT, IMAGE_MEAN, IMAGE_STD, QUANTIZED, ROUNDED, gate_segmenter
from .graph_builder import STORAGES, float_storage
from .onnx_weights import store_weights_fp16
from .segmenter_checkpoint import load_checkpoint
from .segmenter_encoder import build_image_encoder
from .segmenter_graphs import MaskDecoderGraph

OPSET, IR_VERSION = 18, 8
"""Of the mask decoder: what ONNX Runtime 1.23 and TensorRT 10.3 both load."""

ENCODER_FILE, DECODER_FILE = "segmenter/image_encoder.onnx", "segmenter/mask_decoder.onnx"


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterExport:
    """What an export gives to the bundle."""

    files: dict[str, Path]
    """Path inside the bundle -> file on disk."""
    manifest: SegmenterManifest
    gate: dict[str, Any]


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
    checkpoint: Path,
    out_dir: Path,
    *,
    config: str | None = None,
    storage: str = "float16",
    flavour: str = "ort",
    pictures: Sequence[NDArray[np.uint8]] = (),
) -> SegmenterExport:
    """Writes both graphs under `out_dir` and measures them against the checkpoint.

    Args:
        checkpoint: transformers folder of a `Sam2Model` of any size, or a `sam2*.pt` of SAM 2's own package.
        out_dir: gets `segmenter/*.onnx`.
        config: SAM 2's name of the size that a `.pt` must have; None recognises it.
        storage: "float16" (large weights rounded, arithmetic in float32), "float32", or "int8" (the encoder's products
            in int8, flavour "ort" alone; all else as "float16").
        flavour: of the encoder: "ort" uses ONNX Runtime's own operators, "portable" only those of opset 17.
        pictures: uint8 [H, W, 3] to gate on; noise is always tried too.

    Raises:
        ExportError: not such a checkpoint, a weight beyond fp16, or the graphs differ too much from it.
    """
    if storage not in STORAGES:
        raise ExportError(f"expected weights stored as {', '.join(STORAGES)}, got {storage!r}")
    model = load_checkpoint(checkpoint, config)
    manifest = segmenter_manifest(model)
    encoder_path, decoder_path = out_dir / ENCODER_FILE, out_dir / DECODER_FILE
    encoder_path.parent.mkdir(parents=True, exist_ok=True)
    specs = segmenter_specs(model)
    build_image_encoder(model, specs[0], flavour=flavour, storage=storage).save(encoder_path)
    export_mask_decoder(model, decoder_path, storage=float_storage(storage))
    limits = {"float32": EXACT, "float16": ROUNDED, "int8": QUANTIZED}[storage]
    gate = gate_segmenter(model, encoder_path, decoder_path, specs, pictures=pictures, limits=limits)
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
