"""Choosing tokens on the device: Qwen2.5-VL's vocabulary, greedily and with top-p, beside PyTorch's argmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from segzero_rt.kernels.sample_token import sample_token

from .errors import GpuCheckError
from .kernels_parser import open_kernels
from .replay import median_run
from .roofline import read_peaks
from .stages import Context, Figures
from .timing import Clock, seconds_each

_VOCABULARY = {"full": 151_936, "tiny": 500}
_BATCHES = (1, 8)
_CHOICES: dict[str, dict[str, float]] = {"greedy": {}, "top-p": {"temperature": 0.7, "top_p": 0.9}}
_SETS = 32
"""Of logits, taken in turns."""


def measure(context: Context) -> Figures:
    """Microseconds a step, and share of the bandwidth of reading the logits once.

    Raises:
        GpuCheckError: the device chooses other tokens than the reference.
    """
    kernels = open_kernels(context)
    vocabulary, peaks = _VOCABULARY[context.size], read_peaks(context)
    runs, rounds = (2, 2) if context.tiny else (_SETS, 20)
    figures: Figures = {"vocabulary": vocabulary, "kernels": kernels.detail}
    for batch in _BATCHES:
        logits = np.random.default_rng(batch).normal(0, 3, (runs, batch, vocabulary)).astype(np.float32)
        for name, choice in _CHOICES.items():
            options: dict[str, Any] = {**choice, "kernels": kernels}
            _check(logits[0], options)
            if kernels.device is None:
                each = logits[0]
                call = lambda each=each, options=options: sample_token(each, **options)  # noqa: E731 - one call, timed
                seconds = seconds_each(Clock(context.device), call, rounds)
            else:
                seconds = _on_device(kernels.device, logits, choice, rounds)
            key = f"{name}, {batch} replies" if batch > 1 else f"{name}, one reply"
            figures[key] = peaks.reached(seconds, 4.0 * batch * vocabulary)
        figures[f"torch argmax, {batch} replies"] = _pytorch_ms(context, logits[0], rounds)
    return figures


def _on_device(kernels: Any, logits: Any, choice: dict[str, float], rounds: int) -> float:
    from segzero_rt.kernels.sample_token_device import DeviceSampler

    device, (runs, batch, vocabulary) = kernels.device, logits.shape
    sampler = DeviceSampler(kernels, batch, vocabulary, **choice)
    each = [device.to_device(one) for one in logits]
    return median_run(device, lambda index: sampler.step(each[index]), runs=runs, rounds=rounds)


def _check(logits: Any, options: dict[str, Any]) -> None:
    from segzero_rt.kernels.backend import resolve_kernels

    ours = sample_token(logits, **options)
    expected = sample_token(logits, **{**options, "kernels": resolve_kernels("reference")})
    if not np.array_equal(ours.token_ids, expected.token_ids):
        raise GpuCheckError(f"expected the reference's tokens {expected.token_ids}, got {ours.token_ids}")


def _pytorch_ms(context: Context, logits: Any, rounds: int) -> float:
    import torch

    held = torch.from_numpy(logits).to(context.device)
    return 1e3 * seconds_each(Clock(context.device), lambda: held.argmax(-1), rounds)
