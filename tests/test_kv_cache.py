"""The cache: in pieces or at once, alone or in a batch, used again or fresh, the decoder says the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="writes checkpoints with transformers")
pytest.importorskip("transformers", reason="writes checkpoints with transformers")

from policy_checkpoints import RUNNABLE_FLAVOURS, write_checkpoint

from export.policy_checkpoint import PolicyCheckpoint
from export.policy_decoder import build_decoder
from export.policy_embedding import write_token_table
from segzero_rt.graph import Graph
from segzero_rt.kv_cache import CacheSizes, KVCache, ReturnedRowsCache
from segzero_rt.positions import MropeTable, PictureSpan

CAPACITY = 64
PICTURE = PictureSpan(start=3, grid_hw=(3, 4))
LENGTH = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    folder = tmp_path_factory.mktemp("cache") / "hf"
    write_checkpoint(folder)
    return PolicyCheckpoint(folder)


@pytest.fixture(scope="module", params=RUNNABLE_FLAVOURS)
def decoder(
    request: pytest.FixtureRequest, checkpoint: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Graph:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_token_table(checkpoint, folder, storage="float16")
    builder = build_decoder(checkpoint, flavour=request.param, storage="float16", max_length=CAPACITY)
    builder.save(folder / "decoder.onnx")
    return Graph.load(folder / "decoder.onnx", builder.spec, backend="cpu", threads=1)


def new_cache(decoder: Graph, checkpoint: PolicyCheckpoint, *, batch: int = 1) -> KVCache:
    text = checkpoint.text
    table = MropeTable(
        head_dim=text.head_dim, theta=text.rope_theta, mrope_section=text.mrope_section, max_length=CAPACITY
    )
    sizes = CacheSizes(
        num_layers=text.num_layers,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )
    return KVCache.create(decoder, sizes, table, PICTURE, batch=batch)


def embeds(batch: int = 1, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, length, 64)).astype(np.float32)


def all_rows(length: int, batch: int = 1) -> np.ndarray:
    return np.tile(np.arange(length, dtype=np.int64), (batch, 1))


def at_once(decoder: Graph, checkpoint: PolicyCheckpoint, tokens: np.ndarray) -> np.ndarray:
    cache = new_cache(decoder, checkpoint, batch=len(tokens))
    return cache.extend(tokens, all_rows(tokens.shape[1], len(tokens)))


@pytest.mark.parametrize("cuts", [[20], [1], [39], [5, 6, 7], list(range(1, LENGTH))], ids=str)
def test_a_prefill_in_pieces_equals_one(decoder: Graph, checkpoint: PolicyCheckpoint, cuts: list[int]) -> None:
    tokens = embeds()
    cache = new_cache(decoder, checkpoint)
    pieces = [cache.extend(piece, all_rows(piece.shape[1])) for piece in np.split(tokens, cuts, axis=1)]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), at_once(decoder, checkpoint, tokens), atol=2e-4)
    assert cache.lengths.tolist() == [LENGTH]


def test_steps_equal_a_prefill(decoder: Graph, checkpoint: PolicyCheckpoint) -> None:
    tokens = embeds()
    cache = new_cache(decoder, checkpoint)
    cache.extend(tokens[:, :10], np.zeros((1, 0), np.int64))
    got = []
    for place in range(10, LENGTH):
        cache.next_embeds[:] = tokens[:, place : place + 1]
        got.append(cache.step().copy())
    np.testing.assert_allclose(np.concatenate(got, axis=1), at_once(decoder, checkpoint, tokens)[:, 10:], atol=2e-4)


def test_steps_of_several_tokens_equal_a_prefill(decoder: Graph, checkpoint: PolicyCheckpoint) -> None:
    """Of several widths in turn, over rows that were written, taken back and written anew, with runs between."""
    tokens, wrong = embeds(), embeds(seed=7)
    cache = new_cache(decoder, checkpoint)
    cache.extend(tokens[:, :10], np.zeros((1, 0), np.int64))
    got, place = [], 10
    for width, kept in ((3, 2), (3, 3), (1, 1), (6, 1), (3, 1), (1, 1), (6, 6), (2, 0), (6, 5), (4, 4), (6, 6)):
        cache.step_embeds(width)[:] = wrong[:, place : place + width]
        cache.step_embeds(width)[:, :kept] = tokens[:, place : place + kept]
        got.append(cache.step(width)[:, :kept].copy())
        place += kept
        cache.truncate(place)
        if width == 1:  # a run of as many tokens that is no step
            cache.extend(wrong[:, :1], np.zeros((1, 1), np.int64))
            cache.truncate(place)
    assert place == LENGTH
    np.testing.assert_allclose(np.concatenate(got, axis=1), at_once(decoder, checkpoint, tokens)[:, 10:], atol=2e-4)
    cache.extend(tokens[:, : CAPACITY - LENGTH], np.zeros((1, 0), np.int64))
    with pytest.raises(ValueError, match="at most 64"):
        cache.step(1)
    with pytest.raises(ValueError, match="steps of one token for a batch of 3"):
        new_cache(decoder, checkpoint, batch=3).step(2)


def test_logits_are_of_the_rows_asked_for(decoder: Graph, checkpoint: PolicyCheckpoint) -> None:
    tokens = embeds()
    rows = np.array([[39, 0, 7, 7]])
    got = new_cache(decoder, checkpoint).extend(tokens, rows)
    np.testing.assert_allclose(got, at_once(decoder, checkpoint, tokens)[:, rows[0]], atol=2e-4)
    none = new_cache(decoder, checkpoint).extend(tokens, np.zeros((1, 0), np.int64))
    assert none.shape == (1, 0, checkpoint.text.vocab_size)


def test_rows_of_a_batch_have_their_own_lengths(decoder: Graph, checkpoint: PolicyCheckpoint) -> None:
    """Rows of 20, 26 and 33 tokens, padded at the right to 33, then two steps and a piece of three tokens each."""
    tokens, lengths = embeds(batch=3, seed=5), np.array([20, 26, 33])
    cache = new_cache(decoder, checkpoint, batch=3)
    padded = tokens[:, :33].copy()
    for row, length in enumerate(lengths):
        padded[row, length:] = 1e3  # must not be seen
    got = [cache.extend(padded, (lengths - 1)[:, None], new_lengths=lengths)]
    for step in range(2):
        cache.next_embeds[:, 0] = tokens[np.arange(3), lengths + step]
        got.append(cache.step().copy())
    piece = np.stack([tokens[row, length + 2 : length + 5] for row, length in enumerate(lengths)])
    got.append(cache.extend(piece, all_rows(3, 3)))
    for row, length in enumerate(lengths):
        alone = at_once(decoder, checkpoint, tokens[row : row + 1, : length + 5])[0]
        np.testing.assert_allclose(np.concatenate(got, axis=1)[row], alone[length - 1 :], atol=5e-4)
    assert cache.lengths.tolist() == (lengths + 5).tolist()


def test_a_shortened_cache_equals_a_fresh_one(decoder: Graph, checkpoint: PolicyCheckpoint) -> None:
    tokens, other = embeds(), embeds(seed=9)
    cache = new_cache(decoder, checkpoint)
    cache.extend(tokens[:, :20], np.zeros((1, 0), np.int64))
    for _ in range(2):
        cache.extend(other[:, 20:], all_rows(20))  # another question, longer than the next
        for _ in range(3):
            cache.step()
        cache.truncate(20)
        got = cache.extend(tokens[:, 20:30], all_rows(10))
        np.testing.assert_allclose(got, at_once(decoder, checkpoint, tokens[:, :30])[:, 20:], atol=2e-4)
        cache.truncate(20)


def test_a_full_cache_refuses_more(decoder: Graph, checkpoint: PolicyCheckpoint) -> None:
    cache = new_cache(decoder, checkpoint)
    cache.extend(embeds(length=CAPACITY - 1), np.zeros((1, 0), np.int64))
    with pytest.raises(ValueError, match="at most 64"):
        cache.extend(embeds(length=2), np.zeros((1, 0), np.int64))
    assert cache.lengths.tolist() == [CAPACITY - 1], "a refused call changes nothing"
    cache.step()
    with pytest.raises(ValueError, match="at most 64"):
        cache.step()


@pytest.mark.parametrize("length", [-1, 11])
def test_a_cache_is_only_ever_shortened(decoder: Graph, checkpoint: PolicyCheckpoint, length: int) -> None:
    cache = new_cache(decoder, checkpoint)
    cache.extend(embeds(length=10), np.zeros((1, 0), np.int64))
    with pytest.raises(ValueError, match="from 0 to 10"):
        cache.truncate(length)


def test_no_copy_of_the_cache_per_token(decoder: Graph, checkpoint: PolicyCheckpoint) -> None:
    """The buffers of the first step are those of the last."""
    cache = new_cache(decoder, checkpoint)
    cache.extend(embeds(length=20), np.zeros((1, 0), np.int64))
    before = [buffer.ctypes.data for buffer in cache._buffers]
    bound = None
    for _ in range(10):
        cache.step()
        assert bound is None or cache._steps[1].bound is bound, "bound once"
        bound = cache._steps[1].bound
    assert [buffer.ctypes.data for buffer in cache._buffers] == before
    text = checkpoint.text
    assert cache.num_bytes == sum(buffer.nbytes for buffer in cache._buffers) or isinstance(cache, ReturnedRowsCache)
    assert cache.num_bytes == 2 * text.num_layers * text.num_kv_heads * 64 * text.head_dim * 4
    assert cache.mrope_delta == 4 - 12


def test_a_growing_buffer_keeps_its_rows(
    decoder: Graph, checkpoint: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReturnedRowsCache, "STRIDE", 8)
    tokens = embeds(length=60)
    cache = new_cache(decoder, checkpoint)
    got = [cache.extend(tokens[:, :13], all_rows(13))]
    for place in range(13, 60):
        cache.next_embeds[:] = tokens[:, place : place + 1]
        got.append(cache.step().copy())
    np.testing.assert_allclose(np.concatenate(got, axis=1), at_once(decoder, checkpoint, tokens), atol=2e-4)
