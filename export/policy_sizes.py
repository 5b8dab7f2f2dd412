"""Sizes and peculiarities of a policy's tower and decoder, read from `config.json`, family by family.

What the families differ in stands here as values; the graphs are written from these and not from a family's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segzero_rt.errors import ExportError
from segzero_rt.manifest import INPUT_PIXELS, POLICY_FAMILIES, RELATIVE_1000

QWEN2_5_VL, QWEN2_VL, QWEN3_VL = POLICY_FAMILIES

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

_TOKENS_OF_A_WINDOW = 4
"""Along a side, for a tower that has no windows of its own: as in Qwen2.5-VL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionKeys:
    """What transformers calls the tower's parts that families name differently, below a block or below the tower."""

    fc1: str = "mlp.fc1"
    fc2: str = "mlp.fc2"
    """The two products of an MLP without gate."""
    merger_norm: str = "ln_q"
    merger_fc1: str = "mlp.0"
    merger_fc2: str = "mlp.2"


QWEN3_KEYS = VisionKeys(
    fc1="mlp.linear_fc1",
    fc2="mlp.linear_fc2",
    merger_norm="norm",
    merger_fc1="linear_fc1",
    merger_fc2="linear_fc2",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSizes:
    """The vision tower."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_size: int
    """Side of an attention window, in pixels."""
    full_attention_blocks: tuple[int, ...]
    rope_theta: float
    gated: bool
    """Blocks as Qwen2.5-VL has them: gated MLPs and root-mean-square norms; otherwise layer norms and plain MLPs."""
    activation: str = "quick_gelu"
    """Of an MLP without gate: "quick_gelu" or "gelu_pytorch_tanh"."""
    patch_bias: bool = False
    position_side: int = 0
    """Side of a square of learned positions, added to the patches; 0 for none."""
    deepstack_blocks: tuple[int, ...] = ()
    """Blocks whose output goes to the decoder as well, to its layer 0, 1, ... in this order."""
    keys: VisionKeys = VisionKeys()
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ExportError(
                f"expected vision heads whose width is a multiple of 4, got hidden size "
                f"{self.hidden_size} in {self.num_heads} heads"
            )
        blocks = self.deepstack_blocks
        if list(blocks) != sorted(set(blocks)) or any(not 0 <= block < self.depth for block in blocks):
            raise ExportError(
                f"expected deepstack_visual_indexes in order and below {self.depth}, got {self.deepstack_blocks}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSizes:
    """The decoder."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tied: bool
    """The output layer is the token embedding."""
    mrope_interleaved: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    """Queries and keys are normed, head by head, before they are rotated."""
    coordinates: str = INPUT_PIXELS
    """What this family learnt to answer in, see `PolicyManifest.coordinates`."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ExportError(
                f"expected heads that are shared evenly, got {self.num_heads} heads and {self.num_kv_heads} for keys"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ExportError(
                f"expected an mrope_section that sums to half the head's width {self.head_dim}, "
                f"got {self.mrope_section}"
            )

    @property
    def queries_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def keys_width(self) -> int:
        """Of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim


def read_sizes(family: str, config: Mapping[str, Any]) -> tuple[VisionSizes, TextSizes]:
    """The sizes in a `config.json` of one of `POLICY_FAMILIES`.

    Raises:
        KeyError, TypeError, ValueError: a setting is missing, or one that the graphs cannot express.
        ExportError: settings that contradict each other.
    """
    vision = _VISION[family](config["vision_config"])
    text = _qwen3_text(config) if family == QWEN3_VL else _text(config)
    if len(vision.deepstack_blocks) >= text.num_layers:
        raise ExportError(
            f"expected more decoder layers than deepstack_visual_indexes, got {text.num_layers} and "
            f"{len(vision.deepstack_blocks)}"
        )
    return vision, text


def _qwen2_5_vision(config: Mapping[str, Any]) -> VisionSizes:
    return VisionSizes(
        **_any_vision(config),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        window_size=int(config["window_size"]),
        full_attention_blocks=tuple(int(block) for block in config["fullatt_block_indexes"]),
        gated=True,
    )


def _qwen2_vision(config: Mapping[str, Any]) -> VisionSizes:
    """Every patch attends to all others, so that the windows which patches come in mean nothing."""
    width = int(config["embed_dim"])
    if config.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ValueError(f"hidden_act {config['hidden_act']}")
    return VisionSizes(
        **_any_vision(config),
        **_no_windows(config),
        hidden_size=width,
        intermediate_size=int(width * config["mlp_ratio"]),
        gated=False,
    )


def _qwen3_vision(config: Mapping[str, Any]) -> VisionSizes:
    activation = config.get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_act {activation}")
    positions = int(config["num_position_embeddings"])
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(f"num_position_embeddings {positions}, no square")
    return VisionSizes(
        **_any_vision(config),
        **_no_windows(config),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        gated=False,
        activation=activation,
        patch_bias=True,
        position_side=side,
        deepstack_blocks=tuple(int(block) for block in config["deepstack_visual_indexes"]),
        keys=QWEN3_KEYS,
        image_mean=HALF,
        image_std=HALF,
    )


def _any_vision(config: Mapping[str, Any]) -> dict[str, Any]:
    """What all families call alike."""
    rope = config.get("rope_parameters") or {}
    return {
        "depth": int(config["depth"]),
        "num_heads": int(config["num_heads"]),
        "channels": int(config.get("in_channels", config.get("in_chans", 3))),
        "patch_size": int(config["patch_size"]),
        "temporal_patch_size": int(config.get("temporal_patch_size", 2)),
        "merge_size": int(config["spatial_merge_size"]),
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
    }


def _no_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "window_size": int(config["patch_size"]) * int(config["spatial_merge_size"]) * _TOKENS_OF_A_WINDOW,
        "full_attention_blocks": tuple(range(int(config["depth"]))),
    }


_VISION = {QWEN2_5_VL: _qwen2_5_vision, QWEN2_VL: _qwen2_vision, QWEN3_VL: _qwen3_vision}


def _text(config: Mapping[str, Any]) -> TextSizes:
    text = config.get("text_config") or config
    hidden_size, num_heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} in {num_heads} heads")
    return TextSizes(**_any_text(config, 1000000.0), head_dim=hidden_size // num_heads)


def _qwen3_text(config: Mapping[str, Any]) -> TextSizes:
    text = config["text_config"]
    if not _rope(text).get("mrope_interleaved", True):
        raise ValueError("mrope_interleaved false")
    return TextSizes(
        **_any_text(config, 500000.0),
        head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // int(text["num_attention_heads"])),
        mrope_interleaved=True,
        qkv_bias=bool(text.get("attention_bias")),
        qk_norm=True,
        coordinates=RELATIVE_1000,
    )


def _any_text(config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """What all families call alike; `theta` is the base of the rotary frequencies where none is given."""
    text = config.get("text_config") or config
    rope = _rope(text)
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
        raise ValueError(f"rope_type {rope.get('rope_type')!r}")
    if text.get("use_sliding_window"):
        raise ValueError("use_sliding_window true")
    section = rope["mrope_section"]
    return {
        "num_layers": int(text["num_hidden_layers"]),
        "hidden_size": int(text["hidden_size"]),
        "intermediate_size": int(text["intermediate_size"]),
        "num_heads": int(text["num_attention_heads"]),
        "num_kv_heads": int(text["num_key_value_heads"]),
        "vocab_size": int(text["vocab_size"]),
        "rms_norm_eps": float(text["rms_norm_eps"]),
        "rope_theta": float(rope.get("rope_theta", text.get("rope_theta", theta))),
        "mrope_section": (int(section[0]), int(section[1]), int(section[2])),
        "max_position_embeddings": int(text["max_position_embeddings"]),
        "tied": bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    }


def _rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    return text.get("rope_parameters") or text.get("rope_scaling") or {}
