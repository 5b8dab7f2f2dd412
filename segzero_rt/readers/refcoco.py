"""Referring expressions over COCO-style instances: RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO.

The `refs(….).p` file of the `refer` tools, or the same list as JSON. A ref becomes one question of its first sentence
alone, as in Seg-Zero's data, or a question per sentence. gRefCOCO's refs name several annotations, or none. Two refs of
a picture can be asked for together besides, "'a' and 'b'", as in VisionReasoner's data.

The files are pickles: they are read by an unpickler that knows lists, texts and numbers and nothing else.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from segzero_rt.errors import DatasetError
from segzero_rt.readers.coco import CocoInstances
from segzero_rt.readers.source import (
    NAME_KIND,
    NONE_KIND,
    SEVERAL_KIND,
    Load,
    Mask,
    SourcePicture,
    SourceQuestion,
    read_json_file,
    required,
)

_NO_ANNOTATION = -1  # gRefCOCO's mark of a question without an object


class RefCocoReader:
    """One question per referring expression, or per ref.

    Args:
        instances: the annotations that the refs name.
        refs: `refs(….).p` of the `refer` tools, or its list as JSON.
        split: only refs of this split.
        all_sentences: a question per sentence instead of the first one alone.
        join_refs: a question besides for every two neighbours among a picture's refs that mean different objects.
    """

    def __init__(
        self,
        instances: CocoInstances,
        refs: Path,
        *,
        split: str,
        all_sentences: bool = False,
        join_refs: bool = False,
    ) -> None:
        self.instances, self.refs = instances, refs
        self.all_sentences, self.join_refs = all_sentences, join_refs
        self._of_image: dict[int, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
        found: set[str] = set()
        for index, ref in enumerate(_read_refs(refs)):
            source = f"{refs}: refs[{index}]"
            found.add(required(ref, "split", source, str))
            if required(ref, "image_id", source, int) not in instances.images:
                raise DatasetError(f"{source}: `image_id` {ref['image_id']} is not in {instances.path}")
            if ref["split"] == split:
                self._of_image[ref["image_id"]].append((source, ref))
        if not self._of_image:
            raise DatasetError(f"{refs}: expected refs of split {split!r}, it has {', '.join(sorted(found))}")

    def __len__(self) -> int:
        return len(self._of_image)

    def pictures(self) -> Iterator[tuple[str, Load]]:
        for image_id in self._of_image:
            yield str(image_id), functools.partial(self._picture, image_id)

    def _picture(self, image_id: int) -> SourcePicture:
        refs = self._of_image[image_id]
        questions = [one for source, ref in refs for one in self._questions(ref, source)]
        if self.join_refs:
            questions += [one for pair in zip(refs[0::2], refs[1::2], strict=False) for one in self._joined(*pair)]
        return SourcePicture(
            source=f"{self.refs}: image {image_id}",
            image=self.instances.picture(image_id),
            questions=tuple(questions),
        )

    def _questions(self, ref: dict[str, Any], source: str) -> Iterator[SourceQuestion]:
        masks = tuple(self._mask(number, ref, source) for number in _annotation_ids(ref, source))
        sentences = required(ref, "sentences", source, list)
        if not sentences:
            raise DatasetError(f"{source}: expected at least one sentence, got none")
        ref_id = required(ref, "ref_id", source, int)
        for number, sentence in enumerate(sentences if self.all_sentences else sentences[:1]):
            yield SourceQuestion(
                row_id=f"ref{ref_id}-{number}",
                text=required(sentence, "sent", f"{source}: sentences[{number}]", str),
                masks=masks,
                kind=(NONE_KIND, NAME_KIND)[len(masks)] if len(masks) < 2 else SEVERAL_KIND,
            )

    def _joined(self, one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]) -> Iterator[SourceQuestion]:
        ids = [set(_annotation_ids(ref, source)) for source, ref in (one, other)]
        if not ids[0] or not ids[1] or ids[0] & ids[1]:
            return
        first, second = (next(self._questions(ref, source)) for source, ref in (one, other))
        yield SourceQuestion(
            row_id=f"{first.row_id}+{second.row_id}",
            text=f"'{first.text}' and '{second.text}'",
            masks=first.masks + second.masks,
            kind=SEVERAL_KIND,
        )

    def _mask(self, annotation_id: int, ref: dict[str, Any], source: str) -> Mask:
        annotation = self.instances.annotations.get(annotation_id)
        if annotation is None or annotation["image_id"] != ref["image_id"]:
            raise DatasetError(f"{source}: annotation {annotation_id} of this picture is not in {self.instances.path}")
        return self.instances.mask(annotation)


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dictionaries, texts and numbers; a pickle that asks for any class or function is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which plain data does not need")


def _read_refs(path: Path) -> list[Any]:
    if path.suffix == ".json":
        refs = read_json_file(path)
    else:
        try:
            # latin1 never fails, and the texts are ASCII: the files were written by Python 2
            refs = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(f"{path}: expected the pickled list of the refer tools: {error}") from error
    if not isinstance(refs, list) or not refs:
        raise DatasetError(f"{path}: expected a list of refs, got {refs!r:.80}")
    return refs


def _annotation_ids(ref: dict[str, Any], source: str) -> list[int]:
    given = required(ref, "ann_id", source, int, list)
    ids = [given] if isinstance(given, int) else given
    if any(type(number) is not int for number in ids):
        raise DatasetError(f"{source}: expected `ann_id` as a number or numbers, got {given!r:.80}")
    return [number for number in ids if number != _NO_ANNOTATION]
