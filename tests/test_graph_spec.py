"""The specs hold names, shapes and dtypes together; what differs is refused, with both sides named."""

from __future__ import annotations

import pytest

from segzero_rt.errors import GraphError
from segzero_rt.graph_spec import (
    DECODER_FLAVOURS,
    GraphSpec,
    TensorSpec,
    decoder_spec,
    embedding_spec,
    vision_spec,
)

SIZES = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "hidden_size": 64, "vocab_size": 100}
TOY = GraphSpec(
    name="toy",
    inputs=(TensorSpec("x", "float32", ("batch", 4)), TensorSpec("n", "int64", ("batch",))),
    outputs=(TensorSpec("y", "float32", ("batch", 2)),),
)
GOOD_INPUTS = [("x", "float32", ["batch", 4]), ("n", "int64", ["batch"])]
GOOD_OUTPUTS = [("y", "float32", ["batch", 2])]


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        pytest.param("", "float32", (1,), id="no-name"),
        pytest.param("x", "float33", (1,), id="unknown-dtype"),
        pytest.param("x", "float32", (0,), id="zero-length"),
        pytest.param("x", "float32", (-1,), id="negative-length"),
        pytest.param("x", "float32", ("",), id="nameless-dimension"),
        pytest.param("x", "float32", (True,), id="bool-length"),
        pytest.param("x", "float32", (1.5,), id="broken-length"),
    ],
)
def test_a_tensor_that_makes_no_sense_is_refused(name: str, dtype: str, shape: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TensorSpec(name, dtype, shape)  # type: ignore[arg-type]


def test_a_graph_names_each_tensor_once() -> None:
    tensor = TensorSpec("x", "float32", (1,))
    with pytest.raises(ValueError, match="once"):
        GraphSpec(name="g", inputs=(tensor, tensor), outputs=(TensorSpec("y", "float32", (1,)),))
    with pytest.raises(ValueError, match="inputs and outputs"):
        GraphSpec(name="g", inputs=(), outputs=(tensor,))


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        pytest.param([("z", "float32", ["b", 4]), GOOD_INPUTS[1]], GOOD_OUTPUTS, "z", id="renamed-input"),
        pytest.param(GOOD_INPUTS[::-1], GOOD_OUTPUTS, "n, x", id="inputs-swapped"),
        pytest.param(GOOD_INPUTS[:1], GOOD_OUTPUTS, "expected inputs x, n", id="input-missing"),
        pytest.param([("x", "float16", ["b", 4]), GOOD_INPUTS[1]], GOOD_OUTPUTS, "float16", id="other-dtype"),
        pytest.param([("x", "float32", ["b", 5]), GOOD_INPUTS[1]], GOOD_OUTPUTS, "5", id="other-length"),
        pytest.param([("x", "float32", ["b", 4, 1]), GOOD_INPUTS[1]], GOOD_OUTPUTS, "4, 1", id="other-rank"),
        pytest.param(GOOD_INPUTS, [("y", "float32", ["b", 3])], "3", id="other-output-length"),
        pytest.param(GOOD_INPUTS, [*GOOD_OUTPUTS, ("w", "float32", [1])], "w", id="one-output-more"),
    ],
)
def test_a_file_that_differs_is_refused(inputs: list, outputs: list, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        TOY.check_declared(inputs, outputs)


def test_a_file_may_name_its_dynamic_dimensions_as_it_likes() -> None:
    TOY.check_declared([("x", "float32", ["N", 4]), ("n", "int64", [None])], GOOD_OUTPUTS)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        pytest.param({"x": (2, 4)}, "expected inputs", id="missing"),
        pytest.param({"x": (2, 4), "n": (2,), "m": (1,)}, "expected inputs", id="unknown"),
        pytest.param({"x": (2, 5), "n": (2,)}, r"\[2, 5\]", id="static-length"),
        pytest.param({"x": (2, 4), "n": (3,)}, "batch = 2", id="batches-disagree"),
        pytest.param({"x": (4,), "n": (1,)}, r"\[4\]", id="rank"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        TOY.check_shapes(shapes)


def test_dynamic_lengths_come_back_by_name() -> None:
    assert TOY.check_shapes({"x": (7, 4), "n": (7,)}) == {"batch": 7}
    assert TOY.dynamic_axes == {"x": {0: "batch"}, "n": {0: "batch"}, "y": {0: "batch"}}
    assert not TOY.tensor("x").static
    assert TensorSpec("s", "float32", (1, 2)).static
    with pytest.raises(KeyError, match="nothing"):
        TOY.tensor("nothing")


@pytest.mark.parametrize("flavour", DECODER_FLAVOURS)
def test_every_decoder_has_batch_new_tokens_and_picked_logits(flavour: str) -> None:
    spec = decoder_spec(flavour=flavour, max_length=77, **SIZES)
    assert spec.tensor("inputs_embeds").shape == ("batch", "new", 64)
    assert spec.tensor("logits_rows").shape == ("batch", "rows")
    assert spec.tensor("logits").shape == ("batch", "rows", 100)
    cache = [tensor for tensor in spec.inputs if tensor.name.startswith("past_")]
    assert [tensor.name for tensor in cache[:3]] == ["past_key_0", "past_value_0", "past_key_1"]
    assert len(cache) == len(spec.outputs) - 1 == 6
    capacity = 77 if flavour == "trt11" else "capacity"
    assert {tensor.shape for tensor in cache} == {("batch", 2, capacity, 16)}
    assert len(spec.in_place) == (0 if flavour == "portable" else 6)
    for output, source in spec.in_place.items():
        assert spec.tensor(output).shape == spec.tensor(source).shape
    rows = {tensor.shape[2] for tensor in spec.outputs[1:]}
    assert rows == ({"new"} if flavour == "portable" else {capacity}), "in place, or only the new rows: never a copy"


def test_an_unknown_flavour_is_refused() -> None:
    with pytest.raises(ValueError, match="ort, portable"):
        decoder_spec(flavour="fancy", **SIZES)


def test_vision_and_embedding_carry_the_batch_first() -> None:
    for spec in (vision_spec(patch_dim=588, head_dim=32, hidden_size=64), embedding_spec(hidden_size=64)):
        assert spec.inputs[0].shape[0] == spec.outputs[0].shape[0] == "batch"
        assert spec.outputs[0].shape[-1] == 64
