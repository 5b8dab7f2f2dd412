"""The resident pipeline on a real device: the CPU's answers, and no wait for a token. Needs `[gpu]`, `[cuda]`, nvcc."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segzero_rt import SegZero
from segzero_rt.image import load_image
from segzero_rt.resident.frames import as_frame
from segzero_rt.resident.load import load_resident

pytestmark = pytest.mark.gpu
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "tabletop.png"
QUESTIONS = ("the spoon", "the red things", "the purple elephant")


@pytest.mark.parametrize("replay", [False, True], ids=["enqueued", "replayed"])
def test_the_shipped_bundle_answers_as_on_the_cpu(replay: bool, bundle_path: Path) -> None:
    """Rounding differs from device to device, so boxes may by a pixel: masks are compared by what they share."""
    host, picture = SegZero.load(bundle_path, backend="cpu", draft_tokens=0), load_image(PICTURE)
    resident = load_resident(bundle_path, replay=replay)
    for question in QUESTIONS:
        expected = host(picture, question)
        for _ in range(2):  # the second time with everything captured and allocated
            found = resident(picture, question)
            assert found.status == expected.status
            shared, joint = (found.union & expected.union).sum(), (found.union | expected.union).sum()
            assert shared >= 0.9 * joint
            assert found.decode_counts["host_waits"] <= 3


def test_tokens_cost_no_wait_and_the_frame_no_copy(bundle_path: Path) -> None:
    resident, picture = load_resident(bundle_path), load_image(PICTURE)
    on_device = resident.staging.to_device(picture)
    frame = as_frame(on_device, resident.staging)
    assert frame.planes[0].address == on_device.address
    counts = []
    for budget in (4, 24):
        waits = resident.num_host_waits
        found = resident.ask(resident.look(frame, ahead=False), "the spoon", max_new_tokens=budget)
        counts.append(resident.num_host_waits - waits)
        assert found.host_masks is None
    assert counts[0] == counts[1] <= 3
    assert np.isfinite(found.scores).all()
