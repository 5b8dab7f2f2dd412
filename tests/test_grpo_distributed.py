"""Several processes, and the published models' widths, as far as CPUs go: real tokenizer, 840 x 840 pixels, few layers.

Each case runs in processes of its own, which give their memory back. Beside a case of published widths stands how much
it was seen to need; where less is free, it is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs segzero-rt[train]")

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = REPOSITORY / "tests"
QWEN = REPOSITORY.parent / "shared/assets/qwen2.5-vl-7b"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
PUBLISHED_SIDE = 840
RESULT_NAME = "result.json"

WIDTHS: dict[str, dict[str, Any]] = {
    "3b": {"hidden": 2048, "intermediate": 11008, "heads": 16, "kv_heads": 2, "vocab": 151_936, "tied": True},
    "7b": {"hidden": 3584, "intermediate": 18_944, "heads": 28, "kv_heads": 4, "vocab": 152_064, "tied": False},
}
"""Of the published Qwen2.5-VL configurations; the vision towers differ in what they hand on alone."""


def write_full_size_policy(folder: Path, widths: dict[str, Any], dtype: str) -> None:
    """Random weights at published widths: two vision blocks, two decoder layers, the real tokenizer."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    published = json.loads((QWEN / "config.json").read_text())
    tokens = {key: published[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id")}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": widths["vocab"], "hidden_size": widths["hidden"], "num_hidden_layers": 2,
            "intermediate_size": widths["intermediate"], "num_attention_heads": widths["heads"],
            "num_key_value_heads": widths["kv_heads"], "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
            "tie_word_embeddings": widths["tied"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": published["bos_token_id"], "eos_token_id": published["eos_token_id"],
        },
        vision_config={
            "depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
            "out_hidden_size": widths["hidden"], "fullatt_block_indexes": [1],
        },
        vision_end_token_id=published["vision_end_token_id"], tie_word_embeddings=widths["tied"], **tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(QWEN / name, folder)


def full_size_run(folder: Path, case: str) -> Any:
    """One optimiser step of a published preset, made smaller in samples and tokens alone."""
    from grpo_runs import make_rows

    from training.grpo import GrpoRun
    from training.grpo_presets import Precision, seg_zero_3b, vision_reasoner_7b, with_lora

    few = {"vllm": None, "num_generations": 2, "prompts_per_step": 1, "micro_batch": 1, "max_completion_tokens": 8}
    once = {"max_steps": 1, "eval_every": 1, "num_eval_rows": 1}
    if case == "3b":
        # Without the reference policy, whose 2 GiB more no test machine is sure to have; others prove the KL.
        preset = replace(seg_zero_3b(), **few, **once, precision=Precision.FLOAT32, kl_coef=0.0)
    else:
        preset = replace(with_lora(vision_reasoner_7b()), **few, **once)
    rows = make_rows(folder / "rows", 5, PUBLISHED_SIDE)
    return GrpoRun(
        preset=preset,
        out=folder / "run",
        policy=str(folder / "policy"),
        rows=[*rows[:2], *rows[3:]],
        eval_rows=rows[:1],
    )


def one_step(folder: Path, case: str) -> None:
    """What the processes run: one step, no checkpoint, and what came of it as JSON."""
    import torch

    from training.grpo import build_trainer, check_rows

    if case in WIDTHS:
        run = full_size_run(folder, case)
    else:
        from grpo_runs import make_run

        run = make_run(folder, out="run", max_steps=1, learning_rate=1e-2, micro_batch=1, shared_prompts=False)
    check_rows(run)
    run.out.mkdir(exist_ok=True)
    trainer = build_trainer(run)
    trainer.args.save_strategy, trainer.args.eval_strategy, trainer.args.load_best_model_at_end = "no", "no", False
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    name = next(name for name in trained if "layers.1" in name and "down_proj" in name and "lora_A" not in name)
    before = trained[name].detach().clone()
    trainer.train()
    after = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())[name]
    sharded = hasattr(after, "full_tensor")
    whole = (after.full_tensor() if sharded else after).detach()
    if trainer.accelerator.is_main_process:
        logs = [line for line in trainer.state.log_history if "loss" in line]
        result = {
            "steps": trainer.state.global_step, "loss": logs[0]["loss"], "grad_norm": logs[0]["grad_norm"],
            "kl": logs[0].get("kl"), "moved": float((whole.float() - before.float()).abs().max()),
            "dtype": str(whole.dtype), "sharded": sharded, "processes": trainer.accelerator.num_processes,
            "prompt_tokens": int(logs[0]["num_tokens"]), "trained": sorted({key.split(".")[0] for key in trained}),
            "vision_trained": any("visual" in key for key in trained), "finite": bool(torch.isfinite(whole).all()),
        }  # fmt: skip
        (folder / RESULT_NAME).write_text(json.dumps(result))


def run_processes(folder: Path, case: str, processes: int) -> dict[str, Any]:
    script = folder / "step.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(TESTS)!r}, {str(REPOSITORY)!r}]\n"
        "from pathlib import Path\n"
        "from fsdp_on_cpus import allow_fsdp_on_cpus\n"
        "allow_fsdp_on_cpus()\n"
        "from test_grpo_distributed import one_step\n"
        f"one_step(Path({str(folder)!r}), {case!r})\n"
    )
    launch = [sys.executable]
    if processes > 1:
        config = str(REPOSITORY / "training/accelerate/fsdp_cpu.yaml")
        launch += ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(processes)]
        launch += ["--main_process_port", "0"]
    done = subprocess.run(
        [*launch, str(script)], check=False, capture_output=True, text=True, timeout=1500, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result: dict[str, Any] = json.loads((folder / RESULT_NAME).read_text())
    return result


def available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_small_policy_takes_a_step_sharded_as_it_does_alone(tmp_path: Path, processes: int) -> None:
    from grpo_runs import make_run

    make_run(tmp_path)
    result = run_processes(tmp_path, "small", processes)
    assert (result["steps"], result["processes"], result["sharded"]) == (1, processes, processes == 2)
    assert result["kl"] is not None
    assert result["finite"]
    assert result["moved"] > 0


FULL_SIZE = {
    # case, processes, GiB that must be free
    "3B widths, one process": ("3b", 1, 9.0),
    "3B widths, two processes": ("3b", 2, 18.0),
    "7B widths, LoRA over bfloat16, one process": ("7b", 1, 7.0),
}


@pytest.mark.slow
@pytest.mark.skipif(not QWEN.exists(), reason="needs ../shared/assets")
@pytest.mark.parametrize(("case", "processes", "memory_gib"), FULL_SIZE.values(), ids=FULL_SIZE.keys())
def test_published_widths_take_a_step(tmp_path: Path, case: str, processes: int, memory_gib: float) -> None:
    if available_gib() < memory_gib:
        pytest.skip(f"needs {memory_gib} GiB of free memory, {available_gib():.1f} are")
    dtype = "float32" if case == "3b" else "bfloat16"
    write = (
        f"import sys; sys.path[:0] = [{str(TESTS)!r}]; from pathlib import Path\n"
        "from test_grpo_distributed import *\n"
        f"write_full_size_policy(Path({str(tmp_path / 'policy')!r}), WIDTHS[{case!r}], {dtype!r})"
    )
    subprocess.run([sys.executable, "-c", write], check=True, timeout=600)
    result = run_processes(tmp_path, case, processes)
    assert (result["steps"], result["processes"], result["sharded"]) == (1, processes, processes == 2)
    assert result["prompt_tokens"] > 2 * 900
    assert result["finite"]
    assert result["moved"] > 0
    assert result["vision_trained"] is (case == "3b")
    assert (result["kl"] is not None) is (case == "7b")
