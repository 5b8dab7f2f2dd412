"""A SAM 2 checkpoint to the segmenter's ONNX files, gated against the checkpoint itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from segzero_rt.manifest import SegmenterGraphs, SegmenterManifest

from .gate import plain_pictures
from .gate_segmenter import (
    EXACT,
    HALVED,
    IMAGE_MEAN,
    IMAGE_STD,
    NOISE_PICTURES,
    QUANTIZED,
    ROUNDED,
    gate_pixels,
    gate_segmenter,
)
from .graph_builder import INT8_FROM_WIDTH, STORAGES, float_storage
from .lazy_weight import Floats
from .onnx_weights import store_weights_fp16
from .precisions import ENCODER_COMPUTED
from .qdq import Reach, channel_peaks, in_8_bits, quantize_model
from .segmenter_checkpoint import load_checkpoint
from .segmenter_decoder import build_mask_decoder
from .segmenter_encoder import build_image_encoder
from .segmenter_graphs import MaskPromptGraph
from .segmenter_precision import check_range, in_16_bits, largest_activations, rounding_twin
from .segmenter_specs import SegmenterFiles, segmenter_specs

OPSET, IR_VERSION = 18, 8
"""Of the traced graph: what ONNX Runtime 1.23 and TensorRT 10.3 both load."""

ENCODER_FILE, DECODER_FILE = "segmenter/image_encoder.onnx", "segmenter/mask_decoder.onnx"
MASK_PROMPT_FILE = "segmenter/mask_prompt.onnx"


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterExport:
    """What an export gives to the bundle."""

    files: dict[str, Path]
    """Path inside the bundle -> file on disk."""
    manifest: SegmenterManifest
    gate: dict[str, Any]


def segmenter_manifest(model: Sam2Model, *, mask_prompts: bool = True) -> SegmenterManifest:
    """The segmenter's part of a bundle's manifest."""
    side = int(model.prompt_encoder.input_image_size)
    return SegmenterManifest(
        family="sam2",
        input_size_hw=(side, side),
        resampler="pillow_bilinear",
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        mask_size_hw=(side // 4, side // 4),
        graphs=SegmenterGraphs(
            encoder=ENCODER_FILE, decoder=DECODER_FILE, mask_prompt=MASK_PROMPT_FILE if mask_prompts else None
        ),
    )


def export_segmenter(
    checkpoint: Path,
    out_dir: Path,
    *,
    config: str | None = None,
    storage: str = "float16",
    flavour: str = "ort",
    computed: str = "float32",
    float32_products: Sequence[str] = (),
    mask_prompts: bool = True,
    pictures: Sequence[NDArray[np.uint8]] = (),
    calibration: Sequence[NDArray[np.uint8]] = (),
) -> SegmenterExport:
    """Writes the graphs under `out_dir` and measures them against the checkpoint.

    Args:
        checkpoint: transformers folder of a `Sam2Model` of any size, or a `sam2*.pt` of SAM 2's own package.
        out_dir: gets `segmenter/*.onnx`.
        config: SAM 2's name of the size that a `.pt` must have; None recognises it.
        storage: "float16" (large weights rounded, arithmetic in float32), "float32", or "int8" (the encoder's products
            in int8, in flavour "portable" with ranges that are measured beforehand; all else as "float16").
        flavour: "ort" uses ONNX Runtime's own operators, "portable" only those of opset 17.
        computed: what the encoder's products compute in: "float32", or "float16" or "bfloat16" for GPUs, whatever
            `storage` is; the decoder, which is small, stays in float32. See `segmenter_precision`.
        float32_products: products of the encoder that stay in float32 all the same, as the gate names them.
        mask_prompts: with a graph that takes masks in, which makes sense where training gave masks.
        pictures: uint8 [H, W, 3] to gate on, those of `calibration` where there are none, else coloured patches; noise
            is tried too but where ranges are measured. On noise alone masks are small, and the shipped segmenter in
            int8 would be refused.
        calibration: likewise to measure ranges on, `pictures` where there are none. Never noise: from its ranges alone
            the shipped segmenter lost a fifth of its masks' area on scenes, and on noise 3 % of it.

    Raises:
        ExportError: not such a checkpoint, a weight beyond fp16, no pictures for ranges, or the graphs differ too much
            from it.
    """
    if computed not in ENCODER_COMPUTED:
        raise ExportError(f"expected an encoder computed in {', '.join(ENCODER_COMPUTED)}, got {computed!r}")
    if storage == "int8" and computed != "float32":
        raise ExportError(f"expected weights stored as floats for an encoder computed in {computed}, got int8")
    if float32_products and computed == "float32":
        raise ExportError("expected an encoder computed in 16 bits to keep products of it in float32, got float32")
    if storage not in STORAGES:
        raise ExportError(f"expected weights stored as {', '.join(STORAGES)}, got {storage!r}")
    in_codes = storage == "int8" and flavour != "ort"
    if in_codes and not (calibration or pictures):
        raise ExportError(
            "expected pictures to measure the ranges of the segmenter's int8 codes on, got none; give --calibration "
            "DATASET or --gate-images DIR"
        )
    model = load_checkpoint(checkpoint, config)
    manifest = segmenter_manifest(model, mask_prompts=mask_prompts)
    inside = {name: path for name, path in asdict(manifest.graphs).items() if path is not None}
    files = SegmenterFiles(**{name: out_dir / path for name, path in inside.items()})
    files.encoder.parent.mkdir(parents=True, exist_ok=True)
    spec = segmenter_specs(model).encoder
    # Noise reaches beyond ranges that were measured on pictures, as no picture does.
    gated_on = pictures or calibration or plain_pictures()
    pixels = gate_pixels(spec, gated_on, noise=0 if in_codes else NOISE_PICTURES)
    if computed == "float32":
        if in_codes:
            _write_in_int8(model, files.encoder, gate_pixels(spec, calibration or pictures, noise=0), flavour)
        else:
            build_image_encoder(model, spec, flavour=flavour, storage=storage).save(files.encoder)
        gated, limits = files, {"float32": EXACT, "float16": ROUNDED, "int8": QUANTIZED}[storage]
    else:
        twin = _write_in_16_bits(model, files.encoder, pixels, flavour, computed, float32_products)
        gated, limits = replace(files, encoder=twin), HALVED[computed]
    export_mask_decoder(model, files.decoder, storage=float_storage(storage), flavour=flavour)
    if files.mask_prompt:
        export_mask_prompt(model, files.mask_prompt, storage=float_storage(storage))
    gate = gate_segmenter(model, gated, pixels=pixels, limits=limits, optimized=gated is files)
    if gated is not files:
        gated.encoder.unlink()
    return SegmenterExport(
        files={path: out_dir / path for path in inside.values()},
        manifest=manifest,
        gate=gate | {"storage": storage, "flavour": flavour, "computed": computed},
    )


def _write_in_16_bits(
    model: Sam2Model,
    path: Path,
    pixels: Sequence[NDArray[np.float32]],
    flavour: str,
    computed: str,
    float32_products: Sequence[str],
) -> Path:
    """Writes the encoder, and beside it the twin to gate it by, whose path is returned.

    Raises:
        ExportError: an activation that float16 cannot hold; its layer is named.
    """
    exact = build_image_encoder(model, segmenter_specs(model).encoder, flavour=flavour, storage="float32").model()
    if computed == "float16":
        for batch in pixels:
            check_range(largest_activations(exact, {"pixel_values": batch}), float32_products)
    twin = path.with_name("rounding_twin.onnx")
    onnx.save(rounding_twin(exact, computed, float32_products=float32_products), str(twin))
    onnx.save(in_16_bits(exact, computed, float32_products=float32_products), str(path))
    onnx.checker.check_model(str(path))
    return twin


def _write_in_int8(model: Sam2Model, path: Path, pixels: Sequence[NDArray[np.float32]], flavour: str) -> None:
    """Writes the encoder with its blocks' products in int8 by plain operators, but for narrow ones.

    Without those, the shipped segmenter's masks keep 0.992 of their area instead of 0.986. SAM 2's own sizes have none.
    """
    spec = segmenter_specs(model).encoder
    exact = build_image_encoder(model, spec, flavour=flavour, storage="float32").model()
    peaks: dict[str, Floats] = {}
    for batch in pixels:
        for product, found in channel_peaks(exact, {"pixel_values": batch}).items():
            peaks[product] = np.maximum(peaks[product], found) if product in peaks else found
    narrowest = {tensor.name: min(tensor.dims, default=0) for tensor in exact.graph.initializer}
    reach = {
        product: Reach.of(found)
        for product, found in peaks.items()
        if in_8_bits(product) and narrowest[f"{product}.weight"] >= INT8_FROM_WIDTH
    }
    halved = build_image_encoder(model, spec, flavour=flavour, storage="float16").model()
    onnx.save(quantize_model(halved, reach), str(path))
    onnx.checker.check_model(str(path))


def export_mask_decoder(model: Sam2Model, path: Path, *, storage: str, flavour: str = "ort") -> None:
    """Writes the decoder's graph: features and prompts to masks, for any number of pictures, objects and points."""
    build_mask_decoder(model, segmenter_specs(model).decoder, flavour=flavour, storage=storage).save(path)
    onnx.checker.check_model(str(path))


def export_mask_prompt(model: Sam2Model, path: Path, *, storage: str) -> None:
    """Writes the graph that puts a mask into a picture's features, for any number of pictures."""
    _write(MaskPromptGraph(model), segmenter_specs(model).mask_prompt, path, storage)


def _example(spec: GraphSpec) -> tuple[Tensor, ...]:
    """Inputs to trace with; every dynamic length is another number, so that none is taken for another."""
    lengths: dict[Any, int] = {"batch": 2, "objects": 3, "points": 5}
    shapes = [[lengths.get(length, length) for length in tensor.shape] for tensor in spec.inputs]
    dtypes = [torch.int64 if tensor.dtype == "int64" else torch.float32 for tensor in spec.inputs]
    return tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


def _write(module: nn.Module, spec: GraphSpec, path: Path, storage: str) -> None:
    dims = {name: Dim(name) for tensor in spec.inputs for name in tensor.dynamic_axes.values()}
    shapes = tuple({axis: dims[name] for axis, name in tensor.dynamic_axes.items()} for tensor in spec.inputs)
    program = torch.onnx.export(
        module.eval(),
        _example(spec),
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
