"""One graph to one engine, strongly typed: the types in the ONNX file are what the engine computes in.

parse ─► compare with the spec ─► profiles ─► build (with progress, can be stopped) ─► the engine's bytes

TensorRT 11 knows strongly typed networks alone; asking 10.x for the same gives one file one meaning on both.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segzero_rt.engines.library import HARDWARE_LEVELS, Complaints, Library, listen
from segzero_rt.engines.record import ProfileRecord
from segzero_rt.errors import EngineError, GraphError
from segzero_rt.graph_spec import GraphSpec

Progress = Callable[[str, float], None]
"""Takes the present phase and the share that is done, 0 to 1."""
OPTIMIZATION_LEVELS = range(6)

_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "INT8": "int8",
    "BOOL": "bool",
    "FP8": "float8",
    "INT4": "int4",
    "FP4": "float4",
}
FLOATS = ("float32", "float16", "bfloat16", "float8", "float4")
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How engines are built; the same for all graphs of a bundle."""

    compute_capabilities: tuple[str, ...] = ()
    """Devices to build for, such as "8.9"; empty for the library's own choice. TensorRT-RTX alone has a choice."""
    hardware_compatible: str | None = None
    """A name of `HARDWARE_LEVELS`: the engine also runs on other devices of that kind, more slowly."""
    version_compatible: bool = False
    """The engine also runs under later versions of the library."""
    strip: bool = False
    """Leaves the weights out; they are filled in from the ONNX file when the engine is loaded."""
    tf32: bool = False
    """Lets float32 products round their factors to 10 bits of mantissa; off, float32 means float32."""
    optimization_level: int | None = None
    """0 (built fast) to 5 (runs fast); the library's own choice by default."""
    workspace_bytes: int | None = None
    """Most memory that one layer may use for intermediate results; all there is by default."""

    def __post_init__(self) -> None:
        if self.hardware_compatible is not None and self.hardware_compatible not in HARDWARE_LEVELS:
            raise EngineError(
                f"expected hardware compatibility of {', '.join(HARDWARE_LEVELS)}, got {self.hardware_compatible!r}"
            )
        if self.optimization_level is not None and self.optimization_level not in OPTIMIZATION_LEVELS:
            raise EngineError(f"expected an optimisation level from 0 to 5, got {self.optimization_level}")

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: all that changes the engine, devices apart."""
        names = ("hardware_compatible", "version_compatible", "strip", "tf32", "optimization_level", "workspace_bytes")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """What the library's parser will not take."""

    node: str
    """Name of the node; empty where the whole file is refused."""
    operator: str
    message: str

    def __str__(self) -> str:
        return f"{self.operator or 'the file'} {self.node}: {self.message}"


class ParsedGraph:
    """A graph that the library has read. Use `parse_graph`."""

    def __init__(
        self, library: Library, builder: Any, network: Any, complaints: Complaints, keep: Sequence[Any]
    ) -> None:
        self.library, self.complaints = library, complaints
        self._builder, self._network = builder, network
        self._keep = keep  # the network reads the parser's weights until the engine is built

    @property
    def inputs(self) -> list[tuple[str, str, list[object]]]:
        """Name, dtype and shape, -1 where an axis is dynamic."""
        return [_tensor(self._network.get_input(index)) for index in range(self._network.num_inputs)]

    @property
    def outputs(self) -> list[tuple[str, str, list[object]]]:
        return [_tensor(self._network.get_output(index)) for index in range(self._network.num_outputs)]

    def declared_inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs, as `make_profiles` takes them."""
        tensors = (self._network.get_input(index) for index in range(self._network.num_inputs))
        return {tensor.name: tuple(tensor.shape) for tensor in tensors}

    def check(self, spec: GraphSpec) -> None:
        """Compares inputs and outputs with the spec.

        Raises:
            GraphError: the first difference.
        """
        spec.check_declared(_named(self.inputs), _named(self.outputs))

    def precisions(self) -> dict[str, int]:
        """How many layers compute in each type; strongly typed, so this is what the engine does."""
        return dict(Counter(dtype for _, dtype in self.layers()))

    def layers(self) -> list[tuple[str, str]]:
        """Name and output type of each layer that computes; weights and their conversions compute nothing."""
        kinds = self.library.module.LayerType
        every = (self._network.get_layer(index) for index in range(self._network.num_layers))
        computing = (layer for layer in every if layer.num_outputs and layer.type not in (kinds.CONSTANT, kinds.CAST))
        return [(layer.name, dtype_name(layer.get_output(0).dtype)) for layer in computing]

    def float32_islands(self) -> list[str]:
        """Names of the layers that stay in float32 where others compute in 16 bits or fewer; else empty."""
        layers = self.layers()
        narrow = set(FLOATS) - {"float32"}
        return [name for name, dtype in layers if dtype == "float32"] if narrow & {dtype for _, dtype in layers} else []

    def build(
        self, profiles: Sequence[ProfileRecord], options: BuildOptions, *, timing_cache: Path | None, progress: Progress
    ) -> memoryview:
        """Builds the engine; returns its bytes. Ctrl-C stops the library within one of its steps.

        Args:
            timing_cache: file with kernel timings of earlier builds, read and written where the library keeps any.

        Raises:
            EngineError: the library cannot build it, or does not know an option.
        """
        config = self._builder.create_builder_config()
        _configure(self.library, config, options)
        for profile in profiles:
            config.add_optimization_profile(self._profile(profile))
        cache = _TimingCache(self.library, config, timing_cache)
        monitor = _monitor(self.library, progress)
        config.progress_monitor = monitor
        if self.library.has_attention:
            self._let_attention_be_taken_apart()
        engine = _run_stoppably(lambda: self._builder.build_serialized_network(self._network, config), monitor)
        if engine is None:
            raise EngineError(
                f"expected {self.library} to build {self._network.name}, it says: {self.complaints.first_error()[:600]}"
            )
        cache.save()
        progress("done", 1.0)
        return memoryview(engine)

    def _profile(self, record: ProfileRecord) -> Any:
        profile = self._builder.create_optimization_profile()
        for name, (least, usual, most) in record.shapes.items():
            profile.set_shape(name, least, usual, most)
        return profile

    def _let_attention_be_taken_apart(self) -> None:
        """Fused attention exists in 16 bits only; without leave to use plain layers, float32 would not build."""
        for index in range(self._network.num_layers):
            layer = self._network.get_layer(index)
            if layer.type == self.library.module.LayerType.ATTENTION_INPUT:
                layer.__class__ = self.library.module.IAttentionInputLayer  # `get_layer` gives the base class alone
                layer.attention.decomposable = True


def parse_graph(library: Library, path: Path) -> ParsedGraph | list[Refusal]:
    """Reads an ONNX file, with the weights beside it; where the parser refuses it, gives everything that it refuses."""
    module = library.module
    logger, complaints = listen(library)
    builder = module.Builder(logger)
    if builder is None or not hasattr(builder, "create_network"):
        return [Refusal(node="", operator="", message=complaints.first_error())]
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.name = path.stem  # engines and messages carry it
    parser = module.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return ParsedGraph(library, builder, network, complaints, (logger, parser))
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    return [
        Refusal(node=str(error.node_name()), operator=str(error.node_operator()), message=_reason(error))
        for error in found
    ] or [Refusal(node="", operator="", message=complaints.first_error())]


def _reason(error: Any) -> str:
    """The parser's words; where they are only a failed check, the name of the check as well."""
    words = " ".join(str(error.desc()).split())
    return f"{words} (in {error.func()})" if error.func() else words


def _configure(library: Library, config: Any, options: BuildOptions) -> None:
    module = library.module
    if not options.tf32:
        config.clear_flag(module.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if options.strip:
        config.set_flag(module.BuilderFlag.STRIP_PLAN)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.hardware_compatible is not None:
        _set_hardware_level(library, config, options.hardware_compatible)
    if options.compute_capabilities:
        _set_capabilities(library, config, options.compute_capabilities)


def _set_hardware_level(library: Library, config: Any, name: str) -> None:
    if name not in library.hardware_levels:
        raise EngineError(
            f"expected {library} to build engines for {name} devices, it knows "
            f"{', '.join(library.hardware_levels) or 'no such level'}; leave --hardware-compatible out"
        )
    level = getattr(library.module.HardwareCompatibilityLevel, HARDWARE_LEVELS[name])
    config.hardware_compatibility_level = level
    if config.hardware_compatibility_level != level:  # TensorRT-RTX has the name, warns, and goes on without
        raise EngineError(
            f"expected {library} to build engines for {name} devices, it ignores that; choose devices with "
            "--compute-capability, or leave --hardware-compatible out"
        )


def _set_capabilities(library: Library, config: Any, wanted: Sequence[str]) -> None:
    if not library.builds_ahead:
        raise EngineError(
            f"expected no --compute-capability: {library} builds for the device that is here; build on the target"
        )
    known = library.capability_names()
    if unknown := sorted(set(wanted) - set(known)):
        raise EngineError(f"expected compute capabilities of {', '.join(known)}, got {', '.join(unknown)}")
    config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        member = getattr(library.module.ComputeCapability, "SM" + name.replace(".", ""))
        config.set_compute_capability(member, index)


class _TimingCache:
    """Measured times of kernels, kept from build to build where the library keeps any."""

    def __init__(self, library: Library, config: Any, path: Path | None) -> None:
        self._config = config
        self._path = path if library.has_timing_cache else None
        if self._path is not None:
            known = self._path.read_bytes() if self._path.is_file() else b""
            cache = config.create_timing_cache(known)
            if not config.set_timing_cache(cache, False):  # of another device or version: begin anew
                config.set_timing_cache(config.create_timing_cache(b""), False)

    def save(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        temporary.write_bytes(self._config.get_timing_cache().serialize())
        temporary.replace(self._path)


def _monitor(library: Library, progress: Progress) -> Any:
    """Reports how much of the outermost phase is done, and ends the build once `stopped` is set."""
    base: Any = library.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]  # the base class is known when this runs
        def __init__(self) -> None:
            base.__init__(self)
            self.stopped = threading.Event()
            self._steps: dict[str, int] = {}
            self._share = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[name] = steps
            progress(name, self._share)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self._steps:
                self._share = (step + 1) / max(1, self._steps[name])
            progress(name, self._share)
            return not self.stopped.is_set()

        def phase_finish(self, name: str) -> None:
            self._steps.pop(name, None)

    return Monitor()


def _run_stoppably(build: Callable[[], Any], monitor: Any) -> Any:
    """Builds in a thread of its own: an exception raised inside the library's callbacks would be printed and lost."""
    results: list[Any] = []
    finished = threading.Event()

    def run() -> None:
        try:
            results.append(build())
        finally:
            finished.set()

    thread = threading.Thread(target=run, name="engine-build")
    try:
        thread.start()
        # Not `join`: interrupted, Python 3.10 to 3.12 take the thread for ended (python/cpython#90882), and the library
        # would call back into an interpreter that is gone.
        while not finished.wait(_POLL_S):
            pass
    except KeyboardInterrupt:
        monitor.stopped.set()
        finished.wait()
        raise
    thread.join()
    return results[0] if results else None


def _tensor(tensor: Any) -> tuple[str, str, list[object]]:
    return str(tensor.name), dtype_name(tensor.dtype), list(tensor.shape)


def _named(tensors: list[tuple[str, str, list[object]]]) -> list[tuple[str, str, list[object]]]:
    """Dynamic axes as names, which `GraphSpec.check_declared` takes for "any length"."""
    return [(name, dtype, ["?" if length == -1 else length for length in shape]) for name, dtype, shape in tensors]


def dtype_name(dtype: Any) -> str:
    """NumPy's name of the library's type, where it has one."""
    return _TYPES.get(dtype.name, str(dtype.name).lower())


def elapsed(start_s: float) -> float:
    """Seconds since `start_s`, to a tenth."""
    return round(time.perf_counter() - start_s, 1)


def check_profiles(engine: Any, profiles: Sequence[ProfileRecord]) -> None:
    """Compares a loaded engine's profiles with those that were asked for.

    Raises:
        GraphError: the first difference.
    """
    if engine.num_optimization_profiles != len(profiles):
        raise GraphError(f"expected {len(profiles)} profiles, the engine has {engine.num_optimization_profiles}")
    for index, profile in enumerate(profiles):
        for name, wanted in profile.shapes.items():
            found = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            if found != wanted:
                raise GraphError(f"profile {profile.name}: expected {name} {wanted}, the engine has {found}")
