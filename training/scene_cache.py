"""Training scenes, rendered once: what the policy sees of each, and all that questions about it need.

A cache folder holds `header.json` (what is rendered, and room for how many), `pixels.u8` (pictures at the policy's
input size), `owners.u8` (which object owns each spot of a coarse grid, 255 = table) and `scenes.jsonl` (one line a
scene, written last: its line count says how many scenes are complete). Rendering can stop at any time and goes on where
it was; training may read while it grows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from segzero_rt.errors import SegZeroError

from .scenes import Scene, random_scene

OWNER_GRID = 40
NO_OWNER = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedObject:
    """As `SceneObject`, with geometry in pixels of the policy's input."""

    kind: str
    colour: str
    material: str
    box_xyxy: tuple[float, float, float, float]
    points_xy: tuple[tuple[float, float], tuple[float, float]]
    area_px: float
    """Visible area in source pixels; compared, never scaled."""

    @property
    def centre_xy(self) -> tuple[float, float]:
        left, top, right, bottom = self.box_xyxy
        return (left + right) / 2, (top + bottom) / 2


def to_input_objects(scene: Scene, input_side: int) -> list[CachedObject]:
    """The scene's objects in pixels of a square policy input of `input_side`."""
    sx, sy = input_side / scene.size_hw[1], input_side / scene.size_hw[0]
    return [
        CachedObject(
            kind=thing.kind, colour=thing.colour, material=thing.material, area_px=thing.area_px,
            box_xyxy=(thing.box_xyxy[0] * sx, thing.box_xyxy[1] * sy, thing.box_xyxy[2] * sx, thing.box_xyxy[3] * sy),
            points_xy=(
                ((thing.points_xy[0][0] + 0.5) * sx, (thing.points_xy[0][1] + 0.5) * sy),
                ((thing.points_xy[1][0] + 0.5) * sx, (thing.points_xy[1][1] + 0.5) * sy),
            ),
        )
        for thing in scene.objects
    ]  # fmt: skip


def _owners(scene: Scene) -> NDArray[np.uint8]:
    grid = np.full((OWNER_GRID, OWNER_GRID), NO_OWNER, np.uint8)
    for number, thing in enumerate(scene.objects):
        share = cv2.resize(thing.mask.astype(np.float32), (OWNER_GRID, OWNER_GRID), interpolation=cv2.INTER_AREA)
        grid[share >= 0.5] = number
    return grid


class SceneCache:
    """Reads a cache folder; see the module for its layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.input_side: int = _read_header(folder)["input_side"]
        self.objects: list[list[CachedObject]] = []
        self._read_bytes = 0
        self._map()
        self.refresh()

    def _map(self) -> None:
        capacity: int = _read_header(self.folder)["count"]
        shape = (capacity, self.input_side, self.input_side, 3)
        self.pixels = np.memmap(self.folder / "pixels.u8", np.uint8, "r", shape=shape)
        self.owners = np.memmap(self.folder / "owners.u8", np.uint8, "r", shape=(capacity, OWNER_GRID, OWNER_GRID))

    def refresh(self) -> int:
        """Take in scenes rendered since; returns how many there are."""
        with (self.folder / "scenes.jsonl").open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read_bytes += len(line)
                self.objects.append([_object_from_json(entry) for entry in json.loads(line)])
        if len(self.objects) > len(self.pixels):  # somebody asked for more than when the files were mapped
            self._map()
        return len(self.objects)


def _read_header(folder: Path) -> dict[str, Any]:
    header: dict[str, Any] = json.loads((folder / "header.json").read_text())
    return header


def _object_from_json(entry: dict[str, Any]) -> CachedObject:
    first, second = entry.pop("points_xy")
    return CachedObject(box_xyxy=tuple(entry.pop("box_xyxy")), points_xy=(tuple(first), tuple(second)), **entry)


def _object_to_json(thing: CachedObject) -> dict[str, object]:
    return {
        "kind": thing.kind, "colour": thing.colour, "material": thing.material, "area_px": thing.area_px,
        "box_xyxy": [round(v, 2) for v in thing.box_xyxy],
        "points_xy": [[round(x, 2), round(y, 2)] for x, y in thing.points_xy],
    }  # fmt: skip


def num_objects_of(index: int) -> tuple[int, int]:
    """The curriculum's mixture: one scene in six is sparse, so that early training finds easy pictures."""
    return (1, 3) if index % 6 == 0 else (4, 9)


def build_cache(folder: Path, *, split: str, seed: int, count: int, input_side: int) -> None:
    """Render scenes `0 … count - 1` of a split, resuming where an earlier run stopped.

    Asking for more than an earlier run did makes the folder grow; asking for fewer leaves it as it is.

    Raises:
        SegZeroError: the folder holds scenes of another split, seed or size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = {"split": split, "seed": seed, "count": count, "input_side": input_side}
    if (folder / "header.json").exists():
        count = max(count, _grown_from(_read_header(folder), header, folder))
    done = _complete_lines(folder / "scenes.jsonl")
    pixels = _grown(folder / "pixels.u8", (count, input_side, input_side, 3))
    owners = _grown(folder / "owners.u8", (count, OWNER_GRID, OWNER_GRID))
    # Last, since a reader maps as much as the header says.
    temporary = folder / "header.json.part"
    temporary.write_text(json.dumps({**header, "count": count}))
    temporary.replace(folder / "header.json")
    with (folder / "scenes.jsonl").open("a") as file:
        for index, scene in _scenes(split, seed, range(done, count)):
            picture = Image.fromarray(scene.image_rgb).resize((input_side, input_side), Image.Resampling.BILINEAR)
            pixels[index] = np.asarray(picture)
            owners[index] = _owners(scene)
            file.write(json.dumps([_object_to_json(thing) for thing in to_input_objects(scene, input_side)]) + "\n")
            file.flush()


def _grown_from(earlier: dict[str, Any], wanted: dict[str, Any], folder: Path) -> int:
    """How many scenes the folder has room for already."""
    for key in ("split", "seed", "input_side"):
        if earlier[key] != wanted[key]:
            raise SegZeroError(
                f"expected {folder} to hold scenes of {key} {wanted[key]}, it has {earlier[key]}; choose another folder"
            )
    room: int = earlier["count"]
    return room


def _complete_lines(path: Path) -> int:
    """How many lines are whole; what was left of one that was being written when the run was stopped is cut off."""
    if not path.exists():
        return 0
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with path.open("rb+") as file:
            file.truncate(whole)
    return text.count(b"\n")


def _scenes(split: str, seed: int, indices: range) -> Iterator[tuple[int, Scene]]:
    for index in tqdm(indices, desc=f"scenes ({split})", unit="scene", mininterval=5):
        yield index, random_scene(split, seed, index, num_objects=num_objects_of(index))


def _grown(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A writable map of at least `shape`; what an earlier, smaller run wrote stays."""
    with path.open("ab") as file:
        file.truncate(max(path.stat().st_size, int(np.prod(shape))))
    return np.memmap(path, np.uint8, "r+", shape=shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render training scenes to a cache that the trainings read.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--input-side", type=int, default=280)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    build_cache(
        arguments.folder,
        split=arguments.split,
        seed=arguments.seed,
        count=arguments.count,
        input_side=arguments.input_side,
    )
