"""The decoder's products in int8 with ranges that are known beforehand, from a graph in floats and some replies.

`DynamicQuantizeLinear` takes one range for all tokens of a run. So what a token comes to depends on which others stand
beside it: the first question on a picture is read with a coarser step than the next, and a loop that hands over guesses
(`segzero_rt/decoding.py`) would say other things than one without. Here each range is measured once, over whole
conversations, and written into the graph. A token's numbers are its own then, and nothing is left to measure at run
time.

One step for all channels of a tensor would be set by its largest, so channels are evened out first, exactly: what a
channel is divided by (in a norm's weight, in the columns of `up`, in the values), its row in the next product's weight
is multiplied by. Source: SmoothQuant (arXiv:2211.10438), formula 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from segzero_rt.manifest import PolicyManifest
from segzero_rt.policy import Policy
from segzero_rt.positions import PictureSpan, policy_rotary

from .graph_builder import INT8_FROM_WIDTH, MICROSOFT
from .policy_checkpoint import PolicyCheckpoint
from .policy_decoder import build_decoder

Floats = NDArray[np.float32]

SMOOTHING = 0.7
"""How much of the evening out falls to the weights. Share of places in 100 replies of the tabletop policy with the same
likeliest token as in floats: 94.7 % without, 97.6 % at 0.5, 98.3 % at 0.65, 98.1 % at 0.8; ranges per run: 97.7 %."""
HEADROOM = 1.1
"""Ranges reach that much further than what was measured."""

_NORM = "SimplifiedLayerNormalization"
"""Its second input is its weight."""


@dataclass(frozen=True, slots=True)
class Range:
    """What a tensor's channels held, float32 [channels] each."""

    lowest: Floats
    highest: Floats


class FloatDecoder:
    """A decoder's graph of flavour "ort" in floats, taken apart: its weights as arrays, its products by their input."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(str(path))
        arrays = {one.name: numpy_helper.to_array(one) for one in self.model.graph.initializer}
        self.weights: dict[str, Floats] = {}
        """Float weights by the name that products know them by."""
        self.nodes: list[NodeProto] = []
        """All but the casts of weights."""
        for node in self.model.graph.node:
            if node.op_type == "Cast" and node.input[0] in arrays:
                self.weights[node.output[0]] = arrays[node.input[0]].astype(np.float32)
            else:
                self.nodes.append(node)
        self.weights |= {name: array for name, array in arrays.items() if array.dtype == np.float32}
        self.others = {name: array for name, array in arrays.items() if array.dtype.kind in "iu"}
        self._made_by = {name: node for node in self.nodes for name in node.output if name}
        self.products: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            weighted = node.op_type in ("MatMul", "Gemm") and node.input[1] in self.weights
            if weighted and self.rows(node).shape[0] >= INT8_FROM_WIDTH:
                self.products.setdefault(self.source(node.input[0]), []).append(node)

    def source(self, name: str) -> str:
        """The tensor of which `name` is another view."""
        made_by = self._made_by.get(name)
        return self.source(made_by.input[0]) if made_by is not None and made_by.op_type == "Reshape" else name

    def rows(self, product: NodeProto) -> Floats:
        """A product's weight as [in, out]."""
        weight = self.weights[product.input[1]]
        return weight.T if any(one.name == "transB" and one.i for one in product.attribute) else weight

    def adds_bias(self, node: NodeProto) -> bool:
        """Whether a node does nothing but add a weight of one axis to a product that nothing else reads."""
        if node.op_type != "Add" or node.input[1] not in self.weights or self.weights[node.input[1]].ndim != 1:
            return False
        return sum(node.input[0] in reader.input for reader in self.nodes) == 1

    def divide(self, tensor: str, by: Floats) -> Floats | None:
        """Makes the graph give `tensor` divided by `by`, channel by channel, where some weight before it can do that.

        Returns:
            what it is divided by, which is `by` but for channels that share a weight; None where nothing can.
        """
        node = self._made_by.get(tensor)
        if node is None:
            return None
        if node.op_type == _NORM:
            self._scale(node.input[1], by)
            return by
        if node.op_type == "Mul":
            factors = [self._made_by.get(name) for name in node.input]
            linear = next((one for one in factors if one is not None and one.op_type == "MatMul"), None)
            if linear is None:
                return None
            self._scale(linear.input[1], by)
            return by
        if node.op_type == "GatherND":
            return self.divide(node.input[0], by)
        return self._divide_values(node, by) if node.op_type == "GroupQueryAttention" else None

    def _divide_values(self, attention: NodeProto, by: Floats) -> Floats | None:
        """Query heads of one group mix the same values, so they are divided alike."""
        sizes = {one.name: one.i for one in attention.attribute}
        groups = by.reshape(sizes["kv_num_heads"], sizes["num_heads"] // sizes["kv_num_heads"], -1)
        shared = groups.max(axis=1)
        values = self._made_by.get(attention.input[2] or attention.input[0])  # the latter holds all three, packed
        if values is not None and values.op_type == "Split":
            values = self._made_by.get(values.input[0])
        names = []
        if values is not None and values.op_type == "Add":
            names.append(values.input[1])
            values = self._made_by.get(values.input[0])
        if values is None or values.op_type != "MatMul":
            return None
        for name in (values.input[1], *names):
            ones = np.ones(self.weights[name].shape[-1] - shared.size, np.float32)
            self._scale(name, np.concatenate([ones, shared.reshape(-1)]))
        return np.repeat(shared[:, None], groups.shape[1], axis=1).reshape(-1)

    def _scale(self, name: str, by: Floats) -> None:
        self.weights[name] = (self.weights[name] / by).astype(np.float32)


def make_decoder_static(
    checkpoint: PolicyCheckpoint,
    manifest: PolicyManifest,
    folder: Path,
    *,
    answer_format: str,
    pictures: Sequence[NDArray[np.uint8]],
    questions: Sequence[str],
    max_new_tokens: int,
) -> None:
    """Writes `decoder.onnx` in a policy's folder anew, beside vision graph, embedding and tokenizer that lie there.

    Args:
        checkpoint: that the folder's graphs were made from.
        pictures: uint8 [H, W, 3] of any size, to measure ranges on.
        questions: asked on each of them.
    """
    in_floats = folder / "decoder-floats.onnx"
    build_decoder(checkpoint, flavour=manifest.flavour, storage="float16").save(in_floats)
    try:
        files = {"vision": folder / "vision.onnx", "embedding": folder / "embedding.onnx", "decoder": in_floats}
        tokenizer = folder / "tokenizer.json"
        policy = Policy.from_files(manifest, files, tokenizer, answer_format=answer_format, backend="cpu")
        ranges = measure_ranges(
            policy, in_floats, pictures=pictures, questions=questions, max_new_tokens=max_new_tokens
        )
        quantize_decoder(in_floats, folder / "decoder.onnx", ranges)
    finally:
        in_floats.unlink()


def measure_ranges(
    policy: Policy,
    path: Path,
    *,
    pictures: Sequence[NDArray[np.uint8]],
    questions: Sequence[str],
    max_new_tokens: int,
) -> dict[str, Range]:
    """Ranges of all inputs of products in the graph in `path`, over prompts and replies.

    Args:
        policy: that of this graph; says the replies.
        pictures: uint8 [H, W, 3] of any size.
        questions: asked on each of them.
    """
    model = onnx.load(str(path))
    tensors = [*FloatDecoder(path).products]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ranges: dict[str, Range] = {}
    for picture in pictures:
        view = policy.look(picture)
        features = policy.features(picture)
        for question in questions:
            reply = policy.ask(view, question, max_new_tokens=max_new_tokens).token_ids
            feeds = _whole_conversation(policy, features, [*policy.question_tokens(question), *reply])
            for name, values in zip(tensors, session.run(tensors, feeds), strict=True):
                ranges[name] = _widened(ranges.get(name), values.reshape(-1, values.shape[-1]))
    return ranges


def _whole_conversation(policy: Policy, features: Floats, tokens: list[int]) -> dict[str, Any]:
    """Inputs of the decoder for a picture and all that follows it, in one run."""
    manifest = policy.manifest
    start = policy.prefix_tokens.index(manifest.image_token_id)
    embeds = policy.embed([*policy.prefix_tokens, *tokens])
    embeds[0, start : start + len(features)] = features
    cos, sin = policy_rotary(manifest).rows(PictureSpan(start=start, grid_hw=policy.preprocessor.grid_hw))
    length = embeds.shape[1]
    cache = np.zeros((1, manifest.num_kv_heads, manifest.max_length, manifest.head_dim), np.float32)
    return {
        "inputs_embeds": embeds,
        "logits_rows": np.arange(length, dtype=np.int64)[None],
        "seqlens_k": np.array([length - 1], np.int32),
        "total_length": np.array([length], np.int32),
        "rotary_cos": cos,
        "rotary_sin": sin,
        **{f"past_{part}_{layer}": cache for layer in range(manifest.num_layers) for part in ("key", "value")},
    }


def _widened(known: Range | None, values: Floats) -> Range:
    lowest, highest = values.min(axis=0), values.max(axis=0)
    return (
        Range(lowest, highest)
        if known is None
        else Range(np.minimum(known.lowest, lowest), np.maximum(known.highest, highest))
    )


def quantize_decoder(source: Path, target: Path, ranges: dict[str, Range]) -> None:
    """Writes the graph in `source` to `target` with the products of `ranges` in int8."""
    graph = FloatDecoder(source)
    inputs = {tensor: _smoothed(graph, tensor, held) for tensor, held in ranges.items()}
    writer = _Int8Writer(graph)
    in_int8 = {product.output[0]: tensor for tensor in inputs for product in graph.products[tensor]}
    biased = {node.input[0]: node for node in graph.nodes if graph.adds_bias(node) and node.input[0] in in_int8}
    added = {node.output[0] for node in biased.values()}
    for node in graph.nodes:
        if node.output[0] in in_int8:
            tensor = in_int8[node.output[0]]
            writer.product(node, tensor, *inputs[tensor], bias=biased.get(node.output[0]))
        elif node.output[0] not in added:
            writer.nodes.append(node)
    temporary = target.with_name(target.name + ".part")
    temporary.write_bytes(writer.model().SerializeToString())
    temporary.replace(target)


def _smoothed(graph: FloatDecoder, tensor: str, held: Range) -> tuple[Floats, Floats]:
    """Evens out the tensor's channels; returns its scale and zero point, as arrays without an axis."""
    lowest, highest = held.lowest, held.highest
    largest = np.maximum(np.maximum(-lowest, highest), 1e-5)
    weights = np.maximum(np.max([np.abs(graph.rows(one)).max(axis=1) for one in graph.products[tensor]], axis=0), 1e-6)
    by = largest**SMOOTHING / weights ** (1 - SMOOTHING)
    divided = graph.divide(tensor, (by / np.exp(np.log(by).mean())).astype(np.float32))
    if divided is not None:
        lowest, highest = lowest / divided, highest / divided
        for product in graph.products[tensor]:
            transposed = graph.rows(product) is not graph.weights[product.input[1]]
            rows = (graph.rows(product) * divided[:, None]).astype(np.float32)
            graph.weights[product.input[1]] = rows.T if transposed else rows
    bottom, top = HEADROOM * min(float(lowest.min()), 0.0), HEADROOM * max(float(highest.max()), 0.0)
    scale = np.float32(max(top - bottom, 1e-12) / 255)
    return np.asarray(scale, np.float32), np.asarray(np.clip(np.round(-bottom / scale), 0, 255), np.uint8)


class _Int8Writer:
    """Nodes and weights of the graph to be written."""

    def __init__(self, graph: FloatDecoder) -> None:
        self.nodes: list[NodeProto] = []
        self._graph = graph
        self._arrays: dict[str, NDArray[Any]] = {}

    def product(
        self, node: NodeProto, tensor: str, scale: Floats, zero: Floats, *, bias: NodeProto | None = None
    ) -> None:
        """The same product with uint8 activations and int8 weights, one scale per output.

        Args:
            bias: the node that adds one to it, in whose place it comes then.
        """
        values = self._quantized(tensor, scale, zero)
        if node.input[0] != tensor:  # a view of it: only Gemm asks for two axes, which this product does not need
            shape = next(one for one in self.nodes if node.input[0] in one.output).input[1]
            values = self._add("Reshape", [values, shape], f"{node.output[0]}:rows")
        rows = self._graph.rows(node)
        step = np.maximum(np.abs(rows).max(axis=0), 1e-12).astype(np.float32) / 127
        name = node.output[0]
        self._arrays |= {f"{name}:int8": np.round(rows / step).astype(np.int8), f"{name}:scale": step}
        inputs = [values, f"{name}:int8", f"{tensor}:scale", f"{name}:scale", f"{tensor}:zero"]
        if bias is None:
            self._add("MatMulIntegerToFloat", inputs, name, domain=MICROSOFT)
        else:
            self._add("MatMulIntegerToFloat", [*inputs, "", bias.input[1]], bias.output[0], domain=MICROSOFT)

    def _quantized(self, tensor: str, scale: Floats, zero: Floats) -> str:
        if f"{tensor}:scale" not in self._arrays:
            self._arrays |= {f"{tensor}:scale": scale, f"{tensor}:zero": zero}
            self._add("QuantizeLinear", [tensor, f"{tensor}:scale", f"{tensor}:zero"], f"{tensor}:uint8")
        return f"{tensor}:uint8"

    def _add(self, operator: str, inputs: list[str], output: str, domain: str = "") -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}:{operator}", domain=domain))
        return output

    def model(self) -> onnx.ModelProto:
        """The finished model; weights that only the replaced products read are left out."""
        read = {name for node in self.nodes for name in node.input}
        kept = {name: array for name, array in self._graph.weights.items() if name in read}
        kept |= {name: array for name, array in self._graph.others.items() if name in read}
        model = onnx.ModelProto()
        model.CopyFrom(self._graph.model)
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(self.nodes)
        arrays = kept | self._arrays
        model.graph.initializer.extend(
            numpy_helper.from_array(np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape), name)
            for name in arrays
        )
        return model
