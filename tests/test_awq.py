"""Scales by activations before weights become 4 bits: nothing changes exactly, less is lost rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports checkpoints of PyTorch")

from policy_checkpoints import policy_bundle, random_picture
from test_policy_layers import unpacked

from export.awq import SEARCHED_OUTPUTS, awq_checkpoint, search_scales
from export.calibration import Calibration, calibrate, questions_of
from export.gate import FOUR_BITS, plain_pictures
from export.lazy_weight import Weight
from export.policy import export_policy
from export.policy_checkpoint import Factors, PolicyCheckpoint
from export.reference_layers import LayeredReference
from export.weight_encoding import Int4Encoding, as_four_bits
from segzero_rt.errors import ExportError
from segzero_rt.policy import Policy

OPTIONS: dict[str, Any] = {
    "input_size_hw": (84, 84),
    "max_length": 500,
    "max_new_tokens": 12,
    "gate_questions": ("the red cup",),
}
LOOSE = replace(FOUR_BITS, max_decoder_error=1.2, max_kl_mean=2.0, min_top1=0.0)
"""Random weights lose much more than trained ones."""


def outliers(rows: int, channels: int) -> np.ndarray:
    """Inputs of which every twentieth channel is thirty times as large."""
    x = np.random.default_rng(1).normal(size=(rows, channels)).astype(np.float32)
    x[:, ::20] *= 30
    return x


@pytest.mark.parametrize("outputs", [40, SEARCHED_OUTPUTS + 700], ids=["all", "some-outputs"])
def test_scales_lose_less_on_rows_that_were_not_searched(outputs: int) -> None:
    weight = np.random.default_rng(0).normal(size=(outputs, 160)).astype(np.float32)
    x = outliers(64, 160)
    scales = search_scales(Weight.of(weight), x)
    assert scales.shape == (160,) and scales[0] > 1.5 * scales[1]
    fresh = outliers(200, 160)[64:]

    def missed(by: np.ndarray) -> float:
        return float(np.linalg.norm(fresh @ (as_four_bits(weight * by) / by - weight).T))

    assert missed(scales) < 0.8 * missed(np.ones(160, np.float32))


def test_nothing_is_scaled_where_nothing_is_gained() -> None:
    """A weight that 4 bits hold exactly."""
    weight = np.tile(np.array([-8, 3, 5, 1] * 8, np.float32), (16, 2))
    np.testing.assert_array_equal(search_scales(Weight.of(weight), outliers(16, 64)), 1.0)


def test_four_bits_are_what_the_file_holds() -> None:
    values = np.random.default_rng(2).normal(size=(7, 70)).astype(np.float32)
    np.testing.assert_array_equal(
        as_four_bits(values), unpacked(Int4Encoding("w", Weight.of(values), name="w", scale_name="s"))
    )


@pytest.mark.parametrize(
    ("shape", "rows", "columns"), [((5, 3), 5, 3), ((5, 3), 1, 3), ((5, 3), 5, 1), ((5,), 5, 1)], ids=str
)
def test_factors_apply_to_any_rows(shape: tuple[int, ...], rows: int, columns: int) -> None:
    values = np.arange(1.0, 1 + np.prod(shape)).reshape(shape).astype(np.float32)
    factors = Factors(rows=np.arange(2.0, 2 + rows, dtype=np.float32), columns=np.full(columns, 3, np.float32))
    whole = factors.applied(Weight.of(values))
    expected = values * np.broadcast_to(factors.rows, (5,)).reshape((5,) + (1,) * (len(shape) - 1))
    np.testing.assert_array_equal(whole.array(), expected if len(shape) == 1 else expected * 3)
    np.testing.assert_array_equal(whole.rows(2, 4), whole.array()[2:4])


def measured(folder: Path, tmp_path: Path) -> tuple[PolicyCheckpoint, Calibration]:
    exported = export_policy(folder, tmp_path / "floats", **OPTIONS | {"input_size_hw": (224, 224)})
    checkpoint = PolicyCheckpoint(folder)
    questions = questions_of(plain_pictures(1), ("the red cup",))
    found = calibrate(
        checkpoint, exported.manifest, questions=questions, answer_format="vision_reasoner", keep_rows=True
    )
    return checkpoint, found


@pytest.mark.parametrize("sizes", ["grouped-heads", "qwen3-vl"])
def test_the_scaled_checkpoint_computes_the_same(
    policy_folders: Callable[[str], Path], tmp_path: Path, sizes: str
) -> None:
    import torch

    checkpoint, found = measured(policy_folders(sizes), tmp_path)
    scaled = awq_checkpoint(checkpoint, found.held)
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    assert np.abs(scaled.tensor(name) / checkpoint.tensor(name) - 1).max() > 0.05, "something was scaled"
    assert scaled.fingerprint() != checkpoint.fingerprint()
    ids = torch.arange(20)[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.zeros_like(ids).int(),
    }
    want, got = (LayeredReference(one).logits(inputs, rows=20) for one in (checkpoint, scaled))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("gate_layers", [False, True], ids=["whole", "by-layers"])
def test_a_policy_is_exported_by_awq(policy_folders: Callable[[str], Path], tmp_path: Path, gate_layers: bool) -> None:
    """The same operators and sizes as rounded to nearest; only numbers differ."""
    options = {**OPTIONS, "storage": "int4", "gate_limits": LOOSE, "gate_layers": gate_layers}
    exports = {
        method: export_policy(policy_folders("untied"), tmp_path / method, int4_method=method, **options)
        for method in ("rtn", "awq")
    }
    assert {method: exported.gate["int4_method"] for method, exported in exports.items()} == {
        "rtn": "rtn",
        "awq": "awq",
    }
    files = [exported.files["policy/decoder.onnx"].read_bytes() for exported in exports.values()]
    assert len(files[0]) == len(files[1]) and files[0] != files[1]
    policy = Policy.load(policy_bundle(exports["awq"], tmp_path / "awq"), backend="cpu", threads=1)
    assert policy.answer(random_picture(1), "the red cup", max_new_tokens=5).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"storage": "int4", "int4_method": "best"}, "rtn or awq, got 'best'", id="unknown"),
        pytest.param({"storage": "int8", "int4_method": "awq"}, "expected storage int4", id="other-storage"),
    ],
)
def test_methods_that_are_none_are_refused(
    policy_folders: Callable[[str], Path], tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_policy(policy_folders("untied"), tmp_path, **OPTIONS, **options)
