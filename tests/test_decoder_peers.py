"""The decoder's peers: a checkpoint that all can read, a protocol that all speak, equal replies before any ratio."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decoder_peers
from benchmarks.decoder_peers import PEERS, compare, text_checkpoint


def write_peer(folder: Path, body: str) -> str:
    """A peer's program beside the protocol that it speaks."""
    shutil.copy(PEERS / "worker.py", folder / "worker.py")
    (folder / "peer.py").write_text(f"from worker import serve\n\n{body}\nserve(load)\n")
    return "peer.py"


COUNTS_UP = """
def load(settings):
    print("a library may say anything")
    def generate(prompt, new_tokens):
        yield from range(prompt[-1] + 1, prompt[-1] + 1 + new_tokens)
    return "counter 1.0", generate
"""
ENDS_EARLY = "def load(settings):\n    raise SystemExit('expected a model, got none')\n"


def test_a_peer_tells_version_tokens_and_medians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_peers, "PEERS", tmp_path)
    program = write_peer(tmp_path, COUNTS_UP)
    side = decoder_peers._side(sys.executable, program, {"prompt": [5, 6], "new_tokens": 3}, rounds=2)
    assert side["version"] == "counter 1.0" and side["token_ids"] == [7, 8, 9] and side["rounds"] == 2
    assert side["load_ms"] >= 0 and side["prefill_ms"] >= 0 and side["token_ms"] >= 0
    assert side["answer_ms"] >= side["prefill_ms"]


def test_a_peer_that_cannot_run_is_listed_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_peers, "PEERS", tmp_path)
    side = decoder_peers._side(sys.executable, write_peer(tmp_path, ENDS_EARLY), {}, rounds=1)
    assert side == {"problem": "ended with status 1: expected a model, got none"}


def test_the_text_checkpoint_has_no_pictures_and_the_same_files(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    config = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 64,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope"},
        "vision_config": {"depth": 2},
        "image_token_id": 1,
    }
    (policy / "config.json").write_text(json.dumps(config))
    (policy / "model.safetensors").write_bytes(b"weights")
    for _ in range(2):  # a second time changes nothing
        text = text_checkpoint(policy, tmp_path / "text")
    written = json.loads((text / "config.json").read_text())
    assert written["model_type"] == "qwen2" and written["architectures"] == ["Qwen2ForCausalLM"]
    assert written["hidden_size"] == 64 and written["rope_theta"] == 1e6
    assert not {"vision_config", "image_token_id", "rope_scaling"} & written.keys()
    assert (text / "model.safetensors").read_bytes() == b"weights"


def side(tokens: list[int], token_ms: float = 10.0) -> dict[str, Any]:
    times = {"prefill_ms": 50.0, "token_ms": token_ms, "answer_ms": 50.0 + 2 * token_ms}
    return {"version": "some", "load_ms": 1, "token_ids": tokens, "rounds": 3, **times}


@pytest.mark.parametrize(
    ("tokens", "exact", "equal", "timed"),
    [
        pytest.param([1, 2, 3], True, 3, True, id="same"),
        pytest.param([1, 2, 4], True, 2, False, id="another last token"),
        pytest.param([1, 9, 3], False, 1, True, id="4 bits round their own way"),
        pytest.param([9, 2, 3], False, 0, True, id="another first token"),
    ],
)
def test_peers_are_timed_for_equal_replies_alone(tokens: list[int], exact: bool, equal: int, timed: bool) -> None:
    compared = compare({"segzero": side([1, 2, 3]), "peer": side(tokens, 25.0)}, exact=exact)
    assert compared["segzero"]["equal_tokens"] == 3 and "ratios" not in compared["segzero"]
    peer = compared["peer"]
    assert peer["equal_tokens"] == equal and ("problem" in peer) == (not timed)
    assert peer.get("ratios") == (
        {"prefill_ms": 1.0, "token_ms": 2.5, "answer_ms": pytest.approx(10 / 7)} if timed else None
    )
    assert ("token_ms" in peer) == timed


def test_a_problem_stays_as_it_was_told() -> None:
    compared = compare({"segzero": side([1]), "peer": {"problem": "no such module"}}, exact=True)
    assert compared["peer"] == {"problem": "no such module"}
