"""A scene cache of a dozen pictures and the tokenizer that is learnt from it, for tests of the training."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from training.policy_model import INPUT_SIDE
from training.scene_cache import SceneCache, build_cache
from training.tokenizer import train_tokenizer

NUM_SCENES = 12


def make_cache(folder: Path, count: int = NUM_SCENES) -> SceneCache:
    build_cache(folder, split="train", seed=0, count=count, input_side=INPUT_SIDE)
    return SceneCache(folder)


def make_tokenizer(cache: SceneCache, folder: Path) -> Tokenizer:
    return train_tokenizer(cache, folder / "tokenizer.json")
