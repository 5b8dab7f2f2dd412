"""Engines of policies at their true sizes and widths, random weights: slow, since each takes many seconds to build."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from built_engines import built_bytes, parsed

from segzero_rt.bundle import EMBEDDED, Bundle
from segzero_rt.engines.library import Library, find_library
from segzero_rt.engines.profiles import ProfileLimits, axis_lengths
from segzero_rt.graph_spec import GraphSpec

pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
pytest.importorskip("torch", reason="the checkpoints of these tests are made with it")
pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def library() -> Library:
    return find_library("tensorrt-rtx")


def engine_bytes(library: Library, path: Path, spec: GraphSpec, lengths: Mapping[str, Any]) -> int:
    """Parses, checks against the spec and builds; the size of the engine."""
    return built_bytes(parsed(library, path, spec), spec, lengths)


def test_the_tabletop_policy(library: Library, tmp_path: Path) -> None:
    """All graphs of the shipped policy's checkpoint, in the flavour that TensorRT reads."""
    from export.policy_checkpoint import PolicyCheckpoint
    from export.policy_decoder import build_decoder
    from export.policy_embedding import build_embedding, write_token_table
    from export.policy_vision import build_vision
    from segzero_rt.policy import policy_specs

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
        size = engine_bytes(library, tmp_path / f"{name}.onnx", policy_specs(policy)[name], lengths[name])
        assert size > (tmp_path / f"{name}.onnx").stat().st_size, "weights are inside"


WIDTHS_OF_3B = {
    "hidden": 2048,
    "intermediate": 11008,
    "heads": 16,
    "kv_heads": 2,
    "mrope_section": (16, 24, 24),
    "vision_hidden": 1280,
    "vision_intermediate": 3420,
    "vision_heads": 16,
}
LENGTH = 4096


@pytest.fixture(scope="module")
def at_3b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one decoder layer, two blocks of the tower and a vocabulary of 400."""
    from policy_checkpoints import write_checkpoint

    folder = tmp_path_factory.mktemp("at_3b") / "hf"
    write_checkpoint(folder, **WIDTHS_OF_3B, layers=1, vision_depth=2)
    return folder


@pytest.mark.parametrize("flavour", ["portable", "trt11"])
def test_the_decoder_at_the_width_of_3b_with_one_layer(
    flavour: str, library: Library, at_3b: Path, tmp_path: Path
) -> None:
    from export.policy_checkpoint import PolicyCheckpoint
    from export.policy_decoder import build_decoder
    from export.policy_embedding import write_token_table

    checkpoint = PolicyCheckpoint(at_3b)
    write_token_table(checkpoint, tmp_path, storage="float16")
    options = {"max_length": LENGTH} if flavour == "trt11" else {}
    builder = build_decoder(checkpoint, flavour=flavour, storage="float16", **options)
    builder.save(tmp_path / "decoder.onnx")
    one = {"batch": (1, 1, 1), "rows": (1, 1, 1)}
    cache = {"capacity": (256, 1280, LENGTH), "capacity_and_new": (257, 1281, LENGTH + 1)}
    profiles: dict[str, Any] = {"decode": {**one, "new": (1, 1, 1), **cache}}
    if flavour == "trt11":  # its cache is as long as the file says
        profiles = {"prefill": {**one, "new": (1, 1280, LENGTH)}, "decode": {**one, "new": (1, 1, 1)}}
    assert engine_bytes(library, tmp_path / "decoder.onnx", builder.spec, profiles) > 250 << 20


def test_the_tower_at_the_width_of_3b_with_two_blocks(library: Library, at_3b: Path, tmp_path: Path) -> None:
    """840 by 840 pixels: 3600 patches, in 64 windows of up to 64 for one block, all together for the other."""
    from export.policy_checkpoint import PolicyCheckpoint
    from export.policy_vision import build_vision

    builder = build_vision(PolicyCheckpoint(at_3b), flavour="portable", storage="float16", input_size_hw=(840, 840))
    builder.save(tmp_path / "vision.onnx")
    lengths = {"batch": 1, "patches": 3600, "windows": 64, "slots": 64, "tokens": 900}
    profile = {name: (length,) * 3 for name, length in lengths.items()}
    assert engine_bytes(library, tmp_path / "vision.onnx", builder.spec, {"picture": profile}) > 250 << 20
