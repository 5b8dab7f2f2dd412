"""The policy's vision tower as a graph, node by node (see `vision_spec`).

    patches ─► linear ─► blocks × [ norm ─► qkv ─► rotary ─► attention in windows or over all ─► proj ─► + norm ─► MLP ]
            ─► + norm ─► four neighbours to one token ─► MLP ─► raster order

Qwen2-VL's has layer norms, an MLP without gate, and no windows; Qwen3-VL's learned positions besides, and the output of
some blocks goes to the decoder too, each through a merger of its own. Where this departs from transformers'
`Qwen2_5_VisionTransformerPretrainedModel`, `Qwen2VisionTransformerPretrainedModel` and `Qwen3VLVisionModel` (same
numbers, other order):
1. one frame: the published weights convolve two copies of it, so the two halves of the kernel are added at export;
2. patches come in window order from the host, as do windows and rotary values;
3. windows are padded to one length and attended in one batch; the original takes them one by one. Where the picture's
   size leaves no window cut, they are consecutive rows, and what describes them is not read;
4. biases before a norm are added by it;
5. with weights of 8 bits, flavour "ort" has attention and gated layers as operators of `operators.py`.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from segzero_rt.graph_spec import vision_spec

from .graph_builder import MICROSOFT, OPSET, GraphBuilder
from .lazy_weight import Floats, Weight
from .operators import gated_mlp
from .policy_checkpoint import PolicyCheckpoint
from .policy_sizes import VisionSizes
from .weight_store import WeightStore

TOWER_STORAGE = {"int4": "int8"}
"""A tower has a fifth of a policy's weights and sees everything: 4 bits would save little there and blur much."""

_EPSILON = 1e-6  # of every norm in the tower; fixed in the original too


def build_vision(
    checkpoint: PolicyCheckpoint,
    *,
    flavour: str,
    storage: str,
    computed: str = "float32",
    store: WeightStore | None = None,
    float32_products: Collection[str] = (),
    input_size_hw: tuple[int, int] | None = None,
    opset: int = OPSET,
) -> GraphBuilder:
    """The vision tower's graph. Between its attentions, all patches of all pictures stand in one matrix.

    Args:
        flavour: "ort" uses ONNX Runtime's own operators, "portable" only those of opset 17.
        storage: precision of the weights in the file, one of `POLICY_STORAGES`; where it says 4 bits, the tower has 8.
        computed: precision of products and attention; other than float32 for "portable" alone.
        store: takes the weights; the model itself by default.
        float32_products: see `GraphBuilder`.
        input_size_hw: the one size of pictures that the graph is for; any by default.
        opset: see `GraphBuilder`.
    """
    sizes = checkpoint.vision
    patch_dim = sizes.channels * sizes.patch_size**2
    spec = vision_spec(
        patch_dim=patch_dim,
        head_dim=sizes.head_dim,
        hidden_size=checkpoint.text.hidden_size,
        deepstack=len(sizes.deepstack_blocks),
        learned_positions=sizes.position_side > 0,
    )
    builder = GraphBuilder(
        spec,
        storage=TOWER_STORAGE.get(storage, storage),
        fused=flavour == "ort",
        store=store,
        computed=computed,
        float32_products=float32_products,
        opset=opset,
    )
    residual = _embed_patches(builder, checkpoint, patch_dim)
    whole = input_size_hw is not None and not any(length % sizes.window_size for length in input_size_hw)
    attention = _VisionAttention(builder, sizes, whole_windows=whole)
    branch: _Branch | None = None
    deeper: list[str] = []  # features of the blocks in `deepstack_blocks`
    for block in range(sizes.depth):
        with builder.scope(f"blocks.{block}"):
            weights = _BlockWeights(checkpoint, block)
            x, residual = _norm(builder, branch, residual, "norm1", weights.norm("norm1"))
            builder.hidden[f"blocks.{block}"] = residual
            entering = residual
            mixed = attention.attend(x, weights, everywhere=block in sizes.full_attention_blocks)
            branch = _branch(builder, mixed, "proj", weights.linear("attn.proj", sizes.hidden_size, sizes.hidden_size))
            if sizes.gated and builder.by_operators(sizes.hidden_size, sizes.intermediate_size):
                branch, residual = None, _gated_mlp(builder, _added(builder, branch, residual), weights, sizes)
            else:
                x, residual = _norm(builder, branch, residual, "norm2", weights.norm("norm2"))
                branch = _feed_forward(builder, x, weights, sizes)
        if block - 1 in sizes.deepstack_blocks:
            deeper.append(_merge_deeper(builder, entering, checkpoint, len(deeper)))
    with builder.scope("merger"):
        x, residual = _norm(
            builder, branch, residual, "norm", _norm_weights(checkpoint, f"merger.{sizes.keys.merger_norm}")
        )
        builder.hidden["merger"] = residual
        features = [_merge(builder, x, checkpoint, "merger")]
    if sizes.depth - 1 in sizes.deepstack_blocks:
        deeper.append(_merge_deeper(builder, residual, checkpoint, len(deeper)))
    _give_out(builder, [*features, *deeper], checkpoint)
    return builder


def _embed_patches(builder: GraphBuilder, checkpoint: PolicyCheckpoint, patch_dim: int) -> str:
    """Patches to the tower's width, float32 [batch * patches, hidden], plus learned positions where there are some."""
    sizes = checkpoint.vision
    flat = builder.reshape("patches", [-1, patch_dim])
    # Kept in float32: a sum of two float16 weights would not round back to float16, and it takes the room of those two.
    x = builder.node("MatMul", [flat, builder.weight("patch_embed", _one_frame_weight(checkpoint), exact=True)])
    if sizes.patch_bias:
        bias = checkpoint.weight("model.visual.patch_embed.proj.bias", (sizes.hidden_size,))
        x = builder.node("Add", [x, builder.weight("patch_embed.bias", bias, dtype="float32")])
    if not sizes.position_side:
        return x
    learned = checkpoint.weight("model.visual.pos_embed.weight", (sizes.position_side**2, sizes.hidden_size))
    square = builder.weight("positions", learned, dtype="float32")
    four = builder.node("Gather", [square, "position_taps"], axis=0)  # [patches, 4, hidden]
    shares = builder.node("Unsqueeze", ["position_weights", builder.constant([2])])
    mixed = builder.node("ReduceSum", [builder.node("Mul", [four, shares]), builder.constant([1])], keepdims=0)
    per_picture = builder.node(
        "Concat", [builder.lengths("patches", 0, 1), builder.constant([sizes.hidden_size])], axis=0
    )
    return builder.reshape(builder.node("Add", [builder.reshape(x, per_picture), mixed]), [-1, sizes.hidden_size])


_Norm = tuple[Weight, Weight | None]
"""Scale and, of a layer norm, bias; a root-mean-square norm has none."""


class _BlockWeights:
    """Weights of one block of the tower."""

    def __init__(self, checkpoint: PolicyCheckpoint, block: int) -> None:
        self._checkpoint = checkpoint
        self._block = block
        self._prefix = f"model.visual.blocks.{block}."

    def norm(self, name: str) -> _Norm:
        return _norm_weights(self._checkpoint, f"blocks.{self._block}.{name}")

    def linear(self, name: str, out_width: int, in_width: int) -> tuple[Weight, Weight]:
        """Weight [out, in] and bias."""
        return (
            self._checkpoint.weight(f"{self._prefix}{name}.weight", (out_width, in_width)),
            self._checkpoint.weight(f"{self._prefix}{name}.bias", (out_width,)),
        )


_Branch = tuple[str, Weight]
"""Output of a half-block that is still to be added to the residual, and the bias that is still to be added to it."""


class _VisionAttention:
    """Attention of patches with all others of the picture, or with those of their own window."""

    def __init__(self, builder: GraphBuilder, sizes: VisionSizes, *, whole_windows: bool) -> None:
        self._builder = builder
        self._sizes = sizes
        self._window_rows = (sizes.window_size // sizes.patch_size) ** 2 if whole_windows else None
        per_picture = [builder.lengths("patches", 0, 1), builder.constant([sizes.hidden_size])]
        self._per_picture = builder.node("Concat", per_picture, axis=0)
        self._window_bias = ""
        if builder.fused:
            self._first_position = builder.constant([0])  # patch i takes row i of the rotary table
        else:
            self._cos = builder.node("Unsqueeze", ["rotary_cos", builder.constant([1])])
            self._sin = builder.node("Unsqueeze", ["rotary_sin", builder.constant([1])])

    def attend(self, x: str, weights: _BlockWeights, *, everywhere: bool) -> str:
        """[batch * patches, hidden] to the same, mixed."""
        builder, width = self._builder, self._sizes.hidden_size
        weight, bias = weights.linear("attn.qkv", 3 * width, width)
        query, key, value = (
            builder.reshape(
                builder.linear(
                    x, part, *(whole.part(i * width, (i + 1) * width) for whole in (weight, bias)), flat=True
                ),
                self._per_picture,
            )
            for i, part in enumerate("qkv")
        )
        query, key = self._rotate(query), self._rotate(key)
        if everywhere:
            mixed = self._attend_all(query, key, value)
        elif self._window_rows is not None:
            rows = [builder.reshape(part, [-1, self._window_rows, width]) for part in (query, key, value)]
            mixed = self._attend_all(*rows)
        else:
            mixed = self._attend_windows(query, key, value)
        return builder.reshape(mixed, [-1, width])

    def _rotate(self, x: str) -> str:
        builder, sizes = self._builder, self._sizes
        if builder.fused:
            inputs = [x, self._first_position, "rotary_cos", "rotary_sin"]
            return builder.node("RotaryEmbedding", inputs, domain=MICROSOFT, num_heads=sizes.num_heads)
        heads = builder.reshape(x, [0, 0, sizes.num_heads, sizes.head_dim])
        rotated = builder.narrowed(builder.rotate(builder.widened(heads), self._cos, self._sin))
        return builder.reshape(rotated, [0, 0, sizes.hidden_size])

    def _attend_all(self, query: str, key: str, value: str) -> str:
        sizes = self._sizes
        return self._builder.attention(query, key, value, num_heads=sizes.num_heads, head_dim=sizes.head_dim)

    def _attend_windows(self, query: str, key: str, value: str) -> str:
        """Gathers patches to [batch, windows, slots, ...], attends inside each window, and puts them back."""
        builder, sizes = self._builder, self._sizes
        parts = []
        for part in (query, key, value):
            slots = builder.node("Gather", [part, "window_patches"], axis=1)
            heads = builder.reshape(slots, [0, 0, 0, sizes.num_heads, sizes.head_dim])
            parts.append(builder.node("Transpose", [heads], perm=[0, 1, 3, 2, 4]))
        mixed = builder.node("Transpose", [self._mix(*parts)], perm=[0, 1, 3, 2, 4])
        flat = builder.reshape(
            mixed,
            builder.node("Concat", [builder.lengths("patches", 0), builder.constant([-1, sizes.hidden_size])], axis=0),
        )
        return builder.node("Gather", [flat, "patch_slots"], axis=1)

    def _mix(self, query: str, key: str, value: str) -> str:
        """Softmax attention inside windows, over the two last axes."""
        builder = self._builder
        scaled = builder.node("Mul", [query, builder.constant(self._sizes.head_dim**-0.5, builder.computed)])
        scores = builder.node("MatMul", [scaled, builder.node("Transpose", [key], perm=[0, 1, 2, 4, 3])])
        if not self._window_bias:
            self._window_bias = builder.narrowed("window_bias")
        scores = builder.node("Add", [scores, self._window_bias])
        return builder.node("MatMul", [builder.node("Softmax", [scores], axis=-1), value])


def _branch(builder: GraphBuilder, x: str, name: str, weights: tuple[Weight, Weight]) -> _Branch:
    """A product whose bias is left to the norm that follows, which adds it on the way."""
    return builder.linear(x, name, weights[0]), weights[1]


def _norm(builder: GraphBuilder, branch: _Branch | None, residual: str, name: str, norm: _Norm) -> tuple[str, str]:
    """Adds the last half-block's output, if any, and norms. Returns (normed, the new residual)."""
    weight, bias = norm
    if branch is None:
        if bias is None:
            return builder.rms_norm(residual, name, weight, _EPSILON), residual
        return builder.layer_norm(residual, name, weight, bias, _EPSILON), residual
    if bias is None:
        return builder.add_rms_norm(branch[0], residual, name, weight, _EPSILON, bias=branch[1])
    return builder.add_layer_norm(branch[0], residual, name, weight, _EPSILON, norm_bias=bias, bias=branch[1])


def _norm_weights(checkpoint: PolicyCheckpoint, name: str) -> _Norm:
    sizes = checkpoint.vision
    weight = checkpoint.weight(f"model.visual.{name}.weight", (sizes.hidden_size,))
    return weight, None if sizes.gated else checkpoint.weight(f"model.visual.{name}.bias", (sizes.hidden_size,))


def _added(builder: GraphBuilder, branch: _Branch, residual: str) -> str:
    bias = builder.weight("added_bias", branch[1], dtype="float32")
    return builder.node("Add", [builder.node("Add", [branch[0], bias]), residual])


def _gated_mlp(builder: GraphBuilder, residual: str, weights: _BlockWeights, sizes: VisionSizes) -> str:
    """Norm, gated hidden layer and sum, as one operator."""
    wide, narrow = sizes.intermediate_size, sizes.hidden_size
    layers = (("gate", wide, narrow), ("up", wide, narrow), ("down", narrow, wide))
    read = [(name, *weights.linear(f"mlp.{name}_proj", rows, columns)) for name, rows, columns in layers]
    return gated_mlp(builder, residual, ("norm2", weights.norm("norm2")[0]), read, _EPSILON)


def _feed_forward(builder: GraphBuilder, x: str, weights: _BlockWeights, sizes: VisionSizes) -> _Branch:
    wide, narrow = sizes.intermediate_size, sizes.hidden_size
    if not sizes.gated:
        hidden = builder.linear(x, "fc1", *weights.linear(sizes.keys.fc1, wide, narrow), flat=True)
        hidden = builder.quick_gelu(hidden) if sizes.activation == "quick_gelu" else builder.tanh_gelu(hidden)
        return _branch(builder, hidden, "fc2", weights.linear(sizes.keys.fc2, narrow, wide))
    gate = builder.linear(x, "gate", *weights.linear("mlp.gate_proj", wide, narrow), flat=True)
    up = builder.linear(x, "up", *weights.linear("mlp.up_proj", wide, narrow), flat=True)
    hidden = builder.gated(gate, up, "down")
    return _branch(builder, hidden, "down", weights.linear("mlp.down_proj", narrow, wide))


def _merge(builder: GraphBuilder, x: str, checkpoint: PolicyCheckpoint, merger: str) -> str:
    """Neighbouring patches (consecutive in window order) to one token in the decoder's width, [batch * tokens, ...]."""
    sizes, hidden_size = checkpoint.vision, checkpoint.text.hidden_size
    wide = sizes.hidden_size * sizes.merge_size**2
    x = builder.reshape(x, [-1, wide])
    products = (("fc1", sizes.keys.merger_fc1, wide), ("fc2", sizes.keys.merger_fc2, hidden_size))
    for name, key, out_width in products:
        weight = checkpoint.weight(f"model.visual.{merger}.{key}.weight", (out_width, wide))
        bias = checkpoint.weight(f"model.visual.{merger}.{key}.bias", (out_width,))
        x = builder.linear(x, name, weight, bias, flat=True)
        x = builder.gelu(x) if name == "fc1" else x
    return x


def _merge_deeper(builder: GraphBuilder, residual: str, checkpoint: PolicyCheckpoint, place: int) -> str:
    """Features of what a block gave out: as `_merge`, but normed once four neighbours stand in one row."""
    wide = checkpoint.vision.hidden_size * checkpoint.vision.merge_size**2
    merger = f"deepstack_merger_list.{place}"
    scale, bias = (checkpoint.weight(f"model.visual.{merger}.norm.{part}", (wide,)) for part in ("weight", "bias"))
    with builder.scope(f"deepstack.{place}"):
        x = builder.layer_norm(builder.reshape(residual, [-1, wide]), "norm", scale, bias, _EPSILON)
        return _merge(builder, x, checkpoint, merger)


def _give_out(builder: GraphBuilder, features: list[str], checkpoint: PolicyCheckpoint) -> None:
    """All features of a token in one row, tokens in raster order."""
    width = len(features) * checkpoint.text.hidden_size
    rows = features[0] if len(features) == 1 else builder.node("Concat", features, axis=-1)
    shape = builder.node("Concat", [builder.lengths("patches", 0), builder.constant([-1, width])], axis=0)
    builder.node(
        "Gather", [builder.widened(builder.reshape(rows, shape)), "token_order"], output="image_features", axis=1
    )


def _one_frame_weight(checkpoint: PolicyCheckpoint) -> Weight:
    """[channels * patch * patch, hidden]: the 3-D kernel summed over time, for two equal frames."""
    sizes = checkpoint.vision
    shape = (sizes.hidden_size, sizes.channels, sizes.temporal_patch_size, sizes.patch_size, sizes.patch_size)
    kernel = checkpoint.weight("model.visual.patch_embed.proj.weight", shape)
    width = sizes.channels * sizes.patch_size**2

    def rows(start: int, stop: int) -> Floats:
        summed = kernel.array().astype(np.float64).sum(axis=2).reshape(sizes.hidden_size, width)
        return np.ascontiguousarray(summed.T[start:stop], dtype=np.float32)

    return Weight((width, sizes.hidden_size), rows)
