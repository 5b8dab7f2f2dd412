"""The gate that takes one layer at a time, and precisions other than float32: what holds, and what must be caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

import onnx
import torch
from policy_checkpoints import policy_bundle, random_picture, write_checkpoint
from test_policy_streaming import changed, in_shards, writer

from export.gate import EXACT, FOUR_BITS, default_limits
from export.gate_layers import gate_policy_layers
from export.graph_builder import GraphBuilder
from export.lazy_weight import Weight
from export.policy import export_policy
from export.policy_checkpoint import PolicyCheckpoint
from export.policy_graphs import PolicyGraphWriter, Precision
from export.weight_encoding import Int4Encoding
from segzero_rt.errors import BackendError, ExportError
from segzero_rt.graph import Graph
from segzero_rt.graph_spec import GraphSpec, TensorSpec
from segzero_rt.manifest import PolicyManifest
from segzero_rt.operators.library import OPERATORS_VARIABLE, resolve_operators
from segzero_rt.policy import Policy

OPTIONS = {"input_size_hw": (280, 280), "max_length": 700, "max_new_tokens": 24, "gate_layers": True}
ANY = replace(FOUR_BITS, max_vision_error=2.0, max_decoder_error=2.0, max_kl=99.0, max_kl_mean=99.0, min_top1=0.0)
"""Limits that no graph of random weights is beyond."""


@pytest.mark.parametrize(
    ("sizes", "flavour"),
    [("grouped-heads", "ort"), ("grouped-heads", "portable"), ("untied", "ort"), ("no-windows", "portable")],
)
def test_every_layer_equals_pytorch(
    policy_folders: Callable[[str], Path], tmp_path: Path, sizes: str, flavour: str
) -> None:
    gate = export_policy(policy_folders(sizes), tmp_path, flavour=flavour, external=True, **OPTIONS).gate
    assert gate["layers"] == 3 + 1 + 2 + 1 + 2, "blocks, merger, layers, norm, and both ends"
    assert gate["vision_error"] < 1e-5
    assert gate["decoder_error"] < 5e-5
    assert gate["top1"] == 1.0
    assert not list(tmp_path.rglob("*.part*")), "nothing is left of the parts"


@pytest.mark.parametrize(
    ("ending", "named"),
    [
        ("blocks.0.mlp.down_proj.weight", "vision/blocks.1"),
        ("blocks.2.attn.qkv.weight", "vision/merger"),
        ("merger.mlp.2.weight", "vision/end"),
        ("layers.0.self_attn.v_proj.weight", "decoder/layers.1"),
        ("layers.1.mlp.up_proj.weight", "decoder/norm"),
        ("embed_tokens.weight", "decoder/layers.0"),
    ],
)
def test_the_layer_behind_a_changed_weight_is_named(
    policy_folders: Callable[[str], Path], tmp_path: Path, ending: str, named: str
) -> None:
    """The graphs against a checkpoint in which one tensor has another sign."""
    source = policy_folders("grouped-heads")
    exported = export_policy(source, tmp_path / "out", **OPTIONS)
    graphs = writer(source, tmp_path / "out" / "policy")
    graphs.plan()
    graphs.write()

    def negate(weights: dict[str, torch.Tensor]) -> None:
        weights[next(key for key in sorted(weights) if key.endswith(ending))].neg_()

    other = PolicyCheckpoint(changed(source, tmp_path / "hf", negate))
    with pytest.raises(ExportError, match=f"what enters {named} by"):
        gate_policy_layers(other, exported.manifest, graphs, limits=EXACT)


# --- float16 -------------------------------------------------------------------------------------------------------


def planted(source: Path, folder: Path, ending: str, scale: float) -> Path:
    """A checkpoint one of whose products reaches beyond float16, while its weights do not."""

    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights[next(key for key in sorted(weights) if key.endswith(ending))].mul_(scale)

    return changed(source, folder, enlarge)


def test_a_graph_computed_in_float16_keeps_what_needs_more(
    policy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    exported = export_policy(
        policy_folders("grouped-heads"), tmp_path, flavour="portable", computed="float16", **OPTIONS
    )
    assert exported.gate["vision_error"] < 1e-2
    assert exported.gate["kl_mean"] < 1e-4
    assert exported.manifest.cache_dtype == "float16"
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for name in ("vision", "decoder"):
        model = onnx.shape_inference.infer_shapes(onnx.load(str(exported.files[f"policy/{name}.onnx"])))
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        by_operator = {
            operator: {types[node.output[0]] for node in model.graph.node if node.op_type == operator}
            for operator in ("MatMul", "Softmax", "ReduceMean", "Sqrt", "Sub")
        }
        assert by_operator["Softmax"] == {half}
        assert half in by_operator["MatMul"]
        assert by_operator["ReduceMean"] == by_operator["Sqrt"] == {whole}, "statistics of norms"
        assert by_operator["Sub"] == {whole}, "rotary embeddings"


def test_a_float16_cache_answers(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Through the whole host code: the cache is of the graph's precision, and replies are those of float32."""
    folder = policy_folders("grouped-heads")
    half = export_policy(folder, tmp_path / "half", flavour="portable", computed="float16", **OPTIONS)
    whole = export_policy(folder, tmp_path / "whole", flavour="portable", **OPTIONS)
    picture = random_picture(3)
    logits = []
    for exported, root in ((half, tmp_path / "half"), (whole, tmp_path / "whole")):
        policy = Policy.load(policy_bundle(exported, root), backend="cpu", threads=1)
        view = policy.look(picture)
        embeds = policy.embed(policy.question_tokens("the red cup"))
        logits.append(view.cache.extend(embeds, np.array([[embeds.shape[1] - 1]])))
    difference = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[1])
    assert 0 < difference < 2e-2


@pytest.mark.parametrize(
    ("ending", "scale", "product"),
    [
        ("blocks.1.mlp.down_proj.weight", 6e4, "vision/blocks.1/down"),
        ("blocks.2.attn.proj.weight", 6e4, "vision/blocks.2/proj"),
        ("layers.0.mlp.down_proj.weight", 2e4, "decoder/layers.0/down"),
        ("layers.1.self_attn.o_proj.weight", 4e4, "decoder/layers.1/o"),
    ],
)
def test_an_activation_beyond_float16_is_caught_and_its_layer_named_and_kept(
    policy_folders: Callable[[str], Path], tmp_path: Path, ending: str, scale: float, product: str
) -> None:
    source = planted(policy_folders("grouped-heads"), tmp_path / "hf", ending, scale)
    options = {"flavour": "portable", "computed": "float16", **OPTIONS}
    with pytest.raises(ExportError, match=f"{product} reaches .* --float32-product {product}"):
        export_policy(source, tmp_path / "half", **options)
    kept = export_policy(source, tmp_path / "kept", float32_products=[product], **options)
    assert kept.gate["vision_error"] < 2e-2


@pytest.mark.parametrize(
    ("ending", "product", "storage"),
    [
        ("blocks.1.attn.qkv.weight", "vision/blocks.1/q", "int8"),
        ("merger.mlp.0.weight", "vision/merger/fc1", "float16"),
        ("layers.0.self_attn.v_proj.weight", "decoder/layers.0/qkv", "int8"),
        ("layers.1.mlp.down_proj.weight", "decoder/layers.1/down", "float16"),
    ],
)
def test_the_gate_of_whole_replies_names_it_too(
    policy_folders: Callable[[str], Path], tmp_path: Path, ending: str, product: str, storage: str
) -> None:
    """Before a graph is written: what a CPU makes of such a graph says little, and nothing of the layer."""
    source = planted(policy_folders("grouped-heads"), tmp_path / "hf", ending, 6e4)
    options = {**OPTIONS, "gate_layers": False, "max_new_tokens": 4, "gate_questions": ("the red cup",)}
    with pytest.raises(ExportError, match=f"{product} reaches .* --float32-product {product}"):
        export_policy(source, tmp_path / "half", flavour="portable", computed="float16", storage=storage, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"computed": "float16"}, "flavour portable"),
        ({"computed": "float16", "flavour": "portable", "storage": "float32"}, "stored as float16"),
        ({"computed": "float64"}, "float32, float16"),
        ({"storage": "int3"}, "int4"),
        ({"storage": "int4", "flavour": "portable"}, "flavour ort"),
        ({"float32_products": ["vision/blocks.1/down"]}, "computed in float16"),
        (
            {"computed": "float16", "flavour": "portable", "float32_products": ["vision/blocks.9/down"]},
            "vision/blocks.9/down",
        ),
        ({"computed": "float16", "flavour": "portable", "float32_products": ["blocks.1/down"]}, "as vision/"),
    ],
)
def test_precisions_that_no_graph_has_are_refused(
    policy_folders: Callable[[str], Path], tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_policy(policy_folders("grouped-heads"), tmp_path, **{**OPTIONS, **options})  # type: ignore[arg-type]


# --- fewer bits ----------------------------------------------------------------------------------------------------


def unpacked(encoding: Int4Encoding) -> np.ndarray:
    """What the numbers and scales of an encoding stand for, float32 [out, in]."""
    parts: list[list[np.ndarray]] = [[], []]
    for index, values in encoding.pieces():
        parts[index].append(values)
    numbers, scales = np.concatenate(parts[0]), np.concatenate(parts[1])
    both = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*scales.shape, 32).astype(np.float32)
    whole: np.ndarray = ((both - 8) * scales[..., None].astype(np.float32)).reshape(len(scales), -1)
    return whole[:, : encoding.weight.shape[1]]


@pytest.mark.parametrize("shape", [(3, 32), (1, 33), (70, 96), (5, 31), (2, 1)], ids=str)
def test_four_bits_are_within_half_a_step(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[0, :32] = 0.0
    got = unpacked(Int4Encoding("w", Weight.of(values), name="w", scale_name="s"))
    blocks = np.pad(values, ((0, 0), (0, -shape[1] % 32))).reshape(shape[0], -1, 32)
    step = np.repeat(np.abs(blocks).max(axis=2) / 8, 32, axis=1)[:, : shape[1]]
    # Numbers near the other end of the range, +8 steps, have no code and take +7: a whole step at most.
    assert (np.abs(got - values) <= step * 1.01).all()
    assert np.mean(np.abs(got - values) <= step * 0.51) > 0.9
    assert (got[0, :32] == 0).all()


def test_onnx_runtime_reads_four_bits_as_they_are_meant(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(40, 96)).astype(np.float32)
    x = np.random.default_rng(2).normal(size=(5, 96)).astype(np.float32)
    spec = GraphSpec(
        name="product",
        inputs=(TensorSpec("x", "float32", ("rows", 96)),),
        outputs=(TensorSpec("y", "float32", ("rows", 40)),),
    )
    builder = GraphBuilder(spec, storage="int4")
    builder.node("Identity", [builder.linear("x", "w", values)], output="y")
    builder.save(tmp_path / "graph.onnx")
    got = Graph.load(tmp_path / "graph.onnx", spec, backend="cpu", threads=1).run({"x": x})["y"]
    expected = x @ unpacked(Int4Encoding("w", Weight.of(values), name="w", scale_name="s")).T
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < 2e-2, "the other factor is rounded to 8 bits"
    assert np.linalg.norm(got - x @ values.T) / np.linalg.norm(expected) > 2 * error


def test_a_policy_of_four_bits_answers_and_is_small(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Random weights, so that what it says means nothing: it must run, in the precision asked for, and be smaller."""
    source = policy_folders("untied")
    loose = replace(FOUR_BITS, max_decoder_error=1.2, max_kl_mean=2.0)
    four = export_policy(source, tmp_path / "four", storage="int4", gate_limits=loose, **OPTIONS)
    half = export_policy(source, tmp_path / "half", storage="float16", **OPTIONS)
    sizes = [exported.files["policy/decoder.onnx"].stat().st_size for exported in (four, half)]
    assert sizes[0] < 0.5 * sizes[1]
    operators = {node.op_type for node in onnx.load(str(four.files["policy/decoder.onnx"])).graph.node}
    assert "MatMulNBits" in operators
    policy = Policy.load(policy_bundle(four, tmp_path / "four"), backend="cpu", threads=1)
    assert policy.answer(random_picture(1), "the red cup", max_new_tokens=5).token_ids


def test_a_bfloat16_checkpoint_loses_nothing_when_stored_as_it_is(
    policy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    source = in_shards(policy_folders("grouped-heads"), tmp_path / "hf", torch.bfloat16)
    gate = export_policy(source, tmp_path / "out", storage="bfloat16", **OPTIONS).gate
    assert gate["limits"]["max_decoder_error"] == EXACT.max_decoder_error
    assert gate["decoder_error"] < 5e-5


def test_limits_follow_what_was_lost() -> None:
    assert default_limits("float16", lossless=True) == EXACT
    looser = [default_limits(storage, lossless=False).max_decoder_error for storage in ("float16", "bfloat16", "int4")]
    assert looser == sorted(looser)
    assert EXACT.max_decoder_error < default_limits("float16", lossless=True, computed="float16").max_decoder_error


def test_weights_are_read_by_rows_and_stacked() -> None:
    parts = [np.arange(12.0).reshape(4, 3), np.arange(100.0, 106.0).reshape(2, 3), np.full((1, 3), 7.0)]
    stacked = Weight.stacked([Weight.of(part) for part in parts])
    whole = np.concatenate(parts)
    for start in range(7):
        for stop in range(start + 1, 8):
            np.testing.assert_array_equal(stacked.rows(start, stop), whole[start:stop])
    np.testing.assert_array_equal(stacked.part(3, 6).rows(1, 3), whole[4:6])


def test_parts_of_a_graph_keep_its_own_operators(tmp_path: Path) -> None:
    """Heads of sixteen are attended by an operator of this package's, which a graph defines beside its nodes."""
    write_checkpoint(tmp_path / "hf", vision_hidden=64, vision_heads=4)
    options = {**OPTIONS, "input_size_hw": (84, 84), "storage": "int4", "gate_questions": ("the red cup",)}
    loose = replace(FOUR_BITS, max_vision_error=0.3, max_decoder_error=1.2, max_kl_mean=2.0, min_top1=0.0)
    exported = export_policy(tmp_path / "hf", tmp_path / "out", external=True, gate_limits=loose, **options)
    assert onnx.load(str(exported.files["policy/vision.onnx"]), load_external_data=False).functions
    assert exported.gate["method"] == "layer by layer"


@pytest.fixture
def eight_bits(tmp_path: Path) -> tuple[PolicyCheckpoint, PolicyManifest, PolicyGraphWriter]:
    """A checkpoint whose tower attends by an operator of this package's, and its graphs in int8 with their manifest."""
    write_checkpoint(tmp_path / "hf", vision_hidden=64, vision_heads=4)
    options = {**OPTIONS, "input_size_hw": (84, 84)}
    manifest = export_policy(tmp_path / "hf", tmp_path / "out", storage="int8", gate_limits=ANY, **options).manifest
    precision = Precision(storage="int8")
    checkpoint = PolicyCheckpoint(tmp_path / "hf")
    graphs = PolicyGraphWriter(checkpoint, tmp_path / "out/policy", precision, flavour="ort", input_size_hw=(84, 84))
    graphs.plan()
    graphs.write()
    return checkpoint, manifest, graphs


@pytest.mark.parametrize("operators", ["compiled", "reference"])
def test_both_builds_of_an_operator_are_held_to_the_limits(
    operators: str,
    eight_bits: tuple[PolicyCheckpoint, PolicyManifest, PolicyGraphWriter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a graph says of an operator is spoiled: kernels do not read that, and other processors would."""
    monkeypatch.setenv(OPERATORS_VARIABLE, operators)
    try:
        resolve_operators()
    except BackendError as error:
        pytest.skip(f"needs the compiled operators: {error}")
    checkpoint, manifest, graphs = eight_bits
    limits = replace(ANY, max_vision_error=0.3)
    sound = gate_policy_layers(checkpoint, manifest, graphs, limits=limits)
    assert 0 < sound["vision_error"] < 0.3 and sound["layers"] == 3 + 1 + 2 + 1 + 2, "however many builds there are"
    path = graphs.folder / "vision.onnx"
    model = onnx.load(path, load_external_data=False)
    (attention,) = [function for function in model.functions if function.name == "Attention"]
    attention.node[0].input[2] = "key"  # in the values' place
    onnx.save(model, path)
    behind = " without compiled operators" if operators == "compiled" else ""
    with pytest.raises(ExportError, match=rf"what enters vision/(blocks\.\d|merger|end){behind} by"):
        gate_policy_layers(checkpoint, manifest, graphs, limits=limits)
