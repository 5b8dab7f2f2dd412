"""Policies at their true widths, two layers of decoder and tower, random weights: exported and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

from benchmarks.random_policy import SIZES, write_policy
from export.policy import export_policy

TOKENIZER = Path(__file__).resolve().parent.parent.parent / "shared" / "assets" / "qwen2.5-vl-7b"


@pytest.mark.slow
@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs the published tokenizer in ../shared/assets")
@pytest.mark.parametrize(("name", "side"), [("qwen2.5-vl-3b", 840), ("qwen3-vl-2b", 960)])
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
    assert exported.files["policy/token_table.bin"].stat().st_size == 151936 * 2048 * 2
