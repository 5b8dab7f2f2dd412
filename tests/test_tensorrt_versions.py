"""The builder under TensorRT 10.3 to 11.4 and TensorRT-RTX, by the names that each version really has."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from recorded_tensorrt import SURFACES, VERSIONS, recorded_module

from segzero_rt.engines import library as library_module
from segzero_rt.engines.builder import BuildOptions, ParsedGraph, parse_graph
from segzero_rt.engines.library import Library, find_library
from segzero_rt.engines.record import ProfileRecord
from segzero_rt.errors import BackendError, EngineError, GraphError
from segzero_rt.graph_spec import GraphSpec, TensorSpec

SPEC = GraphSpec(
    name="toy",
    inputs=(TensorSpec("x", "float32", ("batch", 3)),),
    outputs=(TensorSpec("y", "float16", ("batch", 3)),),
)
PROFILES = (
    ProfileRecord(name="prefill", shapes={"x": ((1, 3), (2, 3), (8, 3))}),
    ProfileRecord(name="decode", shapes={"x": ((1, 3), (1, 3), (1, 3))}),
)
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None


def recorded(version: str, **changes: Any) -> Library:
    target = "tensorrt-rtx" if version.startswith("rtx") else "tensorrt"
    return Library(target=target, module=recorded_module(version, **changes))


def parsed(library: Library) -> ParsedGraph:
    graph = parse_graph(library, Path("toy.onnx"))
    assert isinstance(graph, ParsedGraph)
    return graph


def told(library: Library, timing_cache: Path | None = None, **options: Any) -> list[tuple[Any, ...]]:
    """What the library's configuration was told by a build."""
    built = parsed(library).build(
        PROFILES, BuildOptions(**options), timing_cache=timing_cache, progress=lambda phase, share: None
    )
    assert bytes(built) == b"plan"
    config: Any = library.module.Builder._latest._config
    return config._told


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        # version, (hardware levels, attention)
        pytest.param("10.3.0", (("ampere-plus",), False), id="jetpack-6"),
        pytest.param("10.8.0.43", (("ampere-plus",), False), id="10.8"),
        pytest.param("10.15.1.29", (("same-capability", "ampere-plus"), True), id="10.15"),
        pytest.param("11.0.0.114", (("same-capability", "ampere-plus"), True), id="11.0"),
        pytest.param("11.4.0.106", (("same-capability", "ampere-plus"), True), id="11.4"),
    ],
)
def test_what_each_tensorrt_can_do_is_read_from_its_names(version: str, expected: tuple[Any, ...]) -> None:
    library = recorded(version)
    assert (library.hardware_levels, library.has_attention) == expected
    assert not library.builds_ahead and library.has_timing_cache and not library.tells_validity
    assert library.capability_names() == ()
    assert str(library) == f"tensorrt {version}"


def test_what_tensorrt_rtx_can_do_is_read_from_its_names() -> None:
    library = recorded("rtx-1.7.1.116")
    assert library.builds_ahead and not library.has_timing_cache
    assert library.tells_validity and library.has_attention
    assert library.capability_names() == ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_the_same_strongly_typed_network(version: str) -> None:
    library = recorded(version)
    calls = told(library)
    flag = library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert library.module.Builder._latest._flags == 1 << int(flag)
    assert calls[0] == ("clear", "TF32"), "float32 has to mean float32"
    assert [shapes for kind, shapes in (c for c in calls if c[0] == "profile")] == [p.shapes for p in PROFILES]


@pytest.mark.parametrize("version", VERSIONS)
def test_attention_may_be_taken_apart_where_there_is_such_a_layer(version: str) -> None:
    library = recorded(version)
    told(library)
    attention = library.module.Builder._latest._network._attention
    assert attention.decomposable == (version not in ("10.3.0", "10.8.0.43"))


@pytest.mark.parametrize("version", VERSIONS)
def test_options_reach_the_library(version: str) -> None:
    library = recorded(version)
    options = {"version_compatible": True, "strip": True, "tf32": True, "workspace_bytes": 1 << 28}
    calls = told(library, optimization_level=2, hardware_compatible="ampere-plus", **options)
    assert ("set", "VERSION_COMPATIBLE") in calls and ("set", "STRIP_PLAN") in calls
    assert ("clear", "TF32") not in calls and ("WORKSPACE", 1 << 28) in calls
    config = library.module.Builder._latest._config
    assert config.builder_optimization_level == 2
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"


def test_a_hardware_level_that_a_version_lacks_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"tensorrt 10\.3\.0 .* for same-capability devices, it knows ampere-plus"):
        told(recorded("10.3.0"), hardware_compatible="same-capability")
    assert told(recorded("11.0.0.114"), hardware_compatible="same-capability")


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_builds_for_the_device_that_is_here(version: str) -> None:
    with pytest.raises(EngineError, match=r"expected no --compute-capability: tensorrt .* build on the target"):
        told(recorded(version), compute_capabilities=("8.7",))


@pytest.mark.parametrize("version", VERSIONS)
def test_timings_are_kept_from_build_to_build(version: str, tmp_path: Path) -> None:
    cache = tmp_path / "timing" / "one.cache"
    assert ("timings", b"") in told(recorded(version), timing_cache=cache)
    assert cache.read_bytes() == b"timed here"
    assert ("timings", b"timed here") in told(recorded(version), timing_cache=cache)
    cache.write_bytes(b"of another device")
    assert ("timings", b"") in told(recorded(version), timing_cache=cache), "refused timings are left aside"
    assert [path.name for path in cache.parent.iterdir()] == ["one.cache"]


def test_tensorrt_rtx_is_asked_for_no_timings_and_takes_no_hardware_level(tmp_path: Path) -> None:
    """It has the names of both, and warns that they do nothing."""
    calls = told(recorded("rtx-1.7.1.116"), timing_cache=tmp_path / "one.cache")
    assert not [call for call in calls if call[0] == "timings"] and not list(tmp_path.iterdir())
    with pytest.raises(EngineError, match=r"tensorrt-rtx 1\.7\.1\.116 .* it ignores that"):
        told(recorded("rtx-1.7.1.116"), hardware_compatible="ampere-plus")


def test_types_are_read_from_the_network() -> None:
    graph = parsed(recorded("10.3.0"))
    graph.check(SPEC)
    assert graph.inputs == [("x", "float32", [-1, 3])] and graph.outputs == [("y", "float16", [-1, 3])]
    assert graph.precisions() == {"float16": 2}
    other = GraphSpec(name="toy", inputs=SPEC.inputs, outputs=(TensorSpec("y", "float32", ("batch", 3)),))
    with pytest.raises(GraphError, match=r"expected y: float32\[batch, 3\]; the file has float16"):
        graph.check(other)


def test_a_build_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    library = recorded("10.3.0")
    graph = parsed(library)

    def interrupted(phase: str, share: float) -> None:
        monkeypatch.setattr(library.module.Builder, "_seen", phase, raising=False)
        library.module.Builder._latest._config.progress_monitor.stopped.set()

    with pytest.raises(EngineError, match=r"expected tensorrt 10\.3\.0 to build toy"):
        graph.build(PROFILES, BuildOptions(), timing_cache=None, progress=interrupted)
    assert library.module.Builder._seen == "Building"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        pytest.param(("OnnxParser",), "without OnnxParser", id="dispatch-runtime"),
        pytest.param(("Builder", "IBuilderConfig"), "without Builder, IBuilderConfig", id="lean-runtime"),
    ],
)
def test_a_runtime_without_a_builder_is_named(
    missing: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recorded_module("10.3.0", without=missing)
    monkeypatch.setattr(library_module.importlib, "import_module", lambda name: module)
    with pytest.raises(BackendError, match=message):
        find_library("tensorrt")


@pytest.mark.parametrize(
    "error", [ImportError("libnvinfer.so.10: no such file"), RuntimeError("placeholder"), OSError()]
)
def test_a_library_that_cannot_be_loaded_says_what_to_install(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(library_module.importlib, "import_module", fail)
    with pytest.raises(BackendError, match=r"install segzero-rt\[tensorrt\]"):
        find_library("tensorrt")
    with pytest.raises(BackendError, match="expected a target of tensorrt, tensorrt-rtx, got 'cuda'"):
        find_library("cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"hardware_compatible": "turing"}, "expected hardware compatibility of", id="level"),
        pytest.param({"optimization_level": 6}, "from 0 to 5, got 6", id="optimisation"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        BuildOptions(**options)


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed: pip install 'segzero-rt[tensorrt-rtx]'")
def test_the_recorded_surface_of_tensorrt_rtx_is_the_installed_one() -> None:
    """A newer one may have more names; those that the builder relies on must still be there."""
    from tensorrt_surfaces.record import public_names

    surface = json.loads((SURFACES / "rtx-1.7.1.116.json").read_text())["names"]
    installed = public_names(find_library("tensorrt-rtx").module)
    for name, names in surface.items():
        assert set(names) <= set(installed[name]), name
