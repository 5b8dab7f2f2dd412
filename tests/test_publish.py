"""Checkpoint folders that ship: halved weights, mixed with others where asked, and never half a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[train]")

from safetensors.torch import load_file, save_file  # noqa: E402 - needs torch's absence to skip first

from training.publish import publish  # noqa: E402


def write_checkpoint(folder: Path, **weights: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.25, 1.5), (0.4, 1.8), (1.0, 3.0)], ids=["none", "quarter", "0.4", "all"]
)
def test_weights_are_mixed_by_share(tmp_path: Path, share: float, expected: float) -> None:
    write_checkpoint(tmp_path / "run/hf", weight=torch.full((2, 3), 1.0), count=torch.tensor([7]))
    before = write_checkpoint(tmp_path / "shipped", weight=torch.full((2, 3), 3.0), count=torch.tensor([5]))
    publish(tmp_path / "run", before, mix_with=before, mix_share=share)
    weights = load_file(before / "model.safetensors")
    assert weights["weight"].dtype == torch.float16
    torch.testing.assert_close(weights["weight"], torch.full((2, 3), expected, dtype=torch.float16))
    assert weights["count"].tolist() == [7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "shipped"], "nothing staged is left"


def test_a_pickle_of_the_run_stays_behind(tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "run/hf", weight=torch.ones(2))
    for name in ("training_args.bin", "tokenizer.json"):
        (hf / name).write_bytes(b"{}")
    publish(tmp_path / "run", tmp_path / "shipped")
    shipped = {path.name for path in (tmp_path / "shipped").iterdir()}
    assert shipped == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    ("other", "share", "message"),
    [({"weight": torch.zeros(4)}, 0.5, "of one model"), ({"bias": torch.zeros(2)}, 0.5, "of one model"),
     ({"weight": torch.zeros(2)}, 1.5, "between 0 and 1")],
    ids=["shape", "name", "share"],
)  # fmt: skip
def test_what_cannot_be_mixed_changes_nothing(
    tmp_path: Path, other: dict[str, object], share: float, message: str
) -> None:
    write_checkpoint(tmp_path / "run/hf", weight=torch.ones(2))
    before = write_checkpoint(tmp_path / "shipped", **other)
    content = (before / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=message):
        publish(tmp_path / "run", before, mix_with=before, mix_share=share)
    assert (before / "model.safetensors").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "shipped"], "nothing staged is left"
