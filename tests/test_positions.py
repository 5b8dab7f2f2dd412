"""Positions, windows, rotary tables: against transformers' own functions, and a picture small enough to draw."""

from __future__ import annotations

import numpy as np
import pytest

from segzero_rt.positions import MropeTable, PictureSpan, mrope_positions, vision_layout, window_index

torch = pytest.importorskip("torch", reason="compares with transformers, which needs PyTorch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

GRIDS = [
    pytest.param((10, 10), id="ragged-both"),
    pytest.param((4, 4), id="one-window"),
    pytest.param((8, 4), id="whole-windows"),
    pytest.param((1, 1), id="one-token"),
    pytest.param((3, 5), id="small-ragged"),
    pytest.param((1, 9), id="one-row"),
    pytest.param((30, 30), id="840-pixels"),
]


def reference_model(vision_heads: int = 4) -> object:
    """A model without depth: only its position arithmetic is used."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 50,
            "hidden_size": 64,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 40.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={"depth": 1, "hidden_size": 64, "num_heads": vision_heads, "out_hidden_size": 64},
        image_token_id=7,
        vision_start_token_id=8,
        vision_end_token_id=9,
    )
    return transformers.Qwen2_5_VLModel(config)


def qwen3_model(num_positions: int = 36, mrope_section: tuple[int, ...] = (6, 5, 5)) -> object:
    """Qwen3-VL without depth."""
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 50,
            "hidden_size": 64,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 40.0, "mrope_section": list(mrope_section)},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "num_position_embeddings": num_positions,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=7,
        vision_start_token_id=8,
        vision_end_token_id=9,
    )
    return transformers.Qwen3VLModel(config)


def test_a_picture_of_two_by_three_as_drawn() -> None:
    positions = mrope_positions(11, PictureSpan(start=2, grid_hw=(2, 3)))
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
    ]
    assert PictureSpan(start=2, grid_hw=(2, 3)).mrope_delta == -3


@pytest.mark.parametrize("grid_hw", GRIDS)
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (13, 21)])
def test_positions_equal_transformers(grid_hw: tuple[int, int], before: int, after: int) -> None:
    span = PictureSpan(start=before, grid_hw=grid_hw)
    ids = torch.tensor([[1] * before + [7] * span.num_tokens + [1] * after])
    grid = torch.tensor([[1, 2 * grid_hw[0], 2 * grid_hw[1]]])
    for model in (reference_model(), qwen3_model()):
        want, delta = model.get_rope_index(ids, (ids == 7).int(), image_grid_thw=grid)
        got = mrope_positions(ids.shape[1], span)
        np.testing.assert_array_equal(got, want[:, 0].numpy())
        if after:
            assert span.mrope_delta == int(delta)


def test_text_alone_counts_up() -> None:
    assert mrope_positions(4).tolist() == [[0, 1, 2, 3]] * 3


def test_a_picture_outside_the_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="within 5 tokens"):
        mrope_positions(5, PictureSpan(start=2, grid_hw=(2, 2)))
    with pytest.raises(ValueError, match="grid"):
        PictureSpan(start=0, grid_hw=(0, 3))


@pytest.mark.parametrize("grid_hw", GRIDS)
def test_the_rotary_table_equals_transformers_at_every_place(grid_hw: tuple[int, int]) -> None:
    span = PictureSpan(start=5, grid_hw=grid_hw)
    length = span.end + 40
    table = MropeTable(head_dim=32, theta=40.0, mrope_section=(4, 6, 6), max_length=length)
    positions = torch.from_numpy(mrope_positions(length, span))[:, None]
    want = reference_model().language_model.rotary_emb(torch.zeros(1), positions)
    for got, reference in zip(table.rows(span), want, strict=True):
        np.testing.assert_allclose(np.concatenate([got, got], axis=-1), reference[0].numpy(), atol=2e-6)
        assert got.flags.c_contiguous, "it is bound as it lies in memory"


@pytest.mark.parametrize("section", [(6, 5, 5), (12, 2, 2), (5, 6, 5)], ids=["even", "mostly-time", "rows-most"])
def test_the_interleaved_rotary_table_equals_transformers(section: tuple[int, int, int]) -> None:
    span = PictureSpan(start=5, grid_hw=(3, 7))
    table = MropeTable(head_dim=32, theta=40.0, mrope_section=section, max_length=60, interleaved=True)
    positions = torch.from_numpy(mrope_positions(60, span))[:, None]
    want = qwen3_model(mrope_section=section).language_model.rotary_emb(torch.zeros(1), positions)
    in_runs = MropeTable(head_dim=32, theta=40.0, mrope_section=section, max_length=60).rows(span)
    for got, reference, other in zip(table.rows(span), want, in_runs, strict=True):
        np.testing.assert_allclose(np.concatenate([got, got], axis=-1), reference[0].numpy(), atol=2e-6)
        assert np.abs(got - other).max() > 0.1, "or the order of axes would not be tested"


@pytest.mark.parametrize("side", [1, 6, 48])
@pytest.mark.parametrize("grid_hw", GRIDS)
def test_learned_positions_equal_transformers(grid_hw: tuple[int, int], side: int) -> None:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    layout = vision_layout(
        grid_hw, merge_size=2, window_tokens=4, head_dim=16, theta=1e4, masked=-3e4, position_side=side
    )
    grid = torch.tensor([[1, 2 * grid_hw[0], 2 * grid_hw[1]]])
    taps, weights = get_vision_interpolation_indices_and_weights(
        grid, side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    square = np.random.default_rng(0).normal(size=(side * side, 3))
    want = (square[taps.numpy()] * weights.numpy()[..., None]).sum(axis=1)[layout.patch_order]
    got = (square[layout.position_taps] * layout.position_weights[..., None]).sum(axis=1)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert {"position_taps", "position_weights"} <= set(layout.inputs())


def test_a_section_that_does_not_fill_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="sums to 16"):
        MropeTable(head_dim=32, theta=40.0, mrope_section=(4, 6, 5), max_length=8)


@pytest.mark.parametrize("window_tokens", [1, 2, 4, 7])
@pytest.mark.parametrize("grid_hw", GRIDS)
def test_windows_equal_transformers(grid_hw: tuple[int, int], window_tokens: int) -> None:
    from transformers.vision_utils import get_vision_window_index

    grid = torch.tensor([[1, 2 * grid_hw[0], 2 * grid_hw[1]]])
    want, boundaries = get_vision_window_index(grid, 2, window_tokens * 28, 14)
    index, lengths = window_index(grid_hw, window_tokens)
    np.testing.assert_array_equal(index, want.numpy())
    np.testing.assert_array_equal(np.cumsum(lengths) * 4, boundaries[1:].numpy())


@pytest.mark.parametrize("grid_hw", GRIDS)
def test_the_vision_layout_is_consistent(grid_hw: tuple[int, int]) -> None:
    layout = vision_layout(grid_hw, merge_size=2, window_tokens=4, head_dim=16, theta=1e4, masked=-3e4)
    patches = 4 * grid_hw[0] * grid_hw[1]
    assert sorted(layout.patch_order) == list(range(patches)), "a permutation"
    filled = layout.window_bias[:, 0, 0] == 0
    assert filled.sum() == patches, "each patch has one slot that counts"
    np.testing.assert_array_equal(layout.window_patches[filled], np.arange(patches))
    np.testing.assert_array_equal(layout.window_patches.reshape(-1)[layout.patch_slots], np.arange(patches))
    tokens_in_window_order = layout.patch_order[::4] // 4
    np.testing.assert_array_equal(tokens_in_window_order[layout.token_order], np.arange(patches // 4))
    assert filled[:, 0].all(), "no window is empty, or its softmax would have nothing to look at"


@pytest.mark.parametrize("grid_hw", GRIDS)
def test_vision_rotary_equals_transformers(grid_hw: tuple[int, int]) -> None:
    from transformers.vision_utils import get_vision_position_ids

    layout = vision_layout(grid_hw, merge_size=2, window_tokens=4, head_dim=16, theta=1e4, masked=-3e4)
    places = get_vision_position_ids(torch.tensor([[1, 2 * grid_hw[0], 2 * grid_hw[1]]]), 2)
    cos, sin = reference_model().visual.rotary_pos_emb(torch.zeros(1), places)
    for got, want in ((layout.rotary_cos, cos), (layout.rotary_sin, sin)):
        np.testing.assert_allclose(got, want.numpy()[layout.patch_order][:, :8], atol=1e-6)
