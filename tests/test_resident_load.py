"""Opening the resident pipeline: what is missing is named, and graphs are told which stream and which captures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from host_stream import host_stream

from segzero_rt.bundle import Bundle
from segzero_rt.device import Device
from segzero_rt.errors import BackendError, GraphError
from segzero_rt.graph import Backend, Graph, resolve_backend
from segzero_rt.policy import Policy
from segzero_rt.preflight.gpu import read_gpus
from segzero_rt.resident.load import RESIDENT_BACKENDS, load_resident

WITHOUT_GPU = pytest.mark.skipif(bool(read_gpus()), reason="needs a machine without a GPU")


@pytest.mark.parametrize("backend", ["cpu", "auto", "", "x" * 300])
def test_a_backend_without_a_device_is_refused(backend: str, bundle_path: Path) -> None:
    with pytest.raises(BackendError, match="expected a backend on a device, cuda, tensorrt, tensorrt-rtx"):
        load_resident(bundle_path, backend=backend)


@WITHOUT_GPU
@pytest.mark.parametrize("backend", RESIDENT_BACKENDS)
def test_what_is_missing_is_named(backend: str, bundle_path: Path) -> None:
    with pytest.raises(BackendError, match=r"ONNX Runtime .* offers|expected pycuda|expected CUDA device"):
        load_resident(bundle_path, backend=backend)


def test_a_library_that_is_missing_is_named_behind_the_device(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import segzero_rt.engines.graph as engines

    def missing(target: str) -> None:
        raise BackendError(f"expected a library for {target}")

    monkeypatch.setattr(Device, "open", classmethod(lambda cls, index=0: host_stream()[0]))
    monkeypatch.setattr(engines, "find_library", missing)
    with pytest.raises(BackendError, match=r"nvcc|expected a library for tensorrt"):
        load_resident(bundle_path, backend="tensorrt")


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param(Backend(name="cpu", version="1"), ({},), id="cpu"),
        pytest.param(Backend(name="cuda", version="1"), ({}, {}), id="its-own-stream"),
        pytest.param(
            Backend(name="cuda", version="1", stream_handle=94),
            ({"user_compute_stream": "94"}, {}),
            id="another's-stream",
        ),
        pytest.param(
            Backend(name="cuda", version="1", stream_handle=94, replays=True),
            ({"user_compute_stream": "94", "enable_cuda_graph": "1"}, {}),
            id="replays",
        ),
    ],
)
def test_the_provider_is_told_its_stream(backend: Backend, options: tuple[dict[str, str], ...]) -> None:
    assert backend.provider_options == options
    assert len(backend.providers) == len(options)


def test_runs_say_what_may_be_captured_and_wait_for_nothing(tiny_bundle_path: Path) -> None:
    graph = Policy.load(Bundle.open(tiny_bundle_path), backend="cpu", threads=1).embedding
    assert graph._unwaited(True) is None, "on the host there is nothing to wait for"
    cuda = Backend(name="cuda", version="1", stream_handle=94)
    waits, captures = "disable_synchronize_execution_providers", "gpu_graph_id"
    for backend, captured, expected in (
        (cuda, True, [""]),
        (replace(cuda, replays=True), False, ["-1"]),
        (replace(cuda, replays=True), True, ["1", "2"]),
    ):
        pretended = Graph(graph._session, graph.spec, backend)
        for wanted in expected:
            options = pretended._unwaited(captured)
            assert options.get_run_config_entry(waits) == "1"
            assert (options.get_run_config_entry(captures) if backend.replays else "") == wanted


@WITHOUT_GPU
def test_a_provider_that_cannot_start_is_an_error(tiny_bundle_path: Path) -> None:
    if "CUDAExecutionProvider" in resolve_backend("cpu").providers:
        pytest.skip("onnxruntime-gpu is installed")
    bundle = Bundle.open(tiny_bundle_path)
    cuda = Backend(name="cuda", version="1", stream_handle=94, replays=True)
    with pytest.raises((BackendError, GraphError), match="expected"):
        Policy.load(bundle, backend=cuda, threads=1)


def test_outputs_have_the_shapes_that_runs_give(tiny_bundle_path: Path) -> None:
    policy = Policy.load(Bundle.open(tiny_bundle_path), backend="cpu", threads=1)
    inputs = {"input_ids": np.zeros((1, 5), np.int64)}
    given = policy.embedding.run(inputs)
    shapes = policy.embedding.output_shapes({name: array.shape for name, array in inputs.items()})
    assert shapes == {name: array.shape for name, array in given.items()}
    with pytest.raises(GraphError, match="input_ids"):
        policy.embedding.output_shapes({"input_ids": (5,)})
