"""Rendered questions that arms, seeds and later runs share: each is drawn once, whoever needs it first.

FOLDER/<split>-<seed>[-<kinds>]/   rows, as `tabletop_rows` writes them; grows when more are asked for
FOLDER/scenes-<split>-<seed>/      pictures with everything on the table, as `scene_cache` writes them
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segzero_rt.errors import DatasetError

from ..policy_model import INPUT_SIDE
from ..question_scenes import SPLIT_QUERY_KINDS
from ..rows import TrainingRow, read_rows
from ..scene_cache import SceneCache, build_cache
from ..scenes import SPLITS
from ..tabletop_rows import build_tabletop_rows

DEFAULT_FOLDER = Path("runs/rows")
OOD_SPLITS = tuple(SPLIT_QUERY_KINDS)
"""Splits that hold a combination out; `ood_function` asks by functions that no training question names."""


def split_rows(folder: Path, split: str, *, seed: int, num_rows: int, kinds: tuple[str, ...] = ()) -> list[TrainingRow]:
    """The first `num_rows` questions of a split, rendered where no earlier call has.

    Args:
        kinds: as `tabletop_rows.build_tabletop_rows` takes them: in turn; none is the split's own order.

    Raises:
        DatasetError: no such split or kind, or a folder that holds something else.
    """
    _check_split(split)
    name = f"{split}-{seed}" if not kinds else f"{split}-{seed}-{_short(kinds)}"
    with locked(folder / f"{name}.lock"):
        build_tabletop_rows(folder / name, split=split, seed=seed, num_rows=num_rows, kinds=kinds)
    return read_rows(folder / name, check_pictures=False, limit=num_rows)


def split_scenes(folder: Path, split: str, *, seed: int, num_scenes: int) -> SceneCache:
    """At least `num_scenes` pictures of a split, rendered where no earlier call has.

    Raises:
        DatasetError: no such split.
        SegZeroError: the folder holds something else.
    """
    _check_split(split)
    name = f"scenes-{split}-{seed}"
    with locked(folder / f"{name}.lock"):
        build_cache(folder / name, split=split, seed=seed, count=num_scenes, input_side=INPUT_SIDE)
    return SceneCache(folder / name)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock; one that is killed lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _short(kinds: tuple[str, ...]) -> str:
    """A folder's name for an order of kinds: the kinds where they are few, else what tells orders apart."""
    whole = "-".join(kinds)
    return whole if len(kinds) < 4 else hashlib.sha256(whole.encode()).hexdigest()[:8]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DatasetError(f"expected a split of {', '.join(SPLITS)}, got {split!r:.60}")
