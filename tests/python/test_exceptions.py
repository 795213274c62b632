"""One root that catches all, and the builtin that a reader would try."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import safe_broadcaster
from safe_broadcaster import exceptions

BUILTINS = {
    "EventNotSerializable": TypeError,
    "EventInvalid": ValueError,
    "EventTooLarge": ValueError,
    "EventRefused": ValueError,
    "SpillFull": BufferError,
    "SpillLocked": RuntimeError,
    "SpillCorrupt": OSError,
    "ConnectTimeout": TimeoutError,
    "ConnectRefused": ConnectionError,
    "QueueFull": BufferError,
    "HandlerTimeout": TimeoutError,
    "CircuitOpen": ConnectionError,
    "BusUnavailable": ConnectionError,
    "BroadcasterClosed": RuntimeError,
    "BootFailed": RuntimeError,
    "SourceNotStarted": RuntimeError,
    "ForkedProcess": RuntimeError,
    "ConfigError": ValueError,
}
ERRORS_RS = Path(__file__).parents[2] / "src" / "python" / "errors.rs"


def test_every_name_that_the_core_imports_exists() -> None:
    """A missing one would abort the process when its error first occurs."""
    names = re.findall(r"import_exception!\(safe_broadcaster\.exceptions, (\w+)\)", ERRORS_RS.read_text())
    assert len(names) > 10
    for name in names:
        assert issubclass(getattr(exceptions, name), exceptions.BroadcastError)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_each_is_a_child_of_the_root_and_of_its_builtin(name: str, builtin: type[Exception]) -> None:
    error = getattr(exceptions, name)
    assert issubclass(error, exceptions.BroadcastError)
    assert issubclass(error, builtin)


def test_the_tree_is_complete() -> None:
    classes = {name for name, each in vars(exceptions).items() if inspect.isclass(each)}
    assert classes == {*BUILTINS, "BroadcastError"} == set(exceptions.__all__)


def test_the_drawing_on_top_of_the_file_tells_the_truth() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+) \((\w+)\)", exceptions.__doc__ or ""))
    assert drawn == {name: builtin.__name__ for name, builtin in BUILTINS.items()}


def test_all_are_exported_at_the_top() -> None:
    for name in exceptions.__all__:
        assert getattr(safe_broadcaster, name) is getattr(exceptions, name)
    assert len(set(safe_broadcaster.__all__)) == len(safe_broadcaster.__all__)
    assert set(exceptions.__all__) <= set(safe_broadcaster.__all__)
