"""Finds what JSON cannot carry and orjson would write as ``null``: NaN and infinities.

Called only for events whose JSON holds a ``null`` that the core cannot account for by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from safe_broadcaster.exceptions import EventNotSerializable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["refuse_nonfinite"]


def refuse_nonfinite(event: object) -> None:
    """Raise `EventNotSerializable` naming the place of the first NaN or infinity in the event, if there is one."""
    found = next(_nonfinite(event, "event"), None)
    if found is not None:
        path, value = found
        raise EventNotSerializable(f"{path} is {value}: JSON has no such number; send None or leave it out")


def _nonfinite(value: Any, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, float):
        if not math.isfinite(value):
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            yield from _nonfinite(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(cast("list[object]", value)):
            yield from _nonfinite(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _nonfinite(getattr(value, field.name, None), f"{path}.{field.name}")
    elif callable(as_list := getattr(value, "tolist", None)):  # numpy scalars and arrays
        yield from _nonfinite(as_list(), path)
