"""Engines that tests build with TensorRT-RTX, which needs no GPU for that, and look into."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segzero_rt.engines.builder import BuildOptions, ParsedGraph, parse_graph
from segzero_rt.engines.library import Library
from segzero_rt.engines.profiles import make_profiles
from segzero_rt.graph_spec import GraphSpec


def parsed(library: Library, path: Path, spec: GraphSpec) -> ParsedGraph:
    """The file as the library reads it, which must take all of it, with the spec's inputs and outputs."""
    graph = parse_graph(library, path)
    assert isinstance(graph, ParsedGraph), [str(refusal) for refusal in graph]
    graph.check(spec)
    return graph


def built_bytes(
    graph: ParsedGraph, spec: GraphSpec, lengths: Mapping[str, Any], options: BuildOptions | None = None
) -> int:
    """Builds; the size of the engine, which must hold the names of all inputs and outputs."""
    profiles = make_profiles(spec, graph.declared_inputs(), lengths)
    engine = graph.build(profiles, options or BuildOptions(), timing_cache=None, progress=lambda phase, share: None)
    for name in (*spec.input_names, *spec.output_names):
        found = re.search(re.escape(name.encode()), engine)  # without a copy: engines are large
        assert found, f"the engine does not hold the name {name}"
    return len(engine)


def layer_types(graph: ParsedGraph) -> Counter[tuple[str, str]]:
    """How many layers there are of each ONNX operator and type, by the names that the parser gives to layers."""
    found: Counter[tuple[str, str]] = Counter()
    for name, dtype in graph.layers():
        operator = re.sub(r"_\d+$", "", name.rpartition(":")[2].removeprefix("node_"))
        found[operator, dtype] += 1
    return found
