"""What must not become a bundle: checkpoints that cannot be exported, and graphs that differ from PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

import torch
from policy_checkpoints import policy_bundle, random_picture
from safetensors.torch import load_file, save_file

from export.gate import EXACT, GateLimits, gate_policy
from export.policy import PolicyExport, export_policy
from segzero_rt.errors import BundleError, ExportError
from segzero_rt.policy import Policy


def damaged_copy(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            config["text_config"][key] = value
        path.write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def last_of(weights: dict[str, torch.Tensor], ending: str) -> str:
    return sorted(key for key in weights if key.endswith(ending))[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda f: (f / "config.json").unlink(), "config.json", id="no-config"),
        pytest.param(lambda f: (f / "config.json").write_text("{"), "JSON", id="broken-config"),
        pytest.param(lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "llama", id="other-family"),
        pytest.param(lambda f: (f / "model.safetensors").unlink(), r"got no \*\.safetensors there", id="no-weights"),
        pytest.param(lambda f: (f / "model.safetensors").write_bytes(b"\x08" * 50), "safetensors", id="rubbish"),
        pytest.param(lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json", id="no-tokenizer"),
        pytest.param(edit_config(num_hidden_layers=5), "layers.2", id="more-layers-than-weights"),
        pytest.param(edit_config(intermediate_size=77), "of shape", id="other-width"),
        pytest.param(edit_config(num_key_value_heads=3), "shared evenly", id="heads-do-not-divide"),
        pytest.param(edit_config(use_sliding_window=True), "sliding", id="sliding-window"),
        pytest.param(
            edit_weights(lambda w: w[last_of(w, "down_proj.weight")].fill_(7e4)), "float16", id="too-large-for-float16"
        ),
        pytest.param(
            edit_weights(lambda w: w[last_of(w, "q_proj.bias")].fill_(float("nan"))), "finite", id="not-a-number"
        ),
    ],
)
def test_checkpoints_that_cannot_be_exported_are_named(
    policy_folders: Callable[[str], Path], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = damaged_copy(policy_folders("grouped-heads"), tmp_path / "hf", change)
    with pytest.raises(ExportError, match=message):
        export_policy(folder, tmp_path / "out", input_size_hw=(56, 56), max_length=600)


@pytest.mark.parametrize(
    "ending",
    ["q_proj.bias", "down_proj.weight", "attn.qkv.weight", "merger.mlp.0.weight", "ln_q.weight", "embed_tokens.weight"],
)
def test_the_gate_notices_one_changed_weight(
    policy_folders: Callable[[str], Path], tmp_path: Path, exported_policy: tuple[PolicyExport, Path], ending: str
) -> None:
    """The graphs against a checkpoint in which one tensor has another sign."""

    def negate(weights: dict[str, torch.Tensor]) -> None:
        weights[last_of(weights, ending)].neg_()

    other = damaged_copy(policy_folders("grouped-heads"), tmp_path / "hf", edit_weights(negate))
    policy = Policy.load(policy_bundle(*exported_policy), backend="cpu", threads=1)
    with pytest.raises(ExportError, match="differ from PyTorch"):
        gate_policy(other, policy, pictures=[random_picture(0)], limits=EXACT, max_new_tokens=20)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (GateLimits(max_vision_error=1e-12), r"vision_error .* \(limit 1e-12\)"),
        (GateLimits(max_kl_mean=-1.0), r"kl_mean .* \(limit -1\)"),
        (GateLimits(max_kl=-1.0), r"kl_max .* \(limit -1\)"),
        (GateLimits(min_top1=1.5), r"top1 .* \(limit 1.5\)"),
    ],
    ids=["vision", "mean", "max", "top1"],
)
def test_the_gate_says_which_figure_failed(
    policy_folders: Callable[[str], Path], exported_policy: tuple[PolicyExport, Path], limits: GateLimits, message: str
) -> None:
    policy = Policy.load(policy_bundle(*exported_policy), backend="cpu", threads=1)
    with pytest.raises(ExportError, match=message):
        gate_policy(
            policy_folders("grouped-heads"),
            policy,
            pictures=[random_picture(0)],
            limits=limits,
            max_new_tokens=3,
        )


def test_the_gate_sees_a_nan_in_a_later_picture(
    policy_folders: Callable[[str], Path], exported_policy: tuple[PolicyExport, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(policy_bundle(*exported_policy), backend="cpu", threads=1)
    features = policy.features
    pictures = [random_picture(0), random_picture(1)]
    monkeypatch.setattr(policy, "features", lambda image: features(image) * (np.nan if image is pictures[1] else 1))
    with pytest.raises(ExportError, match="vision_error nan"):
        gate_policy(policy_folders("grouped-heads"), policy, pictures=pictures, questions=["x"], max_new_tokens=2)


def test_a_picture_that_fills_the_context_is_refused(exported_policy: tuple[PolicyExport, Path]) -> None:
    export, _ = exported_policy
    with pytest.raises(BundleError, match="max_length"):
        Policy.from_files(
            replace(export.manifest, max_length=10),
            {name: export.files[f"policy/{name}.onnx"] for name in ("vision", "embedding", "decoder")},
            export.files["policy/tokenizer.json"],
            answer_format="vision_reasoner",
            backend="cpu",
        )


def test_rounded_weights_are_measured_by_looser_limits(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights that float16 cannot hold: the export says so by its limits, and float32 storage is exact."""

    def blur(weights: dict[str, torch.Tensor]) -> None:
        for value in weights.values():
            value.mul_(1 + 1e-4)

    folder = damaged_copy(policy_folders("grouped-heads"), tmp_path / "hf", edit_weights(blur))
    options: dict[str, Any] = {"input_size_hw": (56, 56), "max_length": 600, "max_new_tokens": 24}
    half = export_policy(folder, tmp_path / "half", storage="float16", **options).gate
    whole = export_policy(folder, tmp_path / "whole", storage="float32", **options).gate
    assert not half["limits"]["same_tokens"]
    assert whole["limits"]["same_tokens"]
    assert whole["kl_max"] < half["kl_max"]


def test_int8_weights_are_smaller_and_close(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Random weights amplify rounding more than trained ones; a wrong scale or sign would still be far outside."""
    options: dict[str, Any] = {"input_size_hw": (140, 84), "max_length": 600, "max_new_tokens": 16}
    half = export_policy(policy_folders("grouped-heads"), tmp_path / "half", storage="float16", **options)
    loose = GateLimits(max_vision_error=0.1, max_kl=5.0, max_kl_mean=0.5, min_top1=0.5, same_tokens=False)
    small = export_policy(
        policy_folders("grouped-heads"), tmp_path / "int8", storage="int8", gate_limits=loose, **options
    )
    assert small.gate["limits"]["max_kl"] == 5.0
    for name in ("vision", "decoder"):
        sizes = [exported.files[f"policy/{name}.onnx"].stat().st_size for exported in (half, small)]
        assert sizes[1] < sizes[0], name
    with pytest.raises(ExportError, match="flavour ort"):
        export_policy(policy_folders("grouped-heads"), tmp_path / "no", storage="int4", flavour="portable", **options)
