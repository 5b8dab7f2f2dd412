"""Visual tokens that a frozen vision tower need not make again.

A step of GRPO looks at every picture several times: to sample, to score, and once more for the reference policy. While
nothing trains the tower, all of them see the same tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

Look = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Patches of some pictures and their grids to the visual tokens of each."""

REMEMBERED = 64
"""Pictures: those of a few steps."""


class PictureMemory:
    """The visual tokens of the pictures seen last, by their patches.

    For one tower whose weights do not change; tokens carry no gradient.
    """

    def __init__(self, capacity: int = REMEMBERED) -> None:
        if capacity < 1:
            raise ValueError(f"expected room for at least one picture, got {capacity}")
        self._capacity = capacity
        self._tokens: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    def look(self, tower: Look, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, ...]:
        """Visual tokens of each picture, [its tokens, C]; `tower` sees those that are new, each once.

        Args:
            pixel_values: float32 [patches of all pictures, patch_dim].
            image_grid_thw: int64 [pictures, 3].
        """
        parts = torch.split(pixel_values, image_grid_thw.prod(1).tolist())
        keys = [_key(part, grid) for part, grid in zip(parts, image_grid_thw, strict=True)]
        new = [number for number, key in enumerate(keys) if key not in self._tokens and key not in keys[:number]]
        found = {key: self._tokens[key] for key in keys if key in self._tokens}
        if new:
            # Not in inference mode, which sampling is in: a later pass with gradients reads the same tensors.
            with torch.inference_mode(False), torch.no_grad():
                tokens = tower(torch.cat([parts[number] for number in new]).clone(), image_grid_thw[new].clone())
            found |= {keys[number]: one for number, one in zip(new, tokens, strict=True)}
        for key in keys:
            self._tokens[key] = found[key]
            self._tokens.move_to_end(key)
        while len(self._tokens) > self._capacity:
            self._tokens.popitem(last=False)
        return tuple(found[key] for key in keys)


class TowerMemories:
    """A memory for every vision tower, by its weights: policies with the same frozen tower share what it saw.

    Args:
        capacity: pictures that each memory keeps.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._memories: dict[bytes, PictureMemory] = {}

    def of(self, tower: nn.Module) -> PictureMemory:
        """The memory of every tower that has these weights; they have to stay as they are."""
        digest = hashlib.blake2b(digest_size=16)
        for name, weight in tower.state_dict().items():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return self._memories.setdefault(digest.digest(), PictureMemory(self._capacity))


def is_frozen(tower: nn.Module) -> bool:
    """Whether nothing in the tower is trained."""
    return not any(weight.requires_grad for weight in tower.parameters())


def _key(patches: Tensor, grid: Tensor) -> bytes:
    digest = hashlib.blake2b(patches.detach().cpu().contiguous().numpy().tobytes(), digest_size=16)
    digest.update(grid.cpu().numpy().tobytes())
    return digest.digest()
