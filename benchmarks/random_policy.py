"""A policy checkpoint of a published size with random weights: what an export costs does not depend on their values.

    python -m benchmarks.random_policy --like qwen2.5-vl-3b --tokenizer ../shared/assets/qwen2.5-vl-7b --out DIR

Published layouts, bfloat16 shards with an index, written shard by shard: flat settings with `model.` and `visual.` keys
(Qwen2-VL, Qwen2.5-VL), or transformers' own (Qwen3-VL).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .measuring import check_files, run_and_exit

SHARD_BYTES = 512 << 20
POOL = 1 << 24
"""Random numbers that all weights are cut from: drawing billions would take longer than the export."""
TOKENIZER_FILES = ("tokenizer.json", "generation_config.json")
"""What a checkpoint's folder holds beside its weights and settings."""
STD = 0.02
"""Of every matrix, as such models are initialised."""

VISION = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
QWEN2_VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}
"""What Qwen2-VL calls `hidden_size` is the width that its tower gives out."""
QWEN3_VISION = {
    "model_type": "qwen3_vl",
    "depth": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
"""Of Qwen3-VL-2B and 4B."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What tells the sizes of a family apart, from their published config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    family: str = "qwen2_5_vl"
    vision: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the tower that are other than its family's."""


SIZES = {
    "qwen2-vl-2b": Size(
        hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, vocab=151936, tied=True, family="qwen2_vl"
    ),
    "qwen2.5-vl-3b": Size(hidden=2048, intermediate=11008, layers=36, heads=16, kv_heads=2, vocab=151936, tied=True),
    "qwen2.5-vl-7b": Size(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, vocab=152064, tied=False),
    "qwen3-vl-2b": Size(
        hidden=2048, intermediate=6144, layers=28, heads=16, kv_heads=8, vocab=151936, tied=True, family="qwen3_vl"
    ),
    "qwen3-vl-4b": Size(
        hidden=2560, intermediate=9728, layers=36, heads=32, kv_heads=8, vocab=151936, tied=True, family="qwen3_vl"
    ),
}


def main() -> None:
    """Writes one checkpoint.

    Raises:
        OSError: no tokenizer, weights there already, or no room for these.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=tuple(SIZES), default="qwen2.5-vl-3b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--layers", type=int, help="fewer layers of the decoder and the tower, at full width")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    size: Size = SIZES[arguments.like]
    if arguments.layers is not None and not 1 <= arguments.layers <= size.layers:
        parser.error(f"--layers: expected 1 to {size.layers} of {arguments.like}, got {arguments.layers}")
    check_files(*(arguments.tokenizer / name for name in TOKENIZER_FILES))
    _check_room(size, arguments.out, arguments.layers)
    print(write_policy(size, arguments.tokenizer, arguments.out, layers=arguments.layers))


def _check_room(size: Size, out: Path, layers: int | None) -> None:
    """Other weights beside the new ones would be counted as theirs."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: expected a folder or nothing, found a file; take another")
    if out.is_dir() and (found := sorted(out.glob("*.safetensors"))):
        raise FileExistsError(f"{out}: expected a folder without weights, found {found[0].name}; take another")
    needed = sum(2 * math.prod(shape) for _, shape in all_tensors(published(size, layers)))
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            f"{out}: expected {needed / 1e9:.1f} GB of room, found {free / 1e9:.1f} GB; free some, or take fewer layers"
        )


def write_policy(size: Size, tokenizer: Path | None, out: Path, *, layers: int | None = None) -> int:
    """Writes the checkpoint; returns the bytes of its weights.

    Args:
        tokenizer: folder of the files that go with the weights; none where only its graphs are wanted.
        layers: so many in the decoder and in the tower instead of all.
    """
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    config = published(size, layers)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        if tokenizer is not None:
            shutil.copyfile(tokenizer / name, out / name)
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * STD).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    shard: dict[str, Any] = {}
    held = total = place = 0
    for key, shape in [*all_tensors(config), ("", ())]:
        count = int(torch.tensor(shape).prod()) if shape else 0
        if shard and (not key or held + 2 * count > SHARD_BYTES):
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, out / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
            shard, held = {}, 0
        if key:
            place = (place + 7919) % POOL
            shard[key] = _cut(pool, place, count).reshape(shape)
            if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")):
                shard[key] += 1
            held, total = held + 2 * count, total + 2 * count
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def published(size: Size, layers: int | None = None) -> dict[str, Any]:
    """config.json of the size's family."""
    return _CONFIGURATIONS[size.family](size, layers)


def all_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of all weights that such a config.json asks for."""
    return (_qwen3_tensors if config["model_type"] == "qwen3_vl" else tensors)(config)


def configuration(size: Size, layers: int | None = None) -> dict[str, Any]:
    """config.json of Qwen2.5-VL as published, with fewer layers where that is asked."""
    vision = VISION | dict(size.vision) | {"out_hidden_size": size.hidden}
    if layers is not None:
        vision |= {"depth": layers, "fullatt_block_indexes": [layers - 1]}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "max_position_embeddings": 128000,
        **_flat_text(size, layers),
        "vision_config": vision,
    }


def _qwen2_configuration(size: Size, layers: int | None) -> dict[str, Any]:
    """config.json of Qwen2-VL as published; with fewer layers, so many blocks too."""
    vision = QWEN2_VISION | dict(size.vision) | {"hidden_size": size.hidden}
    if layers is not None:
        vision |= {"depth": layers}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "max_position_embeddings": 32768,
        **_flat_text(size, layers),
        "vision_config": vision,
    }


def _flat_text(size: Size, layers: int | None) -> dict[str, Any]:
    """The decoder's settings, which Qwen2-VL and Qwen2.5-VL call alike."""
    return {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers if layers is None else layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": size.tied,
        "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "mrope", "mrope_section": _sections(size.hidden // size.heads)},
        "vocab_size": size.vocab,
    }


def _sections(head_dim: int) -> list[int]:
    """Shares of time, row and column in half a head's width: 16, 24 and 24 of the published 64."""
    side = head_dim // 2 * 3 // 8
    return [head_dim // 2 - 2 * side, side, side]


def _qwen3_configuration(size: Size, layers: int | None) -> dict[str, Any]:
    """config.json of Qwen3-VL as published; with fewer layers, so many blocks too, all but the last given twice."""
    vision = QWEN3_VISION | dict(size.vision) | {"out_hidden_size": size.hidden}
    if layers is not None:
        vision |= {"depth": layers, "deepstack_visual_indexes": list(range(min(3, layers - 1)))}
    text = {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 262144,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers if layers is None else layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": size.tied,
        "vocab_size": size.vocab,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": size.tied,
        "text_config": text,
        "vision_config": vision,
    }


_CONFIGURATIONS = {"qwen2_vl": _qwen2_configuration, "qwen2_5_vl": configuration, "qwen3_vl": _qwen3_configuration}


def _qwen3_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of all weights, which transformers writes as they are published."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    for key, parameter in model.named_parameters():
        yield key, tuple(parameter.shape)


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of all weights of Qwen2-VL and Qwen2.5-VL, as published."""
    hidden, wide, vision = config["hidden_size"], config["intermediate_size"], config["vision_config"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{prefix}self_attn.{part}_proj.weight", (rows, hidden)
            yield f"{prefix}self_attn.{part}_proj.bias", (rows,)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
        for part, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
            yield f"{prefix}mlp.{part}_proj.weight", shape
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)
    yield from _vision_tensors(vision, hidden)


def _vision_tensors(vision: dict[str, Any], out_width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of Qwen2.5-VL; of Qwen2-VL, which has `embed_dim`, layer norms and an MLP without gate."""
    plain = "embed_dim" in vision
    width = vision["embed_dim" if plain else "hidden_size"]
    wide = int(width * vision["mlp_ratio"]) if plain else vision["intermediate_size"]
    norm_parts = ("weight", "bias") if plain else ("weight",)
    if plain:
        mlp = {"mlp.fc1": (wide, width), "mlp.fc2": (width, wide)}
    else:
        mlp = {"mlp.gate_proj": (wide, width), "mlp.up_proj": (wide, width), "mlp.down_proj": (width, wide)}
    side = vision["patch_size"]
    yield "visual.patch_embed.proj.weight", (width, vision["in_chans"], vision["temporal_patch_size"], side, side)
    for block in range(vision["depth"]):
        prefix = f"visual.blocks.{block}."
        shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), **mlp}
        for name, shape in shapes.items():
            yield f"{prefix}{name}.weight", shape
            yield f"{prefix}{name}.bias", shape[:1]
        for name in ("norm1", "norm2"):
            yield from ((f"{prefix}{name}.{part}", (width,)) for part in norm_parts)
    merged = width * vision["spatial_merge_size"] ** 2
    yield from ((f"visual.merger.ln_q.{part}", (width,)) for part in norm_parts)
    for layer, rows in ((0, merged), (2, out_width)):
        yield f"visual.merger.mlp.{layer}.weight", (rows, merged)
        yield f"visual.merger.mlp.{layer}.bias", (rows,)


def _cut(pool: Any, place: int, count: int) -> Any:
    """`count` numbers of the pool from `place` on, around its end as often as it takes."""
    import torch

    rounds = -(-(place + count) // POOL)
    return (
        torch.cat([pool] * rounds)[place : place + count].clone() if rounds > 1 else pool[place : place + count].clone()
    )


if __name__ == "__main__":
    run_and_exit(main, "random_policy")
