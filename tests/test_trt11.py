"""Flavour `trt11`: the same replies, in operators that TensorRT reads as layers of its own. No engine is run here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from policy_checkpoints import RUNNABLE_FLAVOURS, policy_bundle, random_picture

from export.command import assemble, tabletop
from export.policy import PolicyExport, export_policy
from export.policy_checkpoint import PolicyCheckpoint
from export.policy_decoder import build_decoder
from segzero_rt.bundle import Bundle, write_bundle
from segzero_rt.errors import ExportError, GraphError
from segzero_rt.graph import Graph
from segzero_rt.graph_spec import MASKED, GraphSpec, TensorSpec, decoder_spec
from segzero_rt.policy import Policy

pytestmark = pytest.mark.skipif("trt11" not in RUNNABLE_FLAVOURS, reason="opset 24 needs ONNX Runtime 1.25")

OPTIONS: dict[str, Any] = {"flavour": "trt11", "max_length": 500, "max_new_tokens": 24}
SIDES = {"grouped-heads": 28, "qwen3-vl": 32}


@pytest.fixture(scope="module", params=SIDES)
def exported(
    request: pytest.FixtureRequest, policy_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PolicyExport, Path]:
    folder = tmp_path_factory.mktemp("trt11")
    size = (5 * SIDES[request.param], 7 * SIDES[request.param])
    questions = ["x", "the red cup"]
    pictures = [random_picture(0)]
    source = policy_folders(request.param)
    return (
        export_policy(source, folder, input_size_hw=size, gate_pictures=pictures, gate_questions=questions, **OPTIONS),
        folder,
    )


def test_replies_equal_pytorch(exported: tuple[PolicyExport, Path]) -> None:
    gate = exported[0].gate
    assert gate["same_tokens"] == gate["top1"] == 1.0
    assert gate["max_abs_logit"] < 2e-3


def test_questions_leave_no_trace_in_a_cache_that_is_read_whole(exported: tuple[PolicyExport, Path]) -> None:
    policy = Policy.load(policy_bundle(*exported), backend="cpu", threads=1)
    view = policy.look(random_picture(1))
    first = policy.ask(view, "the red cup").token_ids
    policy.ask(view, "something long that leaves its keys and values behind")
    assert policy.ask(view, "the red cup").token_ids == first


def test_the_decoder_is_of_opset_24_and_the_rest_as_portable(exported: tuple[PolicyExport, Path]) -> None:
    files = exported[0].files
    for name, opset in (("vision", 17), ("embedding", 17), ("decoder", 24)):
        path = str(files[f"policy/{name}.onnx"])
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", opset)], name
    layers = exported[0].manifest.num_layers
    counts = Counter(node.op_type for node in model.graph.node)
    assert (counts["Attention"], counts["TensorScatter"], counts["RotaryEmbedding"]) == (layers, 2 * layers, 2 * layers)
    inputs = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "TensorScatter":
            assert node.input[0] in inputs and node.output[0] in outputs, "TensorRT updates no other cache"
        if node.op_type == "Attention":
            assert len(node.input) == 4 and len(node.output) == 1, "all that TensorRT's parser takes"


def test_float16_stays_near(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    gate = export_policy(
        policy_folders("grouped-heads"), tmp_path, input_size_hw=(140, 196), computed="float16", **OPTIONS
    ).gate
    assert gate["kl_mean"] < 1e-4
    assert gate["vision_error"] < 1e-2


def test_update_and_attention_equal_the_specification() -> None:
    """ONNX's own reference against ONNX Runtime: queries of four heads on two, two rows of different lengths."""
    rng = np.random.default_rng(0)
    names = ["query", "key", "value", "past_key", "past_value", "write_indices", "bias"]
    nodes = [
        helper.make_node("TensorScatter", ["past_key", "key", "write_indices"], ["present_key"], axis=-2),
        helper.make_node("TensorScatter", ["past_value", "value", "write_indices"], ["present_value"], axis=-2),
        helper.make_node("Attention", ["query", "present_key", "present_value", "bias"], ["mixed"], scale=1.0),
    ]
    types = [TensorProto.INT64 if name == "write_indices" else TensorProto.FLOAT for name in names]
    inputs = [helper.make_tensor_value_info(*pair, None) for pair in zip(names, types, strict=True)]
    results = ["mixed", "present_key", "present_value"]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
    graph = helper.make_graph(nodes, "step", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    bias = np.full((2, 1, 3, 9), MASKED, np.float32)
    for row, length in enumerate((2, 5)):
        for new in range(3):
            bias[row, 0, new, : length + new + 1] = 0
    feeds = {
        "query": rng.normal(size=(2, 4, 3, 8)),
        **{name: rng.normal(size=(2, 2, 3, 8)) for name in ("key", "value")},
        **{name: rng.normal(size=(2, 2, 9, 8)) for name in ("past_key", "past_value")},
        "bias": bias,
    }
    feeds = {name: values.astype(np.float32) for name, values in feeds.items()}
    feeds["write_indices"] = np.array([2, 5])
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for got, want in zip(session.run(results, feeds), ReferenceEvaluator(model).run(results, feeds), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_tensorrt_reads_layers_of_its_own_and_builds_an_engine(
    exported: tuple[PolicyExport, Path], tiny_bundle_path: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    from segzero_rt.engines.builder import BuildOptions, ParsedGraph, parse_graph
    from segzero_rt.engines.gate import example_inputs
    from segzero_rt.engines.library import find_library
    from segzero_rt.engines.make import build_engines
    from segzero_rt.engines.profiles import ProfileLimits, bundle_specs

    library = find_library("tensorrt-rtx")
    export, folder = exported
    decoder = folder / "policy" / "decoder.onnx"
    parsed = parse_graph(library, decoder)
    assert isinstance(parsed, ParsedGraph), parsed
    network, kinds = parsed._network, library.module.LayerType
    counts = Counter(network.get_layer(place).type for place in range(network.num_layers))
    layers = export.manifest.num_layers
    assert (counts[kinds.KV_CACHE_UPDATE], counts[kinds.ROTARY_EMBEDDING]) == (2 * layers, 2 * layers)
    assert counts[kinds.ATTENTION_INPUT] == counts[kinds.ATTENTION_OUTPUT] == layers

    preset = replace(tabletop(), input_size_hw=export.manifest.input_size_hw)
    manifest, files = assemble(preset, "trt11", export, None, Bundle.open(tiny_bundle_path))
    bundle = write_bundle(tmp_path / "bundle", manifest, files)
    report = build_engines(
        bundle, library, graphs=("decoder",), options=BuildOptions(), limits=ProfileLimits(), gpu=None
    )
    assert not report.refused
    (record,) = Bundle.open(bundle.root).manifest.engines
    assert record.gate["status"] == "not_run"
    graph = Graph.load(decoder, bundle_specs(manifest)["decoder"][1], backend="cpu", threads=1)
    for inputs in example_inputs(bundle, "decoder", record):  # what the gate on a GPU would ask
        assert np.isfinite(graph.run(inputs)["logits"]).all()


class Context:
    """Adds a row of ones to the cache, as an engine does: in the memory that the update's output is told to be."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name.replace("present", "past")]

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        if self.addresses["present_key_0"] != self.addresses["past_key_0"]:
            return False  # what TensorRT demands of IKVCacheUpdateLayer
        (row,) = self.device.memory[self.addresses["write_indices"]].view(np.int64)
        cache = self.device.memory[self.addresses["present_key_0"]].view(np.float32)
        cache.reshape(self.shapes["past_key_0"])[0, 0, row] = 1
        return True


class Device:
    """Memory by address, on the host."""

    stream_handle = 0

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}

    def current(self) -> Any:
        return nullcontext()

    def allocate(self, num_bytes: int) -> Any:
        address = 16 * (len(self.memory) + 1)
        self.memory[address] = np.zeros(num_bytes, np.uint8)
        return SimpleNamespace(address=address, num_bytes=num_bytes)

    def upload(self, array: np.ndarray, buffer: Any) -> None:
        self.memory[buffer.address][:] = array.reshape(-1).view(np.uint8)

    def download(self, buffer: Any, array: np.ndarray) -> None:
        array.reshape(-1).view(np.uint8)[:] = self.memory[buffer.address]

    def synchronize(self) -> None:
        """Nothing runs beside."""


def test_an_engine_is_given_one_memory_for_a_cache_and_its_update() -> None:
    """What it does with it on a GPU, only a GPU can tell."""
    from segzero_rt.engines.graph import EngineGraph

    shape = ("batch", 1, 4, 2)
    spec = GraphSpec(
        name="decoder",
        flavour="trt11",
        inputs=(TensorSpec("write_indices", "int64", ("batch",)), TensorSpec("past_key_0", "float32", shape)),
        outputs=(TensorSpec("present_key_0", "float32", shape),),
    )
    device = Device()
    engine = SimpleNamespace(create_execution_context=lambda: Context(device))
    record: Any = SimpleNamespace(profiles=[SimpleNamespace(shapes={})])
    backend: Any = SimpleNamespace(library=SimpleNamespace(), gpu=device)
    graph = EngineGraph(engine, record, spec, backend)
    cache, write_indices = np.zeros((1, 1, 4, 2), np.float32), np.zeros(1, np.int64)
    bound = graph.bind({"write_indices": write_indices, "past_key_0": cache}, {"present_key_0": cache})
    for row in (0, 2):
        write_indices[0] = row
        bound.run()
    assert cache[0, 0].tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]


def test_a_cache_of_another_length_than_the_file_s_is_refused(exported: tuple[PolicyExport, Path]) -> None:
    export, folder = exported
    other = replace(export, manifest=replace(export.manifest, max_length=400))
    with pytest.raises(GraphError, match="400"):
        Policy.load(policy_bundle(other, folder), backend="cpu", threads=1)


def test_what_the_flavour_cannot_be(policy_folders: Callable[[str], Path]) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16, "hidden_size": 64, "vocab_size": 100}
    with pytest.raises(ValueError, match="expected max_length for flavour trt11"):
        decoder_spec(flavour="trt11", **sizes)
    checkpoint = PolicyCheckpoint(policy_folders("grouped-heads"))
    for storage in ("int8", "int4"):
        with pytest.raises(ExportError, match=f"flavour ort for {storage} weights, got another"):
            build_decoder(checkpoint, flavour="trt11", storage=storage, max_length=64)
