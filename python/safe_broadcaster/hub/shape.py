"""Whether data has the shape of a dataclass or a TypedDict, as far as annotations say it plainly.

Known are classes, ``Any``, unions, ``Literal``, ``list[…]``, ``dict[…, …]`` and nesting; anything finer is let through.
Whoever wants more registers a pydantic model or a function.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Problem", "check_shape", "is_shape"]


_LISTS = (list, Sequence)
_OBJECTS = (dict, Mapping)


class Problem(NamedTuple):
    """What is wrong with which field."""

    field: str
    what: str


def is_shape(model: object) -> bool:
    """Whether the model is a dataclass or a TypedDict."""
    return isinstance(model, type) and (dataclasses.is_dataclass(model) or typing.is_typeddict(cast("object", model)))


def check_shape(model: Any, data: object, at: str = "data") -> Iterator[Problem]:
    """Yield what is wrong: missing fields, unknown ones, and values of another type."""
    if dataclasses.is_dataclass(model) and isinstance(data, cast("type", model)):
        data = {field.name: getattr(data, field.name) for field in dataclasses.fields(cast("Any", model))}
    if not isinstance(data, Mapping):
        yield Problem(at, f"is {_kind(data)}, not an object")
        return
    fields = cast("Mapping[object, object]", data)
    known, required = _fields(model)
    for name in known:
        if name in fields:
            yield from _check(known[name], fields[name], f"{at}.{name}")
        elif name in required:
            yield Problem(f"{at}.{name}", "is missing")
    for name in fields:
        if name not in known:
            yield Problem(f"{at}.{name}", f"is not a field of {_name(model)}")


def _fields(model: Any) -> tuple[dict[str, Any], frozenset[str]]:
    hints = typing.get_type_hints(model)
    if dataclasses.is_dataclass(model):
        missing = dataclasses.MISSING
        fields = [field for field in dataclasses.fields(model) if field.init]
        required = {each.name for each in fields if each.default is missing and each.default_factory is missing}
        return {each.name: hints[each.name] for each in fields}, frozenset(required)
    required_keys: frozenset[str] = getattr(model, "__required_keys__", frozenset(hints))
    return hints, required_keys


def _check(wanted: Any, value: object, at: str) -> Iterator[Problem]:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in {Union, types.UnionType}:
        if all(next(_check(each, value, at), None) for each in arguments):
            yield Problem(at, f"is {_kind(value)}, not {_name(wanted)}")
    elif origin is Literal:
        if value not in arguments:
            yield Problem(at, f"is {value!r}, not one of {', '.join(map(repr, arguments))}")
    elif origin in _LISTS:
        yield from _check_items(arguments[0], value, at)
    elif origin in _OBJECTS:
        yield from _check_values(arguments[1], value, at)
    elif is_shape(wanted):
        yield from check_shape(wanted, value, at)
    elif not _fits(wanted, value):
        yield Problem(at, f"is {_kind(value)}, not {_name(wanted)}")


def _check_items(wanted: Any, value: object, at: str) -> Iterator[Problem]:
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(cast("Sequence[object]", value)):
            yield from _check(wanted, item, f"{at}[{index}]")
    else:
        yield Problem(at, f"is {_kind(value)}, not a list")


def _check_values(wanted: Any, value: object, at: str) -> Iterator[Problem]:
    if isinstance(value, Mapping):
        for name, item in cast("Mapping[object, object]", value).items():
            yield from _check(wanted, item, f"{at}.{name}")
    else:
        yield Problem(at, f"is {_kind(value)}, not an object")


def _fits(wanted: Any, value: object) -> bool:
    if wanted is None:
        return value is None
    if not isinstance(wanted, type) or wanted is object:
        return True
    if issubclass(wanted, Enum):
        return isinstance(value, wanted) or value in {each.value for each in wanted}
    if wanted in {int, float} and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _name(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")
