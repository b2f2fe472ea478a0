"""What users may write on their adapters: labels, which lists filter by, and annotations, which nothing reads."""

import re
from collections.abc import Mapping

from lorasrv_adapters.errors import InvalidField, quote

MAX_LABELS = 64
MAX_ANNOTATIONS_BYTES = 64 << 10

_KEY_PATTERN = r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?"
_VALUE_PATTERN = r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises InvalidField."""
    if len(labels) > MAX_LABELS:
        raise InvalidField(f"{len(labels)} labels are over the limit of {MAX_LABELS}")
    _check_keys("label", labels)
    for key, value in labels.items():
        if not re.fullmatch(_VALUE_PATTERN, value):
            raise InvalidField(f"label {key}: value {quote(value)} does not match {_VALUE_PATTERN}")


def check_annotations(annotations: Mapping[str, str]) -> None:
    """Raises InvalidField."""
    _check_keys("annotation", annotations)
    num_bytes = sum(len(key) + len(value.encode()) for key, value in annotations.items())
    if num_bytes > MAX_ANNOTATIONS_BYTES:
        raise InvalidField(f"{num_bytes} bytes of annotations are over the limit of {MAX_ANNOTATIONS_BYTES}")


def _check_keys(what: str, entries: Mapping[str, str]) -> None:
    for key in entries:
        if not re.fullmatch(_KEY_PATTERN, key):
            raise InvalidField(f"{what} {quote(key)} does not match {_KEY_PATTERN}")
