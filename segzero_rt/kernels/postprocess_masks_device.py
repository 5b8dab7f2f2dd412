"""postprocess_masks on a device: logits that lie there become masks there."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.device import DeviceArray
from segzero_rt.kernels.device_kernels import THREADS, DeviceKernels, blocks
from segzero_rt.kernels.postprocess_masks import STABILITY_DELTA, CleanOrder, ProcessedMasks, check_request
from segzero_rt.kernels.postprocess_masks_host import mask_job
from segzero_rt.mask import MASK_THRESHOLD, encode_rle_reference

MAX_PIXELS = (1 << 31) - 1
"""Of a mask: its components are numbered in 32 bits."""
_WARP, _ROWS = 32, 8
"""Of a block of pixels."""
_ROWS_OF_THREAD, _STRETCH_ROWS = 4, 64
"""As `kRowsOfThread` and `kStretchRows` of masks_device.cuh."""
_MAX_RUNS, _MAX_CHARACTERS = 1 << 16, 1 << 16
"""Of a mask's run lengths; a real outline takes a few thousand. What has more is encoded by the host."""


class _Components(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("labels", "parents", "areas")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("height", "width")),
    )


class _RunJob(ctypes.Structure):
    _fields_ = (
        ("masks", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("height", "width", "stretches")),
        *((name, ctypes.c_void_p) for name in ("places", "starts")),
        ("max_runs", ctypes.c_int64),
        ("text", ctypes.c_void_p),
        ("max_characters", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
    )


class DeviceMaskMaker:
    """Makes N masks of logits on a device by `postprocess_masks`' contract. One call at a time."""

    def __init__(
        self,
        kernels: DeviceKernels,
        shape: tuple[int, int, int],
        size_hw: tuple[int, int],
        *,
        threshold: float = MASK_THRESHOLD,
        max_hole_area: int = 0,
        max_sprinkle_area: int = 0,
        order: CleanOrder = "before_upsampling",
        stability_delta: float = STABILITY_DELTA,
        run_lengths: bool = True,
        max_runs: int = _MAX_RUNS,
        max_characters: int = _MAX_CHARACTERS,
    ) -> None:
        """Args:
            kernels: of the device that the logits are on.
            shape: of the logits: N, height and width.
            size_hw: height and width of the source picture.
            threshold, max_hole_area, max_sprinkle_area, order, stability_delta, run_lengths: as `postprocess_masks`.
            max_runs: changes down the columns of a mask that there is room for.
            max_characters: of a mask's run lengths.

        Raises:
            ValueError: as `postprocess_masks`, or more than `MAX_PIXELS` pixels.
        """
        check_request(shape, size_hw, max_hole_area, max_sprinkle_area, order)
        count, coarse, fine = shape[0], shape[1] * shape[2], size_hw[0] * size_hw[1]
        if max(coarse, fine) > MAX_PIXELS:
            raise ValueError(f"expected masks of up to {MAX_PIXELS} pixels, got {size_hw} from {shape[1:]}")
        device = kernels.device
        self._kernels, self._shape, self._size_hw = kernels, shape, size_hw
        self.masks = device.empty((count, *size_hw), np.uint8)
        """uint8 [N, H, W]: 1 inside, 0 outside."""
        self.boxes_xyxy = device.empty((count, 4), np.int32)
        """int32 [N, 4]."""
        self.areas = device.empty((count,), np.int64)
        """int64 [N] pixels."""
        self.stability = device.empty((count,), np.float32)
        """float32 [N]."""
        limits = (max_hole_area, max_sprinkle_area)
        self._job = mask_job(shape, size_hw, threshold, limits, order, stability_delta)
        self._job.masks, self._job.boxes_xyxy = self.masks.address, self.boxes_xyxy.address
        self._job.areas, self._job.stability = self.areas.address, self.stability.address
        self._sides = device.empty((count, 2), np.uint32)
        cleans = max(limits) > 0 and count > 0
        self._early = cleans and order == "before_upsampling"
        self._late = cleans and order == "after_upsampling"
        pixels = count * (coarse if self._early else fine if self._late else 0)
        self._parents, self._areas = device.empty((pixels,), np.int32), device.empty((pixels,), np.uint32)
        self._labels = device.empty(shape, np.uint8) if self._early else None
        self._cleaned = device.empty(shape, np.float32) if self._early else None
        self._job.clean_after = self._late
        self.rle_text: DeviceArray | None = None
        """uint8 [N, max_characters]: compressed COCO run lengths; None where they were not asked for."""
        self.rle_lengths: DeviceArray | None = None
        """int64 [N]: characters of each; -1 where they found no room."""
        self._runs = self._run_job(max_runs, max_characters) if run_lengths else None

    def enqueue(self, logits: DeviceArray) -> None:
        """Enqueues making the masks.

        Args:
            logits: float32 in the shape that was named.

        Raises:
            ValueError: another shape or dtype.
        """
        job, count = self._job, self._shape[0]
        job.logits = logits.expect("logits", self._shape, np.float32).address
        coarse = (blocks(self._shape[1] * self._shape[2], THREADS), count)
        each = (blocks(count, _WARP),)
        launch = self._kernels.launch
        launch("begin_masks_kernel", each, (_WARP,), job, self._sides)
        launch("label_logits_kernel", coarse, (THREADS,), job, self._sides, self._labels)
        if self._labels is not None and self._cleaned is not None:
            picture = self._components(self._labels, *self._shape[1:])
            launch("clean_logits_kernel", coarse, (THREADS,), picture, job, self._cleaned)
            job.logits = self._cleaned.address
        height, width = self._size_hw
        grid = (blocks(width, _WARP), blocks(height, _ROWS * _ROWS_OF_THREAD), count)
        launch("upsample_masks_kernel", grid, (_WARP, _ROWS), job)
        if self._late:
            picture = self._components(self.masks, height, width)
            grid = (blocks(width, _WARP), blocks(height, _ROWS), count)
            launch("clean_masks_kernel", grid, (_WARP, _ROWS), picture, job)
        launch("finish_masks_kernel", each, (_WARP,), job, self._sides)
        if self._runs is not None:
            columns = (blocks(width, THREADS), self._runs.stretches, count)
            launch("count_changes_kernel", columns, (THREADS,), self._runs)
            launch("place_changes_kernel", (count,), (THREADS,), self._runs)
            launch("write_changes_kernel", columns, (THREADS,), self._runs)
            launch("write_runs_kernel", (count,), (THREADS,), self._runs)

    def _components(self, labels: DeviceArray, height: int, width: int) -> _Components:
        """Enqueues finding the components of pictures of labels."""
        picture = _Components(
            labels=labels.address,
            parents=self._parents.address,
            areas=self._areas.address,
            count=len(labels),
            height=height,
            width=width,
        )
        grid = (blocks(height * width, THREADS), len(labels))
        for name in ("begin_components_kernel", "join_components_kernel", "measure_components_kernel"):
            self._kernels.launch(name, grid, (THREADS,), picture)
        return picture

    def _run_job(self, max_runs: int, max_characters: int) -> _RunJob:
        device, count, (height, width) = self._kernels.device, self._shape[0], self._size_hw
        stretches = blocks(height, _STRETCH_ROWS)
        self.rle_text = device.empty((count, max_characters), np.uint8)
        self.rle_lengths = device.empty((count,), np.int64)
        self._places = device.empty((count, width * stretches + 1), np.int64)
        self._starts = device.empty((count, max_runs), np.int64)
        return _RunJob(
            masks=self.masks.address,
            count=count,
            height=height,
            width=width,
            stretches=stretches,
            places=self._places.address,
            starts=self._starts.address,
            max_runs=max_runs,
            text=self.rle_text.address,
            max_characters=max_characters,
            lengths=self.rle_lengths.address,
        )


def postprocess_with_device(
    kernels: DeviceKernels, logits: NDArray[np.float32], size_hw: tuple[int, int], **options: Any
) -> ProcessedMasks:
    """See `postprocess_masks.postprocess_masks`, which has checked the arguments: copies there and back."""
    device = kernels.device
    with device.current():
        maker = DeviceMaskMaker(kernels, (len(logits), *logits.shape[1:]), size_hw, **options)
        maker.enqueue(device.to_device(logits))
        wanted = [maker.masks, maker.boxes_xyxy, maker.areas, maker.stability]
        if maker.rle_text is None or maker.rle_lengths is None:
            masks, boxes, areas, stability = device.to_host(*wanted)
            counts: tuple[str, ...] = ()
        else:
            masks, boxes, areas, stability, text, lengths = device.to_host(*wanted, maker.rle_text, maker.rle_lengths)
            counts = tuple(map(_run_lengths, masks, text, lengths.tolist()))
    return ProcessedMasks(
        masks=masks.view(np.bool_), boxes_xyxy=boxes, areas=areas, stability=stability, rle_counts=counts
    )


def _run_lengths(mask: NDArray[np.uint8], text: NDArray[np.uint8], length: int) -> str:
    """One mask's run lengths, by the host where they found no room."""
    if length < 0:
        return str(encode_rle_reference(mask.view(np.bool_))["counts"])
    return text[:length].tobytes().decode("ascii")
