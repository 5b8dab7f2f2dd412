"""Loads the policy that GRPO trains: weights in the preset's precision, frozen parts, adapters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from segzero_rt.errors import SegZeroError

from .grpo_presets import GrpoPreset, Lora, Precision

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""The decoder's projections; the vision tower has modules of the same names."""


def load_policy(preset: GrpoPreset, policy: str) -> Qwen2_5_VLForConditionalGeneration:
    """The policy to train, its vision tower frozen where the preset says so.

    Raises:
        SegZeroError: the folder holds no Qwen2.5-VL.
    """
    dtype = torch.bfloat16 if preset.precision is Precision.BF16 else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": preset.attention}
    if preset.lora is not None and preset.lora.four_bit:
        options["quantization_config"] = _four_bit()
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(policy, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SegZeroError(f"expected a Qwen2.5-VL policy in {policy}, could not load one: {reason}") from error
    if preset.freeze_vision:
        model.model.visual.requires_grad_(False)
    return model


def lora_config(lora: Lora) -> Any:
    """PEFT's configuration for the preset's adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )


def _four_bit() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
