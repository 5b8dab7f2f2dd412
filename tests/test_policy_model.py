"""The packed forward pass gives each question the logits that transformers' own class gives it alone."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from training.policy_model import GRID, INPUT_SIDE, Layout, PackedPolicy, tabletop_config
from training.tokenizer import CONTROL_TOKENS

VOCABULARY = 48
IMAGE, START, END = 4, 5, 6
TEXT = 8
"""First id of an ordinary token."""


def small_policy(*, window_size: int = 140, full: tuple[int, ...] = (1,)) -> PackedPolicy:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "window_size": window_size,
            "out_hidden_size": 64,
            "fullatt_block_indexes": list(full),
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=7,
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # transformers starts so small that every logit would be near 0
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return PackedPolicy(model)


def random_rows(layout: Layout, batch: int, generator: torch.Generator) -> torch.Tensor:
    ids = torch.randint(TEXT, VOCABULARY, (batch, layout.length), generator=generator)
    if layout.prefix_length:
        ids[:, layout.image_start - 1] = START
        ids[:, layout.image_start : layout.image_start + GRID * GRID] = IMAGE
        ids[:, layout.image_start + GRID * GRID] = END
    return ids


def reference_logits(policy: PackedPolicy, ids: torch.Tensor, picture: torch.Tensor | None) -> torch.Tensor:
    """transformers' own forward pass of one question, [L, vocabulary]."""
    inputs = {}
    if picture is not None:
        processor = Qwen2VLImageProcessorPil(min_pixels=1, max_pixels=10**8)
        inputs = dict(processor(images=[picture.numpy()], return_tensors="pt", do_resize=False))
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()[None]
    logits = policy.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **inputs).logits[0]
    assert isinstance(logits, torch.Tensor)
    return logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("window_size", "full", "groups"),
    [
        (140, (1,), ((2, 7), (1, 3))),  # as shipped: 2 x 2 windows, then the whole picture
        (280, (0, 1), ((1, 1),)),  # one window, a question of one token
        (56, (), ((3, 5),)),  # 25 windows and never the whole picture
    ],
)
def test_packed_questions_get_the_logits_of_each_alone(
    window_size: int, full: tuple[int, ...], groups: tuple[tuple[int, int], ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    policy = small_policy(window_size=window_size, full=full)
    layout = Layout(prefix_length=GRID * GRID + 6, image_start=3, groups=groups)
    ids = random_rows(layout, 2, generator)
    pixels = torch.randint(0, 256, (2, INPUT_SIDE, INPUT_SIDE, 3), dtype=torch.uint8, generator=generator)
    hidden, _ = policy.read(ids, policy.look(pixels), layout)
    packed = policy.logits(hidden)
    assert packed.abs().max() > 0.5
    lengths = [length for count, length in groups for _ in range(count)]
    for row in range(2):
        for start, length in zip(layout.starts, lengths, strict=True):
            alone = torch.cat([ids[row, : layout.prefix_length], ids[row, start : start + length]])
            expected = reference_logits(policy, alone, pixels[row])[layout.prefix_length :]
            torch.testing.assert_close(packed[row, start : start + length], expected, atol=1e-4, rtol=0)
        prefix = reference_logits(policy, ids[row, : layout.prefix_length], pixels[row])
        torch.testing.assert_close(packed[row, : layout.prefix_length], prefix, atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_the_watching_head_looks_at_is_what_transformers_attends_to() -> None:
    policy = small_policy()
    policy.model.set_attn_implementation("eager")  # the fused attention does not tell its weights
    layout = Layout(prefix_length=GRID * GRID + 6, image_start=3, groups=((2, 7), (1, 3)))
    generator = torch.Generator().manual_seed(3)
    ids = random_rows(layout, 2, generator)
    pixels = torch.randint(0, 256, (2, INPUT_SIDE, INPUT_SIDE, 3), dtype=torch.uint8, generator=generator)
    _, (entering,) = policy.read(ids, policy.look(pixels), layout, taps=(0,))
    watchers = [(1, layout.starts[1] + 4, layout.starts[1]), (0, layout.starts[2] + 2, layout.starts[2])]
    looked = policy.watched(entering, 1, torch.tensor(watchers), layout)
    for (row, at, start), log_probabilities in zip(watchers, looked, strict=True):
        alone = torch.cat([ids[row, : layout.prefix_length], ids[row, start : at + 1]])
        processor = Qwen2VLImageProcessorPil(min_pixels=1, max_pixels=10**8)
        inputs = dict(processor(images=[pixels[row].numpy()], return_tensors="pt", do_resize=False))
        inputs["mm_token_type_ids"] = (alone == IMAGE).int()[None]
        attentions = policy.model(input_ids=alone[None], output_attentions=True, **inputs).attentions
        cells = slice(layout.image_start, layout.image_start + GRID * GRID)
        torch.testing.assert_close(log_probabilities.exp(), attentions[1][0, 0, -1, cells], atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_text_without_a_picture() -> None:
    policy = small_policy()
    layout = Layout(prefix_length=0, image_start=0, groups=((2, 5),))
    ids = random_rows(layout, 1, torch.Generator().manual_seed(2))
    hidden, tapped = policy.read(ids, None, layout, taps=(0, 1))
    packed = policy.logits(hidden)[0]
    for start in layout.starts:
        expected = reference_logits(policy, ids[0, start : start + 5], None)
        torch.testing.assert_close(packed[start : start + 5], expected, atol=1e-4, rtol=0)
    assert [state.shape for state in tapped] == [hidden.shape] * 2


def test_windows_that_do_not_tile_the_picture_are_refused() -> None:
    with pytest.raises(ValueError, match="expected windows that tile 10 cells, got 4"):
        small_policy(window_size=112)


def test_the_shipped_policy_is_a_few_million_parameters() -> None:
    config = tabletop_config(1500, {token: number for number, token in enumerate(CONTROL_TOKENS)})
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 2e6 < count < 10e6
    assert config.image_token_id == CONTROL_TOKENS.index("<|image_pad|>")
