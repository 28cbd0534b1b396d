"""JSON values as what they should be, or as nothing: a report opens although a file holds something unexpected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def number_of(raw: object) -> float | None:
    """A finite number, or None."""
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        return None
    try:
        number = float(raw)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def count_of(raw: object) -> int | None:
    """A whole number, or None."""
    number = number_of(raw)
    return None if number is None else int(number)


def text_of(raw: object) -> str:
    """Anything as text; nothing for null."""
    return "" if raw is None else str(raw)


def mapping_of(raw: object) -> Mapping[str, object]:
    """An object, or an empty one."""
    return raw if isinstance(raw, dict) else {}


def sequence_of(raw: object) -> Sequence[object]:
    """A list, or an empty one."""
    return raw if isinstance(raw, list) else ()


def numbers_of(raw: object) -> list[float]:
    """The finite numbers of a list."""
    return [number for item in sequence_of(raw) if (number := number_of(item)) is not None]


def places_of(raw: object) -> list[float | None]:
    """The numbers of a list, None where there is none: for what is drawn place by place."""
    return [number_of(item) for item in sequence_of(raw)]
