"""`segzero train` and `segzero scenes`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

from segzero_rt.commands.options import positive_integer
from segzero_rt.errors import DatasetError, SegZeroError

from . import prepare_command
from .experiments import command as experiment_command
from .grpo_command import configure_grpo, execute_grpo

Preset = TypeVar("Preset")

_SCENES_DESCRIPTION = """Write tabletop pictures with questions and exact masks as a dataset folder for `segzero eval`:
DIR/images/*.png and DIR/annotations.jsonl, one question per picture.

splits: train, validation, test
        ood_colour    kinds in colours that are drawn in no other split
        ood_relation  kinds with a relation that no other split asks of them
        ood_wording   functions and consequences in words that no other split uses for that kind
        ood_function  uses that no other split asks of a picture

The same split and seed always give the same pictures, and no seed of one split gives a picture of another. Any ten
questions in a row hold one whose answer is "there is no such object" (not in the ood splits); the rest go round the
query kinds."""
_SCENES_EPILOG = """examples:
  segzero scenes --split test --count 200 --seed 1 --out scenes
  segzero scenes --split ood_colour --out scenes_colour && segzero eval scenes_colour"""

_TRAIN_DESCRIPTION = """Train a policy or a segmenter. Every run is seeded, logged, and goes on where it was
stopped when it is called again with the same --out."""
_TRAIN_EPILOG = """examples:
  segzero train pretrain --preset tabletop
  segzero train segmenter --preset tabletop
  segzero train prepare instances_train2017.json --images train2017 --out rows/coco
  segzero train grpo --preset tabletop --policy training/checkpoints/tabletop/base_brief
  segzero train experiment --out runs/experiment

`segzero train STAGE --help` tells what a stage writes."""

_STAGES = {
    "pretrain": (
        "the base policy",
        """Train the base policy on tabletop scenes: grounding, short questions, world knowledge, the answer format.

writes: DIR/scenes/         the rendered training pictures, made first (0.25 MB each)
        DIR/tokenizer.json  learnt from the questions
        DIR/checkpoint.pt   every few minutes; the run goes on from it
        DIR/metrics.jsonl   one line every 10 steps
        DIR/hf/             the policy as transformers and `segzero export` read it

presets: tabletop        the shipped base (hours on two CPU cores)
         tabletop_brief  300 further steps, in which two of five thoughts are brief; with --start-from
         debug           seconds: every code path, nothing learnt""",
        """examples:
  segzero train pretrain --out runs/pretrain
  segzero train pretrain --preset tabletop_brief --start-from training/checkpoints/tabletop/base --out runs/brief_base
  segzero train pretrain --preset debug --scenes 12 --out /tmp/debug""",
    ),
    "segmenter": (
        "the SAM 2 architecture segmenter",
        """Train the segmenter on pictures composed of random shapes and real texture, with boxes and points as prompts.

writes: DIR/cache/         the rendered training pictures, made first
        DIR/checkpoint.pt  every few minutes; the run goes on from it
        DIR/log.jsonl      one line every 20 steps
        DIR/hf/            the averaged weights as transformers and `segzero export` read them

presets: tabletop  the shipped segmenter (hours on two CPU cores)
         tabletop-more  goes on from the weights in OUT/hf, at the final picture size
         smoke     seconds: every code path, nothing learnt""",
        """examples:
  segzero train segmenter --out runs/segmenter
  segzero train segmenter --preset smoke --out /tmp/smoke""",
    ),
    "grpo": (
        "a policy by reinforcement alone",
        """Train a policy with GRPO: it answers each question several times, and what scored above the others' mean
becomes more likely. Rewards look at format, boxes and points; no reasoning is shown to it.

writes: DIR/run.json        the settings; a run goes on only with the same ones
        DIR/rows/           rendered questions, for presets that render their own
        DIR/checkpoint-N/   the newest and the best; the run goes on from the newest
        DIR/metrics.jsonl   one line a step, and one for each evaluation
        DIR/report.html     curves, and replies of the last evaluation with their pictures
        DIR/runs/           TensorBoard
        DIR/hf/             the best policy as transformers and `segzero export` read it
        DIR/run-K/          with several runs: all of this but the questions, of each; hf/ is their weights' mean

presets: tabletop            the shipped policy on two CPU cores, in three runs
         seg_zero_3b, seg_zero_7b, vision_reasoner_7b
                             the papers' numbers, for eight GPUs
         debug               seconds: every code path, nothing learnt

Several GPUs or nodes: accelerate launch --config_file CONFIG -m segzero_rt.training.grpo OPTIONS, where CONFIG is
fsdp.yaml or deepspeed_zero3.yaml of the folder `accelerate` beside this program.""",
        """examples:
  segzero train grpo --policy runs/pretrain/hf --out runs/grpo
  segzero train grpo --preset seg_zero_7b --qlora --data rows/train --validation rows/val
  accelerate launch --config_file training/accelerate/fsdp.yaml -m training.grpo --preset seg_zero_3b \\
      --data rows/train --validation rows/val --out runs/seg_zero_3b""",
    ),
}
"""Stage → (what it trains, description, examples)."""
_OWN_COMMANDS = (prepare_command, experiment_command)
"""Stages with options of their own alone."""


def _configure_scenes(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _SCENES_DESCRIPTION, _SCENES_EPILOG
    parser.add_argument("--split", default="test", metavar="S", help="see above (default: test)")
    parser.add_argument(
        "--count", type=positive_integer, default=100, metavar="N", help="questions, one picture each (default: 100)"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="K", help="any number from 0 (default: 0)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="dataset folder; must be empty or not exist"
    )


def _seed(text: str) -> int:
    """An argparse type."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text[:40]!r}")
    return int(text)


def _execute_scenes(arguments: argparse.Namespace) -> int:
    from .question_scenes import write_samples
    from .scenes import SPLITS

    if arguments.split not in SPLITS:
        raise DatasetError(f"expected --split to be one of {', '.join(SPLITS)}, got {arguments.split!r}")
    write_samples(arguments.out, arguments.split, arguments.seed, arguments.count)
    print(f"{arguments.count} questions of split {arguments.split} in {arguments.out}")
    return 0


def _configure_train(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _TRAIN_DESCRIPTION, _TRAIN_EPILOG
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, (what, description, epilog) in _STAGES.items():
        stage = stages.add_parser(
            name,
            help=what,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        stage.add_argument("--preset", default="tabletop", metavar="P", help="see above (default: tabletop)")
        stage.add_argument(
            "--out", type=Path, default=Path("runs") / name, metavar="DIR", help=f"the run (default: runs/{name})"
        )
        if name == "grpo":
            configure_grpo(stage)
        if name == "pretrain":
            stage.add_argument(
                "--scenes",
                type=positive_integer,
                default=20_000,
                metavar="N",
                help="training pictures, at least 6 (default: 20000); a later run may ask for more",
            )
            stage.add_argument(
                "--start-from",
                type=Path,
                metavar="DIR",
                help="published checkpoint to go on from, such as training/checkpoints/tabletop/base",
            )
    for command in _OWN_COMMANDS:
        stage = stages.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.configure(stage)


def _execute_train(arguments: argparse.Namespace) -> int:
    for command in _OWN_COMMANDS:
        if arguments.stage == command.NAME:
            status: int = command.execute(arguments)
            return status
    if arguments.out.exists() and not arguments.out.is_dir():
        raise SegZeroError(f"expected --out to be a folder, {arguments.out} is a file; choose another")
    if arguments.stage == "segmenter":
        _train_segmenter(arguments)
    elif arguments.stage == "grpo":
        execute_grpo(arguments)
    else:
        _train_policy(arguments)
    print(f"trained: {arguments.out / 'hf'}")
    return 0


def _train_segmenter(arguments: argparse.Namespace) -> None:
    from .segmenter_train import presets, train_segmenter

    train_segmenter(_preset(presets(), arguments.preset), arguments.out)


def _train_policy(arguments: argparse.Namespace) -> None:
    from .policy_model import INPUT_SIDE
    from .pretrain import PRESETS, Pretraining
    from .publish import READOUTS_NAME
    from .scene_cache import SceneCache, build_cache

    make_preset = _preset(PRESETS, arguments.preset)
    if arguments.scenes < 6:  # one in six is sparse, and early training draws those alone
        raise SegZeroError(f"expected --scenes of at least 6, got {arguments.scenes}")
    if arguments.start_from is not None and not (arguments.start_from / READOUTS_NAME).is_file():
        raise SegZeroError(
            f"expected --start-from to be a published policy with {READOUTS_NAME}, got {arguments.start_from}"
        )
    preset = make_preset()
    if preset.goes_on and arguments.start_from is None:
        raise SegZeroError(
            f"expected --start-from with --preset {arguments.preset}, which goes on from a published base; give "
            "training/checkpoints/tabletop/base"
        )
    folder = arguments.out / "scenes"
    build_cache(folder, split="train", seed=0, count=arguments.scenes, input_side=INPUT_SIDE)
    Pretraining(preset, arguments.out, SceneCache(folder), start_from=arguments.start_from).run()


def _preset(presets: Mapping[str, Preset], name: str) -> Preset:
    if name not in presets:
        raise SegZeroError(f"expected --preset to be one of {', '.join(presets)}, got {name!r}")
    return presets[name]


SCENES = SimpleNamespace(
    NAME="scenes",
    HELP="write tabletop scenes as a dataset that `eval` reads",
    configure=_configure_scenes,
    execute=_execute_scenes,
)
TRAIN = SimpleNamespace(
    NAME="train",
    HELP="train the policy or the segmenter (needs segzero-rt[train])",
    configure=_configure_train,
    execute=_execute_train,
)
