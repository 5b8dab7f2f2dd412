"""TensorRT's side of `EngineGraph` on the host: engines and contexts that run the ONNX file by ONNX Runtime.

It shows that every tensor is named, shaped, addressed and enqueued as an engine wants it; what TensorRT itself
computes, and what it refuses, it cannot show.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from recorded_tensorrt import recorded_module

from segzero_rt.bundle import Bundle
from segzero_rt.device import Device
from segzero_rt.engines.graph import EngineBackend, EngineGraph
from segzero_rt.engines.library import Library
from segzero_rt.engines.profiles import ProfileLimits, axis_lengths, bundle_specs, make_profiles
from segzero_rt.engines.record import EngineRecord, ProfileRecord, platform_name
from segzero_rt.engines.store import graph_digest
from segzero_rt.graph_spec import GraphSpec

INPUT, OUTPUT = "INPUT", "OUTPUT"
_NAMES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
}


class EngineOnHost:
    """What a deserialised engine tells of itself, and the contexts that it makes."""

    def __init__(self, path: Path, profiles: tuple[ProfileRecord, ...]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.profiles = profiles
        self.contexts: list[ContextOnHost] = []
        self._names = [*self.inputs, *self.outputs]

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def node(self, name: str) -> Any:
        return {**self.inputs, **self.outputs}[name]

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_NAMES[self.node(name).type][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(side if isinstance(side, int) else -1 for side in self.node(name).shape)

    def get_tensor_mode(self, name: str) -> str:
        return INPUT if name in self.inputs else OUTPUT

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return list(self.profiles[profile].shapes[name])

    def create_execution_context(self) -> ContextOnHost:
        self.contexts.append(ContextOnHost(self))
        return self.contexts[-1]


class ContextOnHost:
    """Refuses what a context refuses: shapes outside its profile, a run with a tensor that has no address."""

    def __init__(self, engine: EngineOnHost) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = -1
        self.runs = 0
        self.streams: set[int] = set()

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return 0 <= profile < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        ranges = self._engine.profiles[self._profile].shapes.get(name)
        self._shapes[name] = tuple(shape)
        if ranges is None:
            return tuple(shape) == self._engine.get_tensor_shape(name)
        least, _, most = ranges
        return all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        named = {
            side: length
            for given, shape in self._shapes.items()
            for side, length in zip(self._engine.node(given).shape, shape, strict=True)
        }
        return tuple(side if isinstance(side, int) else named.get(side, -1) for side in self._engine.node(name).shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if set(self._addresses) != {*self._engine.inputs, *self._engine.outputs}:
            return False
        binding = self._engine.session.io_binding()
        for name, address in self._addresses.items():
            bind = binding.bind_input if name in self._engine.inputs else binding.bind_output
            dtype = _NAMES[self._engine.node(name).type][1]
            bind(name, "cpu", 0, dtype, self.get_tensor_shape(name), address)
        self._engine.session.run_with_iobinding(binding)
        self.runs += 1
        self.streams.add(stream)
        return True


class EnginesOnHost(EngineBackend):
    """A backend whose engines are `EngineOnHost`, for every graph of a bundle."""

    def load_engine(self, path: Path, spec: GraphSpec) -> EngineGraph:
        graph = path.relative_to(self.bundle.root).as_posix()
        record = record_of(self.bundle, graph)
        return EngineGraph(EngineOnHost(path, record.profiles), record, spec, self)


def engines_on(device: Device, bundle: Bundle) -> EnginesOnHost:
    library = Library(target="tensorrt", module=recorded_module("10.3.0"))
    return EnginesOnHost(name="tensorrt", version=library.version, bundle=bundle, library=library, gpu=device)


def record_of(bundle: Bundle, graph: str, **changes: Any) -> EngineRecord:
    """The record that a build for this graph would leave."""
    specs = bundle_specs(bundle.manifest)
    name, spec = next((name, spec) for name, (path, spec) in specs.items() if path == graph)
    engine = EngineOnHost(bundle.file(graph), ())
    declared = {tensor.name: engine.get_tensor_shape(tensor.name) for tensor in spec.inputs}
    lengths = axis_lengths(bundle.manifest, ProfileLimits())[name]
    plain = EngineRecord(
        file="engines/host.engine",
        graph=graph,
        graph_sha256=graph_digest(bundle, graph),
        target="tensorrt",
        library_version="10.3.0",
        compute_capabilities=("0.0",),
        platform=platform_name(),
        options={"version_compatible": False},
        profiles=make_profiles(spec, declared, lengths),
        precisions={"float32": 1},
        gate={"status": "passed"},
        build_seconds=1.0,
    )
    return dataclasses.replace(plain, **changes)
