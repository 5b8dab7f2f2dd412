"""The options of `segzero train grpo`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.commands.options import positive_integer
from segzero_rt.errors import SegZeroError

if TYPE_CHECKING:  # torch and TRL, which `--help` need not wait for
    from .grpo_presets import GrpoPreset

_VLLM_MODES = ("colocate", "server", "off")
_PRECISIONS = ("float32", "bf16_mixed", "bf16")


def configure_grpo(parser: argparse.ArgumentParser) -> None:
    """Adds what only this stage has."""
    parser.add_argument(
        "--policy", metavar="DIR", help="policy to start from, a folder or hub name (default: preset's)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="training rows (see `segzero train prepare`)")
    parser.add_argument("--validation", type=Path, metavar="DIR", help="rows that choose the best checkpoint")
    parser.add_argument(
        "--workers", type=positive_integer, metavar="N", help="processes that render questions (default: the cores)"
    )
    sizes = parser.add_argument_group("smaller machines")
    adapters = sizes.add_mutually_exclusive_group()
    adapters.add_argument("--lora", action="store_true", help="train adapters on frozen bfloat16 weights")
    adapters.add_argument("--qlora", action="store_true", help="train adapters on 4-bit weights: 7B in 24 GB")
    sizes.add_argument("--freeze-vision", action="store_true", help="do not train the vision tower")
    sizes.add_argument("--micro-batch", type=positive_integer, metavar="N", help="samples of one pass on one device")
    sizes.add_argument(
        "--vllm", choices=_VLLM_MODES, help="who samples: vLLM on the training GPUs, served, or not vLLM"
    )
    sizes.add_argument(
        "--precision", choices=_PRECISIONS,
        help="of weights and passes; bf16_mixed: float32 weights, bfloat16 passes; bf16: with adapters only",
    )  # fmt: skip
    changes = parser.add_argument_group("changes to the preset")
    changes.add_argument("--steps", type=positive_integer, metavar="N", help="optimiser steps")
    changes.add_argument("--learning-rate", type=float, metavar="X")
    changes.add_argument("--seed", type=int, metavar="K", help="of questions, their order and samples (0 to 2^32 - 1)")
    changes.add_argument(
        "--runs", type=positive_integer, metavar="N",
        help="runs with this seed and those after it, in DIR/run-1 and on; the mean of their weights is the policy",
    )  # fmt: skip
    changes.add_argument(
        "--base-share", type=float, metavar="X",
        help="share of the weights that training began with in those that it ends with: less is forgotten",
    )  # fmt: skip
    changes.add_argument(
        "--reward-extras", metavar="T,T",
        help="terms beyond the preset's rewards, in the place of its own: brevity[:TOKENS[:MOST]], mask_iou[:BUNDLE], "
        "abstention, closeness, empty_thinking; or none",
    )  # fmt: skip


def execute_grpo(arguments: argparse.Namespace) -> None:
    """Trains.

    Raises:
        SegZeroError: options, rows or a policy that cannot be trained with; nothing has been trained then.
    """
    from .grpo import GrpoRun, rows_of
    from .grpo_preflight import check_before_rows
    from .grpo_runs import train_runs
    from .worker_processes import default_processes

    preset = chosen_preset(arguments)
    policy = arguments.policy or preset.policy
    given = (arguments.data, arguments.validation)
    check_before_rows(preset, out=arguments.out, policy=policy, given=given)
    folder, processes = arguments.out / "rows", arguments.workers or default_processes()
    rows = rows_of(
        preset, folder / "train", "train", preset.num_rows, arguments.data, preset.row_kinds, processes=processes
    )
    eval_rows = rows_of(
        preset, folder / "validation", "validation", preset.num_eval_rows, arguments.validation, processes=processes
    )
    train_runs(GrpoRun(preset=preset, out=arguments.out, policy=policy, rows=rows, eval_rows=eval_rows))


def chosen_preset(arguments: argparse.Namespace) -> GrpoPreset:
    """The preset with the command line's changes.

    Raises:
        SegZeroError: no such preset, or changes that do not fit together.
    """
    from .grpo_presets import PRESETS, Precision, Vllm, with_lora

    if arguments.preset not in PRESETS:
        raise SegZeroError(f"expected --preset to be one of {', '.join(PRESETS)}, got {arguments.preset!r}")
    preset = PRESETS[arguments.preset]()
    if arguments.lora or arguments.qlora:
        preset = with_lora(preset, four_bit=arguments.qlora)
    changes: dict[str, Any] = {
        "micro_batch": arguments.micro_batch,
        "max_steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "num_runs": arguments.runs,
        "base_share": arguments.base_share,
        "freeze_vision": arguments.freeze_vision or None,
        "precision": None if arguments.precision is None else Precision(arguments.precision),
    }
    if arguments.reward_extras is not None:
        from .grpo_rewards import with_extras

        changes["rewards"] = with_extras(preset.rewards, arguments.reward_extras.split(","))
    given = {name: value for name, value in changes.items() if value is not None}
    if arguments.vllm is not None:
        given["vllm"] = None if arguments.vllm == "off" else Vllm(arguments.vllm)
    try:
        return replace(preset, **given)
    except ValueError as error:
        raise SegZeroError(str(error)) from error
