"""The pages' tables are what the committed results say, and those are of the bundle that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme_table
from benchmarks.readme_table import (
    REPOSITORY,
    TABLES,
    busy,
    measured_bundle,
    newest,
    newest_of_each,
    rewritten,
    shipped_before,
    shipped_bundle,
)

MARKED = "above\n<!-- one: python -m benchmarks.readme_table -->\nold\n<!-- end of one -->\nbelow\n"


@pytest.mark.parametrize("page", TABLES)
def test_pages_show_what_the_results_say(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert rewritten(text, TABLES[page]) == text, f"{page} and benchmarks/results disagree: run {readme_table.__name__}"


def test_a_changed_figure_is_found() -> None:
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    giou = f"{newest('eval_test300_int8')[1]['giou']:.3f}"
    forged = page.replace(f"| {giou} |", "| 0.999 |", 1)
    assert forged != page and rewritten(forged, TABLES["README.md"]) == page


def test_shown_figures_are_of_the_bundle_that_ships() -> None:
    assert measured_bundle() == dict.fromkeys(measured_bundle(), shipped_bundle()), (
        "other weights were shipped than measured: run the commands under 'After other weights were shipped' in "
        "benchmarks/README.md"
    )


def test_every_table_has_its_place_and_every_place_its_table() -> None:
    for page, tables in TABLES.items():
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        assert text.count(": python -m benchmarks.readme_table -->") == len(tables)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param("nothing", id="no marker"),
        pytest.param(MARKED.replace("end of one", "end"), id="no end"),
        pytest.param(MARKED + MARKED, id="twice"),
        pytest.param("<!-- end of one -->".join(MARKED.split("<!-- end of one -->")[::-1]), id="end before begin"),
    ],
)
def test_refuses_a_page_without_its_markers(page: str) -> None:
    with pytest.raises(ValueError, match="expected one table between"):
        rewritten(page, {"one": lambda _: "new"})


def test_writes_between_the_markers_alone() -> None:
    assert rewritten(MARKED, {"one": lambda _: "new"}) == MARKED.replace("old", "new")


@pytest.mark.parametrize(
    ("load", "more", "said"),
    [
        pytest.param([5.88, 7.0, 7.0], {}, "Taken on a busy machine (load average 5.9 on two cores)", id="busy"),
        pytest.param([5.88, 7.0, 7.0], {"scheduling_group_nice": 0}, "to be taken again", id="busy, everyday group"),
        pytest.param([5.88, 7.0, 7.0], {"scheduling_group_nice": -14}, "to be taken again", id="busy, a little more"),
        pytest.param([5.88, 7.0, 7.0], {"scheduling_group_nice": -19}, "Taken beside other work", id="busy, first"),
        pytest.param([2.9, 9.0, 9.0], {"scheduling_group_nice": -19}, "", id="its own load"),
        pytest.param(None, {}, "", id="untold"),
    ],
)
def test_says_when_others_worked_on_the_machine(load: list[float] | None, more: dict[str, int], said: str) -> None:
    line = busy({"environment": {"load_average": load, "cores": 2, **more}})
    assert (said in line) if said else not line


def test_says_when_another_bundle_was_measured() -> None:
    assert not shipped_before(shipped_bundle()) and "shipped before" in shipped_before("0" * 64)


def test_takes_the_latest_result_of_each_number_of_cores(tmp_path: Path) -> None:
    for name in ("kind_1cores_20261101", "kind_1cores_20261203", "kind_2cores_20261102", "kind_20261001"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name}))
    latest = newest_of_each("kind", tmp_path)
    assert {cores: document["name"] for cores, (_, document) in latest.items()} == {
        "": "kind_20261001", "1": "kind_1cores_20261203", "2": "kind_2cores_20261102",
    }  # fmt: skip
    assert list(latest)[-1] == "1", "the latest of all is last"


def test_takes_the_latest_result_of_a_name(tmp_path: Path) -> None:
    for name in ("kind_20261101", "kind_1cores_20261203", "kind_2cores_20261202", "kind_other_2cores_20270101"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name}))
    assert newest("kind", tmp_path) == ("kind_1cores_20261203.json", {"name": "kind_1cores_20261203"})
    with pytest.raises(FileNotFoundError, match="kinds_<date>"):
        newest("kinds", tmp_path)
