"""The operations of `segzero_rt.kernels` as a stream takes them: each call enqueues work on arrays of the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from segzero_rt.device import Device, DeviceArray
from segzero_rt.kernels.preprocess import InputTensor, PixelFormat, YuvColours
from segzero_rt.kernels.sample_token import GrammarTable


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResidentGrammar:
    """A `GrammarTable` on a device."""

    table: GrammarTable
    arrays: dict[str, DeviceArray]
    """The table's fields by name."""

    @classmethod
    def upload(cls, table: GrammarTable, device: Device) -> ResidentGrammar:
        names = ("next_state", "allowed", "steps_to_end", "token_offsets", "token_bytes", "end_tokens")
        return cls(table=table, arrays={name: device.to_device(getattr(table, name)) for name in names})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResidentFrame:
    """A picture in a device's memory, as `preprocess.Frame` is one in the host's."""

    pixel_format: PixelFormat
    size_hw: tuple[int, int]
    planes: tuple[DeviceArray, ...]
    """uint8, with whatever lies between their rows."""
    pitches_bytes: tuple[int, ...]
    """From row to row of each plane."""
    colours: YuvColours = "bt601"
    """Of NV12."""


class ResidentKernels(Protocol):
    """What the pipeline asks of a device; contracts are those of the operations."""

    def preprocess(
        self, frame: ResidentFrame, tensor: InputTensor, out: DeviceArray, *, order: NDArray[np.integer] | None = None
    ) -> None:
        """Writes what a model takes, float32 in `tensor.shape`; `order` as in `preprocess.preprocess`."""
        ...

    def sample_token(
        self,
        logits: DeviceArray,
        *,
        grammar: ResidentGrammar | None,
        state: DeviceArray,
        steps_left: DeviceArray,
        token_id: DeviceArray,
        next_state: DeviceArray,
    ) -> None:
        """The likeliest token of one reply.

        Args:
            logits: float32 [1, V].
            grammar: what may be said; None for anything.
            state: int32 [1], where the reply stands in the grammar.
            steps_left: int32 [1], as in `sample_token.sample_token`.
            token_id: int32 [1], written.
            next_state: int32 [1], written; other memory than `state`.
        """
        ...
