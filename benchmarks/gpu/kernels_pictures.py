"""Masks and frames on the device: time and share of the bandwidth, of bytes read once and written once.

Three masks are what a question has; they are over before a device has got going, and fit its cache. So a batch of them
stands beside: that shows what the kernels do with the memory. PyTorch's interpolation, which does the first part of the
work, stands beside both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.kernels import FRAME_HW, INPUT_HW, MASK_HW, outlines
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.postprocess_masks import postprocess_masks
from segzero_rt.kernels.preprocess import Frame, InputTensor, preprocess

from .errors import GpuCheckError
from .kernels_parser import open_kernels
from .replay import median_run
from .roofline import Peaks, read_peaks
from .stages import Context, Figures
from .timing import Clock, seconds_each

if TYPE_CHECKING:
    from segzero_rt.kernels.device_kernels import DeviceKernels

_FRAMES_HW = {"full": FRAME_HW, "tiny": (45, 61)}
_BATCHES = {"full": (3, 64), "tiny": (2,)}
_KINDS: dict[str, dict[str, Any]] = {
    "plain": {"run_lengths": False},
    "cleaned": {"run_lengths": False, "max_hole_area": 100, "max_sprinkle_area": 100},
    "cleaned, with run lengths": {"max_hole_area": 100, "max_sprinkle_area": 100},
}
_SEGMENTER_HW = (1024, 1024)
_FIELDS = ("masks", "boxes_xyxy", "areas", "stability")


def masks(context: Context) -> Figures:
    """Milliseconds and share of the bandwidth for each number of masks and kind of work.

    Raises:
        GpuCheckError: the device makes other masks than the host.
    """
    kernels, peaks, frame_hw = open_kernels(context), read_peaks(context), _FRAMES_HW[context.size]
    figures: Figures = {"kernels": kernels.detail, "frame_hw": frame_hw, "mask_hw": MASK_HW}
    for count in _BATCHES[context.size]:
        logits = np.concatenate([outlines(min(3, count))] * -(-count // 3))[:count]
        num_bytes = logits.nbytes + count * frame_hw[0] * frame_hw[1]
        for name, options in _KINDS.items():
            _check_masks(kernels, logits[:2], frame_hw, options)
            seconds = _mask_seconds(context, kernels, logits, frame_hw, options)
            figures[f"{count} masks, {name}"] = peaks.reached(seconds, num_bytes)
        figures[f"{count} masks, torch interpolation alone"] = _interpolated(
            context, peaks, logits, frame_hw, num_bytes
        )
    return figures


def frames(context: Context) -> Figures:
    """The same for frames to the policy's patches and the segmenter's planes.

    Raises:
        GpuCheckError: the device makes other numbers than the host.
    """
    kernels, peaks, frame_hw = open_kernels(context), read_peaks(context), _FRAMES_HW[context.size]
    figures: Figures = {"kernels": kernels.detail, "frame_hw": frame_hw}
    pixels = np.random.default_rng(0).integers(0, 256, (*frame_hw, 3), dtype=np.uint8)
    for name, tensor in _tensors(context).items():
        ours, expected = (
            preprocess(Frame.rgb(pixels), tensor, kernels=one) for one in (kernels, resolve_kernels("host"))
        )
        if not np.array_equal(ours, expected):
            raise GpuCheckError(
                f"expected the host's numbers for {name}, {kernels} differs by {_worst(ours, expected)}"
            )
        seconds = _frame_seconds(context, kernels, pixels, tensor)
        figures[name] = peaks.reached(seconds, pixels.nbytes + ours.nbytes)
    return figures


def _check_masks(
    kernels: Kernels, logits: NDArray[np.float32], frame_hw: tuple[int, int], options: dict[str, Any]
) -> None:
    ours, expected = (
        postprocess_masks(logits, frame_hw, **options, kernels=one) for one in (kernels, resolve_kernels("host"))
    )
    same = all(np.array_equal(getattr(ours, name), getattr(expected, name)) for name in _FIELDS)
    if not same or ours.rle_counts != expected.rle_counts:
        raise GpuCheckError(f"expected the host's masks, {kernels} makes others with {options}")


def _mask_seconds(
    context: Context, kernels: Kernels, logits: NDArray[np.float32], frame_hw: tuple[int, int], options: dict[str, Any]
) -> float:
    if kernels.device is None:
        call = lambda: postprocess_masks(logits, frame_hw, **options, kernels=kernels)  # noqa: E731 - one call, timed
        return seconds_each(Clock(context.device), call, 2 if context.tiny else 20)
    from segzero_rt.kernels.postprocess_masks_device import DeviceMaskMaker

    maker = DeviceMaskMaker(kernels.device, (len(logits), *MASK_HW), frame_hw, **options)
    held = kernels.device.device.to_device(logits)
    return _median(context, kernels.device, lambda: maker.enqueue(held))


def _frame_seconds(context: Context, kernels: Kernels, pixels: NDArray[np.uint8], tensor: InputTensor) -> float:
    if kernels.device is None:
        call = lambda: preprocess(Frame.rgb(pixels), tensor, kernels=kernels)  # noqa: E731 - one call, timed
        return seconds_each(Clock(context.device), call, 2 if context.tiny else 20)
    from segzero_rt.kernels.preprocess_device import DeviceFrame, DevicePreprocessor

    device = kernels.device.device
    plane = device.to_device(pixels)
    frame = DeviceFrame(
        pixel_format="rgb", size_hw=pixels.shape[:2], planes=(plane,), pitches_bytes=(3 * pixels.shape[1],)
    )
    out, maker = device.empty(tensor.shape, np.float32), DevicePreprocessor(kernels.device, tensor)
    return _median(context, kernels.device, lambda: maker.enqueue(frame, out))


def _median(context: Context, kernels: DeviceKernels, enqueue: Callable[[], None]) -> float:
    runs, rounds = (2, 1) if context.tiny else (20, 20)
    return median_run(kernels.device, lambda _: enqueue(), runs=runs, rounds=rounds)


def _tensors(context: Context) -> dict[str, InputTensor]:
    normal: dict[str, Any] = {"image_mean": (0.48, 0.46, 0.41), "image_std": (0.27, 0.26, 0.28)}
    policy_hw, planes_hw = ((56, 28), (16, 24)) if context.tiny else (INPUT_HW, _SEGMENTER_HW)
    return {
        "policy patches": InputTensor(size_hw=policy_hw, patch_size=14, merge_size=2, **normal),
        "segmenter planes": InputTensor(size_hw=planes_hw, **normal),
    }


def _interpolated(
    context: Context, peaks: Peaks, logits: NDArray[np.float32], frame_hw: tuple[int, int], num_bytes: int
) -> Figures:
    import torch

    held = torch.from_numpy(logits)[None].to(context.device)
    call = lambda: torch.nn.functional.interpolate(held, frame_hw, mode="bilinear") > 0  # noqa: E731 - one call, timed
    return peaks.reached(seconds_each(Clock(context.device), call, 2 if context.tiny else 20), num_bytes)


def _worst(ours: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(ours - expected).max())
