"""Engines of policies at their true sizes and widths, random weights: slow, some seconds each."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_engines import built_bytes, layer_types, parsed

from segzero_rt.bundle import EMBEDDED, Bundle
from segzero_rt.engines.builder import BuildOptions
from segzero_rt.engines.library import Library, find_library
from segzero_rt.engines.profiles import ProfileLimits, axis_lengths
from segzero_rt.positions import window_index

pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
pytest.importorskip("torch", reason="the checkpoints of these tests are made with it")

from benchmarks.random_policy import SIZES, write_policy
from export.policy_checkpoint import PolicyCheckpoint
from export.policy_decoder import build_decoder
from export.policy_embedding import build_embedding, write_token_table
from export.policy_graphs import PolicyGraphWriter, Precision
from export.policy_vision import build_vision
from export.qdq import Reach
from segzero_rt.policy import policy_specs

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def library() -> Library:
    return find_library("tensorrt-rtx")


def test_the_tabletop_policy(library: Library, tmp_path: Path) -> None:
    """All graphs of the shipped policy's checkpoint, in the flavour that TensorRT reads."""
    checkpoint = PolicyCheckpoint(REPOSITORY / "training/checkpoints/tabletop/policy")
    manifest = Bundle.open(EMBEDDED).manifest
    policy = dataclasses.replace(manifest.policy, flavour="portable")
    write_token_table(checkpoint, tmp_path, storage="float16")
    builders = {
        "embedding": build_embedding(checkpoint, storage="float16"),
        "vision": build_vision(checkpoint, flavour="portable", storage="float16", input_size_hw=policy.input_size_hw),
        "decoder": build_decoder(checkpoint, flavour="portable", storage="float16"),
    }
    lengths = axis_lengths(dataclasses.replace(manifest, policy=policy), ProfileLimits())
    for name, builder in builders.items():
        builder.save(tmp_path / f"{name}.onnx")
        spec = policy_specs(policy)[name]
        size = built_bytes(parsed(library, tmp_path / f"{name}.onnx", spec), spec, lengths[name])
        assert size > (tmp_path / f"{name}.onnx").stat().st_size, "weights are inside"


LENGTH = 4096
VOCABULARY = 400
"""So few tokens that the widths take the time."""
LAYERS = {"qwen2-vl-2b": 1, "qwen2.5-vl-3b": 1, "qwen2.5-vl-7b": 1, "qwen3-vl-2b": 2, "qwen3-vl-4b": 2}
"""Qwen3-VL's first layers take more from the picture than the last does."""
NARROW_TOWERS = {"qwen2_vl": {"mlp_ratio": 1}}
"""What keeps a tower small that is only written, where a family does not say `intermediate_size`."""
DECODERS = [
    ("qwen2.5-vl-3b", "portable", "float32"),
    ("qwen2.5-vl-3b", "trt11", "float32"),
    *((name, flavour, "float16") for name in SIZES for flavour in ("portable", "trt11")),
]
TOWERS = [("qwen2.5-vl-3b", "float32"), *((name, "float16") for name in SIZES if name != "qwen3-vl-2b")]
"""Qwen3-VL-2B's is that of 4B but for the width that it gives out."""
LEAST_OF_FILE = {"float32": 1.8, "float16": 0.95}
"""What an engine that computes in this has at least, beside the bytes of its file, whose weights have 16 bits."""


def at_width(name: str, folder: Path, *, layers: int, **changes: Any) -> PolicyCheckpoint:
    """A checkpoint at the widths of a published size, random weights, few layers and as few blocks of its tower."""
    write_policy(dataclasses.replace(SIZES[name], vocab=VOCABULARY, **changes), None, folder, layers=layers)
    return PolicyCheckpoint(folder)


def decoder_profiles(flavour: str) -> dict[str, Any]:
    """Prefill and decode over a cache of up to `LENGTH` tokens."""
    one = {"batch": (1, 1, 1), "rows": (1, 1, 1)}
    profiles: dict[str, Any] = {"prefill": {**one, "new": (1, 1280, LENGTH)}, "decode": {**one, "new": (1, 1, 1)}}
    if flavour == "portable":  # trt11's cache is as long as the file says
        for profile in profiles.values():
            profile |= {"capacity": (256, 1280, LENGTH)}
            profile["capacity_and_new"] = tuple(map(sum, zip(profile["capacity"], profile["new"], strict=True)))
    return profiles


@pytest.mark.parametrize(("name", "flavour", "computed"), DECODERS)
def test_layers_of_every_decoder_at_its_true_width(
    name: str, flavour: str, computed: str, library: Library, tmp_path: Path
) -> None:
    """In float16 norms stay in float32, and no product does."""
    narrow = NARROW_TOWERS.get(SIZES[name].family, {"intermediate_size": 64})
    checkpoint = at_width(name, tmp_path / "hf", layers=LAYERS[name], vision=narrow)
    write_token_table(checkpoint, tmp_path, storage="float16")
    options: dict[str, Any] = {"max_length": LENGTH} if flavour == "trt11" else {}
    builder = build_decoder(checkpoint, flavour=flavour, storage="float16", computed=computed, **options)
    path = tmp_path / "decoder.onnx"
    builder.save(path)
    graph = parsed(library, path, builder.spec)
    found = layer_types(graph)
    assert {dtype for operator, dtype in found if operator in ("MatMul", "Gemm")} == {computed}
    assert {dtype for operator, dtype in found if operator in ("ReduceMean", "Sqrt", "RMSNormalization")} == {"float32"}
    profiles = decoder_profiles(flavour)
    file_bytes = path.stat().st_size
    shutil.rmtree(tmp_path / "hf")  # pytest keeps folders, and these are large
    path.unlink()
    assert built_bytes(graph, builder.spec, profiles) > file_bytes * LEAST_OF_FILE[computed]


@pytest.mark.parametrize(
    ("codes", "rounded", "capability"),
    [("int8", {"int8": 4}, ()), ("fp8", {"float8": 4}, ("8.9",)), ("nvfp4", {}, ("12.0",))],
    ids=["int8", "fp8", "nvfp4"],
)
def test_a_layer_of_3b_in_explicit_codes(
    codes: str, rounded: dict[str, int], capability: tuple[str, ...], library: Library, tmp_path: Path
) -> None:
    """Activations of the four places that products read have codes too, but in nvfp4; weights keep theirs."""
    checkpoint = at_width("qwen2.5-vl-3b", tmp_path / "hf", layers=1, vision={"intermediate_size": 64})
    widths = {"qkv": 2048, "o": 2048, "gate": 2048, "up": 2048, "down": 11008}
    reach = {f"decoder/layers.0/{n}": Reach(np.ones(width, np.float32), 4.0) for n, width in widths.items()}
    graphs = PolicyGraphWriter(
        checkpoint,
        tmp_path,
        Precision(computed="float16", codes=codes),
        flavour="portable",
        input_size_hw=(840, 840),
        max_length=LENGTH,
        reach=reach if rounded else None,
    )
    graphs.plan()
    graphs.write()
    spec, path = graphs.builders["decoder"].spec, tmp_path / "decoder.onnx"
    graph = parsed(library, path, spec)
    found = graph.precisions()
    assert {dtype: found.get(dtype) for dtype in rounded} == rounded
    file_bytes = path.stat().st_size
    numbers = 2048 * (2560 + 2048) + 3 * 2048 * 11008
    assert file_bytes < 1.1 * numbers * (9 / 16 if codes == "nvfp4" else 1)
    shutil.rmtree(tmp_path / "hf")
    options = BuildOptions(compute_capabilities=capability)
    assert 0.95 < built_bytes(graph, spec, decoder_profiles("portable"), options) / file_bytes < 1.4, "no floats"


@pytest.mark.parametrize(("name", "computed"), TOWERS)
def test_two_blocks_of_every_tower_at_its_true_width(
    name: str, computed: str, library: Library, tmp_path: Path
) -> None:
    """900 tokens a picture: 840 by 840 pixels, for Qwen3-VL 960 by 960.

    Qwen2.5-VL's first block looks at 64 windows of up to 64 patches each, its second at all 3600 at once, as do both of
    the other families.
    """
    checkpoint = at_width(name, tmp_path / "hf", layers=2, intermediate=64)
    vision = checkpoint.vision
    cell = vision.patch_size * vision.merge_size
    options: dict[str, Any] = {"computed": computed, "input_size_hw": (30 * cell, 30 * cell)}
    builder = build_vision(checkpoint, flavour="portable", storage="float16", **options)
    path = tmp_path / "vision.onnx"
    builder.save(path)
    graph = parsed(library, path, builder.spec)
    found = layer_types(graph)
    assert {dtype for operator, dtype in found if operator == "Gemm"} == {computed}
    counts = window_index((30, 30), vision.window_size // cell)[1]
    lengths = {"batch": 1, "patches": 3600, "windows": len(counts), "slots": 4 * int(counts.max()), "tokens": 900}
    file_bytes = path.stat().st_size
    shutil.rmtree(tmp_path / "hf")
    path.unlink()
    profile = {axis: (length,) * 3 for axis, length in lengths.items()}
    assert built_bytes(graph, builder.spec, {"picture": profile}) > file_bytes * LEAST_OF_FILE[computed]
