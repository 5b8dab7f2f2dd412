"""Names, shapes and dtypes of every exported graph: written here once, used by the exporter and checked by the runtime.

A dimension is a number (static) or a name (dynamic). The same name within one spec means the same length, which
`GraphSpec.check_shapes` holds. Conventions of the policy's graphs, from day one:

* `batch` comes first everywhere, so that several questions can share one run;
* a row of the batch has its own length in the cache (`seqlens_k`, or its own row of `attention_bias`);
* `new` tokens may be any number from 1 up, with any number of tokens in the cache before them;
* logits are computed only for the rows named by `logits_rows`, which may be none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from segzero_rt.errors import GraphError

Dimension = int | str

DTYPES = ("float32", "float16", "int64", "int32", "uint8", "bool")
DECODER_FLAVOURS = ("ort", "portable", "trt11")
"""`ort`: fused attention of ONNX Runtime that writes the KV cache in place. `portable`: plain operators of opset 17.
`trt11`: attention, cache update, rotary embedding and norms as operators of opset 24, which TensorRT from 10.15 on
reads as layers of its own; the vision tower and the embedding are those of `portable`."""

MASKED = -3.0e4
"""Added to attention scores that must not count: exp() of it is 0 and it still fits into float16."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: str
    """A numpy dtype's name, one of `DTYPES`."""
    shape: tuple[Dimension, ...]
    """Numbers are static lengths, names are dynamic ones; `()` is a scalar."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("expected a tensor's name, got an empty string")
        if self.dtype not in DTYPES:
            raise ValueError(f"expected one of {', '.join(DTYPES)} as dtype of {self.name}, got {self.dtype!r}")
        for length in self.shape:
            if isinstance(length, bool) or not isinstance(length, (int, str)) or length in (0, "") or _negative(length):
                raise ValueError(f"expected positive lengths or names in the shape of {self.name}, got {self.shape}")

    @property
    def static(self) -> bool:
        """True when no dimension is dynamic, so that a buffer can be allocated before the first run."""
        return all(isinstance(length, int) for length in self.shape)

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axis number to name, for the dynamic dimensions."""
        return {axis: length for axis, length in enumerate(self.shape) if isinstance(length, str)}

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(length) for length in self.shape)}]"


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of one graph, in the order in which the file declares them."""

    name: str
    """What the graph is: "vision", "embedding", "decoder", ..."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    flavour: str = ""
    """Which of several graphs of the same name this is; empty where there is only one."""

    def __post_init__(self) -> None:
        if not self.name or not self.inputs or not self.outputs:
            raise ValueError(
                f"expected a graph's name, inputs and outputs, got {self.name!r} with "
                f"{len(self.inputs)} inputs and {len(self.outputs)} outputs"
            )
        for tensors in (self.inputs, self.outputs):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise ValueError(f"expected each tensor of graph {self.name} once, got {names}")

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.outputs)

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """`{tensor: {axis: name}}` as `torch.onnx.export` takes it; tensors without a dynamic axis are left out."""
        named = {tensor.name: tensor.dynamic_axes for tensor in (*self.inputs, *self.outputs)}
        return {name: axes for name, axes in named.items() if axes}

    @property
    def in_place(self) -> dict[str, str]:
        """Output to the input whose memory it has to share: the caches that a decoder updates where they lie."""
        caches = (name.removeprefix("present_") for name in self.output_names if name.startswith("present_"))
        return {f"present_{cache}": f"past_{cache}" for cache in caches}

    def tensor(self, name: str) -> TensorSpec:
        """The input or output called `name`. Raises KeyError."""
        for tensor in (*self.inputs, *self.outputs):
            if tensor.name == name:
                return tensor
        raise KeyError(f"graph {self.name} has no tensor {name!r}")

    def check_declared(
        self, inputs: Iterable[tuple[str, str, Sequence[object]]], outputs: Iterable[tuple[str, str, Sequence[object]]]
    ) -> None:
        """Compares what a loaded file declares, as (name, dtype, shape), with this spec.

        Names, order, dtypes, ranks and static lengths must agree; a dynamic dimension may carry any name in the file.

        Raises:
            GraphError: the first difference, with both sides.
        """
        for kind, expected, declared in (("inputs", self.inputs, [*inputs]), ("outputs", self.outputs, [*outputs])):
            if [tensor.name for tensor in expected] != [name for name, _, _ in declared]:
                raise GraphError(
                    f"graph {self.label}: expected {kind} {', '.join(t.name for t in expected)}; "
                    f"the file has {', '.join(name for name, _, _ in declared)}; export the bundle again"
                )
            for tensor, (_, dtype, shape) in zip(expected, declared, strict=True):
                if tensor.dtype != dtype or not _shape_fits(tensor.shape, shape):
                    raise GraphError(
                        f"graph {self.label}: expected {tensor}; the file has {dtype}{list(shape)}; "
                        "export the bundle again"
                    )

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Checks shapes of actual inputs; returns the length of each dynamic dimension by name.

        Raises:
            GraphError: an input is missing or unknown, has another rank or static length, or two inputs disagree.
        """
        if set(shapes) != set(self.input_names):
            raise GraphError(
                f"graph {self.label}: expected inputs {', '.join(self.input_names)}; got {', '.join(shapes)}"
            )
        lengths: dict[str, int] = {}
        for tensor in self.inputs:
            shape = shapes[tensor.name]
            if not _shape_fits(tensor.shape, shape):
                raise GraphError(f"graph {self.label}: expected {tensor}; got shape {list(shape)}")
            for axis, name in tensor.dynamic_axes.items():
                if lengths.setdefault(name, shape[axis]) != shape[axis]:
                    raise GraphError(
                        f"graph {self.label}: expected {name} = {lengths[name]} in {tensor}; got shape {list(shape)}"
                    )
        return lengths

    @property
    def label(self) -> str:
        """Name with flavour, for messages."""
        return f"{self.name} ({self.flavour})" if self.flavour else self.name


def embeds_width(hidden_size: int, deepstack: int) -> int:
    """Numbers that stand for one token in `inputs_embeds`: its embedding, then what layers 0, 1, ... add behind them.

    The latter are zeros for text. They travel with the embedding so that a host treats every family alike.
    """
    return hidden_size * (1 + deepstack)


def vision_spec(
    *, patch_dim: int, head_dim: int, hidden_size: int, deepstack: int = 0, learned_positions: bool = False
) -> GraphSpec:
    """Vision tower of the policy: pictures of one size, cut into patches, to features in the decoder's width.

    The host lays the patches in window order and describes the windows, so the graph holds no index arithmetic.

    Args:
        patch_dim: numbers in one patch, channels * patch height * patch width. One frame only: the temporal copies that
            the published weights expect are folded into the weights at export.
        head_dim: width of one attention head of the vision tower.
        hidden_size: the decoder's width.
        deepstack: features of so many depths of the tower stand behind its last ones, see `embeds_width`.
        learned_positions: the tower adds positions from a square of learned ones, each patch a mix of four.
    """
    taps = (
        # Places in the square, row by row, that a patch (in window order) lies between, and the share of each.
        TensorSpec("position_taps", "int64", ("patches", 4)),
        TensorSpec("position_weights", "float32", ("patches", 4)),
    )
    return GraphSpec(
        name="vision",
        inputs=(
            TensorSpec("patches", "float32", ("batch", "patches", patch_dim)),
            # Angles of patch i (in window order), rows then columns; half of the head's width, the rest repeats it.
            TensorSpec("rotary_cos", "float32", ("patches", head_dim // 2)),
            TensorSpec("rotary_sin", "float32", ("patches", head_dim // 2)),
            # Patch in each slot of each window; slots past a window's end repeat some patch and are masked.
            TensorSpec("window_patches", "int64", ("windows", "slots")),
            TensorSpec("window_bias", "float32", ("windows", 1, 1, "slots")),
            # Where patch i stands among the windows * slots.
            TensorSpec("patch_slots", "int64", ("patches",)),
            # Which merged token, in window order, stands at place i of the picture's raster order.
            TensorSpec("token_order", "int64", ("tokens",)),
            *(taps if learned_positions else ()),
        ),
        outputs=(TensorSpec("image_features", "float32", ("batch", "tokens", embeds_width(hidden_size, deepstack))),),
    )


def embedding_spec(*, hidden_size: int, deepstack: int = 0) -> GraphSpec:
    """Token embedding of the policy, see `embeds_width`. The host writes picture features over placeholders' rows."""
    return GraphSpec(
        name="embedding",
        inputs=(TensorSpec("input_ids", "int64", ("batch", "new")),),
        outputs=(TensorSpec("inputs_embeds", "float32", ("batch", "new", embeds_width(hidden_size, deepstack))),),
    )


def decoder_spec(
    *,
    flavour: str,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_size: int,
    vocab_size: int,
    cache_dtype: str = "float32",
    deepstack: int = 0,
    max_length: int | None = None,
) -> GraphSpec:
    """Decoder of the policy with an explicit KV cache.

    Both flavours take `inputs_embeds` of `new` tokens (see `embeds_width`), and `logits_rows`: for each row of the
    batch, which of the new tokens get logits. They differ in how positions and cache go in and out:

    * `ort`: the whole rotary table (row i is position i's M-RoPE value), `seqlens_k` (per row, tokens in the cache
      after this run, minus 1), `total_length` (the longest row after this run); the cache is bound as past and present,
      so that the new rows are written in place.
    * `portable`: the rotary values of the new tokens; `attention_bias`, 0 where token `new` may look and `MASKED`
      elsewhere, over the cache's capacity followed by the new tokens; the cache is only read, the new rows come out.
    * `trt11`: `write_indices` (per row, tokens in the cache before this run); `attention_bias` over the cache alone,
      for the new rows are written before it is read; the cache is bound as past and present. Its capacity is
      `max_length` and stands in the file: TensorRT wants to know it when it builds.

    The cache of a layer is `[batch, kv_heads, capacity, head_dim]` in all, of `cache_dtype`.

    Raises:
        ValueError: an unknown flavour, or `trt11` without `max_length`.
    """
    if flavour not in DECODER_FLAVOURS:
        raise ValueError(f"expected a decoder flavour of {', '.join(DECODER_FLAVOURS)}, got {flavour!r}")
    half = head_dim // 2
    if flavour == "ort":
        placement: tuple[TensorSpec, ...] = (
            TensorSpec("seqlens_k", "int32", ("batch",)),
            TensorSpec("total_length", "int32", (1,)),
            TensorSpec("rotary_cos", "float32", ("max_length", half)),
            TensorSpec("rotary_sin", "float32", ("max_length", half)),
        )
    elif flavour == "trt11":
        if max_length is None:
            raise ValueError("expected max_length for flavour trt11, got none: its cache has a fixed capacity")
        placement = (
            TensorSpec("write_indices", "int64", ("batch",)),
            TensorSpec("attention_bias", "float32", ("batch", 1, "new", max_length)),
            TensorSpec("rotary_cos", "float32", ("batch", "new", half)),
            TensorSpec("rotary_sin", "float32", ("batch", "new", half)),
        )
    else:
        placement = (
            TensorSpec("attention_bias", "float32", ("batch", 1, "new", "capacity_and_new")),
            TensorSpec("rotary_cos", "float32", ("batch", "new", half)),
            TensorSpec("rotary_sin", "float32", ("batch", "new", half)),
        )
    capacity: Dimension = max_length if flavour == "trt11" and max_length is not None else "capacity"
    rows, prefix = ("new", "new") if flavour == "portable" else (capacity, "present")
    past = _cache_tensors("past", num_layers, ("batch", num_kv_heads, capacity, head_dim), cache_dtype)
    written = _cache_tensors(prefix, num_layers, ("batch", num_kv_heads, rows, head_dim), cache_dtype)
    return GraphSpec(
        name="decoder",
        flavour=flavour,
        inputs=(
            TensorSpec("inputs_embeds", "float32", ("batch", "new", embeds_width(hidden_size, deepstack))),
            TensorSpec("logits_rows", "int64", ("batch", "rows")),
            *placement,
            *past,
        ),
        outputs=(TensorSpec("logits", "float32", ("batch", "rows", vocab_size)), *written),
    )


def _cache_tensors(prefix: str, num_layers: int, shape: tuple[Dimension, ...], dtype: str) -> list[TensorSpec]:
    return [
        TensorSpec(f"{prefix}_{part}_{layer}", dtype, shape) for layer in range(num_layers) for part in ("key", "value")
    ]


def _negative(length: Dimension) -> bool:
    return isinstance(length, int) and length < 0


def _shape_fits(expected: tuple[Dimension, ...], shape: Sequence[object]) -> bool:
    """Same rank, and equal wherever the spec has a number and the other side knows one."""
    if len(expected) != len(shape):
        return False
    return all(
        not isinstance(want, int) or want == have or not isinstance(have, int)
        for want, have in zip(expected, shape, strict=True)
    ) and all(not isinstance(have, int) or have >= 0 for have in shape)
