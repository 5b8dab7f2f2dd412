"""The decoder's memory on a device: what `kv_cache.KVCache` does, without the host in between.

What a step of one token needs besides the token (its place, its row of the rotary table, whom it may attend to) is
known for all places beforehand. It lies on the device once, in one table for each; a step copies its entries from
there to where the graph reads them, which the stream does by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from segzero_rt.device import DeviceArray
from segzero_rt.graph import Graph
from segzero_rt.graph_spec import MASKED
from segzero_rt.kv_cache import CacheSizes, Floats
from segzero_rt.positions import MropeTable, PictureSpan
from segzero_rt.resident.arrays import Staging, rows

if TYPE_CHECKING:
    from segzero_rt.graph import Memory


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Tied:
    """A graph with its memory, for runs of so many tokens."""

    new: int
    inputs: Mapping[str, Memory]
    outputs: Mapping[str, DeviceArray]
    enqueue: Callable[[], None]


class ResidentCache(ABC):
    """Keys and values of one sequence. Use `ResidentCache.create`, then `extend` and `step`."""

    def __init__(
        self, staging: Staging, graph: Graph, sizes: CacheSizes, table: MropeTable, picture: PictureSpan | None
    ) -> None:
        device = staging.device
        self.capacity = table.max_length
        self.length = 0
        """Tokens in the cache, as far as work is enqueued."""
        self.embeds = device.empty((1, 1, sizes.hidden_size), "float32")
        """Where `step` reads its token."""
        self.logits = device.empty((1, 1, sizes.vocab_size), "float32")
        """Where `extend` and `step` write those of the last token."""
        self._device, self._staging, self._graph, self._sizes = device, staging, graph, sizes
        cos, sin = table.rows(picture)
        self._rotary = device.to_device(cos), device.to_device(sin)
        # All places, as the graphs' inputs want them: which row gets logits, where the new rows begin.
        self._places = device.to_device(np.arange(self.capacity, dtype=np.int64))
        shape = (1, sizes.num_kv_heads, self.capacity, sizes.head_dim)
        self._dtype = graph.spec.tensor("past_key_0").dtype
        self._buffers = [device.empty(shape, self._dtype) for _ in range(2 * sizes.num_layers)]
        for buffer in self._buffers:
            device.fill(buffer)
        self._total_length = np.zeros(1, np.int32)  # which the `ort` flavour's attention reads on the host
        self._step: _Tied | None = None

    @staticmethod
    def create(
        staging: Staging, graph: Graph, sizes: CacheSizes, table: MropeTable, picture: PictureSpan | None = None
    ) -> ResidentCache:
        """An empty cache for `table.max_length` tokens, of the kind that the decoder's flavour needs.

        Raises:
            BackendError: the device has no room for it.
        """
        kinds: dict[str, type[ResidentCache]] = {
            "ort": InPlaceResident,
            "portable": ReturnedRowsResident,
            "trt11": ScatteredResident,
        }
        return kinds[graph.spec.flavour](staging, graph, sizes, table, picture)

    def truncate(self, length: int) -> None:
        """Forgets all tokens from place `length` on.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"expected a length from 0 to {self.length}, got {length}")
        self.length = length

    def extend(self, embeds: DeviceArray) -> None:
        """Adds tokens, float32 [1, new, hidden] with new >= 1, and writes the logits of the last.

        Raises:
            ValueError: more tokens than there is room for.
        """
        self._check_room(embeds.shape[1])
        self._run(self._tie(embeds))

    def step(self) -> None:
        """Adds the token in `embeds` and writes its logits.

        Raises:
            ValueError: the cache is full.
        """
        self._check_room(1)
        if self._step is None:
            self._step = self._tie(self.embeds, fixed=True)
        self._run(self._step)

    def _tie(self, embeds: DeviceArray, *, fixed: bool = False) -> _Tied:
        new = embeds.shape[1]
        last_row = rows(self._places, new - 1, new).view((1, 1))
        placing, written = self._placing(new), self._written(new)
        inputs = {
            "inputs_embeds": embeds,
            "logits_rows": last_row,
            **placing,
            **dict(zip(self._names("past"), self._buffers, strict=True)),
        }
        outputs = {"logits": self.logits, **written}
        return _Tied(
            new=new, inputs=placing, outputs=written, enqueue=self._graph.enqueuer(inputs, outputs, fixed=fixed)
        )

    def _run(self, tied: _Tied) -> None:
        self._prepare(tied)
        total = self.length + tied.new

        def run() -> None:
            self._total_length[0] = total
            tied.enqueue()

        self._device.call(run)
        self._keep(tied)
        self.length = total

    def _check_room(self, new: int) -> None:
        if self.length + new > self.capacity:
            raise ValueError(f"expected at most {self.capacity} tokens in the cache, got {self.length} and {new} more")

    def _names(self, prefix: str) -> list[str]:
        """Names of the cache's tensors, layer by layer, keys before values."""
        return [f"{prefix}_{part}_{layer}" for layer in range(self._sizes.num_layers) for part in ("key", "value")]

    @abstractmethod
    def _placing(self, new: int) -> dict[str, Memory]:
        """Memory for the inputs that say where `new` tokens stand."""

    def _written(self, new: int) -> dict[str, DeviceArray]:
        """Memory for the cache's outputs: the cache itself where the graph writes in place."""
        return dict(zip(self._names("present"), self._buffers, strict=True))

    @abstractmethod
    def _prepare(self, tied: _Tied) -> None:
        """Enqueues what fills the memory of `_placing` for tokens from `length` on."""

    def _keep(self, tied: _Tied) -> None:  # noqa: B027 - two of three flavours have nothing to do
        """Enqueues what puts new rows where they belong, if the graph has not."""


class InPlaceResident(ResidentCache):
    """For `ort` graphs, which take the whole rotary table and one number."""

    def __init__(
        self, staging: Staging, graph: Graph, sizes: CacheSizes, table: MropeTable, picture: PictureSpan | None
    ) -> None:
        super().__init__(staging, graph, sizes, table, picture)
        self._counts = self._device.to_device(np.arange(self.capacity, dtype=np.int32))

    def _placing(self, new: int) -> dict[str, Memory]:
        return {
            "seqlens_k": self._device.empty((1,), "int32"),
            "total_length": self._total_length,
            "rotary_cos": self._rotary[0],
            "rotary_sin": self._rotary[1],
        }

    def _prepare(self, tied: _Tied) -> None:
        last = self.length + tied.new - 1
        self._device.copy(rows(self._counts, last, last + 1), _on_device(tied.inputs["seqlens_k"]))


class _Biased(ResidentCache):
    """For graphs that take rotary rows of the new tokens, and say with a bias which places each of them sees."""

    def __init__(
        self, staging: Staging, graph: Graph, sizes: CacheSizes, table: MropeTable, picture: PictureSpan | None
    ) -> None:
        super().__init__(staging, graph, sizes, table, picture)
        # Of these, any `capacity` numbers in a row are the bias of one token: zeros for what it sees, the rest masked.
        seen = np.zeros(2 * self.capacity, np.float32)
        seen[self.capacity :] = MASKED
        self._seen = self._device.to_device(seen)

    def _placing(self, new: int) -> dict[str, Memory]:
        half = self._sizes.head_dim // 2
        return {
            "attention_bias": self._staging.to_device(self._bias(new)[None, None]),
            "rotary_cos": self._device.empty((1, new, half), "float32"),
            "rotary_sin": self._device.empty((1, new, half), "float32"),
        }

    def _prepare(self, tied: _Tied) -> None:
        for part, name in zip(self._rotary, ("rotary_cos", "rotary_sin"), strict=True):
            self._device.copy(rows(part, self.length, self.length + tied.new), _on_device(tied.inputs[name]))
        if tied.new == 1:  # of several tokens, it was made for this very run
            begin = self.capacity - self._seen_by(0)
            self._device.copy(rows(self._seen, begin, begin + self.capacity), _on_device(tied.inputs["attention_bias"]))

    @abstractmethod
    def _bias(self, new: int) -> Floats:
        """float32 [new, ...] for tokens from `length` on."""

    @abstractmethod
    def _seen_by(self, row: int) -> int:
        """How many places of the cache one of the new tokens sees."""

    def _cache_bias(self, new: int) -> Floats:
        """float32 [new, capacity]."""
        seen = np.array([[self._seen_by(row)] for row in range(new)])
        return np.where(np.arange(self.capacity) < seen, np.float32(0), np.float32(MASKED))


class ReturnedRowsResident(_Biased):
    """For `portable` graphs: the bias goes on over the new tokens, whose rows come out and are put in place."""

    def _bias(self, new: int) -> Floats:
        among_new = np.triu(np.full((new, new), MASKED, np.float32), k=1)
        return np.concatenate([self._cache_bias(new), among_new], axis=1)

    def _seen_by(self, row: int) -> int:
        return self.length

    def _written(self, new: int) -> dict[str, DeviceArray]:
        shape = (1, self._sizes.num_kv_heads, new, self._sizes.head_dim)
        return {name: self._device.empty(shape, self._dtype) for name in self._names("new")}

    def _keep(self, tied: _Tied) -> None:
        row_bytes = self._sizes.head_dim * np.dtype(self._dtype).itemsize
        for buffer, new_rows in zip(self._buffers, tied.outputs.values(), strict=True):
            self._device.copy_rows(
                new_rows,
                buffer,
                row_bytes=tied.new * row_bytes,
                rows=self._sizes.num_kv_heads,
                pitch_bytes=self.capacity * row_bytes,
                offset_bytes=self.length * row_bytes,
            )


class ScatteredResident(_Biased):
    """For `trt11` graphs, which write their rows from a place on before they attend."""

    def _bias(self, new: int) -> Floats:
        return self._cache_bias(new)

    def _seen_by(self, row: int) -> int:
        return self.length + row + 1

    def _placing(self, new: int) -> dict[str, Memory]:
        return {"write_indices": self._device.empty((1,), "int64"), **super()._placing(new)}

    def _prepare(self, tied: _Tied) -> None:
        super()._prepare(tied)
        self._device.copy(rows(self._places, self.length, self.length + 1), _on_device(tied.inputs["write_indices"]))


def _on_device(memory: Memory) -> DeviceArray:
    assert isinstance(memory, DeviceArray), "all that `_placing` allocates itself"
    return memory
