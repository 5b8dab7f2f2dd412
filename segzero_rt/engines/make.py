"""Engines for a bundle: what must be built, built graph by graph, each recorded as soon as it is whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from segzero_rt.bundle import Bundle
from segzero_rt.engines.builder import BuildOptions, ParsedGraph, Progress, Refusal, elapsed, parse_graph
from segzero_rt.engines.library import Library
from segzero_rt.engines.profiles import ProfileLimits, axis_lengths, bundle_specs, make_profiles
from segzero_rt.engines.record import EngineRecord, platform_name
from segzero_rt.engines.store import building, graph_digest, record_engines, write_engine
from segzero_rt.errors import EngineError
from segzero_rt.manifest import GATE_NOT_RUN
from segzero_rt.preflight.gpu import Gpu
from segzero_rt.preflight.type_needs import type_needs

Gate = Callable[[str, EngineRecord, Path], Mapping[str, Any]]
"""Takes a graph's name, its record and its file; runs it and returns figures with `status`, or raises EngineError."""


@dataclass(kw_only=True, slots=True)
class BuildReport:
    """What came of a build."""

    bundle: Bundle
    built: list[EngineRecord] = field(default_factory=list)
    kept: list[EngineRecord] = field(default_factory=list)
    """Already there, of the same graph, library and options."""
    refused: dict[str, list[Refusal]] = field(default_factory=dict)
    """Graph to what the parser will not take; nothing was built then."""


def build_engines(
    bundle: Bundle,
    library: Library,
    *,
    options: BuildOptions,
    limits: ProfileLimits,
    gpu: Gpu | None,
    graphs: Collection[str] = (),
    force: bool = False,
    gate: Gate | None = None,
    progress: Callable[[str], Progress] = lambda graph: lambda phase, share: None,
) -> BuildReport:
    """Builds what is missing or out of date, and records each engine in the manifest.

    All graphs are parsed before the first is built, so that a graph that the library will not take is known at once.

    Args:
        gpu: the device that is here; TensorRT needs one, TensorRT-RTX builds without.
        graphs: names of graphs; all by default.
        force: builds again what is there already.
        gate: runs an engine against its reference; without one the record says `not_run`.
        progress: gives, for a graph's name, what its progress is told to.

    Raises:
        EngineError: an unknown graph, no device where one is needed, a device without a type of the graphs, a build
            that fails, a gate that is not passed.
        GraphError: a graph differs from its spec.
        BundleError: the bundle cannot be written.
    """
    specs = bundle_specs(bundle.manifest)
    if unknown := sorted(set(graphs) - set(specs)):
        raise EngineError(f"expected graphs of {', '.join(specs)}, got {', '.join(unknown)[:80]}")
    capabilities = _capabilities(library, options, gpu)
    _check_types(bundle, [specs[name][0] for name in graphs or specs], capabilities)
    lengths = axis_lengths(bundle.manifest, limits)
    with building(bundle):
        report = BuildReport(bundle=bundle)
        parsed: dict[str, ParsedGraph] = {}
        for name in graphs or specs:
            path, spec = specs[name]
            result = parse_graph(library, bundle.file(path))
            if isinstance(result, ParsedGraph):
                result.check(spec)
                parsed[name] = result
            else:
                report.refused[name] = result
        if report.refused:
            return report
        for name in list(parsed):
            path, spec = specs[name]
            graph = parsed.pop(name)  # its memory goes once its engine is built
            planned = EngineRecord(
                file="",
                graph=path,
                graph_sha256=graph_digest(bundle, path),
                target=library.target,
                library_version=library.version,
                compute_capabilities=capabilities,
                platform=platform_name(),
                options=options.recorded(),
                profiles=make_profiles(spec, graph.declared_inputs(), lengths[name]),
                precisions=graph.precisions(),
                gate={"status": GATE_NOT_RUN, "reason": "no device here that could run it"},
                build_seconds=0.0,
            )
            there = next((old for old in report.bundle.manifest.engines if planned.same_build(old)), None)
            if there is not None and not force:
                report.kept.append(there)
                continue
            _build(report, name, planned, graph, options, gate, progress(name))
    return report


def _build(
    report: BuildReport,
    name: str,
    planned: EngineRecord,
    graph: ParsedGraph,
    options: BuildOptions,
    gate: Gate | None,
    progress: Progress,
) -> None:
    start_s = time.perf_counter()
    cache = timing_cache_path(planned)
    data = graph.build(planned.profiles, options, timing_cache=cache, progress=progress)
    devices = "-".join(f"sm{capability.replace('.', '')}" for capability in planned.compute_capabilities) or "any"
    file, listed = write_engine(report.bundle, f"{planned.target}-{devices}-{name}", data)
    record = replace(planned, file=file, build_seconds=elapsed(start_s))
    if gate is not None:
        try:
            record = replace(record, gate=dict(gate(name, record, report.bundle.root / file)))
        except EngineError:
            (report.bundle.root / file).unlink()
            raise
    report.bundle = record_engines(report.bundle, [(record, listed)])
    report.built.append(record)


def timing_cache_path(record: EngineRecord) -> Path:
    """Where timings of kernels are kept between builds: they belong to a device and a library, not to a bundle."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    device = "-".join(record.compute_capabilities)
    return root / "segzero" / "timing" / f"{record.target}-{record.library_version}-{device}.cache"


def _capabilities(library: Library, options: BuildOptions, gpu: Gpu | None) -> tuple[str, ...]:
    """What the record says the engines are for."""
    if library.builds_ahead:
        return tuple(sorted(set(options.compute_capabilities)))
    if gpu is None:
        raise EngineError(
            f"expected a CUDA device: {library} times kernels on the device that it builds for; build on the target, "
            "or use --target tensorrt-rtx, which builds without one"
        )
    return (gpu.capability,)


def _check_types(bundle: Bundle, graphs: list[str], capabilities: Collection[str]) -> None:
    """A library reads and optimises a large graph for minutes before it says so."""
    for need in type_needs(bundle, graphs):
        if lacking := [capability for capability in capabilities if not need.met_by(capability)]:
            raise EngineError(
                f"expected devices that have {need}: compute capability {need.least_capability} or newer, got "
                f"{', '.join(lacking)}; export it again with --storage float16 or int8, or build for another device"
            )
