"""Compiled operators against the functions that stand in for them elsewhere, and how one or the other is chosen."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.operators import OPERATORS, operator_function, uses_operators
from segzero_rt.errors import BackendError, GraphError
from segzero_rt.graph import Graph
from segzero_rt.graph_spec import GraphSpec, TensorSpec
from segzero_rt.kernels.build import find_compiler, processor_features
from segzero_rt.operators import DOMAIN, library
from segzero_rt.operators.library import OPERATORS_VARIABLE, installed_library, resolve_operators
from segzero_rt.operators.sources import FEATURES

REPOSITORY = Path(__file__).resolve().parent.parent
NEEDS_OPERATORS = pytest.mark.skipif(
    not (processor_features() >= FEATURES and (find_compiler() or installed_library())),
    reason="there is no processor with AMX, or no C++ compiler",
)
ROUNDING = 2.0**-8
"""Of one number in bfloat16, half a step at most."""
SPLIT_ROUNDING = 2.0**-14
"""Of a product of two numbers that are both taken as the sum of two bfloat16: less than that of it."""

Floats = NDArray[np.float32]


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    library._chosen.cache_clear()
    yield
    library._chosen.cache_clear()


def noise(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model_of(operator: str, inputs: dict[str, Any], shapes: dict[str, list[int | str]], **attributes: Any) -> bytes:
    """A graph of one operator. Inputs that are arrays are its weights, those in `shapes` are given to each run."""
    node = helper.make_node(operator, [*shapes, *inputs], ["y"], domain=DOMAIN, **attributes)
    sides = [f"y{axis}" for axis in range(len(next(iter(shapes.values()))))]
    graph = helper.make_graph(
        [node],
        "one_operator",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sides)],
        [numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[operator_function(operator, 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    contents: bytes = model.SerializeToString()
    return contents


def run(model: bytes, feeds: dict[str, Floats], *, compiled: bool, threads: int = 1) -> Floats:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if compiled:
        options.register_custom_ops_library(str(resolve_operators().path))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    result: Floats = session.run(None, feeds)[0]
    return result


def mlp_weights(width: int, hidden: int, *, int8: bool) -> dict[str, Any]:
    weights = {"norm_scale": 1 + 0.1 * noise(1, width), "norm_bias": 0.1 * noise(2, width)}
    for layer, (rows, columns) in enumerate([(width, hidden), (hidden, width)], start=1):
        values = noise(3 + layer, rows, columns) / math.sqrt(rows)
        if int8:
            scale = np.abs(values).max(axis=0) / 127
            weights |= {f"weight{layer}": np.round(values / scale).astype(np.int8), f"scale{layer}": scale}
        else:
            weights |= {f"weight{layer}": values}
        weights |= {f"bias{layer}": 0.1 * noise(5 + layer, columns)}
    return weights


def mlp_by_definition(x: Floats, weights: dict[str, Any], epsilon: float) -> NDArray[np.float64]:
    """`x + fc2(gelu(fc1(norm(x))))` in float64."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    rows = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon)
    rows = rows * weights["norm_scale"] + weights["norm_bias"]
    for layer in (1, 2):
        weight = weights[f"weight{layer}"].astype(np.float64) * weights.get(f"scale{layer}", 1.0)
        rows = rows @ weight + weights[f"bias{layer}"]
        if layer == 1:
            rows = rows * (1 + np.vectorize(math.erf, otypes=[np.float64])(rows / math.sqrt(2))) / 2
    return x + rows


MLPS = [
    ("one row", 1, 16, 16),
    ("a row short of two tiles", 31, 48, 192),
    ("two tiles", 32, 64, 256),
    ("a row more", 33, 96, 384),
    ("an odd number of columns' tiles", 40, 48, 80),
    ("as the tabletop's third stage", 577, 192, 768),
    ("no rows", 0, 32, 64),
]


LAYERS = [("Mlp", 2 * ROUNDING, 1e-5), ("Int8Mlp", 2 * ROUNDING, 0.1), ("SplitMlp", SPLIT_ROUNDING, 1e-5)]
"""Operator; what it and its function may be off by, beside what is added. "Int8Mlp"'s function rounds rows to whole
numbers of 8 bits, all by the largest."""


@NEEDS_OPERATORS
@pytest.mark.parametrize(
    ("operator", "compiled_off", "function_off"), LAYERS, ids=[operator for operator, *_ in LAYERS]
)
@pytest.mark.parametrize(("name", "rows", "width", "hidden"), MLPS, ids=[name for name, *_ in MLPS])
def test_compiled_hidden_layers_are_nearer_to_their_definition_than_a_rounding(
    name: str, rows: int, width: int, hidden: int, operator: str, compiled_off: float, function_off: float
) -> None:
    weights = mlp_weights(width, hidden, int8=operator == "Int8Mlp")
    model = model_of(operator, weights, {"x": ["rows", width]}, epsilon=1e-6)
    x = 3 * noise(0, rows, width)
    want = mlp_by_definition(x, weights, 1e-6)
    ours = run(model, {"x": x}, compiled=True)
    assert ours.shape == want.shape
    if rows:
        added = np.abs(want - x).max()
        assert np.abs(ours - want).max() < compiled_off * added
        assert np.abs(run(model, {"x": x}, compiled=False) - want).max() < function_off * added
    np.testing.assert_array_equal(ours, run(model, {"x": x}, compiled=True, threads=3))


SPLITS = [
    ("one row", 1, 16, 16),
    ("a row short of two tiles", 31, 48, 80),
    ("two tiles", 32, 64, 32),
    ("a row more", 33, 96, 48),
    ("a row short of a block", 127, 144, 64),
    ("blocks and a row", 257, 32, 144),
    ("deep", 5, 4096, 16),
    ("no rows", 0, 32, 64),
]


@NEEDS_OPERATORS
@pytest.mark.parametrize("biased", [False, True], ids=["product", "linear"])
@pytest.mark.parametrize(("name", "rows", "depth", "columns"), SPLITS, ids=[name for name, *_ in SPLITS])
def test_split_products_keep_twice_the_digits_of_bfloat16(
    name: str, rows: int, depth: int, columns: int, biased: bool
) -> None:
    weights = {"weight": noise(1, depth, columns) / math.sqrt(depth)}
    weights |= {"bias": noise(2, columns)} if biased else {}
    model = model_of("SplitLinear" if biased else "SplitProduct", weights, {"x": ["rows", depth]})
    # numbers of all sizes, so that what is small beside others in its row is not lost
    x = noise(0, rows, depth) * np.exp(noise(3, rows, depth))
    want = x.astype(np.float64) @ weights["weight"] + weights.get("bias", 0.0)
    ours = run(model, {"x": x}, compiled=True)
    assert ours.shape == want.shape
    # each of the summed products by itself, so that none is allowed more since another is large
    allowed = SPLIT_ROUNDING * (np.abs(x).astype(np.float64) @ np.abs(weights["weight"])) + 1e-6 * np.abs(want)
    assert (np.abs(ours - want) <= allowed).all()
    np.testing.assert_array_equal(ours, run(model, {"x": x}, compiled=True, threads=3))
    if want.size:
        np.testing.assert_allclose(run(model, {"x": x}, compiled=False), want, atol=1e-5 * np.abs(want).max())


@NEEDS_OPERATORS
def test_the_split_activation_holds_over_floats_whole_range() -> None:
    width = 16
    identity = {"norm_scale": np.zeros(width, np.float32), "norm_bias": np.zeros(width, np.float32)}
    steps = np.concatenate([np.linspace(-40, 40, 4001), [-1e30, -1e5, -1e-30, 0, 1e-30, 1e5, 1e30]]).astype(np.float32)
    for values in np.array_split(np.pad(steps, (0, -len(steps) % width)), -(-len(steps) // width)):
        layers = {"weight1": np.zeros((width, width), np.float32), "bias1": values}
        layers |= {"weight2": np.eye(width, dtype=np.float32), "bias2": np.zeros(width, np.float32)}
        model = model_of("SplitMlp", identity | layers, {"x": ["rows", width]}, epsilon=1e-6)
        ours = run(model, {"x": np.zeros((1, width), np.float32)}, compiled=True)[0]
        want = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in values.astype(float)]
        np.testing.assert_allclose(ours, want, rtol=SPLIT_ROUNDING, atol=1e-6)


def gated_weights(width: int, hidden: int) -> dict[str, Any]:
    weights: dict[str, Any] = {"norm_scale": 1 + 0.1 * noise(1, width)}
    for seed, (layer, rows, columns) in enumerate(
        [("gate_", width, hidden), ("up_", width, hidden), ("", hidden, width)]
    ):
        values = noise(3 + seed, rows, columns) / math.sqrt(rows)
        scale, last = np.abs(values).max(axis=0) / 127, "" if layer else "2"
        weights[f"{layer}weight{last}"] = np.round(values / scale).astype(np.int8)
        weights |= {f"{layer}scale{last}": scale, f"{layer}bias{last}": 0.1 * noise(9 + seed, columns)}
    return weights


def gated_by_definition(x: Floats, weights: dict[str, Any], epsilon: float) -> NDArray[np.float64]:
    """`x + down(silu(gate(norm(x))) * up(norm(x)))` in float64."""
    x = np.asarray(x, np.float64)
    rows = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + epsilon) * weights["norm_scale"]

    def linear(rows: NDArray[np.float64], layer: str, last: str = "") -> NDArray[np.float64]:
        weight = weights[f"{layer}weight{last}"].astype(np.float64) * weights[f"{layer}scale{last}"]
        product: NDArray[np.float64] = rows @ weight + weights[f"{layer}bias{last}"]
        return product

    gate = linear(rows, "gate_")
    return x + linear(gate / (1 + np.exp(-gate)) * linear(rows, "up_"), "", "2")


@NEEDS_OPERATORS
@pytest.mark.parametrize(("name", "rows", "width", "hidden"), MLPS, ids=[name for name, *_ in MLPS])
def test_compiled_gated_layers_are_nearer_to_their_definition_than_a_rounding(
    name: str, rows: int, width: int, hidden: int
) -> None:
    weights = gated_weights(width, hidden)
    model = model_of("Int8GatedMlp", weights, {"x": ["rows", width]}, epsilon=1e-6)
    x = 3 * noise(0, rows, width)
    want = gated_by_definition(x, weights, 1e-6)
    ours = run(model, {"x": x}, compiled=True)
    assert ours.shape == want.shape
    if rows:
        added = np.abs(want - x).max()
        assert np.abs(ours - want).max() < 3 * ROUNDING * added
        assert np.abs(run(model, {"x": x}, compiled=False) - want).max() < 0.1 * added
    np.testing.assert_array_equal(ours, run(model, {"x": x}, compiled=True, threads=3))


@NEEDS_OPERATORS
def test_gates_far_from_zero_are_open_or_shut() -> None:
    width, far = 16, 300.0  # where a power of e leaves float32's range
    weights = gated_weights(width, width)
    weights |= {"gate_weight": np.zeros((width, width), np.int8), "gate_bias": np.full(width, -far, np.float32)}
    model = model_of("Int8GatedMlp", weights, {"x": ["rows", width]}, epsilon=1e-6)
    x = noise(0, 5, width)
    np.testing.assert_allclose(run(model, {"x": x}, compiled=True), x + weights["bias2"], atol=1e-6)
    weights["gate_bias"] = np.full(width, far, np.float32)
    model = model_of("Int8GatedMlp", weights, {"x": ["rows", width]}, epsilon=1e-6)
    want = gated_by_definition(x, weights, 1e-6)
    np.testing.assert_allclose(run(model, {"x": x}, compiled=True), want, atol=3 * ROUNDING * np.abs(want).max())


def attention_by_definition(query: Floats, key: Floats, value: Floats, heads: int, scale: float) -> Floats:
    def cut(x: Floats) -> NDArray[np.float64]:
        return x.astype(np.float64).reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(0, 2, 1, 3)

    scores = cut(query) @ cut(key).transpose(0, 1, 3, 2) * scale
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = shares / shares.sum(axis=-1, keepdims=True) @ cut(value)
    return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(*query.shape[:2], value.shape[2]), np.float32)


ATTENTIONS = [
    ("one query, one key", (1, 1, 1), 1, 16, 16),
    ("a window", (3, 64, 64), 1, 48, 48),
    ("a pooled window", (5, 4, 16), 1, 96, 48),
    ("keys that fill no tile", (2, 33, 17), 2, 32, 48),
    ("a tile and a key", (1, 16, 33), 4, 48, 48),
    ("wide heads", (1, 20, 40), 1, 192, 1040),
    ("as the tabletop's whole map", (1, 576, 576), 4, 48, 48),
    ("no pictures", (0, 4, 4), 1, 16, 16),
]


@NEEDS_OPERATORS
@pytest.mark.parametrize(
    ("name", "sizes", "heads", "key_width", "value_width"), ATTENTIONS, ids=[name for name, *_ in ATTENTIONS]
)
def test_compiled_attention_is_near_to_its_definition(
    name: str, sizes: tuple[int, int, int], heads: int, key_width: int, value_width: int
) -> None:
    batch, queries, keys = sizes
    operator = "HeadAttention" if heads == 1 else "Attention"
    wide, wide_value = heads * key_width, heads * value_width
    shapes: dict[str, list[int | str]] = {"query": ["b", "q", wide], "key": ["b", "k", wide]}
    scale = key_width**-0.5
    model = model_of(operator, {}, shapes | {"value": ["b", "k", wide_value]}, num_heads=heads, scale=scale)
    feeds = {
        "query": 2 * noise(0, batch, queries, wide),
        "key": 2 * noise(1, batch, keys, wide),
        "value": noise(2, batch, keys, wide_value),
    }
    want = attention_by_definition(**feeds, heads=heads, scale=scale)
    ours = run(model, feeds, compiled=True)
    assert ours.shape == want.shape
    # scores of some tens, whose rounding the exponential enlarges
    np.testing.assert_allclose(ours, want, atol=8 * ROUNDING * max(np.abs(feeds["value"]).max(initial=0), 1))
    np.testing.assert_allclose(ours, run(model, feeds, compiled=True, threads=3), atol=0)
    if batch and key_width == value_width:
        np.testing.assert_allclose(run(model, feeds, compiled=False), want, atol=1e-4)


@NEEDS_OPERATORS
def test_scores_beyond_the_exponentials_range_and_keys_of_zeros_are_no_matter() -> None:
    shapes: dict[str, list[int | str]] = {name: ["b", "n", 16] for name in ("query", "key", "value")}
    model = model_of("HeadAttention", {}, shapes, num_heads=1, scale=1.0)
    query, value = np.full((1, 2, 16), 1e4, np.float32), noise(0, 1, 2, 16)
    key = np.stack([np.full((1, 16), 1e4, np.float32), np.full((1, 16), -1e4, np.float32)], axis=1)
    ours = run(model, {"query": query, "key": key, "value": value}, compiled=True)
    np.testing.assert_allclose(ours, np.repeat(value[:, :1], 2, axis=1), atol=ROUNDING * np.abs(value).max())
    ours = run(model, {"query": query, "key": np.zeros_like(key), "value": value}, compiled=True)
    np.testing.assert_allclose(ours, np.repeat(value.mean(axis=1, keepdims=True), 2, axis=1), atol=2 * ROUNDING)


REFUSED = [
    ("a width that 16 does not divide", mlp_weights(24, 32, int8=False), 24, "16 divides"),
    (
        "layers that do not fit",
        mlp_weights(32, 64, int8=False) | {"weight2": noise(0, 32, 32)},
        32,
        "fit",
    ),
    ("a bias of another length", mlp_weights(32, 64, int8=False) | {"bias1": noise(0, 32)}, 32, "vector"),
]
FLOAT_MLPS = ("Mlp", "SplitMlp")


@NEEDS_OPERATORS
@pytest.mark.parametrize("operator", FLOAT_MLPS)
@pytest.mark.parametrize(("name", "weights", "width", "says"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_layers_that_the_kernels_cannot_take_are_refused_when_a_graph_is_loaded(
    tmp_path: Path, name: str, weights: dict[str, Any], width: int, says: str, operator: str
) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(model_of(operator, weights, {"x": ["rows", width]}, epsilon=1e-6))
    x = TensorSpec(name="x", dtype="float32", shape=("rows", width))
    y = TensorSpec(name="y", dtype="float32", shape=("rows", width))
    with pytest.raises(GraphError, match=says):
        Graph.load(path, GraphSpec(name="one_operator", inputs=(x,), outputs=(y,)), backend="cpu")


def test_each_operator_has_a_function_of_its_own() -> None:
    functions = [operator_function(name, 17) for name in OPERATORS]
    assert [function.name for function in functions] == [*OPERATORS]
    assert all(function.domain == DOMAIN and function.node for function in functions)


def test_a_file_says_whether_it_holds_operators(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(model_of("Mlp", mlp_weights(16, 16, int8=False), {"x": ["rows", 16]}, epsilon=1e-6))
    assert uses_operators(path)
    model = onnx.load(path)
    del model.graph.node[:]
    path.write_bytes(model.SerializeToString())
    assert not uses_operators(path)


def test_the_reference_can_be_forced_and_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPERATORS_VARIABLE, "reference")
    chosen = resolve_operators()
    assert (str(chosen), chosen.path) == ("reference", None)
    monkeypatch.setenv(OPERATORS_VARIABLE, "fastest")
    with pytest.raises(BackendError, match="auto, reference, compiled, got 'fastest'"):
        resolve_operators()


def test_another_processor_runs_the_functions_and_forcing_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "processor_features", lambda: FEATURES - {"amx_bf16"})
    monkeypatch.delenv(OPERATORS_VARIABLE, raising=False)
    assert resolve_operators().path is None and "amx_bf16" in resolve_operators().detail
    monkeypatch.setenv(OPERATORS_VARIABLE, "compiled")
    with pytest.raises(BackendError, match="lacks amx_bf16"):
        resolve_operators()


def test_without_a_compiler_the_functions_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "processor_features", lambda: FEATURES)
    monkeypatch.setattr(library, "installed_library", lambda: None)
    monkeypatch.delenv(OPERATORS_VARIABLE, raising=False)
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert "found neither" in resolve_operators().detail


def test_a_damaged_library_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "operators.so"
    damaged.write_bytes(b"\x7fELF")
    monkeypatch.setattr(library, "processor_features", lambda: FEATURES)
    monkeypatch.setattr(library, "installed_library", lambda: damaged)
    monkeypatch.delenv(OPERATORS_VARIABLE, raising=False)
    assert resolve_operators().path is None and "the system says" in resolve_operators().detail


@NEEDS_OPERATORS
def test_a_library_of_other_sources_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = tmp_path / f"_operators{library.sysconfig.get_config_var('EXT_SUFFIX')}"
    built.write_bytes(Path(str(resolve_operators().path)).read_bytes())
    monkeypatch.setattr(library, "HERE", tmp_path)
    assert installed_library() == built
    monkeypatch.setattr(library, "source_digest", lambda: "0" * 24)
    assert installed_library() is None


def test_importing_it_loads_neither_the_runtime_nor_a_library() -> None:
    code = "import sys, segzero_rt.operators.library; assert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, env={**os.environ})
