"""When PuLID acts: both ends included, and nothing waits for the device."""

import pytest
import torch
from pulid_sdxl.pulid.schedule import CURVES, Schedule


def percent_to_sigma(percent):
    """Like the host's: everything at the ends, falling between them."""
    return 999999999.9 if percent <= 0 else 0.0 if percent >= 1 else 14.6 * (1 - percent) ** 2


def strength(schedule, sigma):
    return schedule.strength(torch.tensor(sigma)).item()


def test_the_whole_range_needs_no_schedule():
    assert Schedule.make(percent_to_sigma, 0, 1) is None


def test_both_ends_are_included():
    schedule = Schedule.make(percent_to_sigma, 0.2, 0.6)
    start, end = percent_to_sigma(0.2), percent_to_sigma(0.6)
    assert [strength(schedule, s) for s in (start + 0.01, start, (start + end) / 2, end, end - 0.01)] == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("curve", "expected"),
    [("flat", [1, 1, 1]), ("ease in", [0, 0.5, 1]), ("ease out", [1, 0.5, 0]), ("ease in-out", [0, 1, 0])],
)
def test_curves_run_over_the_range(curve, expected):
    schedule = Schedule.make(percent_to_sigma, 0.2, 0.6, curve)
    sigmas = [percent_to_sigma(percent) for percent in (0.2, 0.4, 0.6)]
    assert [strength(schedule, sigma) for sigma in sigmas] == pytest.approx(expected, abs=0.02)
    assert strength(schedule, percent_to_sigma(0.1)) == strength(schedule, percent_to_sigma(0.7)) == 0


@pytest.mark.parametrize("curve", CURVES)
def test_curves_over_everything_stay_between_0_and_1_at_the_hosts_ends(curve):
    schedule = Schedule.make(percent_to_sigma, 0, 1, curve)
    if schedule is not None:
        assert all(0 <= strength(schedule, sigma) <= 1 for sigma in (1e4, 14.6, 5.0, 0.01, 0.0))


def test_it_runs_on_a_device_without_values():
    schedule = Schedule.make(percent_to_sigma, 0.2, 0.6, "ease in", device="meta")
    assert schedule.strength(torch.empty((), device="meta")).shape == ()  # .item() would raise here
