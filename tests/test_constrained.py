"""Replies held to the grammar: they can be read and end in time, whatever is guessed; what is allowed stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from segzero_rt.answer_format import FORMATS, VISION_REASONER
from segzero_rt.answer_grammar import answer_automaton, token_table
from segzero_rt.bundle import Bundle
from segzero_rt.constrained import AnswerConstraint
from segzero_rt.errors import QuestionError
from segzero_rt.image import load_image
from segzero_rt.kernels.sample_token import GrammarTable
from segzero_rt.policy import Policy

if TYPE_CHECKING:
    from export.policy import PolicyExport

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "tabletop.png"
TOKENS: list[bytes | None] = [*(bytes([number]) for number in range(256)), b"<answer>", b'{"', b"[{", None]
END = len(TOKENS) - 1


@pytest.fixture(scope="module")
def grammar() -> GrammarTable:
    return token_table(answer_automaton(VISION_REASONER, (84, 280)), TOKENS, [END])


def wishes(*tokens: bytes | int) -> np.ndarray:
    """Logits, one row for each token that a decoder likes best; `[{` comes second everywhere."""
    logits = np.zeros((len(tokens), len(TOKENS)), np.float32)
    logits[:, TOKENS.index(b"[{")] = 1
    for row, token in zip(logits, tokens, strict=True):
        row[token if isinstance(token, int) else TOKENS.index(token)] = 2
    return logits


def test_the_likeliest_allowed_token_is_said(grammar: GrammarTable) -> None:
    constraint = AnswerConstraint(grammar, [TOKENS.index(b"<answer>")])
    assert constraint.choices(wishes(b'{"'), [], 100) == [TOKENS.index(b"[{")], "the list's bracket comes first"
    assert constraint.choices(wishes(b'"'), [], 100) == [ord('"')]


def test_a_state_goes_as_far_as_the_guesses_are_right(grammar: GrammarTable) -> None:
    told = [TOKENS.index(b"<answer>")]
    wished = wishes(b"[", b"]", b"x", END)
    for guesses, said in (
        ([ord("["), ord("]"), ord("<")], [ord("["), ord("]"), 0, END]),
        ([ord("["), ord("{"), ord("<")], [ord("["), ord("]"), ord("x"), END]),
        ([ord("{"), ord("]"), ord("<")], [ord("["), ord("]"), ord("x"), END]),
    ):
        constraint = AnswerConstraint(grammar, told)
        got = constraint.choices(wished, guesses, 100)
        said[2] = said[2] or ord("\n")  # of what may follow "[]" the first; the guess was "<"
        assert got == said
        right = 1 + next((i for i, (one, other) in enumerate(zip(guesses, got, strict=False)) if one != other), 3)
        alone, after = AnswerConstraint(grammar, [*told, *got[:right]]), wishes(b"x")
        assert constraint.choices(after, [], 100) == alone.choices(after, [], 100)


def test_the_way_to_the_end_is_taken_in_time(grammar: GrammarTable) -> None:
    constraint, said = AnswerConstraint(grammar), []
    for left in range(30, 0, -1):
        said += constraint.choices(wishes(b"x"), [], left)
        if said[-1] == END:
            break
    text = b"".join(TOKENS[token_id] or b"" for token_id in said)
    assert said[-1] == END and text.startswith(b"xxxxxxxxxx") and len(said) == 30
    assert answer_automaton(VISION_REASONER, (84, 280)).accepts(text)


def test_a_beginning_that_no_answer_follows_is_refused(grammar: GrammarTable) -> None:
    for text in (b"<answer>{", b"<answer>[]</answer>.", b"\xff"):
        with pytest.raises(QuestionError, match="reply_start"):
            AnswerConstraint(grammar, list(text))


@pytest.fixture(scope="module")
def load(exported_policy: tuple[PolicyExport, Path]) -> Callable[..., Policy]:
    """Loads a policy with random weights, of both flavours in turn."""
    from policy_checkpoints import policy_bundle

    export, folder = exported_policy

    def make(draft_tokens: int, **sizes: object) -> Policy:
        changed = replace(export, manifest=replace(export.manifest, **sizes))
        return Policy.load(
            policy_bundle(changed, folder), backend="cpu", threads=1, draft_tokens=draft_tokens, constrained=True
        )

    return make


def test_random_weights_say_readable_answers_whatever_is_guessed(load: Callable[..., Policy]) -> None:
    from policy_checkpoints import random_picture

    policies = [load(count) for count in (0, 1, 5)]
    for budget in (24, 40):
        for known in FORMATS.values():
            automaton = answer_automaton(known, policies[0].manifest.answer_size_hw)
            said = [
                policy.answer(random_picture(budget), "the red cup", answer_format=known, max_new_tokens=budget)
                for policy in policies
            ]
            assert len({generation.token_ids for generation in said}) == 1
            assert all(generation.finished and automaton.accepts(generation.text.encode()) for generation in said)


def test_what_the_shipped_policy_says_well_stays_as_it_is(bundle_path: Path) -> None:
    """And what it misspells can be read. By the grammar as it stands: no parser that forgives."""
    bundle = Bundle.open(bundle_path)
    if bundle.manifest.name != "tabletop":
        pytest.skip("the checkout has no trained bundle yet")
    free, constrained = (Policy.load(bundle, backend="cpu", threads=1, constrained=choice) for choice in (False, True))
    automaton = answer_automaton(VISION_REASONER, bundle.manifest.policy.answer_size_hw)
    picture, same = load_image(PICTURE), 0
    questions = ("the spoon", "dinner is ready to be served, what helps", "the purple unicorn", "all things", "xyz")
    for question in questions:
        one, other = free.answer(picture, question), constrained.answer(picture, question)
        assert other.finished and automaton.accepts(other.text.encode())
        if automaton.accepts(one.text.encode()):
            assert one.token_ids == other.token_ids
            same += 1
    assert same >= 2


def test_a_reply_start_is_part_of_the_answer(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    policy = Policy.load(bundle, backend="cpu", threads=1, constrained=True)
    automaton = answer_automaton(policy.default_format, bundle.manifest.policy.answer_size_hw)
    view = policy.look(load_image(PICTURE))
    reply = policy.ask(view, "the spoon", reply_start="<think> a spoon </think>\n<answer>", max_new_tokens=60)
    assert reply.text.startswith("<think> a spoon") and automaton.accepts(reply.text.encode())
    with pytest.raises(QuestionError, match="reply_start"):
        policy.ask(view, "the spoon", reply_start="<answer>none")


def test_the_command_asks_for_it(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from segzero_rt.cli import main

    command = ["run", str(PICTURE), "the spoon", "--bundle", str(bundle_path), "--threads", "1", "--json"]
    assert main([*command, "--constrained", "--max-new-tokens", "24"]) in (0, 3), "a box without area is possible"
    constrained = json.loads(capsys.readouterr().out)
    assert main([*command, "--max-new-tokens", "24"]) == 3
    assert json.loads(capsys.readouterr().out)["status"] == "truncated"
    assert constrained["status"] != "truncated"
