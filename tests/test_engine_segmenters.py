"""Engines of the shipped segmenter, and of every published one at 1024 x 1024, random weights: slow, seconds each."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from built_engines import built_bytes, layer_types, parsed
from numpy.typing import NDArray
from onnx import TensorProto

from segzero_rt.engines.library import Library, find_library
from segzero_rt.graph_spec import GraphSpec

if TYPE_CHECKING:
    from transformers import Sam2Model

pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
torch = pytest.importorskip("torch", reason="the checkpoints of these tests are made with it")

from export.edgetam import edgetam_model  # noqa: E402 - needs torch's absence to skip first
from export.segmenter_sizes import HIERA_SIZES, LARGE, TINY, HieraSize  # noqa: E402
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


def made_up_peaks(model: onnx.ModelProto, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """As `channel_peaks`: alike for products of one width, so that those of one tensor share its codes."""
    widths = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.name.endswith(".weight")}
    products = [node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    return {
        name.removesuffix(".weight"): np.linspace(1, 2, widths[name], dtype=np.float32)
        for name in products
        if name in widths
    }


@pytest.mark.parametrize(("size", "codes"), [(TINY, 4 * 12 + 1), (LARGE, 4 * 48)], ids=["hiera_t", "hiera_l"])
def test_the_image_encoder_in_explicit_int8(
    size: HieraSize, codes: int, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `segzero export --flavour portable --storage int8` writes it, but with ranges made up: neither nodes nor sizes
    depend on their values, and to measure them on one picture takes the largest a minute and 10 GB.

    A block has codes of four tensors: what it reads, what attention gives out, and what both its hidden layer's
    products read. Its first also go to the product that widens the residual, at the start of three stages; but where
    windows of 14 reach beyond the map, as at tiny's last, that one reads rows before zeros fill those windows.
    """
    from export.segmenter import _write_in_int8

    monkeypatch.setattr("export.segmenter.channel_peaks", made_up_peaks)
    model, path = segmenter(size), tmp_path / "encoder.onnx"
    spec = segmenter_specs(model).encoder
    _write_in_int8(model, path, [np.empty(0, np.float32)], "portable")
    del model
    graph = parsed(library, path, spec)
    num_blocks, found = sum(size.blocks), layer_types(graph)
    assert found["QuantizeLinear", "int8"] == graph.precisions()["int8"] == codes
    assert found["DequantizeLinear", "float32"] == codes + 6 * num_blocks + 3, "those, and of each weight"
    stored = [tensor for tensor in onnx.load(str(path)).graph.initializer if tensor.data_type == TensorProto.INT8]
    numbers, position_bytes = sum(math.prod(tensor.dims) for tensor in stored), 4 * (1024 // 4) ** 2 * size.width
    path.unlink()
    engine_bytes = built_bytes(graph, spec, {"picture": ONE})
    assert numbers + position_bytes < engine_bytes < 2 * numbers + position_bytes, "float16's has more than this"


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
