"""Upsampling: its arithmetic against exact fractions, its bits against PyTorch's, its short cut against itself."""

from __future__ import annotations

from fractions import Fraction

import cv2
import numpy as np
import pytest

from segzero_rt.upsampling import fused, upsample_logits, upsampled_above


def _floats(count: int, seed: int) -> np.ndarray:
    """Finite float32 of all magnitudes, small ones and zeros among them."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, count, np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(0.1))
    return np.where(bits % 3 == 0, np.float32(0.3) * (bits % 97), values).astype(np.float32)


def _rounded(value: Fraction) -> np.float32:
    """The float32 next to a fraction, ties to even, found without floating-point arithmetic on the value."""
    guess = np.float32(float(value)) if abs(value) < Fraction(2) ** 128 else np.float32(np.inf)
    if not np.isfinite(guess):
        return np.float32(np.copysign(np.inf, float(np.sign(value.numerator))))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    finite = [candidate for candidate in candidates if np.isfinite(candidate)]
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.uint32)) & 1))


def test_fused_is_rounded_once() -> None:
    one, other, added = _floats(4000, 1), _floats(4000, 2), _floats(4000, 3)
    # Rounding twice errs where sums nearly cancel, and a hair beside the middle of two float32.
    with np.errstate(over="ignore", under="ignore"):
        product = one[:1000] * other[:1000]
    added[:1000] = np.where(np.isfinite(product), -product, np.float32(0))
    one[1000:2000], other[1000:2000] = np.float32(1 + 2**-12), np.float32(1 + 2**-12)
    added[1000:2000] = _floats(1000, 4) * np.float32(1e-6)
    with np.errstate(over="ignore", invalid="ignore"):
        given = fused(one, other, added)
    for a, b, c, result in zip(one, other, added, given, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + (Fraction(float(c)) if np.isfinite(c) else 0)
        if np.isfinite(c) and abs(exact) < Fraction(2) ** 127:
            assert result == _rounded(exact), (a, b, c)


UPSAMPLED = [(1, 1), (1, 9), (17, 3), (64, 64), (37, 21), (480, 641), (1081, 1)]


@pytest.mark.parametrize("size_hw", UPSAMPLED, ids=str)
@pytest.mark.parametrize("side", [1, 8, 64])
def test_upsampling_is_torch_interpolate(size_hw: tuple[int, int], side: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")
    logits = np.random.default_rng(1).normal(0, 3, (2, side, side)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size=size_hw, mode="bilinear")[0].numpy()
    # Small pictures and few channels take another of PyTorch's ways, which rounds in another order.
    np.testing.assert_allclose(upsample_logits(logits, size_hw), theirs, atol=2e-5)


@pytest.mark.parametrize(("coarse", "size_hw"), [((64, 64), (480, 641)), ((256, 256), (1080, 1920))], ids=str)
def test_upsampling_has_the_bits_of_torch(coarse: tuple[int, int], size_hw: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        pytest.skip(f"PyTorch fuses multiply-adds with AVX2 and AVX-512, this machine has {capability}")
    logits = np.random.default_rng(1).normal(0, 3, (1, *coarse)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size=size_hw, mode="bilinear")[0].numpy()
    np.testing.assert_array_equal(upsample_logits(logits, size_hw), theirs)


def test_upsampling_by_hand() -> None:
    # Centres at halves: from 2 to 4 samples the weights are 1, 3/4, 1/4, 0.
    row = upsample_logits(np.array([[[0.0, 4.0]]], np.float32), (1, 4))
    np.testing.assert_array_equal(row, [[[0.0, 1.0, 3.0, 4.0]]])
    assert upsample_logits(np.zeros((0, 8, 8), np.float32), (5, 6)).shape == (0, 5, 6)


@pytest.mark.parametrize("size_hw", [(1, 1), (33, 47), (131, 257), (5, 0)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.7, -3.0])
@pytest.mark.parametrize("kind", ["smooth", "whole numbers", "huge", "zeros", "infinite", "not a number"])
def test_the_short_cut_decides_alike(kind: str, threshold: float, size_hw: tuple[int, int]) -> None:
    logits = np.random.default_rng(6).normal(0, 2, (16, 21)).astype(np.float32)
    if kind == "whole numbers":
        logits = np.round(logits)
    elif kind == "huge":
        logits *= np.float32(1e37)
    elif kind == "zeros":
        logits[:] = 0
    elif kind == "infinite":
        logits[3:5, 4:9] = [[np.inf], [-np.inf]]
    elif kind == "not a number":
        logits[2, 2:5] = np.nan
    with np.errstate(invalid="ignore"):
        expected = upsample_logits(logits[None], size_hw)[0] > np.float32(threshold)
    np.testing.assert_array_equal(upsampled_above(logits, size_hw, threshold), expected)


def test_opencv_is_as_near_as_the_short_cut_needs() -> None:
    worst = 0.0
    for seed, size_hw in enumerate([(480, 641), (131, 257), (33, 31)]):
        logits = np.random.default_rng(seed).normal(0, 3, (1, 80, 80)).astype(np.float32)
        fast = cv2.resize(logits[0], size_hw[::-1], interpolation=cv2.INTER_LINEAR)
        worst = max(worst, float(np.abs(fast - upsample_logits(logits, size_hw)[0]).max() / np.abs(logits).max()))
    assert worst < 2e-4, "the short cut allows 1e-3"
