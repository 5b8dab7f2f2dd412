"""`segzero train` and `segzero scenes`."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

SPLIT_HELP = "train, validation, test, or one that holds out combinations: ood_colour, ood_relation, ood_wording, ood_function"


def _configure_scenes(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write tabletop pictures with questions and exact masks as a dataset folder for `segzero eval`."
    parser.epilog = "example: segzero scenes --split test --count 200 --seed 1 --out scenes"
    parser.add_argument("--split", default="test", help=SPLIT_HELP)
    parser.add_argument("--count", type=int, default=100, metavar="N", help="how many questions, one picture each (default 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="any number from 0; never reproduces a training picture")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="dataset folder; must not hold anything yet")


def _execute_scenes(arguments: argparse.Namespace) -> int:
    from segzero_rt.errors import DatasetError

    from .question_scenes import write_samples
    from .scenes import SPLITS

    if arguments.split not in SPLITS or arguments.count < 1 or arguments.seed < 0:
        raise DatasetError(
            f"expected --split among {', '.join(SPLITS)}, --count of at least 1 and --seed of at least 0, "
            f"got {arguments.split!r}, {arguments.count} and {arguments.seed}"
        )
    write_samples(arguments.out, arguments.split, arguments.seed, arguments.count)
    print(f"{arguments.count} questions of split {arguments.split} in {arguments.out}")
    return 0


def _configure_train(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train from scratch; every run is seeded, logged and goes on where it was stopped."
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, what in (("pretrain", "the base policy"), ("segmenter", "the SAM 2 architecture segmenter")):
        stage = stages.add_parser(name, help=what, description=f"Train {what}.")
        stage.add_argument("--preset", default="tabletop", help="a complete configuration: tabletop (default) or debug")
        stage.add_argument("--out", type=Path, default=Path("runs") / name, metavar="DIR", help="checkpoints, logs and hf/")
        if name == "pretrain":
            stage.add_argument("--scenes", type=int, default=20_000, metavar="N", help="training pictures to render once")


def _execute_train(arguments: argparse.Namespace) -> int:
    from segzero_rt.errors import SegZeroError

    if arguments.stage == "segmenter":
        from .segmenter_train import PRESETS as SEGMENTER_PRESETS
        from .segmenter_train import train_segmenter

        preset = _preset(SEGMENTER_PRESETS, arguments.preset)
        train_segmenter(preset(), arguments.out, resume=True)
        return 0
    from .policy_model import INPUT_SIDE
    from .pretrain import PRESETS, Pretraining
    from .scene_cache import SceneCache, build_cache

    preset = _preset(PRESETS, arguments.preset)
    if arguments.scenes < 6:
        raise SegZeroError(f"expected at least 6 training pictures, got --scenes {arguments.scenes}")
    folder = arguments.out / "scenes"
    build_cache(folder, split="train", seed=0, count=arguments.scenes, input_side=INPUT_SIDE)
    Pretraining(preset(), arguments.out, SceneCache(folder)).run()
    return 0


def _preset(presets, name: str):  # type: ignore[no-untyped-def]
    from segzero_rt.errors import SegZeroError

    if name not in presets:
        raise SegZeroError(f"expected a preset among {', '.join(presets)}, got {name!r}")
    return presets[name]


SCENES = SimpleNamespace(
    NAME="scenes", HELP="write tabletop scenes as a dataset that `eval` reads", configure=_configure_scenes, execute=_execute_scenes
)
TRAIN = SimpleNamespace(
    NAME="train", HELP="train the policy or the segmenter (needs segzero-rt[train])", configure=_configure_train, execute=_execute_train
)
