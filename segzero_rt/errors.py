"""Every error that a caller of the runtime can meet, in one place.

Each message says what was expected, what came, and what to do. The command line turns a `SegZeroError` into one line on
stderr and exit status 2; anything else that escapes is a bug of this package.
"""

from __future__ import annotations


class SegZeroError(Exception):
    """Base of all errors that are the caller's to mend."""


class BundleError(SegZeroError):
    """A bundle is missing, damaged, of another version, or reaches outside its own folder."""


class BackendError(SegZeroError):
    """The backend that was asked for is not installed, not known, or cannot run this graph."""


class GraphError(SegZeroError):
    """A graph's inputs or outputs differ from its `GraphSpec`."""


class ImageError(SegZeroError):
    """A picture cannot be read, or has a size or layout that the runtime does not take."""


class QuestionError(SegZeroError):
    """A question is empty or too long for the policy's context."""


class PromptError(SegZeroError):
    """A box or point given by hand is not a valid segmentation prompt."""


class OutputError(SegZeroError):
    """A file cannot be written where it was asked for."""


class DatasetError(SegZeroError):
    """A dataset folder is missing, incomplete, or a line of its annotations cannot be read."""


class MissingPackageError(SegZeroError):
    """An optional package is not installed; the message names the extra that brings it."""


class ExportError(SegZeroError):
    """A checkpoint cannot be exported, or its export failed a gate; no bundle was written."""


class EngineError(SegZeroError):
    """An engine cannot be built, does not fit its graph, or may not be run without the caller's consent."""
