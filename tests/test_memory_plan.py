"""The memory plan against measured peaks, and what the doctor makes of it; predictions obey the roofline."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bare_machine import MACHINE, gpu
from onnx import TensorProto, helper, numpy_helper

from segzero_rt.bundle import Bundle
from segzero_rt.engines.record import EngineRecord, ProfileRecord
from segzero_rt.onnx_summary import read_summary
from segzero_rt.operators.library import Operators
from segzero_rt.preflight import memory_plan
from segzero_rt.preflight.memory_plan import MemoryPlan, kv_cache_bytes, plan_memory
from segzero_rt.preflight.prediction import MODULES, Module, Work, predict, question_work
from segzero_rt.preflight.report import plan_report, plan_rows

REPOSITORY = Path(__file__).resolve().parent.parent
_ASK = """
import sys
import numpy as np
from segzero_rt import Prompt, SegZero
from segzero_rt.environment import peak_memory_bytes
pipeline = SegZero.load(sys.argv[1], backend="cpu", threads=1)
picture = np.full((480, 640, 3), 128, np.uint8)
pipeline(picture, "a cup", max_new_tokens=16)
pipeline.segment(picture, [Prompt(box_xyxy=(8, 8, 300, 400))])
print(peak_memory_bytes())
"""


def measured_peak(bundle: Path) -> int:
    """Peak resident memory of a fresh process that loads the bundle and asks it one thing under ONNX Runtime."""
    result = subprocess.run(
        [sys.executable, "-c", _ASK, str(bundle)],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    return int(result.stdout.splitlines()[-1])


@pytest.mark.skipif("SEGZERO_TEST_EMULATED" in os.environ, reason="an emulator's memory counts as the process's own")
@pytest.mark.parametrize("fixture", ["bundle_path", "tiny_bundle_path", "portable_bundle_path"])
def test_the_plan_is_near_the_measured_peak(fixture: str, request: pytest.FixtureRequest) -> None:
    """Within a quarter; an arena grows in steps, and libraries differ from machine to machine."""
    path = request.getfixturevalue(fixture)
    planned = plan_memory(Bundle.open(path)).run_bytes
    measured = measured_peak(path)
    assert 0.75 < planned / measured < 1.25, f"{planned / 2**20:.0f} MiB planned, {measured / 2**20:.0f} MiB measured"


def test_parts_add_up_and_follow_their_causes(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    plan = plan_memory(bundle)
    parts = plan.as_dict()
    assert parts["run_bytes"] == sum(v for n, v in parts.items() if n not in ("run_bytes", "build_peak_bytes"))
    policy = bundle.manifest.policy
    by_hand = 2 * policy.num_layers * policy.num_kv_heads * policy.head_dim * policy.max_length * 4
    assert parts["kv_cache_bytes"] == kv_cache_bytes(policy) == by_hand
    half = dataclasses.replace(policy, cache_dtype="float16")
    assert kv_cache_bytes(half) == by_hand // 2
    longer = dataclasses.replace(
        bundle,
        manifest=dataclasses.replace(
            bundle.manifest, policy=dataclasses.replace(policy, max_length=2 * policy.max_length)
        ),
    )
    assert plan_memory(longer).kv_cache_bytes == 2 * by_hand
    assert plan_memory(longer).run_bytes - plan.run_bytes == by_hand


def test_operators_that_split_products_keep_their_weights_beside(
    tiny_bundle_path: Path, portable_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(path: Path, library: Path | None) -> int:
        chosen = Operators(name="chosen", detail="for the test", path=library)
        monkeypatch.setattr(memory_plan, "resolve_operators", lambda: chosen)
        return plan_memory(Bundle.open(path)).segmenter_weights_bytes

    compiled = Path("operators.so")
    floats = planned(tiny_bundle_path, None)
    assert 1.3 * floats < planned(tiny_bundle_path, compiled) < 2 * floats, "the mask decoder has none"
    assert planned(portable_bundle_path, compiled) == planned(portable_bundle_path, None)


@pytest.mark.parametrize(
    ("stored", "computed", "num_bytes"),
    [("float32", "float32", 4), ("float16", "float32", 4), ("float16", "float16", 2), ("int8", "float32", 2)],
)
def test_engines_keep_weights_as_they_are_computed_with(
    tmp_path: Path, stored: str, computed: str, num_bytes: int
) -> None:
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    weight = numpy_helper.from_array(np.zeros((64, 48), stored), "w")
    cast = helper.make_node("Cast", ["w"], ["wide"], name="wide:Cast", to=types[computed])
    product = helper.make_node("MatMul", ["x", "wide"], ["y"], name="y:MatMul")
    x, y = (helper.make_tensor_value_info(name, types[computed], [1, width]) for name, width in (("x", 64), ("y", 48)))
    model = helper.make_model(helper.make_graph([cast, product], "product", [x], [y], [weight]))
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    assert memory_plan.engine_bytes(path, read_summary(path)) == num_bytes * 64 * 48


@pytest.mark.parametrize(
    ("available", "fits"),
    [pytest.param(8 << 30, True, id="plenty"), pytest.param(90 << 20, False, id="too-little"), (None, True)],
)
def test_what_does_not_fit_is_a_problem(bundle_path: Path, available: int | None, fits: bool) -> None:
    problems: list[str] = []
    machine = dataclasses.replace(MACHINE, memory_available_bytes=available)
    report = plan_report(Bundle.open(bundle_path), machine, problems, with_predictions=False)
    assert report is not None and report["fits"] is fits and bool(problems) is not fits
    assert problems == [] or ("free memory" in problems[0] and "90 MiB" in problems[0])
    json.dumps(report)
    assert dict(plan_rows(report))["memory plan"]


ENGINE = EngineRecord(
    file="engines/x.engine",
    graph="policy/vision.onnx",
    graph_sha256="0" * 64,
    target="tensorrt-rtx",
    library_version="1.7.1.116",
    compute_capabilities=("8.9",),
    platform="linux-x86_64",
    options={"version_compatible": False},
    profiles=(ProfileRecord(name="picture", shapes={}),),
    precisions={"float32": 1},
    gate={"status": "not_run"},
    build_seconds=1.0,
)
ADA = gpu("8.9")


@pytest.mark.parametrize(
    ("machine", "engine", "problem"),
    [
        pytest.param({}, {}, "no CUDA device here", id="no-gpu"),
        pytest.param({"gpus": (ADA,)}, {}, "tensorrt-rtx is not installed", id="no-library"),
        pytest.param(
            {"gpus": (ADA,), "tensorrt": {"tensorrt-rtx": "1.8"}}, {}, "built with tensorrt-rtx 1.7", id="newer"
        ),
        pytest.param(
            {"gpus": (ADA,), "tensorrt": {"tensorrt-rtx": "1.8"}},
            {"options": {"version_compatible": True}},
            None,
            id="vc",
        ),
        pytest.param(
            {"gpus": (dataclasses.replace(ADA, capability="12.0"),), "tensorrt": {"tensorrt-rtx": "1.7.1.116"}},
            {},
            "built for 8.9, this device has 12.0",
            id="another-device",
        ),
        pytest.param({"gpus": (ADA,), "tensorrt": {"tensorrt-rtx": "1.7.1.116"}}, {}, None, id="fits"),
        pytest.param(
            {"gpus": (ADA,), "tensorrt": {"tensorrt-rtx": "1.7.1.116"}}, {"compute_capabilities": ()}, None, id="any"
        ),
    ],
)
def test_engines_say_why_they_cannot_run(
    machine: dict[str, Any], engine: dict[str, Any], problem: str | None, bundle_path: Path
) -> None:
    bundle = Bundle.open(bundle_path)
    record = dataclasses.replace(ENGINE, **engine)
    manifest = bundle.manifest
    listed = dict(manifest.files) | {record.file: next(iter(manifest.files.values()))}
    changed = dataclasses.replace(bundle, manifest=dataclasses.replace(manifest, files=listed, engines=(record,)))
    report = plan_report(changed, dataclasses.replace(MACHINE, **machine), [], with_predictions=False)
    assert report is not None
    found = report["engines"][0]["problem"]
    assert found is None if problem is None else problem in found


def test_predictions_obey_the_roofline(bundle_path: Path) -> None:
    slow = Module(name="slow", memory_bytes=1 << 40, bandwidth=1e9, dense_flops=1e30, capability="8.7")
    narrow = Module(name="narrow", memory_bytes=1, bandwidth=1e30, dense_flops=1e12, capability="8.7")
    bundle = Bundle.open(bundle_path)
    work = question_work(bundle)
    bound_by_memory, bound_by_math = predict(bundle, (slow, narrow))
    for name, stage in work.items():
        assert stage.num_bytes > 0 and stage.flops > 0
        assert math.isclose(bound_by_memory["stages_ms"][name], stage.num_bytes / 1e6, abs_tol=0.01)
        assert math.isclose(bound_by_math["stages_ms"][name], stage.flops / 1e9, abs_tol=0.01)
    assert bound_by_memory["fits"] and not bound_by_math["fits"]
    assert work["prefill"].flops > 100 * work["token"].flops, "a prefill takes many tokens at once"
    assert Work(num_bytes=3e9, flops=0).seconds(slow) == 3.0


def test_every_module_has_a_row_that_says_it_is_a_prediction(bundle_path: Path) -> None:
    report = plan_report(Bundle.open(bundle_path), MACHINE, [], with_predictions=True)
    assert report is not None and "not measured" in report["predictions_note"]
    rows = dict(plan_rows(report))
    for module in MODULES:
        assert "fits" in rows[f"  {module.name}"]
    assert "not measured" in rows["predictions"]


def test_the_plan_has_one_name_for_each_part() -> None:
    plan = MemoryPlan(
        libraries_bytes=1,
        policy_weights_bytes=2,
        kv_cache_bytes=4,
        segmenter_weights_bytes=8,
        segmenter_bytes=16,
        workspace_bytes=32,
        build_peak_bytes=64,
    )
    assert plan.run_bytes == 63 and plan.as_dict()["run_bytes"] == 63


def test_the_preflight_loads_nothing(bundle_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from segzero_rt.cli import main
    from segzero_rt.graph import Graph

    monkeypatch.setattr(Graph, "load", lambda *_, **__: pytest.fail("a graph was loaded"))
    assert main(["doctor", str(bundle_path), "--preflight", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["trial"] is None and document["runs"] is True
    assert {row["module"] for row in document["preflight"]["predictions"]} == {module.name for module in MODULES}
    assert document["preflight"]["memory_plan"]["run_bytes"] > 0
    assert {"memory_available_bytes", "jetpack", "gpus", "driver", "cuda", "tensorrt"} <= set(document["machine"])
