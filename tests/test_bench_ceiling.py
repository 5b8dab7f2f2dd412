"""What `segzero bench` holds stages against: work counted on graphs, peaks measured on the spot, energy, pictures."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from segzero_rt.bench.ceiling import Ceiling, measure_ceiling
from segzero_rt.bench.meters import Meter, integrate, readable_zones, tegrastats_watts
from segzero_rt.bench.onnx_session import open_session
from segzero_rt.bench.peaks import Peaks, measure_peaks, product_model
from segzero_rt.bench.plots import DISTRIBUTION, ROOFLINE, WATERFALL, write_plots
from segzero_rt.bench.tasks import make_tasks
from segzero_rt.bench.work import ProfiledNode, StageWork, count_flops, count_work, read_profile
from segzero_rt.bundle import EMBEDDED, Bundle
from segzero_rt.cli import main
from segzero_rt.errors import BackendError, OutputError
from segzero_rt.graph import resolve_backend
from segzero_rt.onnx_summary import computed_types
from segzero_rt.operators.library import resolve_operators

PEAKS = Peaks(flops={"float32": 1e11, "int8": 1e12}, read_rates={1 << 20: 40e9, 1 << 27: 10e9})


def node(operator: str, *inputs: tuple[int, ...], output: tuple[int, ...], dtype: str = "float") -> ProfiledNode:
    return ProfiledNode(operator=operator, dtype=dtype, inputs=inputs, output=output)


@pytest.mark.parametrize(
    ("one", "cached", "expected"),
    [
        pytest.param(node("MatMul", (7, 5), (5, 3), output=(7, 3)), 0, {"float32": 2 * 7 * 5 * 3}, id="product"),
        pytest.param(
            node("MatMul", (2, 4, 7, 5), (2, 4, 5, 3), output=(2, 4, 7, 3)), 0, {"float32": 1680}, id="batch"
        ),
        pytest.param(
            node("Gemm", (7, 5), (3, 5), (3,), output=(7, 3), dtype="float16"), 0, {"float16": 210}, id="16 bits"
        ),
        pytest.param(
            node("MatMulIntegerToFloat", (7, 5), (), (3,), output=(7, 3), dtype="uint8"), 0, {"int8": 210}, id="8 bits"
        ),
        pytest.param(node("MatMulNBits", (1, 64), (9, 2, 16), output=(1, 9)), 0, {"int8": 2 * 64 * 9}, id="4 bits"),
        pytest.param(
            node("Conv", (1, 3, 8, 8), (6, 3, 2, 2), output=(1, 6, 4, 4)), 0, {"float32": 2 * 96 * 12}, id="convolution"
        ),
        pytest.param(  # a depthwise kernel sees one channel
            node("Conv", (1, 6, 8, 8), (6, 1, 3, 3), (6,), output=(1, 6, 8, 8)), 0, {"float32": 6912}, id="depthwise"
        ),
        pytest.param(
            node("ConvTranspose", (1, 8, 4, 4), (8, 2, 2, 2), (2,), output=(1, 2, 8, 8)), 0, {"float32": 2 * 128 * 8},
            id="transposed",
        ),
        pytest.param(
            node("MultiHeadAttention", (1, 10, 16), (1, 20, 16), (1, 20, 16), output=(1, 10, 16)), 0,
            {"float32": 2 * 2 * 10 * 20 * 16}, id="attention",
        ),
        pytest.param(  # three tokens after four: they see 5, 6 and 7
            node("GroupQueryAttention", (1, 3, 32), (1, 1, 99, 8), output=(1, 3, 16)), 4, {"float32": 4 * 18 * 16},
            id="cached attention",
        ),
        pytest.param(node("Softmax", (7, 5), output=(7, 5)), 0, {}, id="no product"),
        pytest.param(
            node("MultiHeadAttention", (1, 10, 16), (1, 20, 16), (1, 20, 16), output=(1, 10, 16), dtype="bfloat16"), 0,
            {"float16": 2 * 2 * 10 * 20 * 16}, id="attention in 16 bits",
        ),
        pytest.param(
            node("Attention", (2, 10, 16), (2, 20, 16), (2, 20, 16), output=(2, 10, 16)), 0,
            {"bfloat16": 2 * 2 * 2 * 10 * 20 * 16}, id="compiled attention",
        ),
        pytest.param(
            node("HeadAttention", (3, 49, 8), (3, 49, 8), (3, 49, 8), output=(3, 49, 8)), 0,
            {"bfloat16": 2 * 2 * 3 * 49 * 49 * 8}, id="compiled attention of a head",
        ),
        pytest.param(node("Attention", (1, 2, 9, 8), (1, 2, 20, 8), output=(1, 2, 9, 8)), 0, {}, id="ONNX's attention"),
        pytest.param(
            node("Mlp", (2, 7, 4), (4,), (4,), (4, 12), (12,), (12, 4), (4,), output=(2, 7, 4)), 0,
            {"bfloat16": 2 * 14 * (48 + 48)}, id="compiled layers",
        ),
        pytest.param(
            node("Int8GatedMlp", (7, 4), (4,), *((4, 12), (12,), (12,)) * 2, (12, 4), (4,), (4,), output=(7, 4)), 0,
            {"int8": 2 * 7 * 3 * 48}, id="compiled gated layers",
        ),
        pytest.param(
            node("SplitMlp", (7, 4), (4,), (4,), (4, 12), (12,), (12, 4), (4,), output=(7, 4)), 0,
            {"bfloat16": 3 * 2 * 7 * (48 + 48)}, id="compiled layers of floats",
        ),
        pytest.param(
            node("SplitLinear", (7, 5), (5, 3), (3,), output=(7, 3)), 0, {"bfloat16": 3 * 210}, id="a split product"
        ),
        pytest.param(node("Split", (7, 6), (2,), output=(7, 3)), 0, {}, id="ONNX's split"),
    ],
)  # fmt: skip
def test_counts_operations_as_by_hand(one: ProfiledNode, cached: int, expected: dict[str, float]) -> None:
    assert count_flops([one], cached_tokens=cached) == expected
    assert count_flops([one, one], cached_tokens=cached) == {kind: 2 * count for kind, count in expected.items()}


def test_counts_the_work_of_a_bundles_graphs(tiny_bundle_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle_path)
    work = count_work(bundle, next(make_tasks(None, 1)))
    assert set(work) == {"vision", "prefill", "token", "mask_encode", "mask_decode"}
    assert all(stage.num_bytes > 0 and sum(stage.flops.values()) > 0 for stage in work.values())
    policy = bundle.manifest.policy
    # A product of the decoder meets every token once; attention comes on top, and logits are asked for once.
    tokens = sum(work["prefill"].flops.values()) / sum(work["token"].flops.values())
    pictures = (policy.input_size_hw[0] // 28) * (policy.input_size_hw[1] // 28)
    assert pictures < tokens < policy.max_length
    assert work["token"].num_bytes > work["prefill"].num_bytes, "the token reads the cache"


def attention_graph(path: Path, computed: int, softmax: int) -> Path:
    """Softmax attention of 7 queries with 5 keys of 3 numbers each behind a projection, by products of one type."""
    onnx = pytest.importorskip("onnx", reason="writes the graph")
    from onnx import TensorProto, helper

    def cast(source: str, name: str, kind: int) -> Any:
        return helper.make_node("Cast", [source], [name], to=kind, name=f"{name}:Cast")

    nodes = [
        cast("x", "queries_in", computed),
        helper.make_node("MatMul", ["queries_in", "weight"], ["queries"], name="queries:MatMul"),
        helper.make_node("Transpose", ["keys"], ["turned"], perm=[1, 0], name="turned:Transpose"),
        helper.make_node("MatMul", ["queries", "turned"], ["scores"], name="scores:MatMul"),
        cast("scores", "wide", softmax),
        helper.make_node("Softmax", ["wide"], ["shares_wide"], name="shares_wide:Softmax"),
        cast("shares_wide", "shares", computed),
        helper.make_node("MatMul", ["shares", "keys"], ["mixed"], name="mixed:MatMul"),
        cast("mixed", "y", TensorProto.FLOAT),
    ]
    weights = [
        helper.make_tensor("weight", computed, [4, 3], np.ones(12)),
        helper.make_tensor("keys", computed, [5, 3], np.ones(15)),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [7, width]) for n, width in (("x", 4), ("y", 3)))
    graph = helper.make_graph(nodes, "attention", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


_FLOAT32, _FLOAT16, _BFLOAT16 = 1, 10, 16
"""ONNX's numbers of types."""


@pytest.mark.parametrize(
    ("computed", "softmax", "kind"),
    [
        pytest.param(_FLOAT32, _FLOAT32, "float32", id="float32"),
        pytest.param(_FLOAT16, _FLOAT16, "float16", id="float16"),
        pytest.param(_FLOAT16, _FLOAT32, "float16", id="float16 but for the softmax"),
    ],
)
def test_counts_a_graph_in_the_type_that_it_computes_in(tmp_path: Path, computed: int, softmax: int, kind: str) -> None:
    """A CPU casts to float32 and back around each product of 16 bits, and its profile names nothing else."""
    path = attention_graph(tmp_path / "graph.onnx", computed, softmax)
    session = open_session(str(path), resolve_backend("cpu"), 1, profile=str(tmp_path / "profile"))
    session.run(None, {"x": np.ones((7, 4), np.float32)})
    (nodes,) = read_profile(session.end_profiling(), computed_types(path))
    assert count_flops(nodes) == {kind: 2 * (7 * 4 * 3 + 7 * 3 * 5 + 7 * 5 * 3)}


def test_types_of_nodes_follow_inputs_weights_and_casts(tmp_path: Path) -> None:
    found = computed_types(attention_graph(tmp_path / "graph.onnx", _BFLOAT16, _FLOAT32))
    assert found == {
        "queries_in:Cast": "float32",
        "queries:MatMul": "bfloat16",
        "turned:Transpose": "bfloat16",
        "scores:MatMul": "bfloat16",
        "wide:Cast": "bfloat16",
        "shares_wide:Softmax": "float32",
        "shares:Cast": "float32",
        "mixed:MatMul": "bfloat16",
        "y:Cast": "bfloat16",
    }


def test_compiled_operators_count_as_the_functions_in_their_place() -> None:
    """The shipped pair has each of them but one, and what they compute does not depend on who computes it."""
    try:
        if resolve_operators().path is None:
            pytest.skip(f"needs the compiled operators: {resolve_operators().detail}")
    except BackendError as error:
        pytest.skip(f"needs the compiled operators: {error}")
    bundle, task = Bundle.open(EMBEDDED), next(make_tasks(None, 1))
    functions, compiled = (count_work(bundle, task, operators=one) for one in (False, True))
    assert {name: sum(work.flops.values()) for name, work in functions.items()} == {
        name: sum(work.flops.values()) for name, work in compiled.items()
    }
    for stage in ("vision", "mask_encode"):
        assert "bfloat16" not in functions[stage].flops
        assert compiled[stage].flops["bfloat16"] > 0
        assert compiled[stage].flops["float32"] < functions[stage].flops["float32"]


def test_a_stage_takes_the_longer_of_reading_and_computing() -> None:
    reading = StageWork(flops={"float32": 1e6}, num_bytes=1 << 20)
    computing = StageWork(flops={"float32": 1e9, "int8": 1e9}, num_bytes=1 << 20)
    large = StageWork(flops={"float32": 1e6}, num_bytes=1 << 30)
    assert reading.ceiling_ms(PEAKS) == pytest.approx((1 << 20) / 40e6)
    assert computing.ceiling_ms(PEAKS) == pytest.approx(10 + 1)
    assert large.ceiling_ms(PEAKS) == pytest.approx((1 << 30) / 10e6), "read from memory, not from a cache"
    assert StageWork(flops={"float16": 1e9}, num_bytes=1).ceiling_ms(PEAKS) == pytest.approx(1), "best known peak"
    assert Peaks.from_json(PEAKS.to_json()) == PEAKS and PEAKS.bandwidth == 10e9
    assert PEAKS.bandwidth_of(5) == 40e9


def test_guesses_are_computed_but_read_once_a_run() -> None:
    work = {
        "token": StageWork(flops={"float32": 1e8}, num_bytes=1 << 20),
        "vision": StageWork(flops={"int8": 1e9}, num_bytes=1),
    }
    ceiling = Ceiling(peaks=PEAKS, work=work)
    fractions = ceiling.fractions({"decode": 100.0, "vision": 4.0, "parse": 1.0}, {"runs": 5.0, "drafted": 20.0})
    assert fractions == {"decode": pytest.approx(25 * 1.0 / 100), "vision": pytest.approx(0.25)}
    assert "decode" not in ceiling.fractions({"decode": 100.0}, {})


@pytest.mark.parametrize(("operator", "types", "dtypes"), [
    ("MatMul", (1, 1, 1), (np.float32, np.float32)), ("MatMulInteger", (2, 3, 6), (np.uint8, np.int8)),
])  # fmt: skip
def test_the_graph_written_by_hand_multiplies(
    operator: str, types: tuple[int, int, int], dtypes: tuple[type, type]
) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 100, (3, 300)).astype(dtypes[0]), rng.integers(-100, 100, (300, 5)).astype(dtypes[1])
    session = open_session(product_model(operator, 3, right, types=types), resolve_backend("cpu"), 1)
    (product,) = session.run(None, {"x": left})
    np.testing.assert_array_equal(product, left.astype(np.int64) @ right.astype(np.int64))


def test_peaks_are_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segzero_rt.bench.peaks._SECONDS", 0.01)
    monkeypatch.setattr("segzero_rt.bench.peaks._SIDES", {"cpu": 256})
    peaks = measure_peaks(resolve_backend("cpu"), 1)
    assert set(peaks.flops) == {"float32", "int8", "float16"} and min(peaks.flops.values()) > 1e8
    rates = [peaks.read_rates[size] for size in sorted(peaks.read_rates)]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 1e7


def test_a_backend_without_a_counter_is_told(tiny_bundle_path: Path) -> None:
    settings = {"bundle": str(tiny_bundle_path), "images": None, "backend": "tensorrt", "threads": 1}
    problem = measure_ceiling(settings)
    assert isinstance(problem, str) and "expected a backend of" in problem


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        pytest.param("RAM 2722/7620MB CPU [1%@729] VDD_IN 5123mW/5040mW VDD_SOC 1002mW/990mW", 5.123, id="Orin Nano"),
        pytest.param("GR3D_FREQ 0% VDD_GPU_SOC 2386mW/2386mW VDD_CPU_CV 795mW/795mW VIN_SYS_5V0 2721mW/2721mW", 5.902,
                     id="AGX Orin"),
        pytest.param("RAM 1/2MB POM_5V_IN 2532/2532 POM_5V_GPU 0/0 POM_5V_CPU 405/405", 2.532, id="JetPack 4"),
        pytest.param("RAM 2722/7620MB CPU [1%@729]", None, id="no rail"),
        pytest.param("", None, id="empty"),
    ],
)  # fmt: skip
def test_reads_power_from_tegrastats(line: str, watts: float | None) -> None:
    assert tegrastats_watts(line) == (None if watts is None else pytest.approx(watts))


def test_energy_is_the_area_under_power() -> None:
    assert integrate([(0.0, 2.0), (1.0, 4.0), (3.0, 4.0)]) == pytest.approx(3 + 8)


class RecordedNvml:
    """The driver's library, as its header says that it is called; 3 J and 2 GB between two looks."""

    def __init__(self) -> None:
        self.millijoules = 1_000_000

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:
        device._obj.value = 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, out: Any) -> int:
        out._obj.value = self.millijoules
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: Any, out: Any) -> int:
        out._obj.used = 2_000_000_000
        return 0


def no_library(name: str) -> Any:
    raise OSError(name)


def test_measures_energy_and_memory_where_the_machine_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()
    zone.mkdir()
    (zone / "energy_uj").write_text("5000000")
    assert readable_zones(tmp_path) == [zone], "a part of a package is in it already"
    monkeypatch.setattr("segzero_rt.bench.meters._SAMPLE_S", 0.001)
    library = RecordedNvml()
    with Meter(load=lambda _: library, powercap=tmp_path) as meter:
        library.millijoules += 3000
        (zone / "energy_uj").write_text("7500000")
        end_s = time.monotonic() + 60
        while meter._peak_bytes is None and time.monotonic() < end_s:
            time.sleep(0.001)
    assert meter.reading.to_json(2) == {
        "joules_per_question": {"nvml": pytest.approx(1.5), "rapl": pytest.approx(1.25)},
        "device_peak_memory_bytes": 2_000_000_000,
    }
    with Meter(load=no_library, powercap=tmp_path / "missing") as meter:
        pass
    assert meter.reading.to_json(1) == {"joules_per_question": None, "device_peak_memory_bytes": None}


def test_a_counter_that_ran_over_gives_no_figure(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "energy_uj").write_text("5000000")
    with Meter(load=no_library, powercap=tmp_path) as meter:
        (zone / "energy_uj").write_text("10")
    assert meter.reading.joules == {}


def bench_document() -> dict[str, Any]:
    percentiles = {"p50": 10.0, "p90": 12.0, "p99": 13.0}
    work = {
        "vision": StageWork(flops={"float32": 1e9}, num_bytes=4e6),
        "token": StageWork(flops={"int8": 1e7}, num_bytes=5e6),
    }
    return {
        "stages_ms": {
            "preprocess": percentiles,
            "vision": percentiles,
            "mask_encode": percentiles,
            "total": percentiles,
        },
        "end_to_end_ms": percentiles,
        "end_to_end_all_ms": [10.0, 9.0, 13.0],
        "stages_apart_ms": {"vision": percentiles, "token": percentiles, "parse": percentiles},
        "ceiling": Ceiling(peaks=PEAKS, work=work).to_json(),
        "environment": {"bundle": {"name": "tabletop"}, "backend": "cpu", "cpu": "some", "cores": 2},
    }


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        pytest.param((), [WATERFALL, DISTRIBUTION, ROOFLINE], id="all"),
        pytest.param(("ceiling",), [WATERFALL, DISTRIBUTION], id="no ceiling"),
        pytest.param(("stages_ms", "stages_apart_ms"), [], id="no single stream"),
    ],
)
def test_draws_what_there_are_figures_for(tmp_path: Path, without: tuple[str, ...], expected: list[str]) -> None:
    pytest.importorskip("matplotlib")
    document = {name: value for name, value in bench_document().items() if name not in without}
    assert write_plots(document, str(tmp_path / "new")) == expected
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(expected)
    for name in expected:
        picture = cv2.imread(str(tmp_path / "new" / name))
        assert picture.shape[1] == 1200 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_refuses_to_draw_what_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "--plot", str(tmp_path / "plots"), "--scenario", "offline", "--scenario", "cold-start"]
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert "--scenario single-stream" in told and "offline, cold-start" in told and told.count("\n") == 1
    assert not (tmp_path / "plots").exists()


def test_says_what_to_install_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--plot", str(tmp_path), "--bundle", "gone"]) == 2
    assert "install 'segzero-rt[plot]'" in capsys.readouterr().err


def test_refuses_a_file_as_a_folder_for_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="expected a folder"):
        write_plots(bench_document(), str(tmp_path / "file"))
