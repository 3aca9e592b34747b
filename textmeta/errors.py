"""The errors that textmeta raises on purpose, and the logger of what it tells beside them.

Every message says what was given, what was expected, and where (row, label, file or setting).
"""

import logging

logger = logging.getLogger("textmeta")  # of every file


class TextMetaError(Exception):
    """Base class: ``except TextMetaError`` catches everything that textmeta raises on purpose."""


class SettingsError(TextMetaError, ValueError):
    """A setting is unknown, out of range, or does not fit another setting."""


class DataError(TextMetaError, ValueError):
    """Texts, labels, corpora or class splits cannot be used as given."""


class EncoderError(TextMetaError):
    """A pretrained encoder cannot be loaded, or cannot carry the adapter that was asked for."""


class AdapterError(TextMetaError):
    """An adapter folder is missing, damaged, or does not belong to the encoder."""


class DamagedAdapterError(AdapterError):
    """A file of an adapter folder is missing or not what was written: a fresh copy may help."""


class HubError(TextMetaError):
    """The Hub has no such repository or revision, or does not let this user at it."""


class HubUnreachableError(HubError):
    """The Hub does not answer, and what is asked for is not in the cache."""


class DivergedError(TextMetaError):
    """Training came to a loss or gradient that is not finite."""


class LostProcessError(TextMetaError):
    """Another process of the same run has ended, or does not answer."""


class TrainingInterrupted(TextMetaError):  # noqa: N818 (no error: somebody asked for it)
    """Training was stopped by a signal, ``signum``; its checkpoint holds everything needed to go on."""

    def __init__(self, told: str, signum: int = 2):
        super().__init__(told)
        self.signum = signum
