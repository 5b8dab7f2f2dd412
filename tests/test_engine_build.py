"""Engines really built by TensorRT-RTX, which needs no GPU for that, from graphs that are exported here."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segzero_rt.bundle import Bundle
from segzero_rt.engines.builder import BuildOptions, ParsedGraph, parse_graph
from segzero_rt.engines.library import Library, find_library
from segzero_rt.engines.make import build_engines
from segzero_rt.engines.profiles import ProfileLimits, axis_lengths, bundle_specs, make_profiles
from segzero_rt.errors import BundleError, EngineError
from segzero_rt.graph_spec import GraphSpec, TensorSpec

pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def library() -> Library:
    return find_library("tensorrt-rtx")


@pytest.fixture
def bundle(portable_bundle_path: Path, tmp_path: Path) -> Bundle:
    """A copy that may be changed."""
    return Bundle.open(shutil.copytree(portable_bundle_path, tmp_path / "bundle"))


def build(bundle: Bundle, library: Library, *graphs: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"options": BuildOptions(), "limits": ProfileLimits(), "gpu": None} | changes
    return build_engines(bundle, library, graphs=graphs, **arguments)


def test_every_graph_is_built_and_recorded(bundle: Bundle, library: Library) -> None:
    seen: list[str] = []

    def progress(graph: str) -> Callable[[str, float], None]:
        return lambda phase, share: seen.append(f"{graph} {share:.2f}")

    report = build(bundle, library, progress=progress)
    assert not report.refused and not report.kept
    engines = {engine.graph: engine for engine in Bundle.open(bundle.root).manifest.engines}
    assert set(engines) == {path for path, _ in bundle_specs(bundle.manifest).values()}
    for engine in engines.values():
        data = (bundle.root / engine.file).read_bytes()
        assert engine.target == "tensorrt-rtx" and engine.library_version == library.version
        assert engine.gate["status"] == "not_run" and engine.compute_capabilities == ()
        spec = next(spec for path, spec in bundle_specs(bundle.manifest).values() if path == engine.graph)
        for name in (*spec.input_names, *spec.output_names):
            assert name.encode() in data, f"{engine.file} does not hold the name {name}"
    assert [profile.name for profile in engines["policy/decoder.onnx"].profiles] == ["prefill", "decode"]
    shares = [float(line.split()[1]) for line in seen if line.startswith("decoder ")]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0


def test_the_parsed_networks_have_the_inputs_and_outputs_of_the_specs(bundle: Bundle, library: Library) -> None:
    lengths = axis_lengths(bundle.manifest, ProfileLimits(objects=7, points=9))
    for name, (path, spec) in bundle_specs(bundle.manifest).items():
        graph = parse_graph(library, bundle.file(path))
        assert isinstance(graph, ParsedGraph)
        graph.check(spec)
        assert [(n, d) for n, d, _ in graph.inputs] == [(tensor.name, tensor.dtype) for tensor in spec.inputs]
        for profile in make_profiles(spec, graph.declared_inputs(), lengths[name]):
            dynamic = {n for n, shape in graph.declared_inputs().items() if -1 in shape}
            assert set(profile.shapes) == dynamic
            for shapes in profile.shapes.values():
                assert all(-1 not in shape for shape in shapes)
            for at in range(3):  # each of the three must be a set of shapes that the graph's spec allows together
                whole = {n: profile.shapes[n][at] if n in dynamic else s for n, s in graph.declared_inputs().items()}
                spec.check_shapes(whole)


def test_profiles_cover_what_the_runtime_asks_of_the_decoder(bundle: Bundle) -> None:
    policy = bundle.manifest.policy
    lengths = axis_lengths(bundle.manifest, ProfileLimits(batch=2))["decoder"]
    assert lengths["prefill"]["new"][::2] == (1, policy.max_length)
    assert lengths["decode"]["new"] == (1, 1, 1)
    assert lengths["prefill"]["rows"] == (0, 1, 1), "a prefix is read without logits"
    assert lengths["decode"]["capacity"][2] == policy.max_length
    assert lengths["decode"]["batch"] == (1, 1, 2)
    one = axis_lengths(bundle.manifest, ProfileLimits(batch=2, separate=False))
    assert set(one["embedding"]) == {"prefill"} and set(one["decoder"]) == {"any"}
    assert one["decoder"]["any"]["new"] == (1, 1, policy.max_length) and one["decoder"]["any"]["rows"] == (0, 1, 1)
    for axes in (*lengths.values(), one["decoder"]["any"]):
        for at in range(3):
            assert axes["capacity_and_new"][at] == axes["capacity"][at] + axes["new"][at]


def test_what_is_there_is_kept_until_something_changes(bundle: Bundle, library: Library) -> None:
    first = build(bundle, library, "embedding").built[0]
    again = build(Bundle.open(bundle.root), library, "embedding")
    assert not again.built and [engine.file for engine in again.kept] == [first.file]
    changes: dict[str, dict[str, Any]] = {
        "options": {"options": BuildOptions(optimization_level=1)},
        "limits": {"limits": ProfileLimits(batch=2)},
        "force": {"force": True},
    }
    for name, change in changes.items():
        report = build(Bundle.open(bundle.root), library, "embedding", **change)
        assert len(report.built) == 1, name
        engines = Bundle.open(bundle.root).manifest.engines
        assert len(engines) == 1, f"{name}: the new engine takes the old one's place"
        assert [path.name for path in (bundle.root / "engines").iterdir()] == [Path(engines[0].file).name]
    newer = Library(target=library.target, module=_Versioned(library.module, "9.9"))
    assert len(build(Bundle.open(bundle.root), newer, "embedding").built) == 1, "another version of the library"
    for_ada = build(Bundle.open(bundle.root), library, "embedding", options=BuildOptions(compute_capabilities=("8.9",)))
    assert for_ada.built[0].compute_capabilities == ("8.9",)
    assert len(Bundle.open(bundle.root).manifest.engines) == 2, "engines for other devices stand beside"


class _Versioned:
    """A library's module under another version number."""

    def __init__(self, module: Any, version: str) -> None:
        self._module, self.__version__ = module, version

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def test_a_changed_graph_is_built_again(bundle: Bundle, library: Library) -> None:
    """The embedding's weights lie beside its graph; the graph's own bytes stay the same."""
    from segzero_rt.bundle import write_bundle

    build(bundle, library, "embedding")
    opened = Bundle.open(bundle.root)
    files: dict[str, Path | bytes] = {name: opened.file(name) for name in opened.manifest.files}
    table = bytearray(opened.file("policy/token_table.bin").read_bytes())
    table[0] ^= 1
    changed = write_bundle(
        bundle.root.parent / "changed", opened.manifest, files | {"policy/token_table.bin": bytes(table)}
    )
    assert len(build(changed, library, "embedding").built) == 1


def test_what_the_parser_refuses_is_listed_and_nothing_is_built(
    tiny_bundle_path: Path, tmp_path: Path, library: Library
) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle_path, tmp_path / "ort"))
    report = build(bundle, library, "embedding", "decoder")
    assert set(report.refused) == {"decoder"} and not report.built
    operators = {refusal.operator for refusal in report.refused["decoder"]}
    assert "GroupQueryAttention" in operators
    for refusal in report.refused["decoder"]:
        assert refusal.node and refusal.message
    assert not (bundle.root / "engines").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"compute_capabilities": ("9.0",)}, r"expected compute capabilities of 7\.5, .*, got 9\.0", id="hopper"
        ),
        pytest.param({"hardware_compatible": "ampere-plus"}, "it ignores that", id="level-that-it-ignores"),
        pytest.param(
            {"version_compatible": True}, "tensorrt-rtx .* to build embedding, it says: .*", id="lean-runtime"
        ),
    ],
)
def test_a_build_that_fails_leaves_the_bundle_as_it_was(
    options: dict[str, Any], message: str, bundle: Bundle, library: Library
) -> None:
    before = {path: path.read_bytes() for path in bundle.root.rglob("*") if path.is_file()}
    with pytest.raises(EngineError, match=message):
        build(bundle, library, "embedding", options=BuildOptions(**options))
    assert {path: path.read_bytes() for path in bundle.root.rglob("*") if path.is_file()} == before


def test_a_gate_that_is_not_passed_keeps_the_engine_out(bundle: Bundle, library: Library) -> None:
    def refuse(name: str, record: Any, path: Path) -> dict[str, Any]:
        assert path.is_file() and record.file
        raise EngineError(f"{name}: differs")

    with pytest.raises(EngineError, match="embedding: differs"):
        build(bundle, library, "embedding", gate=refuse)
    assert Bundle.open(bundle.root).manifest.engines == () and not list((bundle.root / "engines").iterdir())
    passed = build(bundle, library, "embedding", gate=lambda name, record, path: {"status": "passed", "error": 0.0})
    assert passed.built[0].gate == {"status": "passed", "error": 0.0}
    assert Bundle.open(bundle.root).manifest.engines[0].gate["status"] == "passed"


def test_a_second_build_at_the_same_time_is_refused(bundle: Bundle, library: Library) -> None:
    from segzero_rt.engines.store import building

    with building(bundle), pytest.raises(EngineError, match="another `segzero build` is running"):
        build(bundle, library, "embedding")
    assert build(bundle, library, "embedding").built


def test_unknown_graphs_and_a_missing_device_are_named(bundle: Bundle, library: Library) -> None:
    with pytest.raises(EngineError, match=r"expected graphs of vision, .*, got encoder"):
        build(bundle, library, "encoder")
    from recorded_tensorrt import recorded_module

    with pytest.raises(EngineError, match=r"expected a CUDA device: tensorrt 10\.3\.0 times kernels"):
        build(bundle, Library(target="tensorrt", module=recorded_module("10.3.0")), "embedding")


def test_a_bundle_that_cannot_be_written_is_named(
    bundle: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(BundleError, match="copy it elsewhere"):
        build(bundle, library, "embedding")


def _start(command: list[str]) -> subprocess.Popen[str]:
    """A process that Ctrl-C reaches, even where the tests themselves run in the background and ignore it."""
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _command(bundle: Bundle, *options: str) -> list[str]:
    return [sys.executable, "-m", "segzero_rt.cli", "build", str(bundle.root), "--target", "tensorrt-rtx", *options]


def test_a_kill_in_mid_build_leaves_a_whole_bundle(bundle: Bundle) -> None:
    process = _start(_command(bundle))
    assert process.stderr is not None
    for line in process.stderr:
        if "build: decoder" in line:  # vision and embedding are recorded by now
            break
    time.sleep(0.2)
    process.kill()
    process.wait()
    survived = Bundle.open(bundle.root)
    assert {engine.graph for engine in survived.manifest.engines} == {"policy/vision.onnx", "policy/embedding.onnx"}
    (bundle.root / "engines" / "left.part").write_bytes(b"half of an engine")
    result = subprocess.run(_command(bundle, "--json"), cwd=REPOSITORY, capture_output=True, text=True, check=True)
    document = json.loads(result.stdout)
    assert [row["status"] for row in document["engines"]].count("kept") == 2
    assert len(document["engines"]) == len(bundle_specs(bundle.manifest))
    listed = {Path(engine.file).name for engine in Bundle.open(bundle.root).manifest.engines}
    assert {path.name for path in (bundle.root / "engines").iterdir()} == listed


def test_ctrl_c_ends_a_build(bundle: Bundle) -> None:
    process = _start(_command(bundle, "--graph", "decoder"))
    assert process.stderr is not None
    assert "build: decoder" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, rest
    assert Bundle.open(bundle.root).manifest.engines == ()


@pytest.fixture
def half_graph(tmp_path: Path) -> tuple[Path, GraphSpec]:
    """A float16 product with its norm in float32, as exporters write it."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("Cast", ["product"], ["wide"], to=TensorProto.FLOAT, name="widen"),
        helper.make_node("Mul", ["wide", "wide"], ["square"], name="island/square"),
        helper.make_node("ReduceMean", ["square"], ["mean"], axes=[-1], keepdims=1, name="island/mean"),
        helper.make_node("Sqrt", ["mean"], ["root"], name="island/root"),
        helper.make_node("Div", ["wide", "root"], ["normed"], name="island/divide"),
        helper.make_node("Cast", ["normed"], ["y"], to=TensorProto.FLOAT16, name="narrow"),
    ]
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 64])],
        [numpy_helper.from_array(np.eye(64, dtype=np.float16), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path = tmp_path / "half.onnx"
    onnx.save(model, str(path))
    shape = ("batch", 64)
    return path, GraphSpec(
        name="half", inputs=(TensorSpec("x", "float16", shape),), outputs=(TensorSpec("y", "float16", shape),)
    )


def test_the_types_of_the_file_are_those_of_the_engine(half_graph: tuple[Path, GraphSpec], library: Library) -> None:
    """A library that took types as hints would build float16 throughout, and a norm of large values would overflow."""
    path, spec = half_graph
    graph = parse_graph(library, path)
    assert isinstance(graph, ParsedGraph)
    graph.check(spec)
    islands = graph.float32_islands()
    assert {"island/square", "island/mean", "island/root", "island/divide"} <= set(islands)
    assert "product" not in islands
    assert graph.precisions()["float16"] >= 1
    profiles = make_profiles(spec, graph.declared_inputs(), {"all": {"batch": (1, 1, 4)}})
    engine = graph.build(profiles, BuildOptions(), timing_cache=None, progress=lambda phase, share: None)
    assert len(engine) > 1000


def test_a_graph_in_float32_has_no_islands(bundle: Bundle, library: Library) -> None:
    graph = parse_graph(library, bundle.file(bundle.manifest.segmenter.graphs.encoder))
    assert isinstance(graph, ParsedGraph)
    assert graph.float32_islands() == []
    assert graph.precisions()["float32"] > 10


def test_a_profile_names_an_axis_that_nobody_knows() -> None:
    spec = GraphSpec(
        name="g", inputs=(TensorSpec("x", "float32", ("rows", 3)),), outputs=(TensorSpec("y", "float32", (1,)),)
    )
    with pytest.raises(EngineError, match=r"known length of axis 0 \(rows\) of x"):
        make_profiles(spec, {"x": (-1, 3)}, {"all": {}})
    assert make_profiles(spec, {"x": (5, 3)}, {"all": {}})[0].shapes == {}
    (profile,) = make_profiles(dataclasses.replace(spec), {"x": (-1, -1)}, {"all": {"rows": (1, 2, 4)}})
    assert profile.shapes == {"x": ((1, 3), (2, 3), (4, 3))}


@pytest.mark.parametrize("limits", [{"batch": 0}, {"objects": 0}, {"points": 2}, {"prefill": 0}])
def test_impossible_limits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(EngineError, match="from 1 and points from 3"):
        ProfileLimits(**limits)
