"""Replies as tokens on a device to their text there, so that `DeviceParser` can read what was just generated."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from segzero_rt.device import DeviceArray
from segzero_rt.kernels.device_kernels import DeviceKernels

_THREADS = 256


class _Tokens(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "counts")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("most", "vocabulary")),
        *((name, ctypes.c_void_p) for name in ("offsets", "bytes", "text")),
        ("capacity", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("begins", "ends")),
    )


class DeviceSpeller:
    """Spells replies on a device. `text`, `begins` and `ends` are what `DeviceParser.enqueue` takes."""

    def __init__(
        self, kernels: DeviceKernels, tokens: Sequence[bytes | None], *, max_replies: int, max_tokens: int
    ) -> None:
        """Args:
            kernels: of the device that the tokens are on.
            tokens: the bytes of each token of the vocabulary; None for those that say nothing, as special ones.
            max_replies: of one call.
            max_tokens: of one reply.

        Raises:
            ValueError: no tokens, or numbers below 1.
        """
        if not tokens or min(max_replies, max_tokens) < 1:
            raise ValueError(
                f"expected tokens, and replies and their tokens from 1 on, got {len(tokens)}, {max_replies} and "
                f"{max_tokens}"
            )
        device, spelled = kernels.device, [token or b"" for token in tokens]
        self._kernels, self._shape = kernels, (max_replies, max_tokens)
        lengths = [len(token) for token in spelled]
        capacity = max(1, max(lengths)) * max_tokens
        self._offsets = device.to_device(np.cumsum([0, *lengths], dtype=np.int32))
        self._bytes = device.to_device(np.frombuffer(b"".join(spelled), np.uint8))
        self.text = device.empty((max_replies * capacity,), np.uint8)
        """uint8: room for the longest replies."""
        self.begins = device.empty((max_replies,), np.int64)
        """int64 [N], where each reply begins in the text."""
        self.ends = device.empty((max_replies,), np.int64)
        """int64 [N], where it ends."""
        self._job = _Tokens(
            most=max_tokens,
            vocabulary=len(tokens),
            offsets=self._offsets.address,
            bytes=self._bytes.address,
            text=self.text.address,
            capacity=capacity,
            begins=self.begins.address,
            ends=self.ends.address,
        )

    def enqueue(self, token_ids: DeviceArray, counts: DeviceArray) -> None:
        """Enqueues spelling N replies.

        Args:
            token_ids: int32 [N, max_tokens].
            counts: int32 [N], how many tokens of each row are the reply.

        Raises:
            ValueError: arrays that do not fit, or more replies than there is room for.
        """
        count, (most, max_tokens) = len(counts), self._shape
        if count > most:
            raise ValueError(f"expected up to {most} replies, got {count}")
        self._job.ids = token_ids.expect("token_ids", (count, max_tokens), np.int32).address
        self._job.counts = counts.expect("counts", (count,), np.int32).address
        self._job.count = count
        self._kernels.launch("spell_tokens_kernel", (count,), (_THREADS,), self._job)
