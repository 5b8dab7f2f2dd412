"""Which engine of a bundle may run here; every reason not to is an error that says what to do."""

from __future__ import annotations

from segzero_rt.bundle import Bundle
from segzero_rt.engines.library import Library
from segzero_rt.engines.record import EngineRecord, platform_name
from segzero_rt.engines.store import graph_digest
from segzero_rt.errors import EngineError
from segzero_rt.manifest import GATE_PASSED


def choose_engine(
    bundle: Bundle, graph: str, library: Library, *, capability: str, allow_ungated: bool = False
) -> EngineRecord:
    """The engine of a graph for this library and device.

    Args:
        graph: path of the ONNX graph inside the bundle.
        capability: compute capability of the device, such as "8.9".
        allow_ungated: take one that was never compared with its reference.

    Raises:
        EngineError: there is none, or it is of another graph, version, device or platform, or was never gated.
    """
    again = f"run `segzero build {bundle.root} --target {library.target}` here"
    here = platform_name()
    of_graph = [
        engine for engine in bundle.manifest.engines if engine.graph == graph and engine.target == library.target
    ]
    if not of_graph:
        raise EngineError(f"{bundle.root}: expected an engine of {library.target} for {graph}, got none; {again}")
    fitting = [
        engine
        for engine in of_graph
        if engine.platform == here and capability in (engine.compute_capabilities or (capability,))
    ]
    if not fitting:
        built_for = "; ".join(f"{', '.join(e.compute_capabilities) or 'any'} on {e.platform}" for e in of_graph)
        raise EngineError(
            f"{bundle.root}: expected an engine of {graph} for compute capability {capability} on {here}, "
            f"got engines for {built_for}; {again}"
        )
    engine = max(
        fitting, key=lambda one: len(one.compute_capabilities) > 0
    )  # one made for this device before one for all
    if engine.graph_sha256 != graph_digest(bundle, graph):
        raise EngineError(f"{bundle.root}: expected an engine of the present {graph}, got one of another; {again}")
    if engine.library_version != library.version and not engine.options.get("version_compatible"):
        raise EngineError(
            f"{bundle.root}: expected an engine of {library}, got {graph} of {engine.library_version}; {again}"
        )
    status = engine.gate.get("status")
    if status != GATE_PASSED and not allow_ungated:
        raise EngineError(
            f"{bundle.root}: expected an engine of {graph} that passed its gate, got one with gate {status}: it was "
            f"never compared with its reference; {again}, or allow it with --allow-ungated"
        )
    return engine
