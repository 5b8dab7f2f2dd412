"""sample_token on the host's build: tells the library where the tables are."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from segzero_rt.kernels.sample_token import GrammarTable, SampledTokens

_NO_MEMORY = 2


class GrammarStruct(ctypes.Structure):
    """`Grammar` of sampling.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("next_state", "allowed", "steps_to_end")),
        *((name, ctypes.c_void_p) for name in ("token_offsets", "token_bytes", "end_tokens")),
        *((name, ctypes.c_int32) for name in ("words", "ended", "most_steps")),
    )


class SampleJob(ctypes.Structure):
    """`SampleJob` of sample_token.cu; a device's kernel takes it too."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("vocabulary", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("top_p", ctypes.c_double),
        ("grammar", GrammarStruct),
        *((name, ctypes.c_void_p) for name in ("states", "steps_left", "seeds", "places")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "next_states")),
        ("advance", ctypes.c_int32),
    )


def sample_on_host(
    library: ctypes.CDLL,
    logits: NDArray[np.float32],
    grammar: GrammarTable | None,
    states: NDArray[np.int32],
    steps_left: NDArray[np.int32],
    scale: float,
    top_p: float,
    seeds: NDArray[np.uint64],
    places: NDArray[np.int32],
) -> SampledTokens:
    """See `sample_token.sample_token`, which has checked the arguments; `scale` is log2(e) / temperature."""
    logits = np.ascontiguousarray(logits)
    token_ids, next_states = np.empty(len(logits), np.int32), np.empty(len(logits), np.int32)
    tables = GrammarStruct() if grammar is None else _grammar(grammar)
    job = SampleJob(
        logits=logits.ctypes.data,
        count=len(logits),
        vocabulary=logits.shape[1],
        scale=scale,
        top_p=top_p,
        grammar=tables,
        states=states.ctypes.data,
        steps_left=steps_left.ctypes.data,
        seeds=seeds.ctypes.data,
        places=places.ctypes.data,
        token_ids=token_ids.ctypes.data,
        next_states=next_states.ctypes.data,
    )
    if library.segzero_sample_token(ctypes.byref(job)) == _NO_MEMORY:
        raise MemoryError(f"no memory to sample from {logits.shape[1]} tokens")
    return SampledTokens(token_ids=token_ids, states=next_states)


def _grammar(grammar: GrammarTable) -> GrammarStruct:
    return GrammarStruct(
        next_state=grammar.next_state.ctypes.data,
        allowed=grammar.allowed.ctypes.data,
        steps_to_end=grammar.steps_to_end.ctypes.data,
        token_offsets=grammar.token_offsets.ctypes.data,
        token_bytes=grammar.token_bytes.ctypes.data,
        end_tokens=grammar.end_tokens.ctypes.data,
        words=grammar.allowed.shape[1],
        ended=grammar.ended,
        most_steps=grammar.most_steps,
    )
