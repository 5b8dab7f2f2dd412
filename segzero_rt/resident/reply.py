"""The decode loop of a device: token t + 1 is enqueued while token t is still being chosen.

A step embeds the token that the step before it chose, runs the decoder and chooses the next, all on the device. The
host learns each token one step late: with a step more in the stream it looks at what the step before has said. So when
a reply ends, one step too many was computed, and its row of the cache is cut off again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from segzero_rt.device import Event
from segzero_rt.graph import Graph
from segzero_rt.kernels.sample_token_device import DeviceSampler
from segzero_rt.resident.arrays import Staging, rows
from segzero_rt.resident.cache import ResidentCache

LEAD = 1
"""Steps in the stream beyond the last token that the host knows."""
PAUSE_S = 50e-6
"""Between two looks at a mark."""


class ResidentReply:
    """Replies of up to `max_new_tokens`, one after another, over one cache. One token a run, greedily."""

    def __init__(
        self,
        staging: Staging,
        embedding: Graph,
        cache: ResidentCache,
        *,
        max_new_tokens: int,
        end_token_ids: Sequence[int],
        lead: int = LEAD,
    ) -> None:
        """
        Raises:
            ValueError: no token, or a lead of less than one step.
        """
        if max_new_tokens < 1 or lead < 1:
            raise ValueError(f"expected at least one token and one step ahead, got {max_new_tokens} and {lead}")
        self._device, self._staging, self._cache = staging.device, staging, cache
        self._ends = frozenset(end_token_ids)
        self._lead = lead
        self.token_ids = self._device.empty((max_new_tokens,), np.int32)
        """int32 [max_new_tokens]: the latest reply on the device; the one that ended it, and later ones, follow."""
        self._told = self._device.pinned((max_new_tokens,), np.int32)
        # 64 bits, as the embedding takes it; a token is its lower half, which comes first where CUDA runs.
        self._input = self._device.empty((1, 1), np.int64)
        self._device.fill(self._input)
        self._embed = embedding.enqueuer({"input_ids": self._input}, {"inputs_embeds": cache.embeds}, fixed=True)
        self.finished = False
        """The policy ended the reply by itself."""
        self.steps = 0
        """Runs of the decoder, the prompt's and those beyond the end not counted."""
        self.num_tokens = 0
        """Of the latest reply, as far as they were asked for."""
        self.pauses = 0
        """How often the host stood still so as not to run further ahead. Work lay in the stream each time, so that the
        device noticed nothing: these are no waits."""
        self.waits = 0
        """1 where the reply went to the end of its budget: for its last token the host waits with nothing behind it."""

    def tokens(self, sampler: DeviceSampler, budget: int, state: int = 0) -> Iterator[int]:
        """Up to `budget` tokens after what the cache holds, each as soon as it is known.

        The token that ends the reply is not among them. Whoever stops asking leaves at most `lead` further steps.

        Args:
            sampler: of one reply.
            state: where the reply's beginning has brought the sampler's grammar.
        """
        self.finished, self.steps, self.num_tokens, self.pauses, self.waits = False, 0, 0, 0, 0
        started = self._staging.hold(np.array([state], np.int32)), self._staging.hold(np.array([budget], np.int32))
        sampler.start(states=started[0], steps_left=started[1])
        self._staging.release()
        marks: list[Event] = []
        length = self._cache.length
        for place in range(budget + self._lead):
            if place < budget:
                if place:
                    self._advance(place)
                marks.append(self._choose(place, sampler))
            known = place - self._lead
            if known < 0:
                continue
            self._pause_until(marks[known])
            self.waits = int(known == budget - 1)
            token_id = int(self._told[known])
            self.steps = known
            if token_id in self._ends or token_id < 0:
                self.finished = token_id in self._ends
                self._cache.truncate(length + known)
                return
            self.num_tokens += 1
            yield token_id

    def _advance(self, place: int) -> None:
        """Enqueues the run of the decoder over the token before this place."""
        self._device.copy(rows(self.token_ids, place - 1, place), self._input)
        self._device.call(self._embed)
        self._cache.step()

    def _choose(self, place: int, sampler: DeviceSampler) -> Event:
        """Enqueues the choice of the token at this place from the latest logits, and its way to the host."""
        sampler.step(self._cache.logits.view((1, self._cache.logits.shape[2])))
        said = rows(self.token_ids, place, place + 1)
        self._device.copy(sampler.token_ids, said)
        self._device.download(said, self._told[place : place + 1])
        return self._device.record()

    def _pause_until(self, mark: Event) -> None:
        if self._device.reached(mark):
            return
        self.pauses += 1
        while not self._device.reached(mark):
            time.sleep(PAUSE_S)
