"""Replies that share their prompt are those that transformers gives each alone: tokens, probabilities, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy_checkpoints import random_picture, write_checkpoint
from transformers import Qwen2VLImageProcessorPil

from training import rollout
from training.reply_scores import score_replies
from training.rollout import Replies, Sampling, draw_tokens, sample_replies
from training.shared_prompt import Prompts, SharedPromptPolicy

PAD = 0
TEXT = (40, 400)
"""Range of ordinary tokens."""
NOTHING_ENDS = ()
SIZES_HW = ((56, 84), (84, 56), (28, 140))


def picture_inputs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    seen = [
        processor(images=[random_picture(number, SIZES_HW[number % 3])], return_tensors="pt") for number in range(count)
    ]
    return torch.cat([one["pixel_values"] for one in seen]), torch.cat([one["image_grid_thw"] for one in seen])


def make_prompts(model: Any, pictures: Sequence[Sequence[int]], lengths: Sequence[int], seed: int = 0) -> Prompts:
    """Random text of the given lengths with each prompt's pictures after its second token."""
    rng = np.random.default_rng(seed)
    config = model.config
    count = 1 + max((number for row in pictures for number in row), default=-1)
    pixels, grids = picture_inputs(count) if count else (None, None)
    rows = []
    for row, length in zip(pictures, lengths, strict=True):
        text = rng.integers(*TEXT, length).tolist()
        for number in row:
            assert grids is not None
            cells = int(grids[number].prod()) // 4
            seen = [config.vision_start_token_id, *[config.image_token_id] * cells, config.vision_end_token_id]
            text[2:2] = seen
        rows.append(tuple(text))
    return Prompts(
        token_ids=tuple(rows), pixel_values=pixels, image_grid_thw=grids, pictures=tuple(map(tuple, pictures))
    )


def alone(prompts: Prompts, row: int) -> dict[str, Any]:
    """transformers' inputs of one prompt."""
    ids = torch.tensor([prompts.token_ids[row]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompts.pictures and prompts.pictures[row]:
        assert prompts.pixel_values is not None and prompts.image_grid_thw is not None
        patches = prompts.pixel_values.split(prompts.image_grid_thw.prod(1).tolist())
        inputs["pixel_values"] = torch.cat([patches[number] for number in prompts.pictures[row]])
        inputs["image_grid_thw"] = prompts.image_grid_thw[list(prompts.pictures[row])]
    return inputs


def with_types(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).int()}


def generated(model: Any, prompts: Prompts, tokens: int) -> list[tuple[int, ...]]:
    """transformers' greedy replies, one prompt at a time, that nothing ends."""
    replies = []
    model.generation_config.eos_token_id = None
    for row in range(len(prompts)):
        inputs = with_types(model, alone(prompts, row))
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=PAD)
        replies.append(tuple(whole[0, inputs["input_ids"].shape[1] :].tolist()))
    return replies


def taught(model: Any, prompts: Prompts, row: int, reply: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a reply's tokens, [T, vocabulary], by transformers' own pass over prompt and reply."""
    inputs = alone(prompts, row)
    ids = torch.cat([inputs["input_ids"], torch.tensor([list(reply)])], 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**with_types(model, inputs)).logits[0, -len(reply) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_checkpoint(tmp_path_factory.mktemp("policy") / "tied")


@pytest.fixture(scope="module")
def three(model: Any) -> Prompts:
    """Unequal lengths, and two of the prompts on one picture."""
    return make_prompts(model, [(0,), (1,), (0,)], (5, 9, 3))


@pytest.mark.parametrize(
    ("pictures", "lengths"),
    [
        pytest.param([(0,)], (6,), id="one prompt"),
        pytest.param([(0,), (1,), (2,)], (6, 6, 6), id="three pictures of unequal size"),
        pytest.param([(0,), (0,), (1,)], (4, 11, 7), id="two questions on one picture"),
        pytest.param([(0, 1), (1,)], (5, 9), id="two pictures in a prompt"),
        pytest.param([(), (0,)], (8, 3), id="a prompt without a picture"),
        pytest.param([(), ()], (3, 9), id="no pictures at all"),
    ],
)
def test_greedy_replies_are_those_of_transformers(
    model: Any, pictures: list[tuple[int, ...]], lengths: tuple[int, ...]
) -> None:
    prompts = make_prompts(model, pictures, lengths)
    replies = sample_replies(
        SharedPromptPolicy(model), prompts, Sampling(max_new_tokens=12, temperature=0.0), NOTHING_ENDS
    )
    assert list(replies.token_ids) == generated(model, prompts, 12)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"tied": False}, id="untied output layer"),
        pytest.param({"kv_heads": 4}, id="no shared keys"),
        pytest.param({"kv_heads": 1, "layers": 3}, id="one key-value head"),
        pytest.param({"window_size": 56, "vision_depth": 4, "full_attention": (1, 3)}, id="many windows"),
    ],
)
def test_other_shapes_of_the_family(tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = write_checkpoint(tmp_path / "policy", **sizes)
    prompts = make_prompts(model, [(0,), (1,)], (4, 7))
    sampling = Sampling(num_replies=2, max_new_tokens=8, temperature=0.0)
    replies = sample_replies(SharedPromptPolicy(model), prompts, sampling, NOTHING_ENDS)
    expected = generated(model, prompts, 8)
    assert list(replies.token_ids) == [expected[0], expected[0], expected[1], expected[1]]


def test_an_optimiser_step_is_seen_at_once(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "policy", seed=3)
    policy = SharedPromptPolicy(model)
    prompts = make_prompts(model, [(0,), (1,)], (5, 5))
    sampling = Sampling(max_new_tokens=10, temperature=0.0)
    before = sample_replies(policy, prompts, sampling, NOTHING_ENDS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    logprobs, _ = score_replies(policy, prompts, (0, 1), before.token_ids)
    logprobs.sum().backward()  # away from what was said
    optimizer.step()
    after = sample_replies(policy, prompts, sampling, NOTHING_ENDS)
    assert after.token_ids != before.token_ids
    assert list(after.token_ids) == generated(model, prompts, 10)


def test_adapters_take_part(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = write_checkpoint(tmp_path / "policy", seed=4)
    prompts = make_prompts(base, [(0,)], (5,))
    sampling = Sampling(max_new_tokens=10, temperature=0.0)
    plain = sample_replies(SharedPromptPolicy(base), prompts, sampling, NOTHING_ENDS)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|down_proj)")).eval()
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    replies = sample_replies(SharedPromptPolicy(adapted), prompts, sampling, NOTHING_ENDS)
    assert replies.token_ids != plain.token_ids
    assert list(replies.token_ids) == generated(adapted, prompts, 10)


# -- sampling ------------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_training_pass(model: Any, three: Prompts) -> None:
    sampling = Sampling(num_replies=3, max_new_tokens=9, temperature=0.7, top_p=0.9, seed=5)
    replies = sample_replies(SharedPromptPolicy(model), three, sampling, NOTHING_ENDS)
    for row, (tokens, told) in enumerate(zip(replies.token_ids, replies.logprobs, strict=True)):
        with torch.no_grad():
            expected = taught(model, three, row // 3, tokens, 0.7)[range(len(tokens)), list(tokens)]
        np.testing.assert_allclose(told, expected.numpy(), atol=1e-4)


def test_the_seed_decides(model: Any, three: Prompts) -> None:
    policy = SharedPromptPolicy(model)
    sampling = Sampling(num_replies=4, max_new_tokens=8, seed=1)
    first = sample_replies(policy, three, sampling, NOTHING_ENDS)
    torch.manual_seed(99)  # nothing but the seed
    assert sample_replies(policy, three, sampling, NOTHING_ENDS) == first
    assert sample_replies(policy, three, replace(sampling, seed=2), NOTHING_ENDS) != first
    assert len(set(first.token_ids)) == 12, "every reply is drawn on its own"


def ended(replies: Replies, ends: Sequence[int], longest: int) -> bool:
    """Every reply stops at its first end token, or at the budget."""
    for tokens in replies.token_ids:
        inside = [place for place, token in enumerate(tokens) if token in ends]
        if inside not in ([], [len(tokens) - 1]) or (not inside and len(tokens) != longest):
            return False
    return True


@pytest.mark.parametrize("shrink_at", [pytest.param(0.0, id="never shrinks"), pytest.param(1.0, id="always")])
def test_what_leaves_the_batch_changes_nothing(
    model: Any, three: Prompts, monkeypatch: pytest.MonkeyPatch, shrink_at: float
) -> None:
    ends = tuple(range(40, 90))  # an eighth of the vocabulary: replies end all along
    sampling = Sampling(num_replies=5, max_new_tokens=20, temperature=3.0, seed=2)
    usual = sample_replies(SharedPromptPolicy(model), three, sampling, ends)
    monkeypatch.setattr(rollout, "SHRINK_AT", shrink_at)
    replies = sample_replies(SharedPromptPolicy(model), three, sampling, ends)
    assert replies.token_ids == usual.token_ids
    assert ended(replies, ends, 20)
    assert len({len(tokens) for tokens in replies.token_ids}) > 3, "unequal lengths, or this shows nothing"
    assert [len(told) for told in replies.logprobs] == [len(tokens) for tokens in replies.token_ids]


@pytest.mark.parametrize(
    ("place", "longest", "expected"),
    [
        pytest.param(3, 10, 4, id="ends in the middle"),
        pytest.param(0, 10, 1, id="ends at once"),
        pytest.param(9, 10, 10, id="ends with the last token"),
        pytest.param(9, 4, 4, id="cut off"),
        pytest.param(9, 1, 1, id="a budget of one"),
    ],
)
def test_replies_end_with_their_end_token_or_at_the_budget(model: Any, place: int, longest: int, expected: int) -> None:
    prompts = make_prompts(model, [(0,)], (6,), seed=7)
    (whole,) = generated(model, prompts, 10)
    place = next(index for index, token in enumerate(whole) if token == whole[place])
    replies = sample_replies(
        SharedPromptPolicy(model), prompts, Sampling(max_new_tokens=longest, temperature=0.0), (whole[place],)
    )
    assert replies.token_ids == (whole[: min(place + 1, expected)],)


SPREAD = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        pytest.param(1.0, 1.0, (0.5, 0.3, 0.15, 0.05), id="as it is"),
        pytest.param(0.5, 1.0, (0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365), id="colder"),
        pytest.param(1.0, 0.8, (0.625, 0.375, 0.0, 0.0), id="two tokens hold the share"),
        pytest.param(1.0, 0.81, (0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0), id="a third is needed"),
        pytest.param(1.0, 0.01, (1.0, 0.0, 0.0, 0.0), id="the likeliest always stays"),
        pytest.param(0.0, 1.0, (1.0, 0.0, 0.0, 0.0), id="greedy"),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)], ids=["sorted", "mixed"])
def test_tokens_are_drawn_in_their_shares(
    temperature: float, top_p: float, expected: tuple[float, ...], order: tuple[int, ...]
) -> None:
    count = 4000
    logits = SPREAD.log()[:, list(order)].expand(count, -1)
    uniform = (torch.arange(count) + 0.5) / count
    drawn, scores = draw_tokens(logits, Sampling(max_new_tokens=1, temperature=temperature, top_p=top_p), uniform)
    shares = torch.bincount(drawn, minlength=4) / count
    torch.testing.assert_close(shares, torch.tensor(expected)[list(order)], atol=1.5 / count, rtol=0)
    told = torch.log_softmax(logits / (temperature or 1.0), -1)
    torch.testing.assert_close(scores, told[range(count), drawn])


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"temperature": 0.0}], ids=["all", "top_p", "greedy"])
def test_what_must_never_be_drawn_leaves_its_share_to_the_others(options: dict[str, Any]) -> None:
    logits = SPREAD.log().expand(100, -1)
    uniform = torch.arange(100) / 100
    drawn, scores = draw_tokens(logits, Sampling(max_new_tokens=1, never=(0,), **options), uniform)
    assert drawn.min() == 1
    torch.testing.assert_close(scores, logits[range(100), drawn])


def test_no_token_without_probability_is_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")], [0.0, float("-inf"), float("-inf")]])
    for uniform in (0.0, 0.5, 1.0 - 2**-24):
        drawn, _ = draw_tokens(logits, Sampling(max_new_tokens=1), torch.full((2,), uniform))
        assert drawn.tolist() == [1, 0]


# -- scores of given replies ---------------------------------------------------------------------------------------

GIVEN = ((1, (50, 60, 70)), (0, (50,)), (2, (41, 42, 43, 44, 45, 46)), (1, ()), (0, (99, 98)))


def test_scores_and_gradients_are_those_of_transformers(model: Any, three: Prompts, monkeypatch: Any) -> None:
    monkeypatch.setattr("training.reply_scores.REPLIES_AT_ONCE", 2)
    prompt_of, replies = zip(*GIVEN, strict=True)
    model.zero_grad()
    logprobs, entropies = score_replies(SharedPromptPolicy(model), three, prompt_of, replies, temperature=0.8)
    weights = torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)
    ((logprobs + 0.1 * entropies) * weights).sum().backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for row, (prompt, reply) in enumerate(GIVEN):
        assert not logprobs[row, len(reply) :].any() and not entropies[row, len(reply) :].any()
        if not reply:
            continue
        scores = taught(model, three, prompt, reply, 0.8)
        chosen, entropy = scores[range(len(reply)), list(reply)], -(scores.exp() * scores).sum(-1)
        torch.testing.assert_close(logprobs[row, : len(reply)], chosen, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(entropies[row, : len(reply)], entropy, atol=2e-5, rtol=1e-5)
        total = total + ((chosen + 0.1 * entropy) * weights[row, : len(reply)]).sum()
    total.backward()
    for name, weight in model.named_parameters():
        error = (ours[name] - weight.grad).norm() / (weight.grad.norm() + 1e-8)
        assert error < 1e-3, f"{name}: {error}"
    model.zero_grad()


def test_no_replies_and_only_empty_ones(model: Any, three: Prompts) -> None:
    policy = SharedPromptPolicy(model)
    assert score_replies(policy, three, (), ())[0].shape == (0, 0)
    assert score_replies(policy, three, (0, 1), ((), ()))[0].shape == (2, 0)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"num_replies": 0}, "at least 1 reply", id="no replies"),
        pytest.param({"max_new_tokens": 0}, "at least 1 reply of 1 token", id="no tokens"),
        pytest.param({"temperature": -1.0}, "temperature from 0", id="below zero"),
        pytest.param({"temperature": float("nan")}, "temperature from 0", id="not a number"),
        pytest.param({"top_p": 0.0}, "top_p", id="nothing to draw from"),
        pytest.param({"top_p": 1.1}, "top_p", id="more than everything"),
    ],
)
def test_impossible_sampling_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"token_ids": ()}, "at least one prompt", id="none"),
        pytest.param({"token_ids": ((), (1,), (2,))}, "an empty one", id="an empty prompt"),
        pytest.param({"pixel_values": None}, "together", id="a grid without pixels"),
        pytest.param({"pictures": ((0,),)}, "for 3 prompts, got 1", id="too few picture lists"),
        pytest.param({"pictures": ((0,), (2,), (0,))}, "from 0 to 1", id="no such picture"),
    ],
)
def test_prompts_that_do_not_fit_their_pictures_are_refused(
    three: Prompts, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(three, **changes)


def test_missing_placeholders_are_named(model: Any, three: Prompts) -> None:
    short = replace(three, token_ids=((50, 51), *three.token_ids[1:]))
    with pytest.raises(ValueError, match="placeholders"):
        SharedPromptPolicy(model).read(short)


def test_another_model_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        SharedPromptPolicy(torch.nn.Linear(2, 2))


def test_one_prompt_for_each_reply(model: Any, three: Prompts) -> None:
    with pytest.raises(ValueError, match="each of 2 replies, got 1"):
        score_replies(SharedPromptPolicy(model), three, (0,), ((50,), (51,)))
    with pytest.raises(ValueError, match="above 0"):
        score_replies(SharedPromptPolicy(model), three, (0,), ((50,),), temperature=0.0)
