"""Guesses change how fast a reply comes and nothing else, at every budget, end and length of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from segzero_rt.answer_format import FORMATS, SEG_ZERO, VISION_REASONER, AnswerFormat
from segzero_rt.decoding import GreedyReply
from segzero_rt.drafting import MAX_CONTEXTS, Draft, Drafter, made_up_replies
from segzero_rt.errors import BackendError
from segzero_rt.policy import DRAFT_TOKENS, Policy

if TYPE_CHECKING:
    from export.policy import PolicyExport

END = 9


class Counting:
    """A decoder that says `script` whatever it is given, and a cache that keeps what it was given."""

    def __init__(self, script: Sequence[int], *, prompt: int = 4, capacity: int = 1000) -> None:
        self.script = [*script]
        self.prompt = prompt
        self.kept: list[int] = []
        self.capacity = capacity
        self.widths: list[int] = []

    @property
    def lengths(self) -> np.ndarray:
        return np.array([self.prompt + len(self.kept)])

    def truncate(self, length: int) -> None:
        assert self.prompt <= length <= self.lengths[0]
        del self.kept[length - self.prompt :]

    def choices(self, token_ids: Sequence[int]) -> list[int]:
        """What follows each token, where all before it are the script's; noise behind a wrong one."""
        start = len(self.kept)
        self.kept += token_ids
        assert self.prompt + len(self.kept) <= self.capacity, "more tokens than the cache has room for"
        self.widths.append(len(token_ids))
        right = [self.kept[: place + 1] == self.script[: place + 1] for place in range(start, len(self.kept))]
        return [
            self.script[start + offset + 1] if well and start + offset + 1 < len(self.script) else 700 + offset
            for offset, well in enumerate(right)
        ]


class Fixed(Draft):
    """Guesses that a test lays down: the script with every n-th token wrong."""

    def __init__(self, script: Sequence[int], count: int, wrong_every: int) -> None:
        super().__init__(Drafter([]), [], count)
        self._script = [*script]
        self._wrong_every = wrong_every

    def guesses(self, count: int) -> list[int]:
        told = len(self._said)
        coming = (self._script[told : told + count] + [3] * count)[:count]
        return [-1 if (told + place) % self._wrong_every == 0 else token for place, token in enumerate(coming)]


SCRIPTS = {
    "ends": [5, 6, 7, 8, 5, 5, 6, 1, 2, 3, 4, END],
    "ends-at-once": [END],
    "ends-second": [5, END],
    "says-the-end-twice": [5, END, 6, END],
    "never-ends": list(range(10, 60)),
}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("wrong_every", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("script", SCRIPTS)
def test_tokens_are_the_decoders_whatever_is_guessed(script: str, wrong_every: int, count: int) -> None:
    said = SCRIPTS[script]
    ended = said.index(END) if END in said else len(said)
    for budget in (1, 2, 3, 7, 11, 12, 13, len(said)):
        room = min(budget, len(said))
        decoder = Counting(said, capacity=4 + room - 1)  # not one place more than a loop without guesses needs
        reply = GreedyReply(decoder, decoder, end_token_ids=[END], draft=Fixed(said, count, wrong_every))
        got = [*reply.tokens(said[0], room)]
        assert got == said[: min(ended, room)], (budget, decoder.widths)
        assert reply.finished == (ended < room)
        assert decoder.kept == said[: len(decoder.kept)], "what is left in the cache was said"
        assert reply.counts.accepted <= reply.counts.drafted == sum(decoder.widths) - reply.counts.runs
        assert max(decoder.widths, default=0) <= min(count + 1, room)


def test_right_guesses_save_runs_and_wrong_ones_cost_none() -> None:
    said = SCRIPTS["never-ends"]
    runs = {}
    for name, wrong_every in (("right", 1000), ("wrong", 1)):
        decoder = Counting(said)
        reply = GreedyReply(decoder, decoder, end_token_ids=[END], draft=Fixed(said, 5, wrong_every))
        assert [*reply.tokens(said[0], 43)] == said[:43]
        runs[name] = reply.counts.runs
    assert runs == {"right": 7, "wrong": 42}  # the first token is the prompt's: 42 are left, at most 6 and 1 a run
    plain = Counting(said)
    reply = GreedyReply(plain, plain, end_token_ids=[END], draft=None)
    assert [*reply.tokens(said[0], 43)] == said[:43]
    assert (reply.counts.runs, reply.counts.drafted) == (42, 0)


def test_the_decoder_runs_only_for_tokens_that_are_asked_for() -> None:
    decoder = Counting(SCRIPTS["never-ends"])
    tokens = GreedyReply(decoder, decoder, end_token_ids=[END], draft=Fixed(decoder.script, 3, 1000)).tokens(10, 50)
    assert [next(tokens) for _ in range(5)] == [10, 11, 12, 13, 14]
    assert len(decoder.widths) == 1, "four came at once"


class TestDrafter:
    def test_guesses_what_followed_the_longest_context(self) -> None:
        drafter = Drafter([[1, 2, 3, 4], [9, 2, 3, 5], [9, 2, 3, 5]])
        assert drafter.guess([1, 2, 3])[0] == 4
        assert drafter.guess([7, 2, 3])[0] == 5
        assert drafter.guess([7, 7, 7]) == (None, 0.0)
        assert drafter.guess([]) == (None, 0.0)
        sure, unsure = drafter.guess([9, 2, 3])[1], drafter.guess([2, 3])[1]
        assert 0 < unsure < sure < 1

    def test_forgets_what_it_learnt_and_keeps_what_it_was_made_with(self) -> None:
        drafter = Drafter([[1, 2, 3]])
        drafter.learn([1, 2, 7, 7], 2)
        drafter.learn([1, 2, 7, 7], 2)
        assert drafter.guess([1, 2])[0] == 7
        drafter.forget()
        assert drafter.guess([1, 2])[0] == 3
        assert drafter.guess([7]) == (None, 0.0)

    def test_its_memory_is_bounded(self) -> None:
        drafter = Drafter([[1, 2, 3]])
        for start in range(0, 3 * MAX_CONTEXTS, 100):
            drafter.learn([*range(start, start + 100)], 0)
            assert len(drafter._follows) <= MAX_CONTEXTS + 300
        assert drafter.guess([1, 2])[0] == 3

    def test_goes_on_with_what_the_decoder_said_behind_a_wrong_guess(self) -> None:
        draft = Draft(Drafter([[1, 2, 3, 4]] * 5), [1], 3)
        draft.take([50], [60, 61])
        assert draft.guesses(3) == [60, 61, 61], "nothing counted: the decoder's own, then any"
        draft.take([1], [60, 61])
        assert draft.guesses(3) == [2, 3, 4], "what is certain goes first"
        assert draft.guesses(0) == []

    @pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
    def test_knows_the_skeleton_of_a_format(self, form: AnswerFormat) -> None:
        """By characters: an answer's keys and brackets come from the drafter, numbers need not."""
        drafter = Drafter.of_format(form, lambda text: [ord(letter) for letter in text], END)
        box, points = (61, 22, 233, 104), [(100, 50)] * form.max_points
        reply = [*map(ord, form.assistant_text("", [(box, points)])), END]
        right = sum(drafter.guess(reply[:place])[0] == reply[place] for place in range(1, len(reply)))
        assert right > 0.7 * len(reply)

    @pytest.mark.parametrize("form", [VISION_REASONER, SEG_ZERO], ids=lambda form: form.name)
    def test_made_up_replies_are_answers(self, form: AnswerFormat) -> None:
        from segzero_rt.answer import AnswerStatus
        from segzero_rt.answer_parser import parse_answer

        statuses = {
            parse_answer(text, answer_format=form, input_size_hw=(280, 280), source_size_hw=(280, 280)).status
            for text in made_up_replies(form)
        }
        assert statuses <= {AnswerStatus.OK, AnswerStatus.NONE_FOUND, AnswerStatus.MALFORMED}
        assert AnswerStatus.NONE_FOUND in statuses


@pytest.fixture(scope="module")
def load(exported_policy: tuple[PolicyExport, Path]) -> Callable[..., Policy]:
    """Loads the exported policy, of both flavours in turn, with other options or sizes."""
    from policy_checkpoints import policy_bundle

    export, folder = exported_policy

    def make(draft_tokens: int | None, **sizes: object) -> Policy:
        changed = replace(export, manifest=replace(export.manifest, **sizes))
        return Policy.load(policy_bundle(changed, folder), backend="cpu", threads=1, draft_tokens=draft_tokens)

    return make


QUESTIONS = ["the red cup", "x", "what cuts paper?", "Größe & 物体 🙂"]


def test_replies_do_not_depend_on_guesses(load: Callable[..., Policy]) -> None:
    """Random weights say hard things to guess; asked twice, they are all remembered."""
    from policy_checkpoints import random_picture

    without, drafts = load(0), {count: load(count) for count in (None, 1, 3, 11)}
    saved: dict[int | None, int] = {}
    for seed in range(3):
        picture = random_picture(seed)
        for question in QUESTIONS:
            expected = without.answer(picture, question)
            assert expected.counts.drafted == 0
            for count, policy in drafts.items():
                view = policy.look(picture)
                told: list[str] = []
                first = policy.ask(view, question)
                again = policy.ask(view, question, on_token=told.append)
                assert first.token_ids == again.token_ids == expected.token_ids, (question, count)
                assert first.text == again.text == "".join(told) == expected.text
                assert first.finished == again.finished == expected.finished
                assert again.counts.accepted <= again.counts.drafted
                saved[count] = saved.get(count, 0) + expected.counts.runs - again.counts.runs
    assert min(saved.values()) > 10, saved
    assert drafts[None]._draft_tokens == DRAFT_TOKENS


@pytest.mark.parametrize("room", [1, 2, 3, 6, 7, 12])
def test_guesses_end_with_the_context(load: Callable[..., Policy], room: int) -> None:
    """A cache that is full before, at or behind the end of a run of guesses."""
    from policy_checkpoints import random_picture

    picture, roomy = random_picture(9), load(0)
    expected = roomy.answer(picture, "x").token_ids[: room + 1]
    prompt = len(roomy.prefix_tokens) + len(roomy.question_tokens("x"))
    narrow = load(5, max_length=prompt + room)
    for _ in range(2):
        assert narrow.answer(picture, "x").token_ids == expected
    assert narrow.ask(narrow.look(picture), "x", max_new_tokens=room).token_ids == expected[:room]


def test_every_budget_cuts_the_same_reply(load: Callable[..., Policy]) -> None:
    from policy_checkpoints import random_picture

    policy = load(5)
    view = policy.look(random_picture(6))
    whole = policy.ask(view, "the red cup", max_new_tokens=24)
    for budget in range(1, 24):
        short = policy.ask(view, "the red cup", max_new_tokens=budget)
        assert short.token_ids == whole.token_ids[:budget] and not short.finished
        assert policy.ask(view, "the red cup", max_new_tokens=24).token_ids == whole.token_ids, "no trace is left"


def test_an_end_among_accepted_guesses_ends_the_reply(load: Callable[..., Policy]) -> None:
    from policy_checkpoints import random_picture

    picture, plain = random_picture(7), load(0)
    tokens = plain.answer(picture, "x").token_ids
    for end in [place for place in range(1, len(tokens)) if tokens[place] not in tokens[:place]][:8]:
        policy = load(5, eos_token_ids=(*plain.manifest.eos_token_ids, tokens[end]))
        policy._drafters[policy.default_format] = Drafter([[*tokens, END]] * 3)  # guesses run beyond the end
        generation = policy.answer(picture, "x")
        assert generation.finished and generation.token_ids == tokens[:end]
        assert policy.answer(picture, "x").token_ids == tokens[:end]


def test_cancelling_stops_inside_accepted_guesses(load: Callable[..., Policy]) -> None:
    from policy_checkpoints import random_picture

    policy = load(5)
    view = policy.look(random_picture(8))
    whole = policy.ask(view, "the red cup", max_new_tokens=20)
    for asked in range(1, 15):
        answers = iter([False] * asked + [True] * 20)
        stopped = policy.ask(view, "the red cup", max_new_tokens=20, cancelled=answers.__next__)
        assert stopped.cancelled and not stopped.finished
        assert stopped.token_ids == whole.token_ids[:asked]
    assert policy.ask(view, "the red cup", max_new_tokens=20).token_ids == whole.token_ids


def test_no_guesses_where_rows_depend_on_each_other(
    load: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    from policy_checkpoints import random_picture

    policy, plain = load(5), load(0)
    monkeypatch.setattr("segzero_rt.policy.rows_are_independent", lambda *_: False)
    for _ in range(2):
        generation = policy.answer(random_picture(3), "x")
        assert generation.token_ids == plain.answer(random_picture(3), "x").token_ids
        assert generation.counts.drafted == 0 and generation.counts.runs == len(generation.token_ids) - 1


@pytest.mark.parametrize("count", [-1, 65])
def test_impossible_counts_are_refused(load: Callable[..., Policy], count: int) -> None:
    with pytest.raises(BackendError, match="0 to 64 guessed tokens"):
        load(count)
