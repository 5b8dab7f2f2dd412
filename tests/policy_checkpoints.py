"""Small Qwen2.5-VL checkpoints with random weights, and a tokenizer, for tests; saved as transformers saves."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.answer_format import FORMATS
from segzero_rt.bundle import Bundle
from segzero_rt.graph_spec import DECODER_FLAVOURS
from segzero_rt.manifest import Manifest, SegmenterGraphs, SegmenterManifest

_OPSET_24_RUNTIME = (1, 25)
RUNNABLE_FLAVOURS = [
    flavour
    for flavour in DECODER_FLAVOURS
    if flavour != "trt11" or tuple(map(int, version("onnxruntime").split(".")[:2])) >= _OPSET_24_RUNTIME
]
"""Those whose operators the installed ONNX Runtime has."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")

SIZES: dict[str, dict[str, Any]] = {
    "grouped-heads": {"kv_heads": 2},
    "one-kv-head": {"kv_heads": 1, "heads": 4},
    "own-kv-heads": {"kv_heads": 4, "heads": 4, "window_size": 56},
    "untied": {"tied": False, "vision_heads": 2},
    "three-groups-all-windows": {"hidden": 96, "heads": 6, "kv_heads": 3, "layers": 3, "full_attention": ()},
    "no-windows": {"full_attention": (0, 1, 2)},
    "qwen2-vl": {"family": "qwen2_vl"},
    "qwen3-vl": {"family": "qwen3_vl", "layers": 3},
    "qwen3-vl-last-block": {
        "family": "qwen3_vl",
        "layers": 4,
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 16,
        "tied": False,
        "vision_heads": 2,
        "deepstack": (0, 1, 2),
    },
}
"""Shapes of policies, by what is special about them."""


def write_tokenizer(folder: Path, vocab_size: int = 400) -> dict[str, int]:
    """Trains a byte-level tokenizer on the prompts; returns the numbers of the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([form.user_prompt("the red cup") for form in FORMATS.values()] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}


def write_checkpoint(folder: Path, *, seed: int = 0, tied: bool = True, **sizes: Any) -> Any:
    """Writes config.json, model.safetensors and tokenizer.json; returns the PyTorch model.

    Args:
        sizes: any of hidden, layers, heads, kv_heads, mrope_section, vision_hidden, vision_depth, vision_heads,
            window_size, full_attention, head_dim, deepstack, family ("qwen2_5_vl", "qwen2_vl" or "qwen3_vl").
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder)
    hidden, heads = sizes.get("hidden", 64), sizes.get("heads", 4)
    family = sizes.get("family", "qwen2_5_vl")
    head_dim = sizes.get("head_dim", 32 if family == "qwen3_vl" else hidden // heads)
    section = sizes.get("mrope_section") or (head_dim // 2 - 2 * (head_dim // 6),) + (head_dim // 6,) * 2
    heads_apart = {"head_dim": head_dim} if family == "qwen3_vl" else {}
    config = AutoConfig.for_model(
        family,
        text_config={
            "vocab_size": 400,
            "hidden_size": hidden,
            "intermediate_size": sizes.get("intermediate", 3 * hidden - 8),
            "num_hidden_layers": sizes.get("layers", 2),
            "num_attention_heads": heads,
            "num_key_value_heads": sizes.get("kv_heads", 2),
            **heads_apart,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": list(section)},
            "bos_token_id": tokens["<|endoftext|>"],
            "eos_token_id": tokens["<|im_end|>"],
            "pad_token_id": tokens["<|endoftext|>"],
        },
        vision_config=_vision_config(family, hidden, sizes),
        image_token_id=tokens["<|image_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        tie_word_embeddings=tied,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))  # biases and norms that are not at rest
            else:
                weight.normal_(std=weight[0].numel() ** -0.5 * (0.5 if "embed_tokens" in name else 2.0))
            weight.copy_(weight.half().float())  # so that storing them as float16 changes nothing
    model.save_pretrained(folder)
    return model


def _vision_config(family: str, hidden: int, sizes: dict[str, Any]) -> dict[str, Any]:
    width = sizes.get("vision_hidden", 48)
    common = {"depth": sizes.get("vision_depth", 3), "num_heads": sizes.get("vision_heads", 4)}
    if family == "qwen2_vl":
        return common | {"embed_dim": width, "hidden_size": hidden, "mlp_ratio": 2}
    common |= {
        "hidden_size": width,
        "intermediate_size": sizes.get("vision_intermediate", 100),
        "out_hidden_size": hidden,
    }
    if family == "qwen3_vl":
        blocks = list(sizes.get("deepstack", (0, 1)))
        return common | {"patch_size": 16, "num_position_embeddings": 49, "deepstack_visual_indexes": blocks}
    return common | {
        "window_size": sizes.get("window_size", 112),
        "fullatt_block_indexes": list(sizes.get("full_attention", (1,))),
    }


def random_picture(seed: int, size_hw: tuple[int, int] = (90, 131)) -> np.ndarray:
    """Blocks of colour with noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (4, 5, 3))
    picture = np.kron(blocks, np.ones((-(-size_hw[0] // 4), -(-size_hw[1] // 5), 1)))[: size_hw[0], : size_hw[1]]
    return np.clip(picture + rng.normal(0, 9, picture.shape), 0, 255).astype(np.uint8)


def policy_bundle(exported: Any, root: Path) -> Bundle:
    """A bundle object around an exported policy, not written to disk; its segmenter is a stand-in."""
    from segzero_rt.manifest import FileRecord

    segmenter = SegmenterManifest(
        family="sam2",
        input_size_hw=(64, 64),
        resampler="pillow_bilinear",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        mask_size_hw=(16, 16),
        graphs=SegmenterGraphs(encoder="segmenter/encoder.onnx", decoder="segmenter/decoder.onnx"),
    )
    manifest = Manifest(
        name="test",
        created_by="test",
        answer_format="vision_reasoner",
        policy=exported.manifest,
        segmenter=segmenter,
        tokenizer=exported.tokenizer,
        files={name: FileRecord(sha256="0" * 64, bytes=path.stat().st_size) for name, path in exported.files.items()},
    )
    return Bundle(root=root, manifest=manifest)
