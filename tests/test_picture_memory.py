"""A frozen vision tower sees each picture once, and what is remembered trains like what is not."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="needs segzero-rt[train]")

import torch

from training.picture_memory import PictureMemory, TowerMemories, is_frozen

GRID = (1, 2, 2)


class Tower:
    """A picture's only token is the mean of its patches; counts the pictures that it has seen."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, pixel_values: Any, image_grid_thw: Any) -> tuple[Any, ...]:
        self.seen.append(len(image_grid_thw))
        parts = torch.split(pixel_values, image_grid_thw.prod(1).tolist())
        return tuple(part.mean(0, keepdim=True) for part in parts)


def pictures(*values: float) -> tuple[Any, Any]:
    """One picture of 2 x 2 equal patches for each value."""
    return torch.cat([torch.full((4, 3), value) for value in values]), torch.tensor([GRID] * len(values))


@pytest.mark.parametrize(
    ("capacity", "asked", "seen"),
    [
        pytest.param(8, [(1.0, 2.0), (1.0, 2.0)], [2], id="the same again"),
        pytest.param(8, [(1.0, 1.0, 2.0)], [2], id="twice at once"),
        pytest.param(8, [(1.0, 2.0), (3.0, 2.0)], [2, 1], id="one new"),
        pytest.param(1, [(1.0,), (2.0,), (1.0,)], [1, 1, 1], id="no room for two"),
        pytest.param(2, [(1.0, 2.0), (1.0,), (3.0,), (1.0,)], [2, 1], id="the one not seen longest goes"),
        pytest.param(2, [(1.0, 2.0, 3.0)], [3], id="more at once than there is room for"),
    ],
)
def test_the_tower_sees_what_is_new(capacity: int, asked: list[tuple[float, ...]], seen: list[int]) -> None:
    memory, tower = PictureMemory(capacity), Tower()
    for values in asked:
        tokens = memory.look(tower, *pictures(*values))
        assert [float(token[0, 0]) for token in tokens] == list(values)
    assert tower.seen == seen
    assert len(memory) <= capacity


def test_equal_patches_in_another_grid_are_another_picture() -> None:
    memory, tower = PictureMemory(), Tower()
    patches, grid = pictures(1.0)
    memory.look(tower, patches, grid)
    memory.look(tower, patches, torch.tensor([[1, 1, 4]]))
    assert tower.seen == [1, 1]


def test_what_was_seen_in_inference_mode_can_be_trained_on() -> None:
    memory, tower = PictureMemory(), Tower()
    with torch.inference_mode():
        memory.look(tower, *pictures(1.0))
    weight = torch.ones(3, requires_grad=True)
    (token,) = memory.look(tower, *pictures(1.0))
    (token * weight).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [1.0, 1.0, 1.0]
    assert tower.seen == [1]


def test_there_must_be_room_for_one() -> None:
    with pytest.raises(ValueError, match="at least one picture, got 0"):
        PictureMemory(0)


def test_a_tower_is_frozen_when_no_weight_of_it_is_trained() -> None:
    tower = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).requires_grad_(False)
    assert is_frozen(tower)
    tower[1].bias.requires_grad_(True)
    assert not is_frozen(tower)


def _tower(value: float, side: int = 2, scale: float = 1.0) -> Any:
    tower = torch.nn.Linear(side, side)
    tower.register_buffer("scale", torch.tensor(scale))
    torch.nn.init.constant_(tower.weight, value)
    torch.nn.init.zeros_(tower.bias)
    return tower


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        pytest.param(_tower(1.0), True, id="the same weights"),
        pytest.param(_tower(1.0 + 2**-23), False, id="one bit in a weight"),
        pytest.param(_tower(1.0, scale=2.0), False, id="a buffer without axes"),
        pytest.param(_tower(1.0, side=3), False, id="another size"),
        pytest.param(_tower(1.0).double(), False, id="another precision"),
    ],
)
def test_towers_share_a_memory_when_their_weights_are_the_same(other: Any, shared: bool) -> None:
    memories = TowerMemories(4)
    assert (memories.of(_tower(1.0)) is memories.of(other)) == shared
