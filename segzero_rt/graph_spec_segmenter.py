"""Names, shapes and dtypes of the segmenter's two graphs; conventions as in `graph_spec.py`.

Widths of features are the checkpoint's business: the runtime only hands them from one graph to the other, so they are
dynamic in its specs, and static numbers in the exporter's.
"""

from __future__ import annotations

from segzero_rt.graph_spec import Dimension, GraphSpec, TensorSpec

LABEL_NOTHING, LABEL_OUTSIDE, LABEL_INSIDE, LABEL_TOP_LEFT, LABEL_BOTTOM_RIGHT = -1, 0, 1, 2, 3
"""What a labelled point says. Every prompt with a box or a point ends with exactly one `LABEL_NOTHING`, as SAM 2's own
predictor does it; one with a mask alone has no labelled point at all."""

NUM_MASK_TOKENS = 4
"""Mask 0 is the answer to a clear prompt; masks 1 to 3 are the readings of an ambiguous one."""


def image_encoder_spec(
    *, input_size_hw: tuple[int, int], mask_size_hw: tuple[int, int], hidden_size: int | None = None
) -> GraphSpec:
    """Picture to features at three scales: a quarter, an eighth and a sixteenth of the input's side.

    Args:
        input_size_hw: pixels of the resized picture.
        mask_size_hw: a quarter of that.
        hidden_size: the decoder's width where it is known, else the widths are dynamic.
    """
    height, width = input_size_hw
    return GraphSpec(
        name="image_encoder",
        inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, height, width)),),
        outputs=_features(mask_size_hw, hidden_size),
    )


def mask_decoder_spec(*, mask_size_hw: tuple[int, int], hidden_size: int | None = None) -> GraphSpec:
    """Features and prompts to mask logits, for any number of objects of each picture from one up.

    A box is two labelled points. All prompts of one run have the same number of points; the host groups them, since a
    filler would be one more thing for the decoder to look at. All four masks come out, and the host chooses.
    """
    height, width = mask_size_hw
    prompts: tuple[Dimension, ...] = ("batch", "objects", "points")
    return GraphSpec(
        name="mask_decoder",
        inputs=(
            *_features(mask_size_hw, hidden_size),
            # In pixels of the resized picture, corner of a pixel at whole numbers; the graph adds SAM's half pixel.
            TensorSpec("points_xy", "float32", (*prompts, 2)),
            TensorSpec("labels", "int64", prompts),
        ),
        outputs=(
            TensorSpec("mask_logits", "float32", ("batch", "objects", NUM_MASK_TOKENS, height, width)),
            TensorSpec("iou_scores", "float32", ("batch", "objects", NUM_MASK_TOKENS)),
            TensorSpec("object_logits", "float32", ("batch", "objects", 1)),
        ),
    )


def mask_prompt_spec(mask_size_hw: tuple[int, int], hidden_size: int | None = None) -> GraphSpec:
    """A rough mask, put into the coarsest features: what the decoder then takes in their place.

    It is a graph of its own because policies give no masks: the decoder, and its time, are the same without it.
    """
    height, width = mask_size_hw
    features = (hidden_size or "width", height // 4, width // 4)
    return GraphSpec(
        name="mask_prompt",
        inputs=(
            TensorSpec("image_embeddings", "float32", ("batch", *features)),
            TensorSpec("mask_logits", "float32", ("batch", 1, height, width)),
        ),
        outputs=(TensorSpec("prompted_embeddings", "float32", ("batch", *features)),),
    )


def _features(mask_size_hw: tuple[int, int], hidden_size: int | None) -> tuple[TensorSpec, ...]:
    height, width = mask_size_hw
    widths: tuple[Dimension, ...] = ("width", "fine_width", "middle_width")
    if hidden_size is not None:
        widths = (hidden_size, hidden_size // 8, hidden_size // 4)
    return (
        TensorSpec("image_embeddings", "float32", ("batch", widths[0], height // 4, width // 4)),
        TensorSpec("high_res_features_0", "float32", ("batch", widths[1], height, width)),
        TensorSpec("high_res_features_1", "float32", ("batch", widths[2], height // 2, width // 2)),
    )
