import math

import pytest

from sidt import Budget
from sidt.errors import InputError


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (0.6, 600),
        (1.0, 1000),
        (1, 1000),
        ("0.6", 600),
        (700, 700),
        ("0.5k", 500),
        ("2.5G", 2_500_000_000),
        (0.1, 100),
    ],
)
def test_bounds(value, limit):
    assert Budget(params=value).bounds(1000, 5) == (limit, None)
    assert Budget(macs=value).bounds(5, 1000) == (None, limit)


def test_a_fraction_is_exact_where_floating_point_is_not():
    assert 0.29 * 100 < 29
    assert Budget(params=0.29).bounds(100, 1) == (29, None)


@pytest.mark.parametrize(
    "value", [0, 0.0, -0.5, -3, 1.5, math.nan, math.inf, "half", "0", "1.5", "-2G", "2.5X", True, []]
)
def test_bad_bounds_name_the_value(value, refused):
    with refused("params=", repr(value)):
        Budget(params=value)


def test_a_budget_needs_a_bound():
    with pytest.raises(InputError, match="needs params=, macs= or latency="):
        Budget()


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        ("20ms", 20_000_000),
        ("0.02s", 20_000_000),
        ("800us", 800_000),
        (" 1.5 ms ", 1_500_000),
        (0.6, 6_000_000),
        ("0.6", 6_000_000),
        (1, 10_000_000),
    ],
)
def test_a_latency_is_a_time_or_a_fraction(value, limit):
    assert Budget(latency=value).bounds(1000, 5, 10_000_000) == (None, None, limit)
    assert Budget(macs=0.5, latency=value).bounds(1000, 8, 10_000_000) == (None, 4, limit)
    assert str(Budget(macs=0.5, latency=value)) == f"macs=0.5, latency={value}"


@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, "0ms", "20", 20, 1.5, "20 hours", "-2ms", True, []])
def test_bad_latencies_name_the_value(value, refused):
    with refused("latency=", repr(value)):
        Budget(latency=value)


def test_a_latency_needs_measured_layers(refused):
    with refused("latency='20ms'", "measure_layers"):
        Budget(macs=0.5, latency="20ms").bounds(1000, 1000)
