"""sample_token on a device: a sampler whose replies stay there from token to token."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from segzero_rt.device import Device, DeviceArray
from segzero_rt.kernels.device_kernels import DeviceKernels, blocks
from segzero_rt.kernels.sample_token import NO_LIMIT, GrammarTable, SampledTokens, check_choice, sharpness
from segzero_rt.kernels.sample_token_host import GrammarStruct, SampleJob

_WARP, _MOST_THREADS = 32, 1024
_TOKENS_OF_A_THREAD = 8
"""At least, so that a small vocabulary does not wait for many threads."""


class DeviceGrammar:
    """A `GrammarTable` on a device."""

    def __init__(self, device: Device, table: GrammarTable) -> None:
        self.table = table
        arrays = {name: device.to_device(getattr(table, name)) for name in _TABLES}
        self._arrays = arrays
        self.struct = GrammarStruct(
            **{name: array.address for name, array in arrays.items()},
            words=table.allowed.shape[1],
            ended=table.ended,
            most_steps=table.most_steps,
        )


_TABLES = ("next_state", "allowed", "steps_to_end", "token_offsets", "token_bytes", "end_tokens")


class DeviceSampler:
    """Chooses the next token of each of B replies by `sample_token`'s contract, on the device.

    Everything that goes on from token to token lies in the arrays here, which kernels and graphs may read and write:
    nothing has to come to the host between two tokens.
    """

    def __init__(
        self,
        kernels: DeviceKernels,
        batch_size: int,
        vocab_size: int,
        *,
        grammar: DeviceGrammar | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        """Args:
            kernels: of the device that the logits are on.
            batch_size: B.
            vocab_size: V, that of the grammar where there is one.
            grammar: what may be said; None for anything.
            temperature: from 0 (greedily) on.
            top_p: above 0, up to 1.

        Raises:
            ValueError: numbers out of their range, or a grammar of another vocabulary.
        """
        check_choice(vocab_size, None if grammar is None else grammar.table, temperature, top_p)
        device = kernels.device
        self._kernels, self._grammar, self._vocab_size = kernels, grammar, vocab_size
        self.token_ids = device.empty((batch_size,), np.int32)
        """int32 [B]: the last tokens; -1 where nothing could be said."""
        self.states = device.empty((batch_size,), np.int32)
        """int32 [B]: where each reply stands in the grammar."""
        self.steps_left = device.empty((batch_size,), np.int32)
        """int32 [B]: tokens that each reply may still have; each step takes one."""
        self.places = device.empty((batch_size,), np.int32)
        """int32 [B]: how many tokens each reply has; each step adds one."""
        self.seeds = device.empty((batch_size,), np.uint64)
        """uint64 [B]."""
        self._threads = min(_MOST_THREADS, _WARP * blocks(vocab_size, _WARP * _TOKENS_OF_A_THREAD))
        scale = sharpness(temperature)
        self._weights = device.empty((batch_size, vocab_size), np.uint64) if scale > 0 else None
        self._job = SampleJob(
            count=batch_size,
            vocabulary=vocab_size,
            scale=scale,
            top_p=top_p,
            grammar=GrammarStruct() if grammar is None else grammar.struct,
            advance=1,
            token_ids=self.token_ids.address,
            states=self.states.address,
            next_states=self.states.address,
            steps_left=self.steps_left.address,
            seeds=self.seeds.address,
            places=self.places.address,
        )
        self.start()

    def start(
        self,
        *,
        states: NDArray[np.int32] | None = None,
        steps_left: NDArray[np.int32] | None = None,
        seeds: NDArray[np.uint64] | None = None,
        places: NDArray[np.int32] | None = None,
    ) -> None:
        """Sets the replies, as `sample_token`'s arguments of these names; by default to their beginning.

        Page-locked arrays are copied without a wait.
        """
        device = self._kernels.device
        for array, values in ((self.states, states), (self.places, places), (self.seeds, seeds)):
            if values is None:
                device.fill(array)
            else:
                device.upload(values, array)
        if steps_left is None:
            device.fill(self.steps_left, NO_LIMIT_BYTE)
        else:
            device.upload(steps_left, self.steps_left)

    def step(self, logits: DeviceArray) -> None:
        """Enqueues the choice of the next tokens.

        Args:
            logits: float32 [B, V].

        Raises:
            ValueError: another shape or dtype.
        """
        logits.expect("logits", (len(self.token_ids), self._vocab_size), np.float32)
        self._job.logits = logits.address
        self._kernels.launch("sample_token_kernel", (len(logits),), (self._threads,), self._job, self._weights)


NO_LIMIT_BYTE = 0x40
"""Four of it make a number that is no less than `NO_LIMIT`: memory is filled byte by byte."""
assert int.from_bytes(bytes([NO_LIMIT_BYTE] * 4), "little") >= NO_LIMIT


@functools.lru_cache(maxsize=4)
def device_grammar(device: Device, table: GrammarTable) -> DeviceGrammar:
    """The table on the device; the last ones asked for are kept."""
    return DeviceGrammar(device, table)


def sample_with_device(
    kernels: DeviceKernels,
    logits: NDArray[np.float32],
    grammar: GrammarTable | None,
    states: NDArray[np.int32],
    steps_left: NDArray[np.int32],
    temperature: float,
    top_p: float,
    seeds: NDArray[np.uint64],
    places: NDArray[np.int32],
) -> SampledTokens:
    """See `sample_token.sample_token`, which has checked the arguments: copies there and back."""
    device = kernels.device
    if not len(logits):
        return SampledTokens(token_ids=np.empty(0, np.int32), states=states)
    with device.current():
        sampler = DeviceSampler(
            kernels,
            *logits.shape,
            grammar=None if grammar is None else device_grammar(device, grammar),
            temperature=temperature,
            top_p=top_p,
        )
        sampler.start(states=states, steps_left=steps_left, seeds=seeds, places=places)
        sampler.step(device.to_device(logits))
        token_ids, after = device.to_host(sampler.token_ids, sampler.states)
    return SampledTokens(token_ids=token_ids, states=after)
