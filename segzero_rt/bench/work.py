"""What each stage has to compute and to read at least, counted on the bundle's own graphs at their true shapes.

Each graph runs once on one CPU thread under ONNX Runtime's profiler, which tells the shapes that every node saw;
products are added up from those. Bytes are weights as they are stored and the KV cache, each read once: what lies
between two nodes need not reach memory. Elementwise work is left out, so the ceiling is one that no program exceeds.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segzero_rt.answer import Prompt
from segzero_rt.bench.onnx_session import open_session
from segzero_rt.bench.peaks import Peaks
from segzero_rt.bench.tasks import Task
from segzero_rt.bundle import Bundle
from segzero_rt.graph import Backend, Graph, resolve_backend
from segzero_rt.graph_spec import GraphSpec
from segzero_rt.onnx_summary import computed_types, read_summary
from segzero_rt.operators.library import resolve_operators
from segzero_rt.preflight.memory_plan import kv_cache_bytes

_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "SplitLinear", "SplitProduct"})
_INT8_PRODUCTS = frozenset(
    {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits"}
)
"""Products of small integers; 4-bit weights are multiplied as 8-bit ones at best."""
_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "ConvTranspose"})
_INT8_CONVOLUTIONS = frozenset({"ConvInteger", "QLinearConv"})
_ATTENTIONS = frozenset({"MultiHeadAttention", "Attention", "HeadAttention"})
"""Without a mask, over [batch, rows, width]; the latter two are compiled operators."""
_CACHED_ATTENTION = "GroupQueryAttention"
_SPLITTING = frozenset({"SplitLinear", "SplitProduct", "SplitMlp"})
"""Compiled operators that take `SPLIT_PRODUCTS` products of bfloat16 for each of float32."""
SPLIT_PRODUCTS = 3
_COMPILED_LAYERS = frozenset({"Mlp", "SplitMlp", "Int8Mlp", "Int8GatedMlp"})
_BY_ROWS = 3
"""Axes of the attention that compiled operators take: ONNX's own `Attention` has four."""
_HALVES = ("float16", "bfloat16")
_NODE_ENDING = "_kernel_time"
"""Of a node's run in the profile, behind its name."""
_REPLY_TOKENS = 4
"""Enough for a run of one token after the prompt's."""

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWork:
    """Of one stage of one question, or of one token."""

    flops: dict[str, float]
    """Operations by type of number; a product and a sum are two."""
    num_bytes: float
    """Read from memory at least."""

    def ceiling_ms(self, peaks: Peaks, *, runs: float = 1, tokens: float = 1) -> float:
        """The least time at these peaks: the larger of reading everything and of computing everything.

        Args:
            runs: how often the bytes are read.
            tokens: how often the products are computed.
        """
        fallback = max(peaks.flops.values())
        compute_s = sum(count / peaks.flops.get(kind, fallback) for kind, count in self.flops.items())
        return 1e3 * max(runs * self.num_bytes / peaks.bandwidth_of(self.num_bytes), tokens * compute_s)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _ProfilingBackend(Backend):
    """ONNX Runtime on one CPU thread, every run written down."""

    folder: str
    library: Path | None
    sessions: dict[str, tuple[Path, Any]]

    def load_engine(self, path: Path, spec: GraphSpec) -> Graph | None:
        session = open_session(str(path), self, 1, profile=str(Path(self.folder) / spec.name), library=self.library)
        self.sessions[spec.name] = path, session
        return Graph(session, spec, self)


def count_work(bundle: Bundle, task: Task, *, operators: bool = True) -> dict[str, StageWork]:
    """Stage to its work: "vision", "prefill", "token" (one of the reply), "mask_encode", "mask_decode" (one object).

    Args:
        operators: as for `Graph.load`: whether compiled ones do what they can, where they are.

    Raises:
        GraphError: a graph cannot be read, or not be run on a CPU.
    """
    from segzero_rt.pipeline import SegZero

    cpu = resolve_backend("cpu")
    sessions: dict[str, tuple[Path, Any]] = {}
    library = resolve_operators().path if operators else None
    with tempfile.TemporaryDirectory(prefix="segzero-work-") as folder:
        backend = _ProfilingBackend(
            name=cpu.name, version=cpu.version, folder=folder, library=library, sessions=sessions
        )
        pipeline = SegZero.load(bundle, backend=backend, draft_tokens=0)
        image_rgb = task.load_image()
        pipeline.policy.answer(image_rgb, task.question, max_new_tokens=_REPLY_TOKENS)
        height, width = image_rgb.shape[:2]
        box = (width / 4, height / 4, width / 2, height / 2)
        center = (width * 3 / 8, height * 3 / 8)
        pipeline.segment(image_rgb, [Prompt(box_xyxy=box, points_xy=(center,))])
        profiles = {
            name: read_profile(session.end_profiling(), computed_types(path))
            for name, (path, session) in sessions.items()
        }
    return _stages(bundle, profiles)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfiledNode:
    """One node in one run."""

    operator: str
    dtype: str
    """Of its first input, in the words of the profile or the graph."""
    inputs: tuple[Shape, ...]
    """Those that it had; what is optional and absent leaves no gap."""
    output: Shape


def _stages(bundle: Bundle, profiles: Mapping[str, list[list[ProfiledNode]]]) -> dict[str, StageWork]:
    policy, segmenter = bundle.manifest.policy, bundle.manifest.segmenter
    names = {
        "vision": policy.graphs.vision,
        "decoder": policy.graphs.decoder,
        "image_encoder": segmenter.graphs.encoder,
        "mask_decoder": segmenter.graphs.decoder,
    }
    weights = {name: read_summary(bundle.file(path)).weight_bytes for name, path in names.items()}
    token_bytes = kv_cache_bytes(policy) / policy.max_length
    stages = {
        stage: StageWork(flops=count_flops(profiles[name][0]), num_bytes=weights[name])
        for stage, name in (
            ("vision", "vision"),
            ("mask_encode", "image_encoder"),
            ("mask_decode", "mask_decoder"),
        )
    }
    length = 0
    for stage, run in zip(("prefill", "token"), profiles["decoder"], strict=False):
        read = weights["decoder"] + token_bytes * length
        stages[stage] = StageWork(flops=count_flops(run, cached_tokens=length), num_bytes=read)
        length += max((node.inputs[0][1] for node in run if node.operator == _CACHED_ATTENTION), default=0)
    return stages


def count_flops(nodes: Iterable[ProfiledNode], *, cached_tokens: int = 0) -> dict[str, float]:
    """Operations of all products among the nodes of a run, by type of number.

    Args:
        cached_tokens: in the KV cache before the run, which no shape tells.
    """
    flops: dict[str, float] = defaultdict(float)
    for node in nodes:
        products = SPLIT_PRODUCTS if node.operator in _SPLITTING else 1
        flops[_kind(node)] += products * _node_flops(node, cached_tokens)
    return {kind: count for kind, count in flops.items() if count}


def _kind(node: ProfiledNode) -> str:
    """The type of number that a node multiplies: what its graph asks for, and compiled operators by what they round to.

    No library multiplies bfloat16 on a CPU, so that its peak is unknown, and the best known one stands for it.
    """
    if node.operator in _INT8_PRODUCTS | _INT8_CONVOLUTIONS or node.operator.startswith("Int8"):
        return "int8"
    if node.operator in _SPLITTING | {"Mlp", "Attention", "HeadAttention"}:
        return "bfloat16"
    return "float16" if node.dtype in _HALVES else "float32"


def _node_flops(node: ProfiledNode, cached_tokens: int) -> float:
    size = math.prod(node.output)
    if node.operator in _PRODUCTS | _INT8_PRODUCTS:
        return 2.0 * size * node.inputs[0][-1]
    if node.operator in _CONVOLUTIONS | _INT8_CONVOLUTIONS:
        kernel = next(shape for shape in node.inputs[1:] if len(shape) == len(node.output))
        if node.operator == "ConvTranspose":  # each number of the input meets every number of its channel's kernel
            return 2.0 * math.prod(node.inputs[0]) * math.prod(kernel[1:])
        return 2.0 * size * math.prod(kernel[1:])
    if node.operator in _COMPILED_LAYERS:
        weights = (shape for shape in node.inputs[1:] if len(shape) > 1)
        return 2.0 * math.prod(node.inputs[0][:-1]) * sum(math.prod(shape) for shape in weights)
    if node.operator in _ATTENTIONS and len(node.inputs[0]) == _BY_ROWS:
        batch, queries = node.inputs[0][:2]
        return 4.0 * batch * queries * node.inputs[1][-2] * node.output[-1]
    if node.operator == _CACHED_ATTENTION:
        batch, queries, width = node.output
        seen = sum(cached_tokens + place + 1 for place in range(queries))
        return 4.0 * batch * seen * width
    return 0.0


def read_profile(path: str, types: Mapping[str, str]) -> list[list[ProfiledNode]]:
    """The nodes of each run, in the order in which the runs were made.

    Args:
        types: what nodes of the graph compute in, by name: a CPU casts products of 16 bits to 32 and back, and the
            profile tells that.
    """
    events = json.loads(Path(path).read_text(encoding="utf-8"))
    runs = sorted(_span(event) for event in events if event["name"] == "model_run")
    nodes = sorted(
        (
            (event["ts"], node)
            for event in events
            if event["cat"] == "Node" and event["name"].endswith(_NODE_ENDING)
            if (node := _node(event["args"], types.get(event["name"].removesuffix(_NODE_ENDING)))) is not None
        ),
        key=lambda pair: pair[0],
    )
    return [[node for at, node in nodes if start <= at < end] for start, end in runs]


def _span(event: Mapping[str, Any]) -> tuple[int, int]:
    return event["ts"], event["ts"] + event["dur"]


def _node(args: Mapping[str, Any], dtype: str | None) -> ProfiledNode | None:
    inputs, outputs = _shapes(args.get("input_type_shape")), _shapes(args.get("output_type_shape"))
    if not inputs or not outputs:
        return None
    return ProfiledNode(
        operator=args["op_name"],
        dtype=dtype or inputs[0][0],
        inputs=tuple(shape for _, shape in inputs),
        output=outputs[0][1],
    )


def _shapes(listed: Sequence[Mapping[str, Sequence[int]]] | None) -> list[tuple[str, Shape]]:
    return [(dtype, tuple(shape)) for one in listed or () for dtype, shape in one.items()]
