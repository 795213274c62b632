"""Intervals follow activity: within their bounds, by the curve that was chosen."""

from __future__ import annotations

import math

import pytest

from safe_broadcaster import AdaptiveInterval, ConfigError, TimeScale
from safe_broadcaster.aggregator import PACES


def test_the_table_of_scales() -> None:
    assert {scale.value: tuple(PACES[scale]) for scale in TimeScale} == {
        "micro": (0.1, 0.05, 1.0, 0.5),
        "meso": (10, 5, 30, 0.3),
        "macro": (300, 60, 600, 0.2),
    }
    assert AdaptiveInterval.of("meso").current == 10


def test_quiet_times_slow_it_down_to_the_maximum() -> None:
    interval = AdaptiveInterval.of(TimeScale.MICRO)
    seen = [interval.update(0.1) for _ in range(20)]
    assert seen[:2] == [pytest.approx(0.12), pytest.approx(0.144)]
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def test_a_spike_speeds_it_up_to_the_minimum() -> None:
    interval = AdaptiveInterval(1.0, 0.05, 1.0, 0.5)
    seen = [interval.update(0.9) for _ in range(20)]
    assert seen[:2] == [pytest.approx(0.8), pytest.approx(0.64)]
    assert seen[-1] == 0.05
    interval.reset()
    assert interval.current == 1.0


def test_activity_at_the_threshold_is_not_above_it() -> None:
    assert AdaptiveInterval.of("micro").update(0.5) == pytest.approx(0.12)


@pytest.mark.parametrize("curve", ["linear", "smooth"])
def test_curves_lead_from_slow_down_over_one_to_speed_up(curve) -> None:
    def factor(share: float) -> float:
        return AdaptiveInterval(10, 1, 100, 0.5, curve=curve).update(share * 0.5) / 10

    assert [factor(share) for share in (0, 1, 2)] == [pytest.approx(each) for each in (1.2, 1.0, 0.8)]
    assert [factor(share) for share in (-5, 9, math.inf)] == [pytest.approx(each) for each in (1.2, 0.8, 0.8)]
    factors = [factor(n / 20) for n in range(41)]
    assert factors == sorted(factors, reverse=True)


def test_a_curve_of_ones_own_gets_the_share_of_the_threshold() -> None:
    shares = []

    def curve(share: float) -> float:
        shares.append(share)
        return 0.5 if share > 3 else 1.0

    interval = AdaptiveInterval(8, 1, 100, 0.5, curve=curve)
    assert [interval.update(activity) for activity in (0.5, 2.0)] == [8, 4]
    assert shares == [1.0, 4.0]


def test_without_a_threshold_any_activity_counts() -> None:
    interval = AdaptiveInterval(10, 1, 100, 0)
    assert interval.update(0) == 12
    assert interval.update(1e-9) == pytest.approx(9.6)


@pytest.mark.parametrize("activity", [math.nan, None, "1", True, [1]])
def test_activity_that_is_no_number_is_refused_and_changes_nothing(activity) -> None:
    interval = AdaptiveInterval.of("micro")
    with pytest.raises(ConfigError, match=r"activity=.* is not allowed"):
        interval.update(activity)
    assert interval.current == 0.1


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf, None])
def test_a_curve_that_gives_no_factor_is_told(factor) -> None:
    interval = AdaptiveInterval(10, 1, 100, 0.5, curve=lambda _: factor)
    with pytest.raises(ConfigError, match=r"curve=.* is not allowed: it gave"):
        interval.update(1)
    assert interval.current == 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": 0.01},
        {"minimum": 0},
        {"minimum": -1},
        {"minimum": "0.1"},
        {"maximum": math.inf},
        {"threshold": -1},
        {"threshold": math.nan},
        {"speed_up": 0},
        {"speed_up": 1.1},
        {"slow_down": 0.9},
        {"curve": "steep"},
    ],
)
def test_wrong_numbers_are_named(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AdaptiveInterval(**{"base": 1.0, "minimum": 0.1, "maximum": 2.0, "threshold": 0.5, **wrong})
