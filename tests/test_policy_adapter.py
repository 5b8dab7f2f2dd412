"""LoRA adapters are merged on the way: the graphs say what PEFT's own merged model says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")
pytest.importorskip("peft", reason="makes adapters, and is what merging is compared with")

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from export import policy
from export.policy import export_policy
from export.policy_checkpoint import PolicyCheckpoint
from segzero_rt.errors import ExportError

OPTIONS: dict[str, Any] = {"input_size_hw": (56, 84), "max_length": 600, "max_new_tokens": 24, "storage": "float32"}
TEXT = "model.language_model.layers.1."


def make_adapter(folder: Path, source: Path, **settings: Any) -> Path:
    """Saves an adapter with random weights that matter."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    adapted.save_pretrained(str(folder))
    return folder


def test_an_adapter_that_changes_its_base_is_no_sum(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """PiSSA is taken out of the base when PEFT loads such an adapter: a sum alone would be wrong."""
    source = policy_folders("grouped-heads")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    before = model.get_parameter(TEXT + "mlp.down_proj.weight").detach().clone()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights="pissa_niter_4")
    )
    adapted.save_pretrained(str(tmp_path / "adapter"))
    after = adapted.get_parameter("base_model.model." + TEXT + "mlp.down_proj.base_layer.weight")
    assert not torch.equal(before, after)
    with pytest.raises(ExportError, match="merge it with PEFT"):
        PolicyCheckpoint(source, tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="decoder-and-tower"),
        pytest.param({"use_rslora": True}, id="rank-stabilised"),
        pytest.param({"target_modules": r".*layers\.1\.mlp\.up_proj"}, id="one-product"),
        pytest.param({"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}}, id="patterns"),
    ],
)
def test_a_merged_adapter_says_what_peft_says(
    policy_folders: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    source = policy_folders("grouped-heads")
    adapter = make_adapter(tmp_path / "adapter", source, **settings)
    gate = export_policy(source, tmp_path / "out", adapter=adapter, **OPTIONS).gate
    assert gate["same_tokens"] == 1.0
    assert gate["max_abs_logit"] < 2e-3


def test_a_forgotten_adapter_is_noticed(
    policy_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = policy_folders("grouped-heads")
    adapter = make_adapter(tmp_path / "adapter", source)
    monkeypatch.setattr(policy, "PolicyCheckpoint", lambda folder, _: PolicyCheckpoint(folder))
    with pytest.raises(ExportError, match="differ from PyTorch"):
        export_policy(source, tmp_path / "out", adapter=adapter, **OPTIONS)


def test_rows_are_merged_as_the_whole(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = policy_folders("grouped-heads")
    adapter = make_adapter(tmp_path / "adapter", source)
    plain, merged = PolicyCheckpoint(source), PolicyCheckpoint(source, adapter)
    key = TEXT + "mlp.down_proj.weight"
    whole = merged.tensor(key)
    assert np.abs(whole - plain.tensor(key)).max() > 0.01
    np.testing.assert_allclose(merged.weight(key).rows(5, 9), whole[5:9], atol=1e-6)
    np.testing.assert_array_equal(merged.tensor(TEXT + "mlp.up_proj.weight"), plain.tensor(TEXT + "mlp.up_proj.weight"))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights)
        save_file(weights, folder / "adapter_model.safetensors")

    return edit


def first(weights: dict[str, torch.Tensor], part: str) -> str:
    return next(key for key in sorted(weights) if part in key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json", id="no-config"),
        pytest.param(lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json", id="broken-config"),
        pytest.param(lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model", id="no-weights"),
        pytest.param(
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x08" * 50), "fetch it again", id="rubbish"
        ),
        pytest.param(edit_config(use_dora=True), "use_dora unset", id="dora"),
        pytest.param(
            edit_config(init_lora_weights="pissa_niter_4"), "that leaves the base model", id="made-from-the-base"
        ),
        pytest.param(edit_config(init_lora_weights="loftq"), "init_lora_weights .* got loftq", id="of-a-rounded-base"),
        pytest.param(
            edit_config(alora_invocation_tokens=[5]), "alora_invocation_tokens unset", id="not-from-the-start"
        ),
        pytest.param(edit_config(layer_replication=[[0, 2]]), "layer_replication unset", id="layers-twice"),
        pytest.param(edit_config(trainable_token_indices=[7]), "trainable_token_indices unset", id="tokens-anew"),
        pytest.param(edit_config(lora_bias=True), "lora_bias unset", id="bias-of-its-own"),
        pytest.param(edit_config(alpha_pattern=["x"]), "by module", id="patterns-that-are-none"),
        pytest.param(edit_config(alpha_pattern={"(": 1}), "numbers for alpha", id="a-pattern-that-does-not-end"),
        pytest.param(edit_config(lora_alpha="x"), "numbers for alpha", id="alpha-as-text"),
        pytest.param(lambda f: (f / "adapter_config.json").write_text("[]"), "JSON object", id="a-list"),
        pytest.param(
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "a pickle", id="pickled"
        ),
        pytest.param(
            edit_weights(lambda w: w.update({first(w, "lora_A"): torch.zeros(4, 3, 2)})), "of one rank", id="no-matrix"
        ),
        pytest.param(
            edit_weights(
                lambda w: w.update({first(w, "lora_A"): torch.zeros(0, 64), first(w, "lora_B"): torch.zeros(64, 0)})
            ),
            "of one rank",
            id="rank-0",
        ),
        pytest.param(edit_config(bias="all"), "bias none", id="biases"),
        pytest.param(edit_config(modules_to_save=["lm_head"]), "modules_to_save", id="whole-modules"),
        pytest.param(edit_config(peft_type="LOHA"), "peft_type LORA", id="another-kind"),
        pytest.param(edit_weights(lambda w: w.pop(first(w, "lora_B"))), "lora_A and lora_B", id="half-a-pair"),
        pytest.param(
            edit_weights(lambda w: w.update({first(w, "lora_A"): torch.zeros(3, 9)})), "of one rank", id="ranks-differ"
        ),
        pytest.param(
            edit_weights(lambda w: w.update({first(w, "lora_A"): torch.zeros(4, 9)})), "of shape", id="other-width"
        ),
        pytest.param(
            edit_weights(
                lambda w: w.update(
                    {key.replace("layers.1", "layers.7"): w.pop(key) for key in list(w) if "layers.1" in key}
                )
            ),
            "layers.7",
            id="more-layers",
        ),
        pytest.param(
            edit_weights(lambda w: w.update({"base_model.model.lm_head.weight": torch.zeros(2)})),
            "weights of LoRA",
            id="a-whole-weight",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_named(
    policy_folders: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
) -> None:
    source = policy_folders("grouped-heads")
    made = tmp_path_factory.getbasetemp() / "adapter-to-damage"
    if not made.is_dir():
        make_adapter(made, source)
    shutil.copytree(made, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(ExportError, match=message):
        export_policy(source, tmp_path / "out", adapter=tmp_path / "adapter", **OPTIONS)
