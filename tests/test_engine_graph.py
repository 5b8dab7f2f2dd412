"""Which engine may run, and what refuses it before a GPU is asked; running one needs a GPU and is marked so."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_tensorrt import recorded_module

from segzero_rt.bundle import Bundle
from segzero_rt.engines.choice import choose_engine
from segzero_rt.engines.library import Library, find_library
from segzero_rt.engines.record import EngineRecord, ProfileRecord, platform_name
from segzero_rt.engines.store import graph_digest
from segzero_rt.errors import BackendError, EngineError

GRAPH = "policy/vision.onnx"


@pytest.fixture
def library() -> Library:
    return Library(target="tensorrt", module=recorded_module("10.3.0"))


def with_engines(path: Path, *changes: dict[str, Any]) -> Bundle:
    """The bundle with engines in its manifest, not on disk: choosing one looks at the manifest alone."""
    bundle = Bundle.open(path)
    files = dict(bundle.manifest.files)
    engines = []
    for index, change in enumerate(changes):
        plain = EngineRecord(
            file=f"engines/{index}.engine",
            graph=GRAPH,
            graph_sha256=graph_digest(bundle, GRAPH),
            target="tensorrt",
            library_version="10.3.0",
            compute_capabilities=("8.7",),
            platform=platform_name(),
            options={"version_compatible": False},
            profiles=(ProfileRecord(name="picture", shapes={}),),
            precisions={"float32": 1},
            gate={"status": "passed"},
            build_seconds=1.0,
        )
        engines.append(dataclasses.replace(plain, **change))
        files[engines[-1].file] = files[GRAPH]
    manifest = dataclasses.replace(bundle.manifest, engines=tuple(engines), files=files)
    return dataclasses.replace(bundle, manifest=manifest)


def test_the_fitting_engine_is_chosen(bundle_path: Path, library: Library) -> None:
    bundle = with_engines(
        bundle_path,
        {"compute_capabilities": ("8.9",)},
        {"compute_capabilities": ()},
        {"compute_capabilities": ("8.9", "8.7")},
        {"target": "tensorrt-rtx"},
        {"graph": "policy/decoder.onnx"},
        {"platform": "windows-amd64"},
    )
    chosen = choose_engine(bundle, GRAPH, library, capability="8.7")
    assert chosen.file == "engines/2.engine", "one made for this device comes before one made for all"
    assert choose_engine(bundle, GRAPH, library, capability="12.0").file == "engines/1.engine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"graph": "policy/decoder.onnx"}, "expected an engine of tensorrt for policy/vision", id="no-engine"
        ),
        pytest.param(
            {"target": "tensorrt-rtx"}, "expected an engine of tensorrt for policy/vision", id="other-library"
        ),
        pytest.param(
            {"compute_capabilities": ("8.9",)}, r"capability 8\.7 on .*, got engines for 8\.9", id="other-device"
        ),
        pytest.param({"platform": "linux-riscv"}, "got engines for 8.7 on linux-riscv", id="other-platform"),
        pytest.param({"graph_sha256": "0" * 64}, "expected an engine of the present", id="other-graph"),
        pytest.param({"library_version": "10.7.0"}, r"tensorrt 10\.3\.0, got .* of 10\.7\.0", id="other-version"),
        pytest.param({"gate": {"status": "not_run"}}, "gate not_run.*--allow-ungated", id="never-run"),
        pytest.param({"gate": {}}, "gate None.*--allow-ungated", id="no-record"),
    ],
)
def test_an_engine_that_may_not_run_says_why(
    change: dict[str, Any], message: str, bundle_path: Path, library: Library
) -> None:
    with pytest.raises(EngineError, match=message) as raised:
        choose_engine(with_engines(bundle_path, change), GRAPH, library, capability="8.7")
    assert "segzero build" in str(raised.value)


def test_consent_and_version_compatibility_let_engines_run(bundle_path: Path, library: Library) -> None:
    ungated = with_engines(bundle_path, {"gate": {"status": "not_run"}})
    assert choose_engine(ungated, GRAPH, library, capability="8.7", allow_ungated=True)
    later = with_engines(bundle_path, {"library_version": "10.0", "options": {"version_compatible": True}})
    assert choose_engine(later, GRAPH, library, capability="8.7")


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_without_library_or_device_the_backend_says_what_is_missing(target: str, bundle_path: Path) -> None:
    from segzero_rt import SegZero
    from segzero_rt.preflight.gpu import read_gpus

    if read_gpus():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(BackendError, match=r"expected (tensorrt|pycuda|CUDA device)"):
        SegZero.load(bundle_path, backend=target)


def test_an_engine_that_this_machine_cannot_load_is_named(portable_bundle_path: Path, tmp_path: Path) -> None:
    """Built here, where there is no driver: TensorRT-RTX builds all the same, and will not load it."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    import shutil

    from segzero_rt.engines.builder import BuildOptions
    from segzero_rt.engines.graph import open_engine
    from segzero_rt.engines.make import build_engines
    from segzero_rt.engines.profiles import ProfileLimits, bundle_specs
    from segzero_rt.preflight.gpu import read_gpus

    if read_gpus():
        pytest.skip("needs a machine without a GPU")
    rtx = find_library("tensorrt-rtx")
    bundle = Bundle.open(shutil.copytree(portable_bundle_path, tmp_path / "bundle"))
    arguments: dict[str, Any] = {"options": BuildOptions(), "limits": ProfileLimits(), "gpu": None}
    (record,) = build_engines(bundle, rtx, graphs=("embedding",), **arguments).built
    path, spec = bundle_specs(bundle.manifest)["embedding"]
    data = (bundle.root / record.file).read_bytes()
    with pytest.raises(EngineError, match=r"engines/tensorrt-rtx-any-embedding.*cannot.*CUDA|expected .* to start"):
        open_engine(rtx, data, record, spec, weights=bundle.file(path))


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_answers_as_onnx_runtime_does(target: str, portable_bundle_path: Path, tmp_path: Path) -> None:
    """The whole way on a device: build with its gate, load, ask."""
    import shutil

    from segzero_rt import SegZero
    from segzero_rt.cli import main

    bundle = shutil.copytree(portable_bundle_path, tmp_path / "bundle")
    assert main(["build", str(bundle), "--target", target]) == 0
    picture = np.full((80, 60, 3), 99, np.uint8)
    expected = SegZero.load(bundle, backend="cpu").policy.answer(picture, "the red cup", max_new_tokens=8)
    found = SegZero.load(bundle, backend=target).policy.answer(picture, "the red cup", max_new_tokens=8)
    assert found.token_ids == expected.token_ids


def test_the_platform_is_named_as_records_name_it() -> None:
    assert platform_name() == f"{platform.system().lower()}-{platform.machine().lower()}"
