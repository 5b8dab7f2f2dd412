"""The policy's decoder as a graph, node by node, in three flavours (see `decoder_spec`).

    inputs_embeds ─► layers × [ norm ─► qkv ─► attention with cache ─► o ─► + norm ─► gate·up ─► down ─► + ] ─► norm
                  ─► output layer ─► logits

Where this departs from transformers' `Qwen2_5_VLTextModel` and `Qwen3VLTextModel` (same numbers, other order):
1. q, k and v are one matrix;
2. rotary values come in from the host, which knows the picture's positions;
3. behind the last layer's attention, which fills the cache, only the rows asked for go on;
4. `portable` scores cached and new tokens separately, so that the cache is never copied to append to it;
5. what Qwen3-VL adds to picture tokens behind its first layers comes in with the embeddings, zeros for text.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from segzero_rt.errors import ExportError
from segzero_rt.graph_spec import decoder_spec

from .graph_builder import MICROSOFT, OPSET, TRT11_OPSET, GraphBuilder, float_storage
from .lazy_weight import Weight
from .policy_checkpoint import PolicyCheckpoint
from .policy_embedding import TABLE_FILE, TOKEN_TABLE_KEY
from .policy_sizes import TextSizes
from .precisions import QUANTIZED_STORAGES
from .weight_store import WeightStore

_FUSED_HEAD_MULTIPLE = 16
"""What ONNX Runtime's GroupQueryAttention asks of a head's width to rotate it."""
_TO_THE_END = 2**31 - 1
"""As the end of a Slice. ONNX would take a larger one too, TensorRT's indices have 32 bits."""


def build_decoder(
    checkpoint: PolicyCheckpoint,
    *,
    flavour: str,
    storage: str,
    computed: str = "float32",
    store: WeightStore | None = None,
    float32_products: Collection[str] = (),
    max_length: int | None = None,
    opset: int = OPSET,
) -> GraphBuilder:
    """The decoder's graph.

    Args:
        flavour: one of `DECODER_FLAVOURS`.
        storage: precision of the weights in the file, one of `POLICY_STORAGES`.
        computed: precision of products and attention; float32 for "ort".
        store: takes the weights; the model itself by default.
        float32_products: see `GraphBuilder`.
        max_length: tokens of the cache, which stand in a graph of flavour "trt11".
        opset: see `GraphBuilder`; flavour "trt11" has one of its own.
    """
    text = checkpoint.text
    if flavour == "ort" and text.head_dim % _FUSED_HEAD_MULTIPLE:
        raise ExportError(
            f"expected heads in multiples of {_FUSED_HEAD_MULTIPLE} for flavour ort, got a width of {text.head_dim}; "
            "take flavour portable"
        )
    spec = decoder_spec(
        flavour=flavour,
        num_layers=text.num_layers,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        cache_dtype=cache_dtype(computed),
        deepstack=len(checkpoint.vision.deepstack_blocks),
        max_length=max_length,
    )
    builder = GraphBuilder(
        spec,
        storage=storage,
        fused=flavour == "ort",
        store=store,
        computed=computed,
        float32_products=float32_products,
        opset=TRT11_OPSET if flavour == "trt11" else opset,
    )
    kinds = {"ort": _FusedAttention, "portable": _PortableAttention, "trt11": _LayerAttention}
    attention: _Attention = kinds[flavour](builder, text)
    deepstack = len(checkpoint.vision.deepstack_blocks)
    residual = _embeds_part(builder, 0, text) if deepstack else "inputs_embeds"
    branch = ""  # output of the last half-layer, not yet added to `residual`
    for layer in range(text.num_layers):
        with builder.scope(f"layers.{layer}"):
            weights = _LayerWeights(checkpoint, layer)
            if 0 < layer <= deepstack:
                residual = builder.node("Add", [residual, _embeds_part(builder, layer, text)])
            x, residual = _norm(builder, branch, residual, "input_layernorm", weights.norm("input_layernorm"), text)
            builder.hidden[f"layers.{layer}"] = residual
            packed = builder.linear(x, "qkv", *weights.qkv())
            mixed = attention.attend(packed, layer, weights.qk_norms())
            if layer == text.num_layers - 1:
                mixed, residual = _rows_asked_for(builder, mixed, residual)
            branch = builder.linear(mixed, "o", weights.o())
            x, residual = _norm(builder, branch, residual, "post_norm", weights.norm("post_attention_layernorm"), text)
            branch = _feed_forward(builder, x, weights, text)
    final = checkpoint.weight("model.language_model.norm.weight", (text.hidden_size,))
    x, residual = _norm(builder, branch, residual, "norm", final, text)
    builder.hidden["norm"] = residual
    _output_layer(builder, x, checkpoint)
    return builder


def cache_dtype(computed: str) -> str:
    """What keys and values are kept in: what they are computed in."""
    return computed


class _LayerWeights:
    """Weights of one layer, packed as the graph wants them."""

    def __init__(self, checkpoint: PolicyCheckpoint, layer: int) -> None:
        self._checkpoint = checkpoint
        self._text = checkpoint.text
        self._prefix = f"model.language_model.layers.{layer}."

    def norm(self, name: str) -> Weight:
        return self._get(f"{name}.weight", (self._text.hidden_size,))

    def qkv(self) -> tuple[Weight, Weight | None]:
        """[q + k + v, hidden] and its bias, if any; queries first, as GroupQueryAttention takes them packed."""
        text = self._text
        rows = {"q": text.queries_width, "k": text.keys_width, "v": text.keys_width}
        weight = [self._get(f"self_attn.{part}_proj.weight", (rows[part], text.hidden_size)) for part in "qkv"]
        if not text.qkv_bias:
            return Weight.stacked(weight), None
        bias = [self._get(f"self_attn.{part}_proj.bias", (rows[part],)) for part in "qkv"]
        return Weight.stacked(weight), Weight.stacked(bias)

    def qk_norms(self) -> tuple[Weight, Weight] | None:
        """Scales of the norms of queries and keys, [head_dim] each; None where there are none."""
        if not self._text.qk_norm:
            return None
        query, key = (self._get(f"self_attn.{part}_norm.weight", (self._text.head_dim,)) for part in "qk")
        return query, key

    def o(self) -> Weight:
        return self._get("self_attn.o_proj.weight", (self._text.hidden_size, self._text.queries_width))

    def widening(self, part: str) -> Weight:
        """Of "gate" or "up"."""
        return self._get(f"mlp.{part}_proj.weight", (self._text.intermediate_size, self._text.hidden_size))

    def down(self) -> Weight:
        return self._get("mlp.down_proj.weight", (self._text.hidden_size, self._text.intermediate_size))

    def _get(self, name: str, shape: tuple[int, ...]) -> Weight:
        return self._checkpoint.weight(self._prefix + name, shape)


class _Attention(Protocol):
    """From packed queries, keys and values, [batch, new, q + k + v], to what they mix, [batch, new, q]."""

    def __init__(self, builder: GraphBuilder, text: TextSizes) -> None: ...

    def attend(self, packed: str, layer: int, norms: tuple[Weight, Weight] | None) -> str: ...


class _FusedAttention:
    """GroupQueryAttention of ONNX Runtime: rotates, writes the cache in place and attends, per row of the batch."""

    def __init__(self, builder: GraphBuilder, text: TextSizes) -> None:
        self._builder = builder
        self._text = text

    def attend(self, packed: str, layer: int, norms: tuple[Weight, Weight] | None) -> str:
        cache = [f"past_key_{layer}", f"past_value_{layer}"]
        queries, keys, values = (packed, "", "") if norms is None else self._normed(packed, norms)
        inputs = [queries, keys, values, *cache, "seqlens_k", "total_length", "rotary_cos", "rotary_sin"]
        outputs = [self._builder.name("attention"), f"present_key_{layer}", f"present_value_{layer}"]
        return self._builder.nodes(
            "GroupQueryAttention",
            inputs,
            outputs,
            domain=MICROSOFT,
            num_heads=self._text.num_heads,
            kv_num_heads=self._text.num_kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=self._text.head_dim**-0.5,
        )[0]

    def _normed(self, packed: str, norms: tuple[Weight, Weight]) -> tuple[str, str, str]:
        builder, text = self._builder, self._text
        query, key, value = _split(builder, packed, text)
        query, key = (
            builder.reshape(
                _head_norm(builder, builder.reshape(x, [0, 0, -1, text.head_dim]), part, scale, text), [0, 0, -1]
            )
            for x, part, scale in zip((query, key), "qk", norms, strict=True)
        )
        return query, key, value


class _PortableAttention:
    """Plain operators. Query heads that share a key-value head are stacked along time, so keys are never repeated."""

    def __init__(self, builder: GraphBuilder, text: TextSizes) -> None:
        self._builder = builder
        self._text = text
        batch, new_total = builder.lengths("attention_bias", 0), builder.lengths("attention_bias", 2, 3)
        heads, shared = builder.constant([text.num_heads]), builder.constant([text.num_kv_heads])
        self._by_head = builder.node("Concat", [batch, heads, new_total], axis=0)
        self._by_shared_head = builder.node(
            "Concat", [batch, shared, builder.constant([-1]), builder.lengths("attention_bias", 3)], axis=0
        )
        self._capacity = builder.lengths("past_key_0", 2)
        self._cos = builder.node("Unsqueeze", ["rotary_cos", builder.constant([1])])
        self._sin = builder.node("Unsqueeze", ["rotary_sin", builder.constant([1])])
        self._bias = builder.narrowed("attention_bias")

    def attend(self, packed: str, layer: int, norms: tuple[Weight, Weight] | None) -> str:
        builder, text = self._builder, self._text
        query, key, value = _heads(builder, packed, text, norms)
        query, key = self._rotate(query), self._rotate(key)
        query = builder.node("Mul", [query, builder.constant(text.head_dim**-0.5, builder.computed)])
        query = builder.reshape(query, [0, text.num_kv_heads, -1, text.head_dim])
        builder.node("Identity", [key], output=f"new_key_{layer}")
        builder.node("Identity", [value], output=f"new_value_{layer}")
        scores = [
            builder.node("MatMul", [query, builder.node("Transpose", [keys], perm=[0, 1, 3, 2])])
            for keys in (f"past_key_{layer}", key)
        ]
        joined = builder.reshape(builder.node("Concat", scores, axis=-1), self._by_head)
        shares = builder.node("Softmax", [builder.node("Add", [joined, self._bias])], axis=-1)
        shares = builder.reshape(shares, self._by_shared_head)
        # Slice and not Split, whose lengths TensorRT wants to know when it builds.
        start, end, axis = builder.constant([0]), builder.constant([_TO_THE_END]), builder.constant([3])
        parts = [
            builder.node("Slice", [shares, start, self._capacity, axis]),
            builder.node("Slice", [shares, self._capacity, end, axis]),
        ]
        mixed = [
            builder.node("MatMul", [part, values])
            for part, values in zip(parts, (f"past_value_{layer}", value), strict=True)
        ]
        # [batch, kv_heads, group * new, head_dim] and [batch, heads, new, head_dim] are the same numbers in a row
        attended = builder.reshape(builder.node("Add", mixed), [0, text.num_heads, -1, text.head_dim])
        return builder.reshape(builder.node("Transpose", [attended], perm=[0, 2, 1, 3]), [0, 0, text.queries_width])

    def _rotate(self, x: str) -> str:
        """In float32, whatever is computed in: an angle of 900 has no place in 16 bits."""
        builder = self._builder
        return builder.narrowed(builder.rotate(builder.widened(x), self._cos, self._sin))


class _LayerAttention:
    """Operators of opset 24 that TensorRT reads as IRotaryEmbedding, IKVCacheUpdate and IAttention layers.

    Its parser takes no past keys in `Attention` and no second output, so the cache is updated before and read whole.
    The update wants caches of four axes and a fixed capacity, rows along axis -2, which are inputs and outputs of the
    network themselves. The layer knows no scale, so queries are scaled before it.
    """

    def __init__(self, builder: GraphBuilder, text: TextSizes) -> None:
        self._builder = builder
        self._text = text
        self._bias = builder.narrowed("attention_bias")

    def attend(self, packed: str, layer: int, norms: tuple[Weight, Weight] | None) -> str:
        builder, text = self._builder, self._text
        query, key, value = _heads(builder, packed, text, norms)
        query, key = (
            builder.narrowed(builder.node("RotaryEmbedding", [builder.widened(x), "rotary_cos", "rotary_sin"]))
            for x in (query, key)
        )
        query = builder.node("Mul", [query, builder.constant(text.head_dim**-0.5, builder.computed)])
        cache = [
            builder.node(
                "TensorScatter",
                [f"past_{part}_{layer}", rows, "write_indices"],
                output=f"present_{part}_{layer}",
                axis=-2,
            )
            for part, rows in (("key", key), ("value", value))
        ]
        mixed = builder.node("Attention", [query, *cache, self._bias], scale=1.0)
        return builder.reshape(builder.node("Transpose", [mixed], perm=[0, 2, 1, 3]), [0, 0, text.queries_width])


def _heads(
    builder: GraphBuilder, packed: str, text: TextSizes, norms: tuple[Weight, Weight] | None
) -> tuple[str, str, str]:
    """Queries, keys and values, [batch, heads, new, head_dim] each; the first two normed where the family does."""
    query, key, value = (
        builder.node("Transpose", [builder.reshape(x, [0, 0, -1, text.head_dim])], perm=[0, 2, 1, 3])
        for x in _split(builder, packed, text)
    )
    if norms is not None:
        query, key = (
            _head_norm(builder, builder.widened(x), part, scale, text)
            for x, part, scale in zip((query, key), "qk", norms, strict=True)
        )
    return query, key, value


def _embeds_part(builder: GraphBuilder, part: int, text: TextSizes) -> str:
    """Of `inputs_embeds`: the embeddings, part 0, or what is added behind layer `part - 1`."""
    ends = [builder.constant([text.hidden_size * place]) for place in (part, part + 1)]
    return builder.node("Slice", ["inputs_embeds", *ends, builder.constant([2])])


def _split(builder: GraphBuilder, packed: str, text: TextSizes) -> list[str]:
    """Queries, keys and values."""
    widths = builder.constant([text.queries_width, text.keys_width, text.keys_width])
    return builder.nodes("Split", [packed, widths], [builder.name(part) for part in "qkv"], axis=-1)


def _head_norm(builder: GraphBuilder, x: str, part: str, scale: Weight, text: TextSizes) -> str:
    """Norms each head, the last axis, of float32 queries ("q") or keys ("k")."""
    return builder.rms_norm(x, f"{part}_norm", scale, text.rms_norm_eps)


def _norm(
    builder: GraphBuilder, branch: str, residual: str, name: str, weight: Weight, text: TextSizes
) -> tuple[str, str]:
    """Adds the last half-layer's output, if any, and norms. Returns (normed, the new residual)."""
    if not branch:
        return builder.rms_norm(residual, name, weight, text.rms_norm_eps), residual
    return builder.add_rms_norm(branch, residual, name, weight, text.rms_norm_eps)


def _rows_asked_for(builder: GraphBuilder, *tensors: str) -> list[str]:
    """[batch, new, hidden] to [batch, rows, hidden] of each."""
    rows = builder.node("Unsqueeze", ["logits_rows", builder.constant([-1])])
    return [builder.node("GatherND", [tensor, rows], batch_dims=1) for tensor in tensors]


def _feed_forward(builder: GraphBuilder, x: str, weights: _LayerWeights, text: TextSizes) -> str:
    gate, up = (builder.linear(x, part, weights.widening(part)) for part in ("gate", "up"))
    return builder.linear(builder.gated(gate, up, "down"), "down", weights.down())


def _output_layer(builder: GraphBuilder, x: str, checkpoint: PolicyCheckpoint) -> None:
    """Logits. Tied weights are read from the token table's own file."""
    text = checkpoint.text
    shape = (text.vocab_size, text.hidden_size)
    if builder.storage in QUANTIZED_STORAGES:  # a copy of its own, small: tied weights are looked up as floats
        weight = checkpoint.weight(TOKEN_TABLE_KEY if text.tied else "lm_head.weight", shape)
        builder.node("Identity", [builder.linear(x, "lm_head", weight, bits=8)], output="logits")
        return
    if text.tied:
        stored = builder.external_weight("token_table", shape, TABLE_FILE)
        table = stored if float_storage(builder.storage) == builder.computed else builder.cast(stored, builder.computed)
    else:
        table = builder.weight("lm_head", checkpoint.weight("lm_head.weight", shape))
    # Gemm and not MatMul: it takes the table as it lies on disk, [vocab, hidden], but only knows two axes.
    flat = builder.node("Gemm", [builder.reshape(x, [-1, text.hidden_size]), table], transB=1)
    sizes = builder.node(
        "Concat", [builder.node("Shape", ["logits_rows"]), builder.constant([text.vocab_size])], axis=0
    )
    # no rows asked for: a length of 0
    builder.node("Reshape", [builder.widened(flat), sizes], output="logits", allowzero=1)
