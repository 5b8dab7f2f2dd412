"""One loaded graph on one backend of ONNX Runtime.

The backend is resolved once, by name, and can be read back: `auto` takes the GPU where ONNX Runtime has one, a forced
backend that is not there is an error and never falls back. ONNX Runtime is imported when the first graph is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.errors import BackendError, GraphError
from segzero_rt.external_data import check_external_data
from segzero_rt.graph_spec import GraphSpec, TensorSpec
from segzero_rt.operators.library import resolve_operators

if TYPE_CHECKING:  # ONNX Runtime has no stubs and must not be imported before a graph is loaded
    import types

    from segzero_rt.device import DeviceArray

    Memory = DeviceArray | NDArray[Any]
    """An array of the device, or one of the host that the graph reads when a run is enqueued."""

Array = NDArray[Any]
Buffer = Any
"""What a run reads or writes in place: a NumPy array, or ONNX Runtime's OrtValue where memory is on a device."""

_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt-ep": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
_EXTRAS = {"cpu": "segzero-rt[cpu]", "cuda": "segzero-rt[gpu]", "tensorrt-ep": "segzero-rt[gpu] and TensorRT"}
BACKENDS = ("auto", *_PROVIDERS)
_NO_BLOCKS = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_environment_lock = threading.Lock()
MAX_THREADS = 1024
"""ONNX Runtime starts as many threads as it is told to, and a slip of the pen would stall the machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A backend that is installed here. Prints as its name."""

    name: str
    """"cpu", "cuda" or "tensorrt-ep"."""
    version: str
    """Of ONNX Runtime."""
    stream_handle: int = 0
    """The CUDA stream that graphs run in, as the driver's number; 0 for one of their own."""
    replays: bool = False
    """Runs over memory that stays in place are captured as a CUDA graph once, and replayed."""

    @property
    def providers(self) -> tuple[str, ...]:
        """ONNX Runtime's execution providers, the one that was asked for first."""
        return _PROVIDERS[self.name]

    @property
    def provider_options(self) -> tuple[dict[str, str], ...]:
        """Of each of `providers`."""
        shared = {"user_compute_stream": str(self.stream_handle)} if self.stream_handle else {}
        captured = {"enable_cuda_graph": "1"} if self.replays else {}
        return tuple({**shared, **captured} if provider == _PROVIDERS["cuda"][0] else {} for provider in self.providers)

    @property
    def device(self) -> str:
        """Where the graph's memory is: "cpu" or "cuda"."""
        return "cpu" if self.name == "cpu" else "cuda"

    def load_engine(self, path: Path, spec: GraphSpec) -> Graph | None:
        """The graph at `path` as an engine of this backend; None where ONNX Runtime loads the file itself."""
        return None

    def __str__(self) -> str:
        return self.name


def resolve_backend(name: str = "auto") -> Backend:
    """Finds the backend called `name`; `auto` is "cuda" where ONNX Runtime offers it, else "cpu".

    Raises:
        BackendError: the name is unknown, ONNX Runtime is not installed, or this backend is not in it.
    """
    if name not in BACKENDS:
        raise BackendError(f"expected a backend of {', '.join(BACKENDS)}, got {name!r}")
    runtime = _onnxruntime()
    available = runtime.get_available_providers()
    if name == "auto":
        name = "cuda" if _PROVIDERS["cuda"][0] in available else "cpu"
    if _PROVIDERS[name][0] not in available:
        raise BackendError(
            f"expected backend {name}, but ONNX Runtime {runtime.__version__} offers {', '.join(available)}; "
            f"install {_EXTRAS[name]}, or choose another backend"
        )
    return Backend(name=name, version=str(runtime.__version__))


def default_threads() -> int:
    """Cores that this process may run on, which a container or `taskset` can make fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Stop:
    """Ends a run of a graph from another thread: hand it to the run, then call it."""

    def __init__(self) -> None:
        self.options = _onnxruntime().RunOptions()

    def __call__(self) -> None:
        self.options.terminate = True


class Graph:
    """A graph that is loaded and agrees with its spec. Use `Graph.load`."""

    def __init__(self, session: Any, spec: GraphSpec, backend: Backend) -> None:
        self.spec = spec
        self.backend = backend
        self._session = session
        self._captures = itertools.count(1)

    @classmethod
    def load(
        cls,
        path: Path,
        spec: GraphSpec,
        *,
        backend: str | Backend = "auto",
        threads: int | None = None,
        short_prompts: bool = False,
        operators: bool = True,
    ) -> Graph:
        """Loads the ONNX file and checks its inputs and outputs against the spec.

        Args:
            threads: threads of one run, 1 to `MAX_THREADS`; all cores of this process by default.
            short_prompts: attend as is fastest for some hundred tokens, where memory for all scores is no matter.
            operators: let compiled operators take the place of functions in the graph, on a CPU that has them.

        Raises:
            BackendError: the backend is not there, or cannot start.
            GraphError: the file cannot be read as a graph, has other inputs or outputs than the spec, or would read
                weights from elsewhere than its own folder.
        """
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise BackendError(f"expected 1 to {MAX_THREADS} threads, got {threads}")
        resolved = backend if isinstance(backend, Backend) else resolve_backend(backend)
        if (engine := resolved.load_engine(path, spec)) is not None:
            return engine
        runtime = _onnxruntime()
        check_external_data(path)
        try:
            with _attention_of_whole_rows() if short_prompts else contextlib.nullcontext():
                options = _session_options(runtime, threads or default_threads())
                if operators and resolved.device == "cpu" and (library := resolve_operators().path) is not None:
                    options.register_custom_ops_library(str(library))
                providers = [*zip(resolved.providers, resolved.provider_options, strict=True)]
                session = _open_session(runtime, path, options, providers)
        except _runtime_errors() as error:
            raise GraphError(f"expected a readable graph at {path}, ONNX Runtime says: {_first_line(error)}") from error
        if session.get_providers()[0] != resolved.providers[0]:
            raise BackendError(
                f"expected backend {resolved}, but ONNX Runtime could only start {session.get_providers()[0]}; "
                "its log names the library that is missing"
            )
        spec.check_declared(_declared(session.get_inputs()), _declared(session.get_outputs()))
        return cls(session, spec, resolved)

    def run(self, inputs: Mapping[str, Array], *, stop: Stop | None = None) -> dict[str, Array]:
        """One run with fresh outputs, by name.

        Raises:
            GraphError: inputs do not fit the spec, the backend fails (out of memory, a damaged graph), or `stop` was
                called.
        """
        self.spec.check_shapes({name: array.shape for name, array in inputs.items()})
        for tensor in self.spec.inputs:
            _check_dtype(tensor, inputs[tensor.name])
        try:
            outputs = self._session.run(self.spec.output_names, dict(inputs), stop.options if stop else None)
        except _runtime_errors() as error:
            raise GraphError(
                f"expected graph {self.spec.label} to run, ONNX Runtime says: {_first_line(error)}"
            ) from error
        return dict(zip(self.spec.output_names, outputs, strict=True))

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        """Zeroed memory that this graph's runs can use without copying; a NumPy array where that is the host's."""
        if self.backend.device == "cpu":
            return np.zeros(shape, dtype=dtype)
        zeros = np.zeros(shape, dtype=dtype)
        return _onnxruntime().OrtValue.ortvalue_from_numpy(zeros, self.backend.device, 0)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> BoundGraph:
        """Ties buffers to all inputs and outputs, for repeated runs without allocation.

        An input and an output may share one buffer where the graph writes in place. Buffers stay tied to their memory:
        change their contents, never reallocate them.

        Raises:
            GraphError: buffers do not fit the spec, or are not contiguous.
        """
        self.spec.check_shapes({name: tuple(_shape(buffer)) for name, buffer in inputs.items()})
        if set(outputs) != set(self.spec.output_names):
            raise GraphError(
                f"graph {self.spec.label}: expected buffers for {', '.join(self.spec.output_names)}; "
                f"got {', '.join(outputs)}"
            )
        for name, buffer in (*inputs.items(), *outputs.items()):
            if isinstance(buffer, np.ndarray):
                _check_dtype(self.spec.tensor(name), buffer)
                if not buffer.flags.c_contiguous:
                    raise GraphError(f"graph {self.spec.label}: expected a contiguous buffer for {name}")
        return BoundGraph(self._session, self.spec.label, inputs, outputs, on_host=self.backend.device == "cpu")

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs for inputs of these shapes.

        Raises:
            GraphError: inputs do not fit the spec, or the file leaves a length of an output open that they do not tell.
        """
        lengths = self.spec.check_shapes(shapes)
        found = {}
        for tensor, declared in zip(self.spec.outputs, self._session.get_outputs(), strict=True):
            sides = [
                have if isinstance(have, int) else lengths.get(str(want), want)
                for want, have in zip(tensor.shape, declared.shape, strict=True)
            ]
            if not all(isinstance(side, int) for side in sides):
                raise GraphError(f"graph {self.spec.label}: expected to know the shape of {tensor}, got {sides}")
            found[tensor.name] = tuple(int(side) for side in sides)
        return found

    def enqueuer(
        self, inputs: Mapping[str, Memory], outputs: Mapping[str, DeviceArray], *, fixed: bool = False
    ) -> Callable[[], None]:
        """A function that enqueues a run over memory of the device, and does not wait for it.

        An input and an output may share memory where the graph writes in place. The function keeps the memory.

        Args:
            fixed: it is called many times, so that a backend that replays may capture it.

        Raises:
            GraphError: arrays do not fit the spec.
        """
        check_arrays(self.spec, inputs, outputs)
        # What a graph reads on the host is a part of what is captured, and would be replayed with it.
        captured = fixed and not any(isinstance(array, np.ndarray) for array in inputs.values())
        options, device = self._unwaited(captured), self.backend.device
        return _Enqueuer(self._session, self.spec, inputs, outputs, device=device, options=options)

    def _unwaited(self, captured: bool) -> Any:
        """Options of a run that returns before a device has done it; None on the host, where there is no such thing."""
        if self.backend.device == "cpu":
            return None
        options = _onnxruntime().RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.backend.replays:
            options.add_run_config_entry("gpu_graph_id", str(next(self._captures)) if captured else "-1")
        return options


class BoundGraph:
    """A graph with its buffers. `run()` reads the inputs' present contents and fills the outputs."""

    def __init__(
        self, session: Any, label: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, on_host: bool
    ) -> None:
        self._label = label
        self._run = session.run_with_iobinding
        self._binding = session.io_binding()
        self._buffers = (dict(inputs), dict(outputs))  # ONNX Runtime holds addresses only: keep the memory alive
        # On a device, ONNX Runtime copies a host input when it is bound, so that it must be bound again for each run.
        self._host_inputs = {} if on_host else {n: b for n, b in inputs.items() if isinstance(b, np.ndarray)}
        for name, buffer in inputs.items():
            if not isinstance(buffer, np.ndarray):
                self._binding.bind_ortvalue_input(name, buffer)
            elif on_host:
                self._binding.bind_input(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
        for name, buffer in outputs.items():
            if isinstance(buffer, np.ndarray):
                self._binding.bind_output(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
            else:
                self._binding.bind_ortvalue_output(name, buffer)

    def rebind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Puts other arrays of the host in the place of some, of any length along dynamic axes; the rest stays tied.

        Several times cheaper than a binding of its own where a graph has many buffers. Arrays are not checked.
        """
        for name, array in inputs.items():
            if name in self._host_inputs:
                self._host_inputs[name] = array
            else:
                self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._buffers[0].update(inputs)
        self._buffers[1].update(outputs)

    def run(self) -> None:
        for name, array in self._host_inputs.items():
            self._binding.bind_cpu_input(name, array)
        try:
            self._run(self._binding)
        except _runtime_errors() as error:
            raise GraphError(f"expected graph {self._label} to run, ONNX Runtime says: {_first_line(error)}") from error


class _Enqueuer:
    """A graph with memory of the device; each call enqueues a run."""

    def __init__(
        self,
        session: Any,
        spec: GraphSpec,
        inputs: Mapping[str, Memory],
        outputs: Mapping[str, DeviceArray],
        *,
        device: str,
        options: Any,
    ) -> None:
        self._label, self._options = spec.label, options
        self._run = session.run_with_iobinding
        self._binding = session.io_binding()
        self._memory = (dict(inputs), dict(outputs))  # ONNX Runtime holds addresses only
        for name, array in inputs.items():
            if isinstance(array, np.ndarray):
                self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            else:
                self._binding.bind_input(name, device, 0, array.dtype.type, array.shape, array.address)
        for name, array in outputs.items():
            self._binding.bind_output(name, device, 0, array.dtype.type, array.shape, array.address)

    def __call__(self) -> None:
        try:
            self._run(self._binding, self._options)
        except _runtime_errors() as error:
            raise GraphError(f"expected graph {self._label} to run, ONNX Runtime says: {_first_line(error)}") from error


def check_arrays(spec: GraphSpec, inputs: Mapping[str, Memory], outputs: Mapping[str, DeviceArray]) -> dict[str, int]:
    """The lengths of a spec's dynamic dimensions, by name, in these arrays.

    Raises:
        GraphError: an array is missing or too many, or has another dtype or shape.
    """
    lengths = spec.check_shapes({name: array.shape for name, array in inputs.items()})
    if set(outputs) != set(spec.output_names):
        raise GraphError(f"graph {spec.label}: expected {', '.join(spec.output_names)}; got {', '.join(outputs)}")
    for name, array in (*inputs.items(), *outputs.items()):
        tensor = spec.tensor(name)
        shape = tuple(lengths.get(side, side) if isinstance(side, str) else side for side in tensor.shape)
        fits = len(shape) == len(array.shape) and all(
            isinstance(wanted, str) or wanted == given for wanted, given in zip(shape, array.shape, strict=True)
        )
        if array.dtype.name != tensor.dtype or not fits:
            raise GraphError(f"graph {spec.label}: expected {tensor}; got {array.dtype.name} {list(array.shape)}")
    return lengths


def _onnxruntime() -> types.ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "expected ONNX Runtime, which is not installed; install segzero-rt[cpu], or segzero-rt[gpu] for CUDA "
            f"({error})"
        ) from error
    module: types.ModuleType = onnxruntime
    return module


def _session_options(runtime: Any, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Planning which outputs may share memory takes most of a small graph's loading time (30 of 50 ms) and gains nothing
    # measurable in its runs; the arena reuses memory as they go.
    options.enable_mem_reuse = False
    # Threads that spin while they wait slow down the other graph that runs beside this one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _open_session(runtime: Any, path: Path, options: Any, providers: list[Any]) -> Any:
    """A session of a graph file; of one that says how to round to 8 bits, if need be without rewriting that.

    ONNX Runtime 1.31 moves QuantizeLinear about and joins it with products as if all its codes were int8, and refuses
    what it has made of floats of 8 bits. As it is written, it runs such a graph.
    """
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    except runtime.capi.onnxruntime_pybind11_state.InvalidGraph:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return runtime.InferenceSession(str(path), options, providers=providers)


@contextlib.contextmanager
def _attention_of_whole_rows() -> Iterator[None]:
    """Has sessions that are made inside compute GroupQueryAttention's scores at once instead of block by block.

    By blocks, 117 tokens of the tabletop policy take 0.39 ms a layer, at once 0.17 ms, and 900 tokens 15 and 9 ms. With
    heads as wide as a large policy's, blocks win from some 600 tokens on. ONNX Runtime has no other switch for it.
    """
    with _environment_lock:
        before = os.environ.get(_NO_BLOCKS)
        os.environ[_NO_BLOCKS] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_NO_BLOCKS]
            else:
                os.environ[_NO_BLOCKS] = before


@functools.cache
def _runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a graph that it cannot load or run; its exceptions have no base of their own."""
    state = _onnxruntime().capi.onnxruntime_pybind11_state
    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoModel",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
        "EPFail",
    )
    return tuple(getattr(state, name) for name in names if hasattr(state, name))


def _declared(tensors: Any) -> list[tuple[str, str, list[object]]]:
    types_ = {
        "tensor(float)": "float32",
        "tensor(float16)": "float16",
        "tensor(int64)": "int64",
        "tensor(int32)": "int32",
        "tensor(uint8)": "uint8",
        "tensor(bool)": "bool",
    }
    return [(tensor.name, types_.get(tensor.type, tensor.type), list(tensor.shape)) for tensor in tensors]


def _shape(buffer: Buffer) -> tuple[int, ...]:
    return buffer.shape if isinstance(buffer, np.ndarray) else tuple(buffer.shape())


def _check_dtype(tensor: TensorSpec, array: Array) -> None:
    if array.dtype.name != tensor.dtype:
        raise GraphError(f"expected {tensor}; got dtype {array.dtype.name}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
