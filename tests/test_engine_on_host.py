"""Engines share the device's memory and stream: what they are told, without a GPU. See `engine_on_host`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_on_host import INPUT, OUTPUT, EngineOnHost, engines_on, record_of
from host_device import HostDriver
from host_stream import host_stream
from kernel_builds import ONLY_COMPILER, kernels_on

from segzero_rt import SegZero
from segzero_rt.bundle import Bundle
from segzero_rt.device import Device
from segzero_rt.engines.graph import EngineGraph, open_engine
from segzero_rt.engines.library import Library
from segzero_rt.engines.profiles import bundle_specs
from segzero_rt.errors import GraphError
from segzero_rt.policy import Policy
from segzero_rt.resident.frames import as_frame
from segzero_rt.resident.pipeline import ResidentSegZero
from segzero_rt.segmenter import ImageEncoder, MaskDecoder

PICTURE = np.random.default_rng(4).integers(0, 256, (61, 93, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(portable_bundle_path: Path) -> Bundle:
    return Bundle.open(portable_bundle_path)


def test_the_host_asks_engines_as_it_asks_graphs(bundle: Bundle) -> None:
    expected = SegZero.load(bundle, backend="cpu", threads=1)(PICTURE, "the red cup", max_new_tokens=6)
    found = SegZero.load(bundle, backend=engines_on(Device(HostDriver()), bundle))(
        PICTURE, "the red cup", max_new_tokens=6
    )
    assert found.answer == expected.answer
    np.testing.assert_array_equal(found.masks, expected.masks)


@ONLY_COMPILER
def test_engines_answer_from_frame_to_masks_on_the_device(bundle: Bundle) -> None:
    device, _ = host_stream()
    beside = device.fork()
    main = engines_on(device, bundle)
    resident = ResidentSegZero(
        Policy.load(bundle, backend=main),
        ImageEncoder.load(bundle, backend=engines_on(beside, bundle)),
        MaskDecoder.load(bundle, backend=main),
        kernels=kernels_on(device),
        encoder_kernels=kernels_on(beside),
    )
    host = SegZero.load(bundle, backend="cpu", threads=1, draft_tokens=0)
    for question in ("the red cup", "another"):
        expected = host(PICTURE, question)
        look = resident.look(as_frame(PICTURE, resident.staging), ahead=False)
        found = resident.ask(look, question, to_host=True)
        assert found.answer == expected.answer
        np.testing.assert_array_equal(found.host_masks, expected.masks)
        assert found.host_waits <= 2, "one, and one for the last token of a budget"


@pytest.fixture
def embedding(bundle: Bundle) -> tuple[EngineGraph, Device]:
    device = Device(HostDriver())
    path, spec = bundle_specs(bundle.manifest)["embedding"]
    graph = engines_on(device, bundle).load_engine(bundle.file(path), spec)
    return graph, device


def test_memory_that_does_not_fit_is_refused(embedding: tuple[EngineGraph, Device]) -> None:
    graph, device = embedding
    ids, width = device.to_device(np.zeros((1, 3), np.int64)), graph.spec.outputs[0].shape[2]
    embeds = device.empty((1, 3, width), np.float32)
    graph.enqueuer({"input_ids": ids}, {"inputs_embeds": embeds})()
    wrong = [
        ("other-dtype", {"input_ids": device.to_device(np.zeros((1, 3), np.int32))}, {"inputs_embeds": embeds}),
        ("missing", {}, {"inputs_embeds": embeds}),
        ("unknown", {"input_ids": ids}, {"logits": embeds}),
        ("other-length", {"input_ids": ids}, {"inputs_embeds": device.empty((1, 4, width), np.float32)}),
        ("on-the-host", {"input_ids": np.zeros((1, 3), np.int64)}, {"inputs_embeds": embeds}),
        (
            "beyond-the-profile",
            {"input_ids": device.to_device(np.zeros((2, 3), np.int64))},
            {"inputs_embeds": device.empty((2, 3, width), np.float32)},
        ),
    ]
    for name, inputs, outputs in wrong:
        with pytest.raises(GraphError, match=r"embedding|expected"):
            graph.enqueuer(inputs, outputs)
        assert name


def test_shapes_of_outputs_are_told_before_there_is_memory(embedding: tuple[EngineGraph, Device]) -> None:
    graph, _ = embedding
    width = graph.spec.outputs[0].shape[2]
    assert graph.output_shapes({"input_ids": (1, 5)}) == {"inputs_embeds": (1, 5, width)}
    with pytest.raises(GraphError, match="within a profile"):
        graph.output_shapes({"input_ids": (7, 5)})


class Runtime:
    """Loads what it is given."""

    engine: EngineOnHost | None = None

    def __init__(self, logger: object) -> None:
        pass

    def deserialize_cuda_engine(self, data: bytes) -> EngineOnHost | None:
        return Runtime.engine


class Module:
    """As much of TensorRT as loading takes."""

    __version__ = "10.3.0"
    Runtime = Runtime

    class ILogger:
        class Severity:
            ERROR, INTERNAL_ERROR, WARNING = range(3)

    class TensorIOMode:
        INPUT, OUTPUT = INPUT, OUTPUT


@pytest.mark.parametrize(
    ("loaded", "asked", "message"),
    [
        pytest.param("embedding", "embedding", None, id="its-own"),
        pytest.param("vision", "embedding", "expected inputs input_ids; the file has patches", id="another-graph"),
        pytest.param("mask_decoder", "image_encoder", "expected inputs pixel_values", id="of-the-segmenter"),
    ],
)
def test_an_engine_of_another_graph_is_refused(
    loaded: str, asked: str, message: str | None, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = bundle_specs(bundle.manifest)
    path, spec = specs[loaded]
    record = record_of(bundle, path)
    monkeypatch.setattr(Runtime, "engine", EngineOnHost(bundle.file(path), record.profiles))
    library = Library(target="tensorrt", module=Module)  # type: ignore[arg-type]
    weights = bundle.file(specs[asked][0])
    if message is None:
        assert open_engine(library, b"", record, specs[asked][1], weights=weights) is Runtime.engine
        return
    with pytest.raises(GraphError, match=message):
        open_engine(library, b"", record, specs[asked][1], weights=weights)
    assert spec.name == loaded


def test_an_engine_with_other_profiles_than_its_record_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, spec = bundle_specs(bundle.manifest)["embedding"]
    record = record_of(bundle, path)
    monkeypatch.setattr(Runtime, "engine", EngineOnHost(bundle.file(path), record.profiles[:1]))
    library = Library(target="tensorrt", module=Module)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="expected 2 profiles, the engine has 1"):
        open_engine(library, b"", record, spec, weights=bundle.file(path))
