"""The cache of rendered scenes: geometry at the policy's size, resuming, growing, reading while it grows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segzero_rt.errors import SegZeroError
from training.scene_cache import NO_OWNER, OWNER_GRID, SceneCache, build_cache, num_objects_of, to_input_objects
from training.scenes import random_scene

SIDE = 56


def build(folder: Path, count: int, **changed: object) -> None:
    wanted = {"split": "train", "seed": 3, "input_side": SIDE, **changed}
    build_cache(folder, count=count, **wanted)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build(folder, 4)
    return folder


def test_boxes_and_points_are_scaled_to_the_policys_picture_and_areas_are_not() -> None:
    scene = random_scene("train", 0, 0, num_objects=(2, 3), size_hw=(121, 163))
    for thing, scaled in zip(scene.objects, to_input_objects(scene, 280), strict=True):
        left, top, right, bottom = thing.box_xyxy
        assert scaled.box_xyxy == pytest.approx(
            (left * 280 / 163, top * 280 / 121, right * 280 / 163, bottom * 280 / 121)
        )
        for (x, y), (sx, sy) in zip(thing.points_xy, scaled.points_xy, strict=True):
            assert (sx, sy) == pytest.approx(((x + 0.5) * 280 / 163, (y + 0.5) * 280 / 121))  # centres of pixels
        assert scaled.area_px == thing.area_px
        assert (scaled.kind, scaled.colour, scaled.material) == (thing.kind, thing.colour, thing.material)


def test_a_cached_scene_is_the_rendered_one(whole: Path) -> None:
    cache = SceneCache(whole)
    scene = random_scene("train", 3, 1, num_objects=num_objects_of(1))
    picture = Image.fromarray(scene.image_rgb).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    assert np.array_equal(cache.pixels[1], np.asarray(picture))
    assert [thing.kind for thing in cache.objects[1]] == [thing.kind for thing in scene.objects]
    for number, (thing, wanted) in enumerate(zip(cache.objects[1], to_input_objects(scene, SIDE), strict=True)):
        assert thing.box_xyxy == pytest.approx(wanted.box_xyxy, abs=0.006)
        ys, xs = np.nonzero(cache.owners[1] == number)
        left, top, right, bottom = (value * OWNER_GRID / SIDE for value in wanted.box_xyxy)
        assert xs.min() >= left - 1 and xs.max() <= right and ys.min() >= top - 1 and ys.max() <= bottom
    assert (cache.owners[1] == NO_OWNER).any()


@pytest.mark.parametrize("damage", ["none", "half a line", "a line without its end"])
def test_a_stopped_build_goes_on_to_the_same_files(whole: Path, tmp_path: Path, damage: str) -> None:
    build(tmp_path, 2)
    lines = tmp_path / "scenes.jsonl"
    if damage == "half a line":
        lines.write_bytes(lines.read_bytes() + b'[{"kind": "mu')
    if damage == "a line without its end":
        lines.write_bytes(lines.read_bytes()[:-1])
    build(tmp_path, 4)
    assert files(tmp_path) == files(whole)


def test_asking_for_fewer_changes_nothing(whole: Path) -> None:
    before = files(whole)
    build(whole, 2)
    assert files(whole) == before


@pytest.mark.parametrize("changed", [{"split": "test"}, {"seed": 4}, {"input_side": 28}], ids=str)
def test_a_folder_of_something_else_is_refused_and_left_alone(whole: Path, changed: dict[str, object]) -> None:
    before = files(whole)
    with pytest.raises(SegZeroError, match=f"scenes of {next(iter(changed))} {next(iter(changed.values()))}, it has"):
        build(whole, 5, **changed)
    assert files(whole) == before


def test_a_reader_follows_a_cache_that_is_being_written(whole: Path, tmp_path: Path) -> None:
    everything = (whole / "scenes.jsonl").read_bytes().splitlines(keepends=True)
    build(tmp_path, 4)
    lines = tmp_path / "scenes.jsonl"
    lines.write_bytes(everything[0] + everything[1][:20])
    cache = SceneCache(tmp_path)
    assert len(cache.objects) == 1  # a line that is being written does not count yet
    lines.write_bytes(b"".join(everything[:3]))
    assert cache.refresh() == 3
    assert [thing.kind for thing in cache.objects[2]] == [thing.kind for thing in SceneCache(whole).objects[2]]


def test_a_reader_follows_a_cache_that_outgrows_what_it_mapped(whole: Path, tmp_path: Path) -> None:
    build(tmp_path, 2)
    cache = SceneCache(tmp_path)
    build(tmp_path, 4)
    assert cache.refresh() == 4
    assert np.array_equal(cache.pixels[3], SceneCache(whole).pixels[3])
    assert np.array_equal(cache.owners[3], SceneCache(whole).owners[3])


def test_one_scene_in_six_is_sparse() -> None:
    assert [num_objects_of(index) for index in (0, 6, 12)] == [(1, 3)] * 3
    assert {num_objects_of(index) for index in (1, 2, 3, 4, 5, 7)} == {(4, 9)}
