"""SAM 2 on pictures, without PyTorch: `ImageEncoder` (picture to features), `MaskDecoder` (features, prompts to masks).

Prompts are taken as SAM 2's own predictor takes them: scaled with the picture, boxes as two labelled corners, half a
pixel added inside the graph. With `multimask` (its default, and the one that both policy families use) the best scored
of the three ambiguous masks is given; without, the single mask, unless that is unstable (SAM 2's rule).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Prompt
from segzero_rt.bundle import Bundle
from segzero_rt.errors import PromptError
from segzero_rt.graph import Backend, Graph, Stop
from segzero_rt.graph_spec_segmenter import image_encoder_spec, mask_decoder_spec, mask_prompt_spec
from segzero_rt.kernels.preprocess import Frame, InputTensor, preprocess
from segzero_rt.manifest import SegmenterManifest
from segzero_rt.mask import masks_from_logits
from segzero_rt.segmenter_prompt import SegmenterPrompt

STABILITY_DELTA, STABILITY_THRESHOLD = 0.05, 0.98
"""SAM 2's `dynamic_multimask_stability_*`: how little a single mask may change between logits of -delta and +delta."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEmbedding:
    """One picture's features, to be decoded with any number of prompts."""

    features: Mapping[str, NDArray[np.float32]]
    """The encoder graph's outputs by name, batch axis of 1 included."""
    size_hw: tuple[int, int]
    """Of the source picture, to which prompts and masks refer."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskPrediction:
    """Masks for N prompts, in their order."""

    masks: NDArray[np.bool_]
    """bool [N, H, W] in the source picture's size."""
    scores: NDArray[np.float32]
    """float32 [N]: predicted IoU of each mask, mostly in [0, 1]."""
    logits: NDArray[np.float32]
    """float32 [N, h, w] at the decoder's own size, before upsampling."""
    object_logits: NDArray[np.float32]
    """float32 [N]: above 0 where the decoder sees anything at the prompt at all."""


class ImageEncoder:
    """Pictures to features. Safe to call from another thread than the policy's."""

    def __init__(self, graph: Graph, manifest: SegmenterManifest) -> None:
        self.graph = graph
        self.manifest = manifest
        self.tensor = InputTensor(
            size_hw=manifest.input_size_hw,
            image_mean=manifest.image_mean,
            image_std=manifest.image_std,
            resampler=manifest.resampler,
        )

    @classmethod
    def load(cls, bundle: Bundle, *, backend: str | Backend = "auto", threads: int | None = None) -> ImageEncoder:
        """Loads the bundle's encoder graph.

        Raises:
            BackendError: the backend is not there.
            GraphError: the graph differs from its spec.
        """
        manifest = bundle.manifest.segmenter
        spec = image_encoder_spec(input_size_hw=manifest.input_size_hw, mask_size_hw=manifest.mask_size_hw)
        path = bundle.file(manifest.graphs.encoder)
        return cls(Graph.load(path, spec, backend=backend, threads=threads), manifest)

    def pixel_values(self, image_rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [H, W, 3] -> float32 [1, 3, h, w], stretched to the encoder's size and normalised.

        Raises:
            ImageError: not uint8 [H, W, 3], or empty.
        """
        return preprocess(Frame.rgb(image_rgb), self.tensor)[None]

    def __call__(self, image_rgb: NDArray[np.uint8], *, stop: Stop | None = None) -> ImageEmbedding:
        """Encodes one picture, uint8 [H, W, 3] RGB.

        Raises:
            ImageError: another layout, or an empty picture.
            GraphError: the backend fails, or `stop` was called meanwhile.
        """
        features = self.graph.run({"pixel_values": self.pixel_values(image_rgb)}, stop=stop)
        return ImageEmbedding(features=features, size_hw=(image_rgb.shape[0], image_rgb.shape[1]))


class MaskDecoder:
    """Features and prompts to masks."""

    def __init__(
        self, graph: Graph, manifest: SegmenterManifest, mask_prompt: Callable[[], Graph] | None = None
    ) -> None:
        """`mask_prompt` gives the graph that takes masks in; it is asked with the first such prompt."""
        self.graph = graph
        self._mask_prompt = mask_prompt
        self.manifest = manifest

    @classmethod
    def load(cls, bundle: Bundle, *, backend: str | Backend = "auto", threads: int | None = None) -> MaskDecoder:
        """Loads the bundle's decoder graph.

        Raises:
            BackendError: the backend is not there.
            GraphError: the graph differs from its spec.
        """
        manifest = bundle.manifest.segmenter
        path = bundle.file(manifest.graphs.decoder)
        spec = mask_decoder_spec(mask_size_hw=manifest.mask_size_hw)
        graph = Graph.load(path, spec, backend=backend, threads=threads)
        if manifest.graphs.mask_prompt is None:
            return cls(graph, manifest)
        masks_path, masks_spec = bundle.file(manifest.graphs.mask_prompt), mask_prompt_spec(manifest.mask_size_hw)
        load = functools.cache(lambda: Graph.load(masks_path, masks_spec, backend=backend, threads=threads))
        return cls(graph, manifest, load)

    def __call__(
        self, embedding: ImageEmbedding, prompts: Sequence[Prompt | SegmenterPrompt], *, multimask: bool = True
    ) -> MaskPrediction:
        """Decodes one mask per prompt.

        Args:
            embedding: of the picture that the prompts refer to.
            prompts: boxes, points and masks in source pixels; none gives arrays of length 0.
            multimask: choose among the three masks of an ambiguous prompt; False prefers the single mask.

        Raises:
            PromptError: a mask where the bundle takes none, or of another size than `manifest.mask_size_hw`.
        """
        asked = [SegmenterPrompt.of(prompt) for prompt in prompts]
        logits = np.zeros((len(asked), *self.manifest.mask_size_hw), np.float32)
        scores, object_logits = np.zeros(len(asked), np.float32), np.zeros(len(asked), np.float32)
        for members in prompt_groups(asked):
            group = [asked[index] for index in members]
            points_xy = points_of(group, self.manifest.input_size_hw, embedding.size_hw)[None]
            labels = np.tile(np.array(group[0].labels, np.int64), (1, len(group), 1))
            features = self._features(embedding, group[0])
            outputs = self.graph.run({**features, "points_xy": points_xy, "labels": labels})
            chosen, chosen_scores = choose_masks(
                outputs["mask_logits"][0], outputs["iou_scores"][0], multimask=multimask
            )
            logits[members], scores[members] = chosen, chosen_scores
            object_logits[members] = outputs["object_logits"][0, :, 0]
        masks = masks_from_logits(logits, embedding.size_hw)
        return MaskPrediction(masks=masks, scores=scores, logits=logits, object_logits=object_logits)

    def _features(self, embedding: ImageEmbedding, prompt: SegmenterPrompt) -> Mapping[str, NDArray[np.float32]]:
        """The picture's features; with a mask, which stands alone in its group, as that mask changes them."""
        mask = prompt.mask_logits
        if mask is None:
            return embedding.features
        if self._mask_prompt is None:
            raise PromptError("expected a box or points: this bundle takes no masks in; export its segmenter anew")
        if mask.shape != self.manifest.mask_size_hw:
            raise PromptError(f"expected a mask's logits as {self.manifest.mask_size_hw}, got {mask.shape}")
        inputs = {"image_embeddings": embedding.features["image_embeddings"], "mask_logits": mask[None, None]}
        return {**embedding.features, "image_embeddings": self._mask_prompt().run(inputs)["prompted_embeddings"]}


def points_of(
    prompts: Sequence[SegmenterPrompt], input_size_hw: tuple[int, int], source_size_hw: tuple[int, int]
) -> NDArray[np.float32]:
    """Labelled points of prompts with the same labels: float32 [N, P, 2] in pixels of the encoder's input."""
    scale_xy = np.array([input_size_hw[1] / source_size_hw[1], input_size_hw[0] / source_size_hw[0]])
    points = np.array([prompt.labelled_xy for prompt in prompts], np.float64).reshape(len(prompts), -1, 2)
    return np.asarray(points * scale_xy, np.float32)


def prompt_groups(prompts: Sequence[SegmenterPrompt]) -> list[list[int]]:
    """Indices of prompts with the same labels, so that no prompt is filled up with points that mean nothing.

    A prompt with a mask stands alone: the mask changes the picture's features.
    """
    groups: dict[object, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.labels if prompt.mask_logits is None else index, []).append(index)
    return list(groups.values())


def choose_masks(
    mask_logits: NDArray[np.float32], iou_scores: NDArray[np.float32], *, multimask: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One of the four masks of each of N objects, as SAM 2 chooses.

    Args:
        mask_logits: float32 [N, 4, h, w].
        iou_scores: float32 [N, 4].
        multimask: take the best scored of masks 1 to 3. Otherwise mask 0, unless it is unstable: then also that.

    Returns:
        logits float32 [N, h, w] and scores float32 [N].
    """
    rows = np.arange(len(mask_logits))
    chosen = 1 + iou_scores[:, 1:].argmax(axis=1)
    if not multimask:
        single = mask_logits[:, 0]
        smaller = np.count_nonzero(single > STABILITY_DELTA, axis=(1, 2)).astype(np.float32)
        larger = np.count_nonzero(single > -STABILITY_DELTA, axis=(1, 2)).astype(np.float32)
        stability = np.divide(smaller, larger, out=np.ones_like(larger), where=larger > 0)
        chosen = np.where(stability >= STABILITY_THRESHOLD, 0, chosen)
    return mask_logits[rows, chosen], iou_scores[rows, chosen]
