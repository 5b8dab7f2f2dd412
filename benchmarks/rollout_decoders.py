"""What one token costs a batch of replies: the runtime's ONNX decoder against the decoder that GRPO samples with.

    python -m benchmarks.rollout_decoders [--policy HF] [--prompts 8] [--replies 8] [--length 140] [--threads 1]

Both run in float32 on the same weights, each reply with `--length` prompt tokens and 48 of its own before it. The ONNX
decoder, exported here, keeps a whole cache for each reply; it is timed with its weights packed when it is loaded, and
without packing, which weights that change in place would need. The training's decoder reads its live parameters and
keeps a prompt once. Loading is what a refresh by a new session would cost per optimiser step, export not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .measuring import RESULTS, pin_to_cores, run_and_exit, write_result

OWN_TOKENS = 48
"""Tokens that each reply has written before."""
REPEATS = 30
ORDINARY = (300, 900)
"""Tokens that prompts and replies are drawn from: none with a meaning of its own."""


def main() -> None:
    """Times the three, writes one result file."""
    arguments = _parse()
    pin_to_cores(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        graph = _export(arguments.policy, Path(scratch))
        sides = {
            "onnx_packed": _onnx_step(graph, arguments, packed=True),
            "onnx_unpacked": _onnx_step(graph, arguments, packed=False),
            "shared_prompt": (_shared_step(arguments), 0.0),
        }
        times_ms = _in_turn({name: step for name, (step, _) in sides.items()})
    document = {
        "policy": arguments.policy.name,
        "prompts": arguments.prompts,
        "replies_to_each": arguments.replies,
        "prompt_tokens": arguments.length,
        "threads": arguments.threads,
        "step_ms": {name: statistics.median(values) for name, values in times_ms.items()},
        "load_ms": {name: load_ms for name, (_, load_ms) in sides.items()},
    }
    path = write_result("rollout_decoders", document, arguments.out)
    print(json.dumps({"result": str(path), "step_ms": document["step_ms"], "load_ms": document["load_ms"]}))


def _in_turn(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each step, all taking turns; the first round is a warm-up."""
    times_ms: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times_ms[name].append((time.perf_counter() - started) * 1e3)
    return {name: values[1:] for name, values in times_ms.items()}


def _export(policy: Path, folder: Path) -> Path:
    from export.policy_checkpoint import PolicyCheckpoint
    from export.policy_decoder import build_decoder
    from export.policy_embedding import write_token_table

    checkpoint = PolicyCheckpoint(policy)
    write_token_table(checkpoint, folder, storage="float32")
    build_decoder(checkpoint, flavour="ort", storage="float32").save(folder / "decoder.onnx")
    return folder / "decoder.onnx"


def _onnx_step(graph: Path, arguments: argparse.Namespace, *, packed: bool) -> tuple[Callable[[], object], float]:
    """One token for every reply, buffers bound in place; and the milliseconds of loading."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    options.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    load_ms = (time.perf_counter() - started) * 1e3
    buffers = _decoder_buffers(session, arguments)
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, session.get_inputs()), (binding.bind_output, session.get_outputs())):
        for tensor in tensors:
            array = buffers[tensor.name.replace("present", "past")]
            bind(tensor.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def step() -> object:
        session.run_with_iobinding(binding)
        return buffers  # which must outlive the binding

    return step, load_ms


def _decoder_buffers(session: Any, arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    rows, length = arguments.prompts * arguments.replies, arguments.length + OWN_TOKENS
    rng = np.random.default_rng(0)
    sizes = {"batch": rows, "new": 1, "rows": 1, "capacity": length + 1, "max_length": length + 1}
    buffers: dict[str, np.ndarray] = {
        "logits_rows": np.zeros((rows, 1), np.int64),
        "seqlens_k": np.full(rows, length, np.int32),
        "total_length": np.array([length + 1], np.int32),
    }
    for tensor in (*session.get_inputs(), *session.get_outputs()):
        if tensor.name not in buffers and not tensor.name.startswith("present"):
            shape = [sizes.get(axis, axis) for axis in tensor.shape]
            buffers[tensor.name] = rng.standard_normal(shape, np.float32)
    return buffers


def _shared_step(arguments: argparse.Namespace) -> Callable[[], object]:
    """One token for every reply, each time the first after `OWN_TOKENS`."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from training.shared_prompt import Prompts, ReplyCache, SharedPromptPolicy

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.policy, dtype=torch.float32).eval()
    policy = SharedPromptPolicy(model)
    draws = torch.Generator().manual_seed(0)
    text = torch.randint(*ORDINARY, (arguments.prompts, arguments.length), generator=draws)
    heads = model.config.text_config.num_key_value_heads
    with torch.inference_mode():
        state = policy.read(Prompts(token_ids=tuple(map(tuple, text.tolist()))))
        cache = ReplyCache(arguments.prompts * arguments.replies * heads, OWN_TOKENS + 1)
        said = torch.randint(*ORDINARY, (arguments.prompts, arguments.replies, OWN_TOKENS), generator=draws)
        policy.reply(state, said, cache)

    def step() -> object:
        with torch.inference_mode():
            cache.length = OWN_TOKENS
            return policy.logits(policy.reply(state, said[..., :1], cache))

    return step


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="one token of a batch: ONNX decoder against the training's own")
    parser.add_argument("--policy", type=Path, default=Path("training/checkpoints/tabletop/policy"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--replies", type=int, default=8, help="to each prompt")
    parser.add_argument("--length", type=int, default=140, help="tokens of a prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    return parser.parse_args()


if __name__ == "__main__":
    run_and_exit(main, "rollout_decoders")
