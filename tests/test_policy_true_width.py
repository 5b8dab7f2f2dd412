"""Policies at their true widths, few layers of decoder and tower, random weights: exported and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

from policy_checkpoints import write_checkpoint

from benchmarks.random_policy import SIZES, write_policy
from export.policy import export_policy

TOKENIZER = Path(__file__).resolve().parent.parent.parent / "shared" / "assets" / "qwen2.5-vl-7b"


@pytest.mark.slow
@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs the published tokenizer in ../shared/assets")
@pytest.mark.parametrize(("name", "side"), [("qwen2-vl-2b", 840), ("qwen2.5-vl-3b", 840), ("qwen3-vl-2b", 960)])
def test_true_widths_equal_pytorch(tmp_path: Path, name: str, side: int) -> None:
    """bfloat16 weights are stored as they are, so that float32 arithmetic is all that can differ."""
    write_policy(SIZES[name], TOKENIZER, tmp_path / "hf", layers=2)
    exported = export_policy(
        tmp_path / "hf",
        tmp_path / "out",
        input_size_hw=(side, side),
        storage="bfloat16",
        external=True,
        gate_layers=True,
    )
    assert exported.gate["layers"] == 2 + 1 + 2 + 1 + 2
    assert exported.gate["vision_error"] < 1e-5
    assert exported.gate["decoder_error"] < 1e-5
    assert exported.gate["top1"] == 1.0
    assert exported.files["policy/token_table.bin"].stat().st_size == 151936 * SIZES[name].hidden * 2


@pytest.mark.slow
def test_true_widths_pass_the_gate_in_few_bits(tmp_path: Path) -> None:
    """One layer at the widths of 3B, two blocks of its tower; a vocabulary of 400, so that the widths take the time.

    Scales are searched and ranges measured as for any checkpoint; the limits are those of every export. Random weights
    have no outliers, and 4 bits cost them more than trained ones.
    """
    widths = {"hidden": 2048, "intermediate": 11008, "heads": 16, "kv_heads": 2, "mrope_section": (16, 24, 24)}
    tower = {"vision_hidden": 1280, "vision_intermediate": 3420, "vision_heads": 16, "vision_depth": 2}
    write_checkpoint(tmp_path / "hf", layers=1, full_attention=(1,), **widths, **tower)
    stored = {
        "awq": {"storage": "int4", "int4_method": "awq"},
        "int8": {"storage": "int8", "flavour": "portable", "computed": "float16"},
    }
    numbers = 2048 * (2560 + 2048) + 3 * 2048 * 11008
    weights = {"awq": numbers * 4.5 / 8 + 400 * 2048, "int8": numbers}  # 8 bits for the table that gives the logits
    errors = {}
    for name, options in stored.items():
        exported = export_policy(
            tmp_path / "hf",
            tmp_path / name,
            input_size_hw=(140, 140),
            max_length=500,
            external=True,
            gate_layers=True,
            gate_questions=("the red cup",),
            **options,  # type: ignore[arg-type]
        )
        errors[name] = exported.gate["decoder_error"]
        assert exported.gate["vision_error"] < 0.1
        written = exported.files["policy/decoder.data"].stat().st_size
        assert weights[name] < written < 1.01 * weights[name]
    assert 1e-3 < errors["int8"] < 0.15 < errors["awq"] < 0.5
