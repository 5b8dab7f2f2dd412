"""The decoder's memory: keys and values of every token so far, their lengths, and the positions of what comes next.

Decoder flavours differ here and nowhere else. All keep `[batch, kv_heads, capacity, head_dim]` per layer and never
copy it for a token: `ort` and `trt11` graphs write their new rows into the bound buffer, `portable` graphs return the
new rows and the cache puts them in place. Shortening a cache is free, so a picture's prefix serves any number of
questions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.graph import BoundGraph, Buffer, Graph
from segzero_rt.graph_spec import MASKED
from segzero_rt.positions import MropeTable, PictureSpan

Floats = NDArray[np.float32]
Rows = NDArray[np.floating[Any]]
"""Keys or values, in the precision that the graph keeps them in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSizes:
    """Sizes of a decoder, as far as its cache needs them."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    """Numbers per token in `inputs_embeds`, see `graph_spec.embeds_width`."""
    vocab_size: int


class _Step:
    """Buffers for runs of so many tokens, which stay tied to the graph from run to run."""

    def __init__(self, batch: int, new: int, sizes: CacheSizes) -> None:
        self.embeds: Floats = np.zeros((batch, new, sizes.hidden_size), dtype=np.float32)
        self.rows = np.tile(np.arange(new, dtype=np.int64), (batch, 1))
        self.logits: Floats = np.zeros((batch, new, sizes.vocab_size), dtype=np.float32)
        self.bound: BoundGraph | None = None


class KVCache(ABC):
    """Cache of one decoder for `batch` sequences that share one layout of picture and text.

    A row of the batch is one sequence with its own length. Use `KVCache.create`, then `extend` for many tokens and
    `step` for one or a few, always as many. What `step` returns is overwritten by the next step of as many tokens.
    """

    def __init__(
        self, graph: Graph, sizes: CacheSizes, table: MropeTable, picture: PictureSpan | None, batch: int
    ) -> None:
        self.sizes = sizes
        self.picture = picture
        self.capacity = table.max_length
        self.lengths: NDArray[np.int64] = np.zeros(batch, dtype=np.int64)
        """Tokens in the cache, per row."""
        self._graph = graph
        self._dtype = np.dtype(graph.spec.tensor("past_key_0").dtype)
        self._rotary = table.rows(picture)
        self._steps: dict[int, _Step] = {}

    @staticmethod
    def create(
        graph: Graph, sizes: CacheSizes, table: MropeTable, picture: PictureSpan | None = None, *, batch: int = 1
    ) -> KVCache:
        """An empty cache for `table.max_length` tokens, of the kind that the decoder's flavour needs."""
        kinds: dict[str, type[KVCache]] = {"ort": InPlaceCache, "portable": ReturnedRowsCache, "trt11": ScatteredCache}
        return kinds[graph.spec.flavour](graph, sizes, table, picture, batch)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def next_embeds(self) -> Floats:
        """Where a `step` of one token reads it, float32 [batch, 1, hidden]: fill it, then call."""
        return self.step_embeds(1)

    def step_embeds(self, new: int) -> Floats:
        """Where a `step` of `new` tokens reads them, float32 [batch, new, hidden]; always the same memory."""
        if new not in self._steps:
            self._steps[new] = _Step(self.batch, new, self.sizes)
        return self._steps[new].embeds

    @property
    def mrope_delta(self) -> int:
        """Position minus place of every token after the picture."""
        return self.picture.mrope_delta if self.picture else 0

    @property
    def num_bytes(self) -> int:
        """Memory that a full cache takes."""
        sizes = self.sizes
        return (
            2
            * sizes.num_layers
            * self.batch
            * sizes.num_kv_heads
            * self.capacity
            * sizes.head_dim
            * self._dtype.itemsize
        )

    def truncate(self, length: int) -> None:
        """Forgets all tokens from place `length` on, in every row.

        Raises:
            ValueError: a row is shorter than that.
        """
        if length < 0 or length > self.lengths.min():
            raise ValueError(f"expected a length from 0 to {self.lengths.min()}, got {length}")
        self.lengths[:] = length

    def extend(
        self, embeds: Floats, logits_rows: NDArray[np.int64], new_lengths: NDArray[np.int64] | None = None
    ) -> Floats:
        """Adds tokens and returns logits of some of them.

        Args:
            embeds: float32 [batch, new, hidden], new >= 1.
            logits_rows: int64 [batch, rows], which of the new tokens; rows may be 0.
            new_lengths: int64 [batch], how many of the new tokens count, for rows padded at the right; all by default.

        Returns:
            float32 [batch, rows, vocab].

        Raises:
            ValueError: more tokens than the cache has room for.
        """
        new = embeds.shape[1]
        self._check_room(new)
        logits = np.zeros((*logits_rows.shape, self.sizes.vocab_size), dtype=np.float32)
        self._add(np.ascontiguousarray(embeds), np.ascontiguousarray(logits_rows), logits)
        self.lengths += new if new_lengths is None else new_lengths
        return logits

    def step(self, new: int = 1) -> Floats:
        """Adds the tokens in `step_embeds(new)` to each row; returns logits of all, float32 [batch, new, vocab].

        Several tokens at once are for a batch of one.

        Raises:
            ValueError: the cache has no room for them, or the batch has several rows and each several tokens.
        """
        if new > 1 and self.batch > 1:
            raise ValueError(f"expected steps of one token for a batch of {self.batch}, got {new}")
        self._check_room(new)
        self.step_embeds(new)
        step = self._steps[new]
        if step.bound is None or self._stale(step.bound, new):
            step.bound = self._bind(step.embeds, step.rows, step.logits)
        self._prepare(new)
        step.bound.run()
        self._keep(new)
        self.lengths += new
        return step.logits

    def _add(self, embeds: Floats, logits_rows: NDArray[np.int64], logits: Floats) -> None:
        """Runs the graph over new tokens of all rows."""
        bound = self._bind(embeds, logits_rows, logits)
        self._prepare(embeds.shape[1])
        bound.run()
        self._keep(embeds.shape[1])

    def _check_room(self, new: int) -> None:
        longest = int(self.lengths.max())
        if longest + new > self.capacity:
            raise ValueError(f"expected at most {self.capacity} tokens in the cache, got {longest} and {new} more")

    def _cache_shape(self, rows: int) -> tuple[int, int, int, int]:
        return self.batch, self.sizes.num_kv_heads, rows, self.sizes.head_dim

    def _names(self, prefix: str) -> list[str]:
        """Names of the cache's tensors, layer by layer, keys before values."""
        return [f"{prefix}_{part}_{layer}" for layer in range(self.sizes.num_layers) for part in ("key", "value")]

    @abstractmethod
    def _bind(self, embeds: Floats, logits_rows: NDArray[np.int64], logits: Floats) -> BoundGraph:
        """Ties all of the graph's buffers for runs with that many new tokens."""

    @abstractmethod
    def _prepare(self, new: int) -> None:
        """Writes lengths, positions and masks of the coming run into the bound buffers."""

    @abstractmethod
    def _keep(self, new: int) -> None:
        """Puts the new rows where they belong, if the graph has not."""

    def _stale(self, bound: BoundGraph, new: int) -> bool:
        """True when the bound step of so many tokens no longer fits the buffers."""
        return False


class InPlaceCache(KVCache):
    """For `ort` graphs: one buffer per layer, bound as past and present."""

    def __init__(
        self, graph: Graph, sizes: CacheSizes, table: MropeTable, picture: PictureSpan | None, batch: int
    ) -> None:
        super().__init__(graph, sizes, table, picture, batch)
        shape = self._cache_shape(self.capacity)
        self._buffers: list[Buffer] = [graph.empty(shape, self._dtype.name) for _ in range(2 * sizes.num_layers)]
        self._seqlens_k = np.zeros(batch, dtype=np.int32)
        self._total_length = np.zeros(1, dtype=np.int32)
        self._many: BoundGraph | None = None  # of `extend`; only three of its buffers differ from call to call

    def _add(self, embeds: Floats, logits_rows: NDArray[np.int64], logits: Floats) -> None:
        """Row by row where GroupQueryAttention demands it: several tokens that follow others, in a batch."""
        if self.batch == 1 or embeds.shape[1] == 1 or not self.lengths.any():
            if self._many is None:
                self._many = self._bind(embeds, logits_rows, logits)
            else:
                self._many.rebind({"inputs_embeds": embeds, "logits_rows": logits_rows}, {"logits": logits})
            self._prepare(embeds.shape[1])
            self._many.run()
            return
        for row in range(self.batch):
            rows = slice(row, row + 1)
            bound = self._bind(embeds[rows], logits_rows[rows], logits[rows], rows)
            self._prepare(embeds.shape[1])
            self._total_length[0] = self._seqlens_k[row] + 1
            bound.run()

    def _bind(
        self, embeds: Floats, logits_rows: NDArray[np.int64], logits: Floats, rows: slice = slice(None)
    ) -> BoundGraph:
        buffers = self._buffers if self.batch == 1 else [buffer[rows] for buffer in self._buffers]
        inputs = {
            "inputs_embeds": embeds,
            "logits_rows": logits_rows,
            "seqlens_k": self._seqlens_k[rows],
            "total_length": self._total_length,
            "rotary_cos": self._rotary[0],
            "rotary_sin": self._rotary[1],
            **dict(zip(self._names("past"), buffers, strict=True)),
        }
        outputs = {"logits": logits, **dict(zip(self._names("present"), buffers, strict=True))}
        return self._graph.bind(inputs, outputs)

    def _prepare(self, new: int) -> None:
        np.add(self.lengths, new - 1, out=self._seqlens_k, casting="unsafe")
        self._total_length[0] = self.lengths.max() + new

    def _keep(self, new: int) -> None:
        """Nothing to do: the graph wrote them."""


class ReturnedRowsCache(KVCache):
    """For `portable` graphs: they attend over the whole buffer, so it grows with the sequence, in large strides."""

    STRIDE = 256

    def __init__(
        self, graph: Graph, sizes: CacheSizes, table: MropeTable, picture: PictureSpan | None, batch: int
    ) -> None:
        super().__init__(graph, sizes, table, picture, batch)
        self._buffers: list[Rows] = [self._allocate(min(self.STRIDE, self.capacity)) for _ in self._names("past")]
        self._rows: list[Rows] = []
        self._bias = np.zeros(0, dtype=np.float32)
        self._new_rotary = (self._bias, self._bias)
        self._latest: BoundGraph | None = None  # the only binding that the arrays above belong to

    def _allocate(self, rows: int) -> Rows:
        return np.zeros(self._cache_shape(rows), dtype=self._dtype)

    def _bind(self, embeds: Floats, logits_rows: NDArray[np.int64], logits: Floats) -> BoundGraph:
        new = embeds.shape[1]
        self._grow(int(self.lengths.max()) + new)
        rows = self._buffers[0].shape[2]
        self._rows = [self._allocate(new) for _ in self._buffers]
        self._bias = np.zeros((self.batch, 1, new, rows + new), dtype=np.float32)
        half = self.sizes.head_dim // 2
        self._new_rotary = (
            np.zeros((self.batch, new, half), np.float32),
            np.zeros((self.batch, new, half), np.float32),
        )
        inputs = {
            "inputs_embeds": embeds,
            "logits_rows": logits_rows,
            "attention_bias": self._bias,
            "rotary_cos": self._new_rotary[0],
            "rotary_sin": self._new_rotary[1],
            **dict(zip(self._names("past"), self._buffers, strict=True)),
        }
        outputs = {"logits": logits, **dict(zip(self._names("new"), self._rows, strict=True))}
        self._latest = self._graph.bind(inputs, outputs)
        return self._latest

    def _prepare(self, new: int) -> None:
        rows = self._buffers[0].shape[2]
        for row, length in enumerate(self.lengths):
            self._bias[row, 0, :, :length] = 0.0
            self._bias[row, 0, :, length:rows] = MASKED
            self._bias[row, 0, :, rows:] = np.triu(np.full((new, new), MASKED, dtype=np.float32), k=1)
            places = np.minimum(length + np.arange(new), self.capacity - 1)
            self._new_rotary[0][row] = self._rotary[0][places]
            self._new_rotary[1][row] = self._rotary[1][places]

    def _keep(self, new: int) -> None:
        for buffer, rows in zip(self._buffers, self._rows, strict=True):
            for row, length in enumerate(self.lengths):
                buffer[row, :, length : length + new] = rows[row]

    def _stale(self, bound: BoundGraph, new: int) -> bool:
        return bound is not self._latest or int(self.lengths.max()) + new > self._buffers[0].shape[2]

    def _grow(self, needed: int) -> None:
        rows = self._buffers[0].shape[2]
        if needed <= rows:
            return
        wanted = min(self.capacity, -(-max(needed, rows) // self.STRIDE) * self.STRIDE)
        for index, old in enumerate(self._buffers):
            self._buffers[index] = self._allocate(wanted)
            self._buffers[index][:, :, :rows] = old


class ScatteredCache(KVCache):
    """For `trt11` graphs: one buffer per layer of a fixed capacity, bound as past and present; all of it is attended.

    What lies behind a row's tokens is masked, so it may hold anything.
    """

    def __init__(
        self, graph: Graph, sizes: CacheSizes, table: MropeTable, picture: PictureSpan | None, batch: int
    ) -> None:
        super().__init__(graph, sizes, table, picture, batch)
        shape = self._cache_shape(self.capacity)
        self._buffers: list[Buffer] = [graph.empty(shape, self._dtype.name) for _ in range(2 * sizes.num_layers)]
        self._write_indices = np.zeros(batch, dtype=np.int64)
        self._bias = np.zeros(0, dtype=np.float32)
        self._new_rotary = (self._bias, self._bias)
        self._latest: BoundGraph | None = None  # the only binding that the arrays above belong to

    def _bind(self, embeds: Floats, logits_rows: NDArray[np.int64], logits: Floats) -> BoundGraph:
        new, half = embeds.shape[1], self.sizes.head_dim // 2
        self._bias = np.zeros((self.batch, 1, new, self.capacity), dtype=np.float32)
        shape = (self.batch, new, half)
        self._new_rotary = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        inputs = {
            "inputs_embeds": embeds,
            "logits_rows": logits_rows,
            "write_indices": self._write_indices,
            "attention_bias": self._bias,
            "rotary_cos": self._new_rotary[0],
            "rotary_sin": self._new_rotary[1],
            **dict(zip(self._names("past"), self._buffers, strict=True)),
        }
        outputs = {"logits": logits, **dict(zip(self._names("present"), self._buffers, strict=True))}
        self._latest = self._graph.bind(inputs, outputs)
        return self._latest

    def _prepare(self, new: int) -> None:
        self._write_indices[:] = self.lengths
        for row, length in enumerate(self.lengths):
            places = length + np.arange(new)
            hidden = np.arange(self.capacity) > places[:, None]
            self._bias[row, 0] = np.where(hidden, np.float32(MASKED), np.float32(0.0))
            self._new_rotary[0][row] = self._rotary[0][places]
            self._new_rotary[1][row] = self._rotary[1][places]

    def _keep(self, new: int) -> None:
        """Nothing to do: the graph wrote them."""

    def _stale(self, bound: BoundGraph, new: int) -> bool:
        return bound is not self._latest
