"""A whole evaluation: every picture of a set asked, scored and noted, and gone on with where it was stopped.

The journal beside the records file holds a line per picture that is done. A run that was killed asks the picture at
hand again and none before it; when all is done, the records are written and the journal goes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segzero_rt.dataset import Sample
from segzero_rt.errors import DatasetError, OutputError
from segzero_rt.evaluation import Predict, Record, broken_record, evaluate, score_sample
from segzero_rt.evaluation_sets import EvaluationSet, LoadSamples

JOURNAL_SUFFIX = ".partial"
PictureRecords = tuple[str, list[Record]]
"""A picture's key and the records of its samples."""
_SETTINGS, _PICTURE, _RECORDS = "settings", "picture", "records"


class RecordJournal:
    """Records of the pictures that are done, by their keys, in the order of the set.

    Raises:
        OutputError: the file is of another evaluation, is damaged, or cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.done: list[PictureRecords] = []
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data.rfind(b"\n") + 1  # a line that was being written when the run was stopped goes
            if whole:
                self._read(data[:whole].split(b"\n")[:-1], settings)
            if not self.done:
                path.write_text(json.dumps({_SETTINGS: dict(settings)}) + "\n", encoding="utf-8")
            elif whole < len(data):
                with path.open("rb+") as file:
                    file.truncate(whole)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error

    def _read(self, lines: Sequence[bytes], settings: Mapping[str, Any]) -> None:
        try:
            earlier, *entries = [json.loads(line) for line in lines]
            earlier = earlier[_SETTINGS]
            self.done = [
                (entry[_PICTURE], [Record.from_json(record) for record in entry[_RECORDS]]) for entry in entries
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{self.path}: expected the records of a stopped evaluation: {error}; remove the file"
            ) from error
        settings = json.loads(json.dumps(settings))
        if self.done and (changed := [name for name in settings if earlier.get(name) != settings[name]]):
            name = changed[0]
            raise OutputError(
                f"{self.path} is of a stopped evaluation with {name} {earlier.get(name)!r:.80}, this one has "
                f"{settings[name]!r:.80}; ask for the same again to go on, or remove that file"
            )

    def add(self, key: str, records: Sequence[Record]) -> None:
        """Notes a picture: whatever ends the process from here on, it is not asked again."""
        line = json.dumps({_PICTURE: key, _RECORDS: [record.to_json() for record in records]}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.done.append((key, list(records)))

    def remove(self) -> None:
        """The records are elsewhere now."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How a set is asked."""

    predict: Predict
    count_tokens: Callable[[str], int] | None = None
    limit: int | None = None
    """Samples; None for all."""
    broken_counts: bool = False
    """A picture that the set does not give counts as IoU 0 instead of stopping the evaluation."""
    on_picture: Callable[[Sequence[Record]], None] = lambda records: None
    """Gets the new records of each picture, those of an earlier run included."""


def run_evaluation(
    dataset: EvaluationSet, asking: Asking, journal: RecordJournal | None = None
) -> list[PictureRecords]:
    """Asks what the journal has not; gives the records of all samples, by picture, in the set's order.

    Raises:
        DatasetError: the set gives a picture that cannot be read, unless those are counted; or no sample at all; or
            not the pictures that the journal knows.
        OutputError: the journal cannot be written.
    """
    by_picture: list[PictureRecords] = []
    count = 0
    done = iter(list(journal.done) if journal else ())
    warm = False
    for key, load in dataset.pictures():
        room = None if asking.limit is None else asking.limit - count
        if room is not None and room <= 0:
            break
        earlier = next(done, None)
        if earlier is not None:
            if earlier[0] != key:
                raise DatasetError(
                    f"expected the picture {earlier[0]!r:.80} of the stopped evaluation, got {key!r:.80}"
                )
            new = earlier[1]
        else:
            new = list(itertools.islice(_ask(key, load, asking, warm=warm), room))
            warm = warm or any(record.latency_ms > 0 for record in new)  # a broken picture asks nothing
            if journal:
                journal.add(key, new)
        by_picture.append((key, new))
        count += len(new)
        asking.on_picture(new)
    if not count:
        raise DatasetError("expected at least one question in the data set, found none")
    return by_picture


def _ask(key: str, load: LoadSamples, asking: Asking, *, warm: bool) -> Iterator[Record]:
    samples: list[Sample] = []
    try:
        samples = load()
        for sample in samples[:1]:
            _ = sample.image_rgb  # decoded here, so that a broken one is told from whatever a prediction raises
    except DatasetError as error:
        if not asking.broken_counts:
            raise
        message = f"{type(error).__name__}: {error}"
        failed = [score_sample(sample, None, latency_ms=0.0, error=message) for sample in samples]
        yield from failed or [broken_record(key, key, message)]
        return
    if samples and not warm:
        for _ in evaluate(samples[:1], asking.predict):
            pass  # once untimed: first touches of weights and allocations are no question's latency
    for record, _ in evaluate(samples, asking.predict, count_tokens=asking.count_tokens, keep_masks=True):
        yield record
