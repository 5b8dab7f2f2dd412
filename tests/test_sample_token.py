"""sample_token: rules by hand on every build, builds against each other token for token, Random123's known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_builds import BUILDS, COMPILED_BUILDS, DEVICE_BUILDS, kernel_build

from segzero_rt.answer_format import VISION_REASONER
from segzero_rt.answer_grammar import answer_automaton, token_table
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.device_kernels import DeviceKernels
from segzero_rt.kernels.sample_token import DEAD, GrammarTable, philox_words, sample_token, weigh
from segzero_rt.kernels.sample_token_device import DeviceSampler, device_grammar

# Bytes, some longer tokens, one that nothing may say, and one that ends replies.
TOKENS: list[bytes | None] = [
    *(bytes([number]) for number in range(256)),
    *(
        b"<answer>",
        b"[{",
        b'"bbox_2d',
        b'": [',
        b", ",
        b"]}]",
        b"</answer>",
        b"think",
        b"12",
        b"\xe4\xb8",
        b" <",
        b'{"',
    ),
    *(None, None),
]
END = len(TOKENS) - 1
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def grammar() -> GrammarTable:
    return token_table(answer_automaton(VISION_REASONER, (84, 280)), TOKENS, [END])


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernel_build(request.param)


def rows(*logits: list[float]) -> np.ndarray:
    return np.array(logits, np.float32)


GREEDY = [
    ("the largest", [0.0, 3.0, 1.0], 1),
    ("of equals the first", [2.0, 5.0, 5.0], 1),
    ("no number is none", [NAN, 1.0, 2.0], 2),
    ("nothing but none: the first", [NAN, NAN, NAN], 0),
    ("infinite", [INF, 3.0, -INF], 0),
    ("as good as infinite: equals", [3e38, INF, 3.4028235e38], 1),
    ("nothing but minus infinity", [-INF, -INF, -INF], 0),
    ("minus infinity and none", [NAN, -INF, NAN], 1),
    ("zeros of both signs are equal", [-0.0, 0.0, -1.0], 0),
]


@pytest.mark.parametrize(("name", "logits", "token_id"), GREEDY, ids=[row[0] for row in GREEDY])
def test_greedily(name: str, logits: list[float], token_id: int, kernels: Kernels) -> None:
    read = sample_token(rows(logits), kernels=kernels)
    assert (read.token_ids.tolist(), read.states.tolist()) == ([token_id], [0])
    assert (read.token_ids.dtype, read.states.dtype) == (np.int32, np.int32)


def test_at_random_the_shares_are_those_of_softmax(kernels: Kernels) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05, 1e-12], np.float32))
    count = 1200
    batch = np.broadcast_to(logits, (count, 5)).astype(np.float32)
    places = np.arange(count, dtype=np.int32)
    for temperature, top_p, shares in (
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 1.0, [0.6849, 0.2466, 0.0616, 0.0068]),
        (1.0, 0.79, [0.625, 0.375, 0, 0]),
        (1.0, 0.85, [0.5263, 0.3158, 0.1579, 0]),
        (1e-3, 1.0, [1, 0, 0, 0]),
    ):
        read = sample_token(batch, temperature=temperature, top_p=top_p, places=places, kernels=kernels)
        found = np.bincount(read.token_ids, minlength=5)[:4] / count
        np.testing.assert_allclose(found, shares, atol=4 * 0.5 / count**0.5)
        assert (found[np.array(shares) == 0] == 0).all()


def test_top_p_keeps_all_that_are_as_likely_as_the_last(kernels: Kernels) -> None:
    batch = np.zeros((300, 3), np.float32)
    read = sample_token(batch, temperature=1.0, top_p=0.1, places=np.arange(300, dtype=np.int32), kernels=kernels)
    assert set(read.token_ids.tolist()) == {0, 1, 2}


def test_a_reply_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (6, 50)).astype(np.float32)
    seeds, places = rng.integers(0, 1 << 63, 6).astype(np.uint64), np.arange(6, dtype=np.int32)
    both: dict[str, Any] = {"temperature": 0.9, "kernels": kernels}
    together = sample_token(logits, seeds=seeds, places=places, **both).token_ids.tolist()
    alone = [
        sample_token(logits[i : i + 1], seeds=seeds[i : i + 1], places=places[i : i + 1], **both).token_ids[0]
        for i in range(6)
    ]
    assert together == alone
    assert together != sample_token(logits, seeds=seeds + np.uint64(1), places=places, **both).token_ids.tolist()


def test_random_bits_are_philox() -> None:
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    assert philox_words([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_words([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox_words(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_weights_are_powers_of_two() -> None:
    logits = np.linspace(-40, 0, 5001).astype(np.float32)
    weights = weigh(logits, np.float32(0), 1.0).astype(np.float64)
    exact = 2.0 ** (32 + logits.astype(np.float64))
    np.testing.assert_allclose(weights, exact, rtol=4e-7, atol=1)
    assert weights[-1] == 2**32 and (np.diff(weights) >= 0).all() and weights[0] == 0


def said(text: bytes, table: GrammarTable) -> int:
    """The state after some bytes."""
    state = 0
    for byte in text:
        state = int(table.next_state[state, byte])
    return state


def test_a_grammar_by_hand(grammar: GrammarTable, kernels: Kernels) -> None:
    logits = np.zeros((4, len(TOKENS)), np.float32)
    wish = {b: TOKENS.index(b) for b in (b'"bbox_2d', b"[{", b"]}]", b"[")}
    logits[0, [wish[b'"bbox_2d'], wish[b"[{"]]] = 9, 5  # no list has been begun: the next best
    logits[1, END] = 9  # still open
    logits[2, END] = 1  # complete: only the end
    logits[3, 5] = 9  # ended: only the end, again
    states = np.array(
        [
            said(b"<answer>", grammar),
            said(b"<answer>[]", grammar),
            said(b"<answer>[]</answer>", grammar),
            grammar.ended,
        ],
        np.int32,
    )
    read = sample_token(logits, grammar=grammar, states=states, kernels=kernels)
    assert read.token_ids.tolist() == [wish[b"[{"], ord("\n"), END, END]
    assert read.states.tolist() == [said(b"<answer>[{", grammar), said(b"<answer>[]\n", grammar)] + [grammar.ended] * 2


def test_what_is_allowed_and_no_number_is_said_if_nothing_else_is(grammar: GrammarTable, kernels: Kernels) -> None:
    logits = np.full((1, len(TOKENS)), NAN, np.float32)
    states = np.array([said(b"<answer>[]</answer", grammar)], np.int32)
    read = sample_token(logits, grammar=grammar, states=states, temperature=1.0, kernels=kernels)
    assert read.token_ids.tolist() == [ord(">")]


@pytest.mark.parametrize("budget", [20, 21, 30, 49, 60, 200])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_replies_end_within_their_budget(
    budget: int, temperature: float, grammar: GrammarTable, kernels: Kernels
) -> None:
    """Whatever the logits say, the reply is whole: 20 tokens are the shortest answer, byte by byte."""
    rng = np.random.default_rng(budget)
    states, text = np.zeros(3, np.int32), [b"", b"", b""]
    for place in range(budget):
        logits = rng.normal(0, 3, (3, len(TOKENS))).astype(np.float32)
        logits[:, END] = -50
        read = sample_token(
            logits,
            grammar=grammar,
            states=states,
            steps_left=np.full(3, budget - place, np.int32),
            temperature=temperature,
            seeds=np.arange(3).astype(np.uint64),
            places=np.full(3, place, np.int32),
            kernels=kernels,
        )
        states = read.states
        text = [one + (TOKENS[number] or b"") for one, number in zip(text, read.token_ids.tolist(), strict=True)]
    assert (states == grammar.ended).all(), text
    automaton = answer_automaton(VISION_REASONER, (84, 280))
    assert all(automaton.accepts(one) for one in text)


def test_a_budget_that_never_sufficed_is_left_aside(grammar: GrammarTable, kernels: Kernels) -> None:
    logits = np.zeros((1, len(TOKENS)), np.float32)
    logits[0, ord("x")] = 1
    read = sample_token(logits, grammar=grammar, steps_left=np.array([5], np.int32), kernels=kernels)
    assert read.token_ids.tolist() == [ord("x")]


@pytest.fixture(params=COMPILED_BUILDS)
def compiled(request: pytest.FixtureRequest) -> Kernels:
    return kernel_build(request.param)


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 32, 33, 270, 5000])
def test_the_builds_agree_without_a_grammar(vocabulary: int, compiled: Kernels) -> None:
    rng = np.random.default_rng(vocabulary)
    for _ in range(20):
        logits = rng.normal(0, 10 ** rng.uniform(-3, 2), (8, vocabulary)).astype(np.float32)
        logits[rng.random(logits.shape) < 0.1] = rng.choice([NAN, INF, -INF, 0.0])
        assert_same(
            logits,
            compiled,
            temperature=float(rng.choice([0.0, 1e-30, 0.3, 1.0, 50.0])),
            top_p=float(rng.choice([1.0, 0.9, 0.5, 1e-9])),
            seeds=rng.integers(0, 1 << 63, 8).astype(np.uint64),
            places=rng.integers(0, 1 << 30, 8).astype(np.int32),
        )


def test_the_builds_agree_within_the_grammar(grammar: GrammarTable, compiled: Kernels) -> None:
    rng = np.random.default_rng(7)
    for _ in range(40):
        logits = rng.normal(0, 3, (8, len(TOKENS))).astype(np.float32)
        logits[rng.random(logits.shape) < 0.1] = NAN
        assert_same(
            logits,
            compiled,
            grammar=grammar,
            states=rng.integers(0, grammar.ended + 1, 8).astype(np.int32),
            steps_left=rng.integers(0, 70, 8).astype(np.int32),
            temperature=float(rng.choice([0.0, 1.0])),
            top_p=float(rng.choice([1.0, 0.7])),
            seeds=rng.integers(0, 1 << 63, 8).astype(np.uint64),
        )


def assert_same(logits: np.ndarray, compiled: Kernels, **arguments: Any) -> None:
    found, reference = (
        sample_token(logits, kernels=build, **arguments) for build in (compiled, resolve_kernels("reference"))
    )
    np.testing.assert_array_equal(found.token_ids, reference.token_ids)
    np.testing.assert_array_equal(found.states, reference.states)


ONE_ROW = np.zeros((1, 270), np.float32)


@pytest.mark.parametrize(
    ("name", "logits", "change", "message"),
    [
        ("double precision", ONE_ROW.astype(np.float64), {}, "float32"),
        ("one row without its axis", ONE_ROW[0], {}, r"\[B, V\]"),
        ("no tokens", np.zeros((1, 0), np.float32), {}, r"\[B, V\]"),
        ("a temperature below zero", ONE_ROW, {"temperature": -1.0}, "temperature"),
        ("a temperature that is no number", ONE_ROW, {"temperature": NAN}, "temperature"),
        ("nothing kept", ONE_ROW, {"top_p": 0.0}, "top_p"),
        ("more than all kept", ONE_ROW, {"top_p": 1.5}, "top_p"),
        ("seeds for two", ONE_ROW, {"seeds": np.zeros(2, np.uint64)}, "seeds"),
        ("signed seeds", ONE_ROW, {"seeds": np.zeros(1, np.int64)}, "uint64"),
        ("another vocabulary", ONE_ROW[:, :99], {"grammar": True}, "270 tokens"),
        ("a state beyond the last", ONE_ROW, {"grammar": True, "states": np.array([60000], np.int32)}, "states from 0"),
    ],
)
def test_what_the_caller_must_mend(
    name: str, logits: np.ndarray, change: dict[str, Any], message: str, grammar: GrammarTable, kernels: Kernels
) -> None:
    arguments = {key: grammar if key == "grammar" else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        sample_token(logits, kernels=kernels, **arguments)


def test_no_rows_have_their_shapes(grammar: GrammarTable, kernels: Kernels) -> None:
    read = sample_token(np.zeros((0, len(TOKENS)), np.float32), grammar=grammar, kernels=kernels)
    assert (read.token_ids.shape, read.states.shape) == ((0,), (0,))


def test_tables_that_contradict_themselves_are_refused(grammar: GrammarTable) -> None:
    from dataclasses import replace

    beyond = grammar.next_state.copy()
    beyond[0, 0] = grammar.ended + 1
    for change in (
        {"next_state": beyond},
        {"next_state": np.full((1, 256), DEAD, np.uint16)},
        {"allowed": grammar.allowed[:, :-1]},
        {"token_bytes": grammar.token_bytes[:-1]},
        {"token_offsets": grammar.token_offsets + 1},
    ):
        with pytest.raises(ValueError, match="expected"):
            replace(grammar, **change)


def device_kernels(name: str) -> DeviceKernels:
    kernels = kernel_build(name).device
    assert kernels is not None
    return kernels


@pytest.mark.parametrize("build", DEVICE_BUILDS)
def test_replies_go_on_upon_the_device_as_one_by_one(build: str, grammar: GrammarTable) -> None:
    """Thirty tokens of three replies without a wait, against the reference token by token."""
    kernels = device_kernels(build)
    device = kernels.device
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (30, 3, len(TOKENS))).astype(np.float32)
    states, left = np.array([0, 5, grammar.ended], np.int32), np.array([40, 1000, 2], np.int32)
    seeds, places = rng.integers(0, 1 << 63, 3).astype(np.uint64), np.array([0, 7, 1 << 20], np.int32)
    sampler = DeviceSampler(
        kernels, 3, len(TOKENS), grammar=device_grammar(device, grammar), temperature=0.8, top_p=0.95
    )
    resident, said = device.to_device(logits), device.empty((30, 3), np.int32)
    sampler.start(states=states, steps_left=left, seeds=seeds, places=places)
    sampler.step(resident.view(logits.shape[1:]))  # compiles and loads
    sampler.start(states=states, steps_left=left, seeds=seeds, places=places)
    waits, allocations = device.num_host_waits, device.num_allocations
    for index in range(30):
        sampler.step(resident.view(logits.shape[1:], offset_bytes=index * logits[0].nbytes))
        device.copy(sampler.token_ids, said.view((3,), offset_bytes=index * 12))
    assert (device.num_host_waits, device.num_allocations) == (waits, allocations), "nothing was waited for"
    tokens, after, end_left, end_places = device.to_host(said, sampler.states, sampler.steps_left, sampler.places)
    for index in range(30):
        read = sample_token(
            logits[index],
            grammar=grammar,
            states=states,
            steps_left=left - index,
            places=places + index,
            seeds=seeds,
            temperature=0.8,
            top_p=0.95,
            kernels=resolve_kernels("reference"),
        )
        states = read.states
        assert tokens[index].tolist() == read.token_ids.tolist(), index
    assert after.tolist() == states.tolist()
    assert (end_left - left + 30).tolist() == (end_places - places - 30).tolist() == [0, 0, 0]


@pytest.mark.parametrize("build", DEVICE_BUILDS)
def test_a_sampler_refuses_what_does_not_fit(build: str, grammar: GrammarTable) -> None:
    kernels = device_kernels(build)
    device = kernels.device
    tables = device_grammar(device, grammar)
    assert tables is device_grammar(device, grammar), "copied once"
    for change in ({"temperature": -1.0}, {"top_p": 0.0}, {"vocab_size": 99}):
        with pytest.raises(ValueError, match="expected"):
            DeviceSampler(kernels, **{"batch_size": 2, "vocab_size": len(TOKENS), "grammar": tables, **change})
    sampler = DeviceSampler(kernels, 2, len(TOKENS), grammar=tables)
    for wrong in (device.empty((1, len(TOKENS)), np.float32), device.empty((2, len(TOKENS)), np.float16)):
        with pytest.raises(ValueError, match="logits"):
            sampler.step(wrong)
