"""A graph on TensorRT or TensorRT-RTX: loads an engine of the bundle and runs it with buffers that stay in place.

The interface is that of `segzero_rt.graph.Graph`. Device buffers are allocated once, for the largest shapes of the
profiles; a run copies its inputs there, enqueues the engine and copies the outputs back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segzero_rt.bundle import Bundle
from segzero_rt.device import Device, DeviceArray, DeviceBuffer, largest_bytes
from segzero_rt.engines.builder import check_profiles, dtype_name
from segzero_rt.engines.choice import choose_engine
from segzero_rt.engines.gate import gate_engine
from segzero_rt.engines.library import Library, find_library, listen
from segzero_rt.engines.make import Gate
from segzero_rt.engines.profiles import bundle_specs
from segzero_rt.engines.record import EngineRecord
from segzero_rt.errors import EngineError, GraphError
from segzero_rt.graph import Array, Backend, BoundGraph, Buffer, Graph, Stop, check_arrays
from segzero_rt.graph_spec import GraphSpec
from segzero_rt.manifest import GATE_NOT_RUN

if TYPE_CHECKING:
    from segzero_rt.graph import Memory


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class EngineBackend(Backend):
    """The engines of one bundle, on one device. Prints as its name."""

    bundle: Bundle
    library: Library
    gpu: Device
    allow_ungated: bool = False

    @classmethod
    def open(
        cls, bundle: Bundle, target: str, *, allow_ungated: bool = False, device: Device | None = None
    ) -> EngineBackend:
        """Finds the library and, where none is given, the device.

        Raises:
            BackendError: either is not there.
        """
        library = find_library(target)
        return cls(
            name=target,
            version=library.version,
            bundle=bundle,
            library=library,
            gpu=device or Device.open(),
            allow_ungated=allow_ungated,
        )

    def load_engine(self, path: Path, spec: GraphSpec) -> EngineGraph:
        """Loads the engine of the bundle's graph at `path`.

        Raises:
            EngineError: no engine of it may run here; see `choose_engine`.
            GraphError: the engine differs from its spec or its record.
        """
        graph = path.relative_to(self.bundle.root).as_posix()
        record = choose_engine(
            self.bundle,
            graph,
            self.library,
            capability=self.gpu.capability,
            allow_ungated=self.allow_ungated,
        )
        data = self.bundle.file(record.file).read_bytes()
        engine = open_engine(self.library, data, record, spec, weights=path)
        return EngineGraph(engine, record, spec, self)


def gate_on_device(bundle: Bundle, library: Library, device: Device) -> Gate:
    """Runs each engine that was built for this device beside ONNX Runtime, as `build_engines` takes it."""
    backend = EngineBackend(name=library.target, version=library.version, bundle=bundle, library=library, gpu=device)
    specs = bundle_specs(bundle.manifest)

    def gate(name: str, record: EngineRecord, path: Path) -> dict[str, Any]:
        if device.capability not in (record.compute_capabilities or (device.capability,)):
            return {"status": GATE_NOT_RUN, "reason": f"built for other devices than this one ({device.capability})"}
        graph, spec = specs[name]
        engine = open_engine(library, path.read_bytes(), record, spec, weights=bundle.file(graph))
        return gate_engine(bundle, name, record, EngineGraph(engine, record, spec, backend))

    return gate


def open_engine(library: Library, data: bytes, record: EngineRecord, spec: GraphSpec, *, weights: Path) -> Any:
    """An engine of the library, checked against spec and record.

    Args:
        weights: the ONNX file, which fills in an engine that was built without its weights.

    Raises:
        EngineError: the library cannot load it on this device.
        GraphError: inputs, outputs or profiles differ.
    """
    module = library.module
    logger, complaints = listen(library)
    runtime = module.Runtime(logger)
    if runtime is None:
        raise EngineError(f"expected {library} to start, it says: {complaints.first_error()[:400]}")
    if record.options.get("version_compatible"):
        runtime.engine_host_code_allowed = True  # the file's hash stands in the manifest
    if library.tells_validity:
        validity, _ = runtime.get_engine_validity(data)
        if validity == module.EngineValidity.INVALID:
            raise EngineError(
                f"expected {record.file} to run on this device, {library} says that it cannot: "
                f"{complaints.first_error()[:400]}"
            )
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"expected {library} to load {record.file}, it says: {complaints.first_error()[:400]}")
    if record.options.get("strip"):
        refitter = module.Refitter(engine, logger)
        if (
            not module.OnnxParserRefitter(refitter, logger).refit_from_file(str(weights))
            or not refitter.refit_cuda_engine()
        ):
            raise EngineError(f"expected {weights} to fill in {record.file}: {complaints.first_error()[:400]}")
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    declared = [(name, dtype_name(engine.get_tensor_dtype(name)), _shape(engine, name)) for name in names]
    is_input = {name: engine.get_tensor_mode(name) == module.TensorIOMode.INPUT for name in names}
    spec.check_declared([t for t in declared if is_input[t[0]]], [t for t in declared if not is_input[t[0]]])
    check_profiles(engine, record.profiles)
    return engine


class EngineGraph(Graph):
    """A loaded engine. Use `EngineBackend.load_engine`. One run at a time."""

    def __init__(self, engine: Any, record: EngineRecord, spec: GraphSpec, backend: EngineBackend) -> None:
        super().__init__(engine, spec, backend)
        self.record, self._library = record, backend.library
        self._engine, self._device = engine, backend.gpu
        self._contexts: dict[int, Any] = {}
        self._buffers: dict[str, DeviceBuffer] = {}

    def run(self, inputs: Mapping[str, Array], *, stop: Stop | None = None) -> dict[str, Array]:
        """One run with fresh outputs, by name. A run on the device is not interrupted; `stop` is asked before it.

        Raises:
            GraphError: inputs do not fit the spec or any profile, or the device fails.
        """
        if stop is not None and stop.options.terminate:
            raise GraphError(f"graph {self.spec.label}: stopped before it ran")
        context, shapes = self._prepare(inputs)
        outputs = {tensor.name: np.empty(shapes[tensor.name], tensor.dtype) for tensor in self.spec.outputs}
        self._execute(context, inputs, outputs)
        return outputs

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """Zeroed memory for `bind`, on the host."""
        return np.zeros(shape, dtype=dtype)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> BoundEngine:
        """Ties arrays to all inputs and outputs, as `Graph.bind`.

        Raises:
            GraphError: arrays do not fit the spec or any profile, or are not contiguous.
        """
        _, shapes = self._prepare(inputs)
        for name, array in (*inputs.items(), *outputs.items()):
            if (name in shapes and array.shape != shapes[name]) or not array.flags.c_contiguous:
                raise GraphError(
                    f"graph {self.spec.label}: expected a contiguous {name} of {shapes.get(name)}, got {array.shape}"
                )
        return BoundEngine(self, inputs, outputs)

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """As `Graph.output_shapes`.

        Raises:
            GraphError: inputs do not fit the spec or any profile.
        """
        self.spec.check_shapes(shapes)
        with self._device.current():
            return self._shaped(shapes)[1]

    def enqueuer(
        self, inputs: Mapping[str, Memory], outputs: Mapping[str, DeviceArray], *, fixed: bool = False
    ) -> Callable[[], None]:
        """A function that enqueues a run on the device's stream, over memory that is there, as `Graph.enqueuer`.

        Raises:
            GraphError: arrays do not fit the spec or any profile, lie on the host, or a cache would not be updated
                where it lies.
        """
        check_arrays(self.spec, inputs, outputs)
        memory = dict(outputs)
        for name, array in inputs.items():
            if not isinstance(array, DeviceArray):
                raise GraphError(f"graph {self.spec.label}: expected {name} on the device, got it on the host")
            memory[name] = array
        for name, source in self.spec.in_place.items():
            if memory[name].address != memory[source].address:
                raise GraphError(f"graph {self.spec.label}: expected {name} and {source} in one memory, got two")
        shapes = {name: array.shape for name, array in inputs.items()}
        with self._device.current():
            _, found = self._shaped(shapes)
        for name, shape in found.items():
            if outputs[name].shape != shape:
                raise GraphError(f"graph {self.spec.label}: expected {name} of {shape}, got {outputs[name].shape}")

        def enqueue() -> None:
            context, _ = self._shaped(shapes)  # which runs of other shapes may have changed
            for name, array in memory.items():
                context.set_tensor_address(name, array.address)
            if not context.execute_async_v3(self._device.stream_handle):
                raise GraphError(f"expected graph {self.spec.label} to run, {self._library} refuses")

        return enqueue

    def _prepare(self, inputs: Mapping[str, Array]) -> tuple[Any, dict[str, tuple[int, ...]]]:
        """The context of a profile that fits, with the inputs' shapes set; shapes of the outputs."""
        self.spec.check_shapes({name: array.shape for name, array in inputs.items()})
        for tensor in self.spec.inputs:
            if inputs[tensor.name].dtype.name != tensor.dtype:
                raise GraphError(f"expected {tensor}; got dtype {inputs[tensor.name].dtype.name}")
        with self._device.current():
            return self._shaped({name: array.shape for name, array in inputs.items()})

    def _shaped(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, dict[str, tuple[int, ...]]]:
        """The context of a profile that fits, set to inputs of these shapes; shapes of the outputs."""
        context = self._context(self._profile_of(shapes))
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise GraphError(f"graph {self.spec.label}: the engine refuses {name} of shape {shape}")
        return context, {name: tuple(context.get_tensor_shape(name)) for name in self.spec.output_names}

    def _profile_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The last profile that fits: decode stands after prefill, and is the faster for one token."""
        for index in range(len(self.record.profiles) - 1, -1, -1):
            ranges = self.record.profiles[index].shapes
            if all(_within(shapes[name], least, most) for name, (least, _, most) in ranges.items()):
                return index
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise GraphError(
            f"graph {self.spec.label}: expected shapes within a profile of its engine, got {given[:300]}; "
            "build it with wider limits"
        )

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            context = self._engine.create_execution_context()  # its arguments have defaults in 10.3 to 11.4
            if context is None or not context.set_optimization_profile_async(profile, self._device.stream_handle):
                raise GraphError(f"graph {self.spec.label}: expected memory for its context, got none; close programs")
            self._contexts[profile] = context
        return self._contexts[profile]

    def _execute(self, context: Any, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        with self._device.current():
            for name, array in inputs.items():
                buffer = self._buffer(name, array)
                self._device.upload(np.ascontiguousarray(array), buffer)
                context.set_tensor_address(name, buffer.address)
            shared = self.spec.in_place  # TensorRT takes a cache's update only where it lies
            for name, array in outputs.items():
                context.set_tensor_address(name, self._buffer(shared.get(name, name), array).address)
            if not context.execute_async_v3(self._device.stream_handle):
                raise GraphError(f"expected graph {self.spec.label} to run, {self._library} refuses")
            for name, array in outputs.items():
                self._device.download(self._buffers[shared.get(name, name)], array)
            self._device.synchronize()

    def _buffer(self, name: str, array: Array) -> DeviceBuffer:
        """Allocated once, for the largest shape of any profile; outputs, whose shapes follow, grow with their use."""
        most = [profile.shapes[name][2] for profile in self.record.profiles if name in profile.shapes]
        needed = max([array.nbytes, *(largest_bytes(shape, array.dtype.name) for shape in most)])
        if name not in self._buffers or self._buffers[name].num_bytes < needed:
            self._buffers[name] = self._device.allocate(needed)
        return self._buffers[name]


class BoundEngine(BoundGraph):
    """An engine with its arrays, as `BoundGraph`."""

    def __init__(self, graph: EngineGraph, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._graph, self._inputs, self._outputs = graph, dict(inputs), dict(outputs)

    def rebind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Puts other arrays in the place of some, of any length along dynamic axes."""
        self._inputs.update(inputs)
        self._outputs.update(outputs)

    def run(self) -> None:
        context, _ = self._graph._prepare(self._inputs)
        self._graph._execute(context, self._inputs, self._outputs)


def _shape(engine: Any, name: str) -> list[object]:
    return ["?" if length == -1 else length for length in engine.get_tensor_shape(name)]


def _within(shape: tuple[int, ...], least: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return all(low <= length <= high for low, length, high in zip(least, shape, most, strict=True))
