"""SAM 2 on a device: frames to features in a stream of their own, placed prompts to the logits of one mask each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from segzero_rt.device import DeviceArray, Event
from segzero_rt.kernels.device_kernels import DeviceKernels
from segzero_rt.kernels.handover_device import enqueue_choose_masks
from segzero_rt.kernels.preprocess_device import DeviceFrame, DevicePreprocessor
from segzero_rt.resident.arrays import Staging
from segzero_rt.segmenter import ImageEncoder, MaskDecoder

Features = Mapping[str, DeviceArray]


class ResidentEncoder:
    """An `ImageEncoder`'s graph in a stream beside the policy's. Features of one picture at a time."""

    def __init__(self, encoder: ImageEncoder, kernels: DeviceKernels) -> None:
        """
        Args:
            encoder: whose graph runs in the stream of these kernels' device.
            kernels: of another stream than the policy's.
        """
        device = self._device = kernels.device
        self._preprocessor = DevicePreprocessor(kernels, encoder.tensor)
        graph, pixels = encoder.graph, (1, *encoder.tensor.shape)
        self._pixels = device.empty(encoder.tensor.shape, np.float32)
        shapes = graph.output_shapes({"pixel_values": pixels})
        self.features: Features = {name: device.empty(shape, np.float32) for name, shape in shapes.items()}
        self._run = graph.enqueuer({"pixel_values": self._pixels.view(pixels)}, self.features, fixed=True)

    def encode(self, frame: DeviceFrame, ready: Event) -> Event:
        """Enqueues the picture's features, behind a mark of another stream; returns the mark behind them."""
        self._device.wait_for(ready)
        self._preprocessor.enqueue(frame, self._pixels)
        self._device.call(self._run)
        return self._device.record()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Tied:
    """The decoder's graph with its memory, for so many prompts of so many labelled points."""

    points_xy: DeviceArray
    mask_logits: DeviceArray
    iou_scores: DeviceArray
    run: Callable[[], None]


class ResidentMaskDecoder:
    """A `MaskDecoder`'s graph on a device."""

    def __init__(self, decoder: MaskDecoder, staging: Staging, kernels: DeviceKernels, features: Features) -> None:
        self.manifest = decoder.manifest
        self._graph, self._kernels, self._features = decoder.graph, kernels, features
        self._device, self._staging = staging.device, staging
        self._tied: dict[tuple[int, tuple[int, ...]], _Tied] = {}

    def points_xy(self, count: int, labels: tuple[int, ...]) -> DeviceArray:
        """Where `decode` reads prompts with these labels: float32 [count, labels, 2] in the encoder input's pixels."""
        return self._tie(count, labels).points_xy.view((count, len(labels), 2))

    def decode(self, count: int, labels: tuple[int, ...], *, logits: DeviceArray, scores: DeviceArray) -> None:
        """Enqueues one mask for each prompt in `points_xy`.

        Args:
            logits: float32 [count, h, w], written.
            scores: float32 [count], written.
        """
        tied = self._tie(count, labels)
        self._device.call(tied.run)
        enqueue_choose_masks(
            self._kernels,
            tied.mask_logits.view(tied.mask_logits.shape[1:]),
            tied.iou_scores.view(tied.iou_scores.shape[1:]),
            logits=logits,
            scores=scores,
        )

    def _tie(self, count: int, labels: tuple[int, ...]) -> _Tied:
        key = (count, labels)
        if key not in self._tied:
            self._tied[key] = self._make(count, labels)
        return self._tied[key]

    def _make(self, count: int, labels: tuple[int, ...]) -> _Tied:
        device, graph = self._device, self._graph
        points_xy = device.empty((1, count, len(labels), 2), np.float32)
        label_array = self._staging.to_device(np.tile(np.array(labels, np.int64), (1, count, 1)))
        inputs = {**self._features, "points_xy": points_xy, "labels": label_array}
        shapes = graph.output_shapes({name: array.shape for name, array in inputs.items()})
        outputs = {name: device.empty(shape, np.float32) for name, shape in shapes.items()}
        return _Tied(
            points_xy=points_xy,
            mask_logits=outputs["mask_logits"],
            iou_scores=outputs["iou_scores"],
            run=graph.enqueuer(inputs, outputs, fixed=True),
        )
