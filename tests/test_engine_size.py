"""Engines of graphs at their true sizes and widths, random weights: slow, since each takes many seconds to build."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from segzero_rt.bundle import EMBEDDED, Bundle
from segzero_rt.engines.builder import BuildOptions, ParsedGraph, parse_graph
from segzero_rt.engines.library import Library, find_library
from segzero_rt.engines.profiles import ProfileLimits, axis_lengths, make_profiles
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
    graph = parse_graph(library, path)
    assert isinstance(graph, ParsedGraph), [str(refusal) for refusal in graph]
    graph.check(spec)
    profiles = make_profiles(spec, graph.declared_inputs(), lengths)
    engine = graph.build(profiles, BuildOptions(), timing_cache=None, progress=lambda phase, share: None)
    for name in (*spec.input_names, *spec.output_names):
        assert name.encode() in bytes(engine)
    return len(engine)


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


def test_sam_2_1_tiny_at_its_true_size(library: Library, tmp_path: Path) -> None:
    """38.9 M parameters, 1024 by 1024 pixels: image encoder and mask decoder."""
    import torch
    from transformers import Sam2Config, Sam2Model

    from export.segmenter import export_mask_decoder
    from export.segmenter_encoder import build_image_encoder
    from export.segmenter_specs import segmenter_specs

    torch.manual_seed(0)
    model = Sam2Model(Sam2Config()).eval()
    specs = segmenter_specs(model)
    build_image_encoder(model, specs.encoder, flavour="portable", storage="float16").save(tmp_path / "encoder.onnx")
    export_mask_decoder(model, tmp_path / "decoder.onnx", storage="float16", flavour="portable")
    batch = {"batch": (1, 1, 1)}
    size = engine_bytes(library, tmp_path / "encoder.onnx", specs.encoder, {"picture": batch})
    assert size > 100 << 20, "27 M parameters in float32"
    prompts = {"prompts": {**batch, "objects": (1, 1, 16), "points": (2, 5, 16)}}
    assert engine_bytes(library, tmp_path / "decoder.onnx", specs.decoder, prompts) > 10 << 20


def test_qwen2_5_vl_at_the_width_of_3b_with_one_layer(library: Library, tmp_path: Path) -> None:
    """Hidden 2048, inner 11008, 16 heads on 2; one decoder layer and a vocabulary of 400."""
    from policy_checkpoints import write_checkpoint

    from export.policy_checkpoint import PolicyCheckpoint
    from export.policy_decoder import build_decoder
    from export.policy_embedding import write_token_table
    from segzero_rt.graph_spec import decoder_spec

    sizes = {"hidden": 2048, "heads": 16, "kv_heads": 2, "layers": 1, "mrope_section": (16, 24, 24)}
    write_checkpoint(tmp_path / "hf", **sizes, intermediate=11008)
    checkpoint = PolicyCheckpoint(tmp_path / "hf")
    write_token_table(checkpoint, tmp_path, storage="float16")
    build_decoder(checkpoint, flavour="portable", storage="float16").save(tmp_path / "decoder.onnx")
    spec = decoder_spec(
        flavour="portable", num_layers=1, num_kv_heads=2, head_dim=128, hidden_size=2048, vocab_size=400
    )
    decode = {"batch": (1, 1, 1), "new": (1, 1, 1), "rows": (1, 1, 1), "capacity": (256, 1280, 4096)}
    decode["capacity_and_new"] = (257, 1281, 4097)
    assert engine_bytes(library, tmp_path / "decoder.onnx", spec, {"decode": decode}) > 250 << 20
