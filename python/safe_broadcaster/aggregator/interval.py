"""How often something is done: more often while there is activity, less often in quiet times.

::

    interval = AdaptiveInterval.of(TimeScale.MICRO)
    while True:
        await asyncio.sleep(interval.current)
        interval.update(activity())
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from safe_broadcaster.checks import check_seconds, is_number
from safe_broadcaster.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    Curve = Literal["step", "linear", "smooth"] | Callable[[float], float]

__all__ = ["PACES", "AdaptiveInterval", "Pace", "TimeScale"]


class TimeScale(str, enum.Enum):
    """Paces at which a program looks at itself."""

    MICRO = "micro"
    """Each tenth of a second: what is going on."""
    MESO = "meso"
    """Each ten seconds: how it goes."""
    MACRO = "macro"
    """Each five minutes: where it goes."""


class Pace(NamedTuple):
    """An interval in seconds, its bounds, and the activity above which it shrinks."""

    base: float
    minimum: float
    maximum: float
    threshold: float


PACES = {
    TimeScale.MICRO: Pace(0.1, 0.05, 1.0, 0.5),
    TimeScale.MESO: Pace(10.0, 5.0, 30.0, 0.3),
    TimeScale.MACRO: Pace(300.0, 60.0, 600.0, 0.2),
}
"""The pace of each scale."""

_STEEPNESS = 4.0
"""Of the smooth curve: nine tenths of the way lie between half the threshold and one and a half of it."""


class AdaptiveInterval:
    """An interval that is multiplied by a factor after each look: ``speed_up`` above the threshold, else ``slow_down``.

    Args:
        base: Seconds at the start.
        minimum: Least seconds.
        maximum: Most seconds.
        threshold: Activity above which it shrinks, in the unit of the activity.
        speed_up: Factor at high activity. Default 0.8: from the longest to the shortest of a scale in about ten looks.
        slow_down: Factor at low activity. Default 1.2: calming down takes somewhat longer.
        curve: How the factor follows the activity. ``step``: one or the other, as above. ``linear``: from ``slow_down``
            at none over 1 at the threshold to ``speed_up`` at twice the threshold and above, so that it holds still
            where activity is at the threshold. ``smooth``: the same without corners. Or a function of activity /
            threshold that returns the factor.

    Raises:
        ConfigError: A number is not allowed, or they do not go together.

    """

    def __init__(  # noqa: PLR0917 - the order of a table's row
        self,
        base: float,
        minimum: float,
        maximum: float,
        threshold: float,
        speed_up: float = 0.8,
        slow_down: float = 1.2,
        *,
        curve: Curve = "step",
    ) -> None:
        check_seconds("base", base)
        check_seconds("minimum", minimum)
        check_seconds("maximum", maximum)
        if not minimum <= base <= maximum:
            raise ConfigError(
                f"base={base!r}, minimum={minimum!r}, maximum={maximum!r} are not allowed: give seconds above 0 with "
                "minimum <= base <= maximum"
            )
        if not (is_number(threshold) and 0 <= threshold < math.inf):
            raise ConfigError(f"threshold={threshold!r} is not allowed: give a number, at least 0")
        if not (is_number(speed_up) and 0 < speed_up <= 1):
            raise ConfigError(f"speed_up={speed_up!r} is not allowed: give a factor above 0 and at most 1")
        if not (is_number(slow_down) and 1 <= slow_down < math.inf):
            raise ConfigError(f"slow_down={slow_down!r} is not allowed: give a factor of at least 1")
        if not callable(curve) and curve not in _CURVES:
            raise ConfigError(f"curve={curve!r} is not allowed: give one of {', '.join(_CURVES)}, or a function")
        self.base = base
        self.minimum = minimum
        self.maximum = maximum
        self.threshold = threshold
        self.current = base
        """Seconds until the next look."""
        self._speed_up = speed_up
        self._slow_down = slow_down
        self._curve = curve

    @classmethod
    def of(cls, scale: TimeScale | str, *, curve: Curve = "step") -> AdaptiveInterval:
        """Make the interval of a scale, see `PACES`."""
        return cls(*PACES[TimeScale(scale)], curve=curve)

    def update(self, activity: float) -> float:
        """Note how much is going on, and return the seconds until the next look.

        Raises:
            ConfigError: The activity is no number, or the curve gives no factor; the interval stays as it is.

        """
        if not is_number(activity) or math.isnan(activity):
            raise ConfigError(f"activity={activity!r} is not allowed: give a number")
        share = activity / self.threshold if self.threshold else (math.inf if activity > 0 else 0.0)
        if callable(self._curve):
            factor = self._curve(share)
            if not (is_number(factor) and 0 < factor < math.inf):
                raise ConfigError(
                    f"curve={self._curve!r} is not allowed: it gave {factor!r}; let it give a number above 0"
                )
        else:
            factor = _CURVES[self._curve](share, self._speed_up, self._slow_down)
        self.current = min(max(self.current * factor, self.minimum), self.maximum)
        return self.current

    def reset(self) -> None:
        """Go back to the base."""
        self.current = self.base


def _step(share: float, speed_up: float, slow_down: float) -> float:
    return speed_up if share > 1 else slow_down


def _linear(share: float, speed_up: float, slow_down: float) -> float:
    share = min(max(share, 0.0), 2.0)
    return slow_down + (1 - slow_down) * share if share <= 1 else 1 + (speed_up - 1) * (share - 1)


def _smooth(share: float, speed_up: float, slow_down: float) -> float:
    reach = math.tanh(_STEEPNESS / 2 * (min(max(share, 0.0), 2.0) - 1)) / math.tanh(_STEEPNESS / 2)
    return speed_up**reach if reach > 0 else slow_down**-reach


_CURVES: dict[str, Callable[[float, float, float], float]] = {"step": _step, "linear": _linear, "smooth": _smooth}
