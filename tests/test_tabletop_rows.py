"""Tabletop questions as training rows: whose turn it is, and a folder that grows where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs segzero-rt[train]")

from segzero_rt.errors import DatasetError
from training.grpo_presets import TABLETOP_KINDS
from training.rows import ROWS_NAME, read_rows
from training.tabletop_rows import build_tabletop_rows


@pytest.mark.parametrize(
    ("split", "kinds", "expected"),
    [
        pytest.param("train", (), ["name", "attribute", "relation", "several"], id="the split's own order"),
        pytest.param("train", ("none", "function"), ["none", "function", "none", "function"], id="in turn"),
        pytest.param("train", ("name", "name", "none"), ["name", "name", "none", "name"], id="a kind twice"),
        pytest.param("ood_wording", ("consequence",), ["consequence"] * 4, id="one kind of a split"),
    ],
)
def test_rows_take_turns(tmp_path: Path, split: str, kinds: tuple[str, ...], expected: list[str]) -> None:
    build_tabletop_rows(tmp_path, split=split, seed=3, num_rows=4, kinds=kinds)
    rows = read_rows(tmp_path)
    assert [row.kind for row in rows] == expected
    assert len({row.row_id for row in rows}) == 4, "no question comes twice"


def test_a_folder_grows_to_what_it_would_have_been(tmp_path: Path) -> None:
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    kinds = ("none", "function", "name")
    build_tabletop_rows(whole, split="train", seed=3, num_rows=4, kinds=kinds)
    build_tabletop_rows(grown, split="train", seed=3, num_rows=2, kinds=kinds)
    path = grown / ROWS_NAME
    path.write_bytes(path.read_bytes()[:-7])  # stopped in the middle of a line
    build_tabletop_rows(grown, split="train", seed=3, num_rows=4, kinds=kinds)
    assert path.read_bytes() == (whole / ROWS_NAME).read_bytes()


@pytest.mark.slow  # each process imports the package anew
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_change_nothing_in_what_is_written(tmp_path: Path, processes: int) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    kinds = ("none", "function", "name", "several", "consequence", "compositional")
    build_tabletop_rows(alone, split="train", seed=3, num_rows=36, kinds=kinds)
    build_tabletop_rows(together, split="train", seed=3, num_rows=2, kinds=kinds)
    build_tabletop_rows(together, split="train", seed=3, num_rows=36, kinds=kinds, processes=processes)
    written = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in (alone, together)
    ]
    assert len(written[0]) == 37 and written[0] == written[1]


@pytest.mark.parametrize(
    ("split", "seed", "kinds"),
    [
        pytest.param("validation", 3, ("name",), id="another split"),
        pytest.param("train", 4, ("name",), id="another seed"),
        pytest.param("train", 3, ("none",), id="other kinds"),
    ],
)
def test_rows_of_another_choice_stay(tmp_path: Path, split: str, seed: int, kinds: tuple[str, ...]) -> None:
    build_tabletop_rows(tmp_path, split="train", seed=3, num_rows=1, kinds=("name",))
    before = (tmp_path / ROWS_NAME).read_bytes()
    with pytest.raises(DatasetError, match=f"{split} and seed {seed} by kind .*train-3-0.*rendered.*another folder"):
        build_tabletop_rows(tmp_path, split=split, seed=seed, num_rows=2, kinds=kinds)
    assert (tmp_path / ROWS_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [b"\0" * 40, b"{", b"[]", b"{}", b"5", b"\xff"],
    ids=["nulls", "half", "a list", "no id", "a number", "bytes"],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / ROWS_NAME).write_bytes(b'{"row_id": "train-3-000000"}\n' + line + b"\n")
    with pytest.raises(DatasetError, match=rf"{ROWS_NAME}:2: expected a rendered row.*remove that folder"):
        build_tabletop_rows(tmp_path, split="train", seed=3, num_rows=2)


@pytest.mark.parametrize(
    ("split", "kinds"),
    [
        pytest.param("train", ("name", "shape"), id="no such kind"),
        pytest.param("ood_wording", ("name",), id="not in this split"),
    ],
)
def test_kinds_that_a_split_lacks_are_refused(tmp_path: Path, split: str, kinds: tuple[str, ...]) -> None:
    with pytest.raises(DatasetError, match="kinds of question"):
        build_tabletop_rows(tmp_path, split=split, seed=3, num_rows=1, kinds=kinds)


def test_the_preset_asks_most_about_what_the_base_never_saw(tmp_path: Path) -> None:
    build_tabletop_rows(tmp_path, split="train", seed=3, num_rows=len(TABLETOP_KINDS), kinds=TABLETOP_KINDS)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / ROWS_NAME).read_text().splitlines()]
    unseen = sum(kind in ("function", "consequence", "compositional") for kind in kinds)
    assert unseen > len(kinds) / 2
    assert set(kinds) >= {"name", "attribute", "relation", "several", "none"}
