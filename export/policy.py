"""A policy checkpoint to the three graphs and the manifest section of a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.errors import ExportError
from segzero_rt.manifest import PolicyGraphs, PolicyManifest
from segzero_rt.policy import VISION_ROPE_THETA, Policy

from .gate import QUESTIONS, GateLimits, default_limits, gate_policy, plain_pictures
from .policy_checkpoint import PolicyCheckpoint
from .policy_decoder import build_decoder
from .policy_embedding import TABLE_FILE, build_embedding, write_token_table
from .policy_vision import build_vision

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyExport:
    """What `export_policy` wrote."""

    manifest: PolicyManifest
    tokenizer: str
    files: dict[str, Path]
    """Path inside the bundle to the file that was written."""
    gate: dict[str, Any]
    """Figures of `gate_policy`."""


def export_policy(
    hf_folder: Path,
    out_dir: Path,
    *,
    input_size_hw: tuple[int, int] = (840, 840),
    flavour: str = "ort",
    storage: str = "float16",
    resampler: str = "pillow_bilinear",
    max_length: int = 4096,
    max_new_tokens: int = 512,
    answer_format: str = "vision_reasoner",
    gate_pictures: Sequence[NDArray[np.uint8]] = (),
    gate_questions: Sequence[str] = QUESTIONS,
    gate_limits: GateLimits | None = None,
) -> PolicyExport:
    """Writes the graphs of a policy into `out_dir`, and compares them with PyTorch.

    Args:
        hf_folder: `config.json`, safetensors and `tokenizer.json`.
        input_size_hw: size in pixels that pictures are resized to, in multiples of a token's side.
        flavour: of the decoder, "ort" or "portable".
        storage: precision of the weights in the files. "float16" and "float32" are computed in float32; "int8" is
            computed in int8, faster and less exact (flavour "ort" alone).
        resampler: what training resized with.
        max_length: tokens of the cache, for prefix, picture, question and reply together.
        max_new_tokens: default budget of a reply.
        answer_format: whose prompts the gate asks with.
        gate_pictures: uint8 [H, W, 3] of any size; some patches of colour by default.
        gate_questions: asked on each of them.
        gate_limits: what the export must reach; by default what its storage allows.

    Raises:
        ExportError: the checkpoint is incomplete, has a part that the graphs cannot express, or the gate failed.
    """
    checkpoint = PolicyCheckpoint(hf_folder)
    if checkpoint.vision.rope_theta != VISION_ROPE_THETA:
        raise ExportError(f"expected a vision rope_theta of {VISION_ROPE_THETA}, got {checkpoint.vision.rope_theta}")
    tokenizer = hf_folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ExportError(f"expected tokenizer.json in {hf_folder}, got none; save the tokenizer in its fast format")
    folder = out_dir / "policy"
    folder.mkdir(parents=True, exist_ok=True)
    lossless = write_token_table(checkpoint, folder, storage=storage)
    for name, builder in (
        ("embedding", build_embedding(checkpoint, storage=storage)),
        ("vision", build_vision(checkpoint, flavour=flavour, storage=storage, input_size_hw=input_size_hw)),
        ("decoder", build_decoder(checkpoint, flavour=flavour, storage=storage)),
    ):
        builder.save(folder / f"{name}.onnx")
        lossless &= builder.lossless
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    manifest = _manifest(checkpoint, input_size_hw, flavour, resampler, max_length, max_new_tokens)
    policy = Policy.from_files(
        manifest,
        {name: folder / f"{name}.onnx" for name in ("vision", "embedding", "decoder")},
        folder / "tokenizer.json",
        answer_format=answer_format,
        backend="cpu",
    )
    gate = gate_policy(
        hf_folder,
        policy,
        pictures=gate_pictures or plain_pictures(),
        questions=gate_questions,
        limits=gate_limits or default_limits(storage, lossless=lossless),
        max_new_tokens=min(max_new_tokens, 64),
    )
    names = ("embedding.onnx", "vision.onnx", "decoder.onnx", TABLE_FILE, "tokenizer.json")
    return PolicyExport(
        manifest=manifest,
        tokenizer="policy/tokenizer.json",
        files={f"policy/{name}": folder / name for name in names},
        gate=gate,
    )


def _manifest(
    checkpoint: PolicyCheckpoint,
    input_size_hw: tuple[int, int],
    flavour: str,
    resampler: str,
    max_length: int,
    max_new_tokens: int,
) -> PolicyManifest:
    vision, text = checkpoint.vision, checkpoint.text
    return PolicyManifest(
        family=checkpoint.family,
        flavour=flavour,
        input_size_hw=input_size_hw,
        resampler=resampler,
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.merge_size,
        window_size=vision.window_size,
        vision_head_dim=vision.head_dim,
        num_layers=text.num_layers,
        num_heads=text.num_heads,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        hidden_size=text.hidden_size,
        rope_theta=text.rope_theta,
        mrope_section=text.mrope_section,
        vocab_size=text.vocab_size,
        eos_token_ids=checkpoint.eos_token_ids,
        image_token_id=checkpoint.image_token_id,
        max_length=min(max_length, text.max_position_embeddings),
        max_new_tokens=max_new_tokens,
        graphs=PolicyGraphs(
            vision="policy/vision.onnx", embedding="policy/embedding.onnx", decoder="policy/decoder.onnx"
        ),
    )
