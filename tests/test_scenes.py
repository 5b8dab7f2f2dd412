"""Tabletop pictures: the same seed gives the same picture, splits share none, and every mask is exact."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from training.object_kinds import COLOURS, KINDS
from training.scenes import HELD_OUT_LOOKS, SPLITS, Scene, allowed_looks, random_company, random_scene, random_state

SIZES_HW = {
    "usual": (360, 480),
    "odd": (121, 163),
    "upright": (211, 97),
    "wide": (64, 301),
    "one object's size": (33, 31),
}


@lru_cache(maxsize=16)
def scene_of(split: str, seed: int, index: int, size_hw: tuple[int, int] = (120, 160)) -> Scene:
    return random_scene(split, seed, index, size_hw=size_hw, num_objects=(2, 5))


def test_a_picture_is_a_function_of_split_seed_and_index() -> None:
    once = random_scene("test", 3, 4, size_hw=(120, 160))
    again = random_scene("test", 3, 4, size_hw=(120, 160))
    assert np.array_equal(once.image_rgb, again.image_rgb)
    assert [thing.box_xyxy for thing in once.objects] == [thing.box_xyxy for thing in again.objects]
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(once.objects, again.objects, strict=True))


def test_no_split_seed_or_index_gives_the_picture_of_another() -> None:
    asked = [(split, seed, index) for split in SPLITS for seed, index in ((0, 0), (0, 1), (1, 0))]
    pictures = {scene_of(*key).image_rgb.tobytes() for key in asked}
    assert len(pictures) == len(asked)


def test_random_states_of_splits_never_meet_even_for_huge_seeds() -> None:
    seeds = (0, 1, 2**32, 2**32 + 1, 2**64 + 5)
    draws = {
        (split, seed, index): random_state(split, seed, index).integers(2**63)
        for split in SPLITS
        for seed in seeds
        for index in (0, 1)
    }
    assert len(set(draws.values())) == len(draws)


@pytest.mark.parametrize("size_hw", SIZES_HW.values(), ids=SIZES_HW)
def test_masks_boxes_and_points_are_of_the_visible_pixels(size_hw: tuple[int, int]) -> None:
    scene = random_scene("train", 7, 1, size_hw=size_hw, num_objects=(1, 2) if min(size_hw) < 40 else (2, 5))
    height, width = size_hw
    assert scene.image_rgb.shape == (height, width, 3) and scene.image_rgb.dtype == np.uint8
    owners = np.zeros(size_hw, int)
    for thing in scene.objects:
        assert thing.mask.shape == size_hw and thing.mask.dtype == np.bool_
        owners += thing.mask
        rows, columns = np.nonzero(thing.mask)
        assert thing.box_xyxy == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert (
            0 <= thing.box_xyxy[0] < thing.box_xyxy[2] <= width and 0 <= thing.box_xyxy[1] < thing.box_xyxy[3] <= height
        )
        assert thing.area_px == thing.mask.sum() >= 60
        assert all(thing.mask[y, x] for x, y in thing.points_xy)
    assert owners.max() == 1, "a pixel belongs to at most one object"


def test_the_picture_shows_the_objects() -> None:
    """An object's pixels differ from the table around it; a mask that is shifted would not."""
    scene = scene_of("test", 1, 0, (360, 480))
    empty = ~np.any([thing.mask for thing in scene.objects], axis=0)
    table = scene.image_rgb[empty].mean(0)
    for thing in scene.objects:
        assert np.abs(scene.image_rgb[thing.mask].mean(0) - table).max() > 3


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_looks_are_drawn_in_their_split_alone(split: str) -> None:
    rng = np.random.default_rng(0)
    company = [thing for _ in range(40) for thing in random_company(rng, split, 9)]
    company += [(thing.kind, thing.colour, thing.material) for thing in scene_of(split, 0, 0).objects]
    seen = {(kind, colour) for kind, colour, _ in company} & HELD_OUT_LOOKS
    assert bool(seen) == (split == "ood_colour")
    for kind in KINDS:
        offered = {(kind, colour) for colour, _ in allowed_looks(kind, split)} & HELD_OUT_LOOKS
        assert not offered or split == "ood_colour"


def test_every_kind_has_looks_left_in_every_split_and_held_out_looks_exist() -> None:
    assert len(KINDS) >= 16
    for kind, spec in KINDS.items():
        assert all(allowed_looks(kind, split) for split in SPLITS)
        assert {colour for colour, _ in spec.looks} <= set(COLOURS)
    assert {(kind, colour) for kind in KINDS for colour, _ in KINDS[kind].looks} >= HELD_OUT_LOOKS


@pytest.mark.parametrize(
    ("split", "seed", "index", "message"),
    [
        ("tset", 0, 0, "expected a split among train, validation, test"),  # a slip of the pen
        ("", 0, 0, "got ''"),  # empty
        ("test", -1, 0, "got -1 and 0"),  # negative seed
        ("test", 0, -5, "got 0 and -5"),  # negative index
    ],
)
def test_bad_requests_name_what_came(split: str, seed: int, index: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_scene(split, seed, index)


def test_objects_that_cannot_fit_are_an_error_not_an_endless_loop() -> None:
    with pytest.raises(RuntimeError, match="no scene of"):
        random_scene("test", 0, 0, size_hw=(5, 7), num_objects=(1, 1))
