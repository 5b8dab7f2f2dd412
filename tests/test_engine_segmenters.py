"""Engines of the shipped segmenter, and of every published one at 1024 x 1024, random weights: slow, seconds each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from built_engines import built_bytes, layer_types, parsed

from segzero_rt.engines.library import Library, find_library
from segzero_rt.graph_spec import GraphSpec

if TYPE_CHECKING:
    from transformers import Sam2Model

pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
torch = pytest.importorskip("torch", reason="the checkpoints of these tests are made with it")

from export.edgetam import edgetam_model  # noqa: E402 - needs torch's absence to skip first
from export.segmenter_sizes import HIERA_SIZES, HieraSize  # noqa: E402
from export.segmenter_specs import segmenter_specs  # noqa: E402

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
ONE = {"batch": (1, 1, 1)}


@pytest.fixture(scope="module")
def library() -> Library:
    return find_library("tensorrt-rtx")


def segmenter(size: HieraSize) -> Sam2Model:
    from transformers import Sam2Model

    torch.manual_seed(0)
    return Sam2Model(size.config()).eval()


def written_encoder(make: Callable[[], Sam2Model], path: Path, computed: str) -> GraphSpec:
    """Writes the image encoder as `segzero export --flavour portable --segmenter-computed` does; gives its spec."""
    import onnx

    from export.segmenter_encoder import build_image_encoder
    from export.segmenter_precision import in_16_bits

    model = make()
    spec = segmenter_specs(model).encoder
    if computed == "float32":
        build_image_encoder(model, spec, flavour="portable", storage="float16").save(path)
    else:
        exact = build_image_encoder(model, spec, flavour="portable", storage="float32").model()
        del model  # the largest takes 0.9 GB, as often as it is held
        onnx.save(in_16_bits(exact, computed), str(path))
    return spec


def decoder_bytes(library: Library, model: Sam2Model, path: Path) -> int:
    """Writes, parses and builds the mask decoder: up to 16 objects of up to 16 points each."""
    from export.segmenter import export_mask_decoder

    spec = segmenter_specs(model).decoder
    export_mask_decoder(model, path, storage="float16", flavour="portable")
    prompts = {"prompts": {**ONE, "objects": (1, 1, 16), "points": (2, 5, 16)}}
    return built_bytes(parsed(library, path, spec), spec, prompts)


@pytest.mark.parametrize("computed", ["float32", "float16"])
def test_the_shipped_segmenter(computed: str, library: Library, tmp_path: Path) -> None:
    """Image encoder and mask decoder of its checkpoint; it never learnt to take masks."""
    from export.segmenter_checkpoint import load_checkpoint

    model = load_checkpoint(REPOSITORY / "training/checkpoints/tabletop/segmenter")
    path = tmp_path / "encoder.onnx"
    spec = written_encoder(lambda: model, path, computed)
    graph = parsed(library, path, spec)
    assert {dtype for name, dtype in layer_types(graph) if name in ("MatMul", "Gemm", "Conv")} == {computed}
    assert built_bytes(graph, spec, {"picture": ONE}) > 0.95 * path.stat().st_size
    assert decoder_bytes(library, model, tmp_path / "decoder.onnx") > (tmp_path / "decoder.onnx").stat().st_size


@pytest.mark.parametrize("computed", ["float32", "float16"])
@pytest.mark.parametrize("size", HIERA_SIZES, ids=lambda size: size.name)
def test_the_image_encoder_of_every_size_of_sam_2(
    size: HieraSize, computed: str, library: Library, tmp_path: Path
) -> None:
    """2.0's and 2.1's differ in their weights alone. In float16 all but products stays in float32, in every block."""
    path = tmp_path / "encoder.onnx"
    spec = written_encoder(lambda: segmenter(size), path, computed)
    graph = parsed(library, path, spec)
    num_blocks, found = sum(size.blocks), layer_types(graph)
    assert found["Softmax", "float32"] == num_blocks
    assert found["LayerNormalization", "float32"] == 2 * num_blocks
    assert found["Erf", "float32"] == num_blocks, "hidden layers"
    for operator in ("MatMul", "Gemm", "Conv"):
        assert {dtype for name, dtype in found if name == operator} == {computed}
    file_bytes = path.stat().st_size  # large weights in 16 bits, whatever computes with them
    path.unlink()  # pytest keeps folders, and these are large
    assert built_bytes(graph, spec, {"picture": ONE}) > file_bytes * (1.8 if computed == "float32" else 0.95)


@pytest.mark.parametrize("computed", ["float32", "float16"])
def test_the_image_encoder_of_edgetam(computed: str, library: Library, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "encoder.onnx"
    spec = written_encoder(edgetam_model, path, computed)
    graph = parsed(library, path, spec)
    assert {dtype for name, dtype in layer_types(graph) if name == "Conv"} == {computed}
    assert built_bytes(graph, spec, {"picture": ONE}) > path.stat().st_size * (1.5 if computed == "float32" else 0.95)


def test_mask_decoder_and_mask_prompt_which_all_of_them_share(library: Library, tmp_path: Path) -> None:
    from export.segmenter import export_mask_prompt

    shapes = []
    with torch.device("meta"):
        for model in (*(segmenter(size) for size in HIERA_SIZES), edgetam_model()):
            parts = {"decoder": model.mask_decoder, "prompt": model.prompt_encoder}
            shapes.append({f"{part} {n}": t.shape for part, of in parts.items() for n, t in of.state_dict().items()})
    assert all(other == shapes[0] for other in shapes[1:])
    model = segmenter(HIERA_SIZES[0])
    assert decoder_bytes(library, model, tmp_path / "decoder.onnx") > 1.8 * (tmp_path / "decoder.onnx").stat().st_size
    spec = segmenter_specs(model).mask_prompt
    export_mask_prompt(model, tmp_path / "mask_prompt.onnx", storage="float16")
    graph = parsed(library, tmp_path / "mask_prompt.onnx", spec)
    assert layer_types(graph)["Conv", "float32"] == 3
    assert built_bytes(graph, spec, {"picture": ONE}) > 0
