"""Int8 with ranges known beforehand: evening out changes nothing, and no token depends on those after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="writes checkpoints with transformers")
pytest.importorskip("transformers", reason="writes checkpoints with transformers")

import onnx
import onnxruntime
from policy_checkpoints import SIZES, policy_bundle, random_picture

from export.gate import GateLimits
from export.policy import export_policy
from export.policy_checkpoint import PolicyCheckpoint
from export.policy_decoder import build_decoder
from export.policy_embedding import write_token_table
from export.static_int8 import FloatDecoder, Range, _Int8Writer, quantize_decoder
from segzero_rt.policy import Policy

LENGTH = 23


@pytest.fixture(params=[name for name in SIZES if name != "no-windows"])
def decoder(request: pytest.FixtureRequest, policy_folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A decoder's graph in floats, in a folder with its token table."""
    checkpoint = PolicyCheckpoint(policy_folders(request.param))
    write_token_table(checkpoint, tmp_path, storage="float16")
    build_decoder(checkpoint, flavour="ort", storage="float16").save(tmp_path / "decoder.onnx")
    return tmp_path / "decoder.onnx"


def logits(path: Path, length: int = LENGTH) -> np.ndarray:
    """Of every token of one run over noise."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shapes = {one.name: one.shape for one in session.get_inputs()}
    half = shapes["rotary_cos"][1]
    angles = np.random.default_rng(1).uniform(0, 6, (64, half))
    feeds = {
        "inputs_embeds": np.random.default_rng(0).normal(size=(1, LENGTH, shapes["inputs_embeds"][2]))[:, :length],
        "rotary_cos": np.cos(angles),
        "rotary_sin": np.sin(angles),
    }
    for name, shape in shapes.items():
        if name.startswith("past_"):
            feeds[name] = np.zeros((1, shape[1], 64, shape[3]))
    feeds = {name: values.astype(np.float32) for name, values in feeds.items()}
    feeds["logits_rows"] = np.arange(length, dtype=np.int64)[None]
    feeds["seqlens_k"], feeds["total_length"] = np.array([length - 1], np.int32), np.array([length], np.int32)
    return session.run(["logits"], feeds)[0][0]


def test_channels_are_evened_out_without_changing_what_is_computed(decoder: Path, tmp_path: Path) -> None:
    graph = FloatDecoder(decoder)
    rng = np.random.default_rng(2)
    assert len(graph.products) == 1 + 4 * sum(name.startswith("past_key") for name in _inputs(decoder))
    for tensor, products in graph.products.items():
        factors = rng.uniform(0.2, 5, graph.rows(products[0]).shape[0]).astype(np.float32)
        divided = graph.divide(tensor, factors)
        assert divided is not None, f"nothing before {tensor} can divide it"
        for product in products:
            rows = graph.rows(product)
            transposed = rows is not graph.weights[product.input[1]]
            scaled = rows * divided[:, None]
            graph.weights[product.input[1]] = scaled.T if transposed else scaled
    writer = _Int8Writer(graph)
    writer.nodes.extend(graph.nodes)
    (tmp_path / "evened.onnx").write_bytes(writer.model().SerializeToString())
    expected = logits(decoder)
    np.testing.assert_allclose(logits(tmp_path / "evened.onnx"), expected, atol=2e-4 * np.abs(expected).max())


def _inputs(path: Path) -> list[str]:
    return [one.name for one in onnxruntime.InferenceSession(str(path)).get_inputs()]


def _kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def _ranges(path: Path, reach: float) -> dict[str, Range]:
    """As wide for all channels; random weights have no outliers."""
    graph = FloatDecoder(path)
    return {
        tensor: Range(*(np.full(graph.rows(products[0]).shape[0], side * reach, np.float32) for side in (-1, 1)))
        for tensor, products in graph.products.items()
    }


def test_tokens_do_not_depend_on_those_after_them(decoder: Path, tmp_path: Path) -> None:
    quantize_decoder(decoder, tmp_path / "int8.onnx", _ranges(decoder, 4.0))
    whole = logits(tmp_path / "int8.onnx")
    for length in (2, 7, 22):
        np.testing.assert_array_equal(logits(tmp_path / "int8.onnx", length), whole[:length])
    expected = logits(decoder)
    assert np.corrcoef(whole.ravel(), expected.ravel())[0, 1] > 0.7, "a wrong scale would leave nothing"
    biases = sum(name.endswith(".bias") for name in FloatDecoder(decoder).weights)
    assert _kinds(tmp_path / "int8.onnx").count("Add") == _kinds(decoder).count("Add") - biases, "products add them"
    assert (tmp_path / "int8.onnx").stat().st_size < decoder.stat().st_size + (
        decoder.parent / "token_table.bin"
    ).stat().st_size


def test_an_int8_policy_may_guess(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Exported as any; one whose ranges are taken per run may not, and says what it says without guesses."""
    folder = policy_folders("grouped-heads")
    loose = GateLimits(max_vision_error=0.1, max_kl=5.0, max_kl_mean=0.5, min_top1=0.5, same_tokens=False)
    exported = export_policy(
        folder,
        tmp_path,
        storage="int8",
        input_size_hw=(84, 84),
        max_length=300,
        max_new_tokens=20,
        gate_questions=("the red cup",),
        gate_limits=loose,
    )
    assert not (tmp_path / "policy" / "decoder-floats.onnx").exists()
    bundle = policy_bundle(exported, tmp_path)
    guessing = Policy.load(bundle, backend="cpu", threads=1, draft_tokens=5)
    one = Policy.load(bundle, backend="cpu", threads=1, draft_tokens=1)
    for seed in range(4):
        reply = guessing.answer(random_picture(seed), "the red cup")
        assert guessing._rows_independent and reply.counts.drafted >= reply.counts.runs - 1
        assert reply.token_ids == one.answer(random_picture(seed), "the red cup").token_ids
    build_decoder(PolicyCheckpoint(folder), flavour="ort", storage="int8").save(tmp_path / "policy" / "decoder.onnx")
    per_run = Policy.load(bundle, backend="cpu", threads=1, draft_tokens=5)
    reply = per_run.answer(random_picture(0), "the red cup")
    assert per_run._rows_independent is False and reply.counts.drafted == 0
