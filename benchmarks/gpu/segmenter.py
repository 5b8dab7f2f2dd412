"""SAM 2.1 large at 1024 x 1024 with random weights made here: PyTorch, eager and compiled, beside ONNX Runtime.

Every side encodes the same picture and decodes three boxes with a point each. Its features are compared with those of
PyTorch in float32 before anything is timed; times are on the device, one run of the encoder after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device_graph import DeviceGraph, own_stream
from .errors import GpuCheckError
from .roofline import read_peaks
from .stages import Context, Figures
from .timing import Clock, seconds_each

if TYPE_CHECKING:
    import torch

SIZE = "hiera_l"
OBJECTS = 3
MAX_ERROR = 0.03
"""Of `|ours - theirs| / |theirs|` against float32: what 16 bits may cost through 48 blocks."""
FEATURES = ("high_res_features_0", "high_res_features_1", "image_embeddings")
_FACTS = "facts.pt"


def graphs(context: Context) -> Figures:
    """Writes weights, graphs and what PyTorch makes of a picture in float32, for the other steps."""
    import onnx
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from export.segmenter import export_mask_decoder
    from export.segmenter_encoder import build_image_encoder
    from export.segmenter_precision import in_16_bits
    from export.segmenter_specs import segmenter_specs

    own_stream(context.device)
    folder = _folder(context)
    folder.mkdir(parents=True, exist_ok=True)
    model = _random_model(context)
    model.save_pretrained(folder / "checkpoint")
    specs = segmenter_specs(model)
    encoder = build_image_encoder(model, specs.encoder, flavour="portable", storage="float32").model()
    onnx.save(in_16_bits(encoder, "float16"), str(folder / "encoder.onnx"))
    export_mask_decoder(model, folder / "decoder.onnx", storage="float32", flavour="portable")
    pixels = torch.randn(1, *specs.encoder.inputs[0].shape[1:], generator=torch.Generator().manual_seed(0))
    model = model.to(context.device)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            features = dict(zip(FEATURES, _features(model, pixels.to(context.device)), strict=True))
        masks = _decode(model, features)
    facts = {
        "pixels": pixels,
        "features": {name: feature.cpu() for name, feature in features.items()},
        "masks": masks.cpu(),
        "operations": counter.get_total_flops(),
        "parameters": sum(one.numel() for one in model.vision_encoder.parameters()),
    }
    torch.save(facts, folder / _FACTS)
    num_bytes = {name: (folder / f"{name}.onnx").stat().st_size for name in ("encoder", "decoder")}
    return {"size": SIZE, "operations": facts["operations"], "parameters": facts["parameters"], "bytes": num_bytes}


def eager(context: Context) -> Figures:
    """PyTorch as it is, in 16 bits on a GPU."""
    return _pytorch(context, lambda encode: encode)


def compiled(context: Context) -> Figures:
    """PyTorch with `torch.compile`; without Inductor at tiny size, where its compiler would take longest of all."""
    import torch

    backend = "aot_eager" if context.tiny else "inductor"
    return {"backend": backend} | _pytorch(context, lambda encode: torch.compile(encode, backend=backend))


def onnxruntime(context: Context, replay: str = "") -> Figures:
    """This repository's graphs in ONNX Runtime; with `replay`, recorded as a CUDA graph."""
    import torch

    own_stream(context.device)
    facts, folder = _read_facts(context), _folder(context)
    graph = DeviceGraph(folder / "encoder.onnx", context.device, replay=bool(replay))
    pixels = facts["pixels"].to(context.device)
    outputs = {name: torch.empty(one.shape, device=context.device) for name, one in facts["features"].items()}
    graph.bind({"pixel_values": pixels}, outputs)
    figures = _measured(context, facts, graph.run, lambda: outputs)
    if replay:
        return figures
    decoder = DeviceGraph(folder / "decoder.onnx", context.device)
    side = pixels.shape[-1]
    points, labels = (one.to(context.device) for one in _prompts(side))
    masks = {
        "mask_logits": torch.empty(1, OBJECTS, 4, side // 4, side // 4, device=context.device),
        "iou_scores": torch.empty(1, OBJECTS, 4, device=context.device),
        "object_logits": torch.empty(1, OBJECTS, 1, device=context.device),
    }
    decoder.bind({**outputs, "points_xy": points, "labels": labels}, masks)
    return figures | _decoding(context, facts, decoder.run, lambda: masks["mask_logits"][:, :, 1:])


def _pytorch(context: Context, prepare: Callable[[Any], Any]) -> Figures:
    import torch
    from transformers import Sam2Model

    own_stream(context.device)
    facts = _read_facts(context)
    dtype = torch.float16 if context.device == "cuda" else torch.float32
    model = Sam2Model.from_pretrained(_folder(context) / "checkpoint", dtype=dtype).eval().to(context.device)
    pixels = facts["pixels"].to(context.device, dtype)
    encode = prepare(lambda: _features(model, pixels))
    found: dict[str, torch.Tensor] = {}

    def run() -> None:
        found.update(zip(FEATURES, encode(), strict=True))

    with torch.inference_mode():
        figures = _measured(context, facts, run, lambda: found)
        said: dict[str, torch.Tensor] = {}
        decoding = _decoding(context, facts, lambda: said.update(masks=_decode(model, found)), lambda: said["masks"])
    return figures | {"dtype": str(dtype)} | decoding


def _measured(
    context: Context, facts: dict[str, Any], run: Callable[[], object], found: Callable[[], dict[str, Any]]
) -> Figures:
    """Compares features with float32's, then times the encoder.

    Raises:
        GpuCheckError: they differ by more than 16 bits explain.
    """
    import torch

    run()
    if context.device == "cuda":
        torch.cuda.synchronize()
    errors = {name: _error(found()[name], expected) for name, expected in facts["features"].items()}
    if not all(error <= MAX_ERROR for error in errors.values()):
        raise GpuCheckError(
            f"expected float32's features within {MAX_ERROR}, got errors of {errors}; nothing was timed"
        )
    seconds = seconds_each(Clock(context.device), run, 3 if context.tiny else 30)
    dtype = "float16" if context.device == "cuda" else "float32"
    reached = read_peaks(context).reached(seconds, 2.0 * facts["parameters"], facts["operations"], dtype)
    return {"relative_error": errors, "encoder": reached}


def _decoding(
    context: Context, facts: dict[str, Any], run: Callable[[], object], masks: Callable[[], torch.Tensor]
) -> Figures:
    """The mask decoder's time, and how far its masks are from float32's behind this side's own features."""
    seconds = seconds_each(Clock(context.device), run, 3 if context.tiny else 30)
    return {"decoder_ms": 1e3 * seconds, "mask_error": _error(masks(), facts["masks"])}


def _decode(model: Any, features: dict[str, torch.Tensor]) -> torch.Tensor:
    """The three masks of each box, [1, objects, 3, h, w]."""
    maps = [features[name] for name in FEATURES]
    points, _ = _prompts(4 * maps[0].shape[-1])
    boxes = points[:, :, :2].reshape(1, OBJECTS, 4).to(maps[0].device)
    found: torch.Tensor = model(image_embeddings=maps, input_boxes=boxes, multimask_output=True).pred_masks
    return found


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float().cpu() - theirs).norm() / theirs.norm())


def _features(model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The encoder's three outputs, finest first, as the graphs give them."""
    maps = list(model.get_image_features(pixels, return_dict=True).fpn_hidden_states)
    maps[-1] = maps[-1] + model.no_memory_embedding
    sizes = model.backbone_feature_sizes
    return [one.permute(1, 2, 0).reshape(1, -1, *hw) for one, hw in zip(maps, sizes, strict=True)]


def _prompts(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of three objects as labelled corners, with the one that says nothing more: [1, 3, 3, 2] and [1, 3, 3]."""
    import torch

    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.2, 0.9, 0.6], [0.2, 0.6, 0.7, 0.9]]) * side
    points = torch.cat([boxes.reshape(OBJECTS, 2, 2), torch.zeros(OBJECTS, 1, 2)], dim=1)
    return points[None].contiguous(), torch.tensor([2, 3, -1]).repeat(1, OBJECTS, 1)


def _random_model(context: Context) -> Any:
    if not context.tiny:
        from benchmarks.segmenter_parity import random_segmenter

        return random_segmenter(SIZE)
    from training.segmenter_model import SegmenterSize, build_segmenter

    return build_segmenter(
        SegmenterSize(
            side=64,
            stage_dims=(16, 32, 64, 128),
            stage_blocks=(1, 1, 2, 1),
            stage_heads=(1, 1, 2, 2),
            stage_windows=(4, 2, 4, 2),
            global_blocks=(3,),
            decoder_dim=32,
        )
    ).eval()


def _folder(context: Context) -> Path:
    return context.work / f"segmenter-{context.size}"


def _read_facts(context: Context) -> dict[str, Any]:
    import torch

    path = _folder(context) / _FACTS
    if not path.is_file():
        raise GpuCheckError(f"expected {path}, found none; run the step `graphs` of the stage first")
    facts: dict[str, Any] = torch.load(path, weights_only=True)
    return facts
