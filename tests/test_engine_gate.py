"""The gate of engines: its inputs run, and it catches what computes something else.

Only the engine is missing: in its place stands the same graph under ONNX Runtime, or one that was damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from segzero_rt.bundle import Bundle
from segzero_rt.engines.gate import FLOAT32_LIMIT, NARROW_LIMIT, example_inputs, gate_engine, relative_errors
from segzero_rt.engines.profiles import ProfileLimits, axis_lengths, bundle_specs, make_profiles
from segzero_rt.engines.record import EngineRecord
from segzero_rt.errors import EngineError
from segzero_rt.graph import Graph

NAMES = ("vision", "embedding", "decoder", "image_encoder", "mask_decoder", "mask_prompt")


@pytest.fixture(scope="module")
def bundle(portable_bundle_path: Any) -> Bundle:
    return Bundle.open(portable_bundle_path)


def record(bundle: Bundle, name: str, **precisions: int) -> EngineRecord:
    """What a build would plan for the graph, with every axis dynamic that the spec leaves open."""
    path, spec = bundle_specs(bundle.manifest)[name]
    lengths = axis_lengths(bundle.manifest, ProfileLimits())[name]
    loaded = Graph.load(bundle.file(path), spec, backend="cpu")
    static = {i.name: [n if isinstance(n, int) else -1 for n in i.shape] for i in loaded._session.get_inputs()}
    declared = {n: tuple(shape) for n, shape in static.items()}
    return EngineRecord(
        file="engines/x.engine",
        graph=path,
        graph_sha256="0" * 64,
        target="tensorrt",
        library_version="10.3.0",
        compute_capabilities=("8.7",),
        platform="linux-aarch64",
        options={},
        profiles=make_profiles(spec, declared, lengths),
        precisions=precisions or {"float32": 9},
        gate={"status": "not_run"},
        build_seconds=0.0,
    )


class Damaged:
    """A graph whose outputs are changed."""

    def __init__(self, graph: Graph, change: Any) -> None:
        self._graph, self._change = graph, change

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._change(output.copy()) for name, output in self._graph.run(inputs).items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_gates_inputs_fit_the_graph_and_its_profiles(name: str, bundle: Bundle) -> None:
    planned = record(bundle, name)
    path, spec = bundle_specs(bundle.manifest)[name]
    graph = Graph.load(bundle.file(path), spec, backend="cpu")
    sets = example_inputs(bundle, name, planned)
    assert len(sets) == len(planned.profiles)
    for inputs, profile in zip(sets, planned.profiles, strict=True):
        for tensor, (least, _, most) in profile.shapes.items():
            shape = inputs[tensor].shape
            assert all(low <= n <= high for low, n, high in zip(least, shape, most, strict=True)), (tensor, shape)
        outputs = graph.run(inputs)
        assert all(np.isfinite(output).all() and output.any() for output in outputs.values())
    passed = gate_engine(bundle, name, planned, graph)
    assert passed["status"] == "passed" and passed["relative_error"] == 0.0 and passed["limit"] == FLOAT32_LIMIT


def test_the_decode_step_looks_at_what_the_cache_holds(bundle: Bundle) -> None:
    """Rows that are masked must not matter, rows that are held must."""
    path, spec = bundle_specs(bundle.manifest)["decoder"]
    graph = Graph.load(bundle.file(path), spec, backend="cpu")
    step = example_inputs(bundle, "decoder", record(bundle, "decoder"))[1]
    logits = graph.run(step)["logits"]
    held = int((step["attention_bias"][0, 0, 0, :-1] == 0).sum())
    assert 0 < held < step["past_key_0"].shape[2]
    for row, matters in ((held - 1, True), (held, False)):
        changed = step | {"past_value_0": step["past_value_0"].copy()}
        changed["past_value_0"][:, :, row] += 5
        assert np.allclose(graph.run(changed)["logits"], logits, atol=1e-6) is not matters


@pytest.mark.parametrize(
    ("change", "precisions", "passes"),
    [
        pytest.param(lambda x: x * (1 + 0.5 * FLOAT32_LIMIT), {}, True, id="rounding"),
        pytest.param(lambda x: x * 1.01, {}, False, id="too-much-for-float32"),
        pytest.param(lambda x: x * 1.01, {"float32": 3, "float16": 90}, True, id="enough-for-float16"),
        pytest.param(lambda x: x * (1 + 2 * NARROW_LIMIT), {"float16": 90}, False, id="too-much-for-float16"),
        pytest.param(lambda x: x * np.nan, {"float16": 90}, False, id="not-a-number"),
        pytest.param(lambda x: x * np.inf, {}, False, id="overflow"),
        pytest.param(lambda x: x * 0, {}, False, id="nothing"),
        pytest.param(lambda x: np.roll(x, 1, axis=-1), {}, False, id="shifted"),
    ],
)
def test_an_engine_that_differs_is_refused(
    change: Any, precisions: dict[str, int], passes: bool, bundle: Bundle
) -> None:
    path, spec = bundle_specs(bundle.manifest)["embedding"]
    engine: Any = Damaged(Graph.load(bundle.file(path), spec, backend="cpu"), change)
    planned = record(bundle, "embedding", **precisions)
    if passes:
        assert gate_engine(bundle, "embedding", planned, engine)["status"] == "passed"
        return
    with pytest.raises(EngineError, match=r"expected the engine of policy/embedding\.onnx within"):
        gate_engine(bundle, "embedding", planned, engine)


def test_errors_of_odd_outputs() -> None:
    zeros, none = np.zeros(3, np.float32), np.zeros((1, 0, 5), np.float32)
    assert relative_errors({"y": zeros}, {"y": zeros}) == {"y": 0.0}
    assert relative_errors({"y": zeros}, {"y": zeros + 1})["y"] > 1
    assert relative_errors({"y": none}, {"y": none}) == {"y": 0.0}
