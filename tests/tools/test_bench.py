"""What is added to a step stays small: counted, not timed. And what the bench says of its own figures."""

import pytest
import torch
from pulid_sdxl.tools import arguments, bench, bench_card


def test_operators_bytes_and_memory_meet_their_targets():
    with torch.inference_mode(False):
        rows = {row.what: row for row in bench.counts()}
    limited = {what: row for what, row in rows.items() if row.target is not None}
    assert len(limited) == 3
    assert {what: row.ratio for what, row in limited.items() if row.ratio > row.target} == {}
    held = next(row for what, row in rows.items() if what.startswith("bytes held"))
    assert held.ours <= 16


def test_a_missed_limit_is_marked_and_counted():
    fine, missed = bench.Row("a", 1.0, 2.0, "s", 0.6), bench.Row("b", 2.0, None, "s", 1.0)
    assert str(fine).endswith("at most 0.6") and str(missed).endswith("at most 1  MISSED")
    assert bench.verdict([fine, missed], 0.0, 2.0, 2, 2) == "1 of 2 limits MISSED."
    assert bench.verdict([fine], 0.0, 2.0, 2, 2) == "All 1 limits hold."


@pytest.mark.parametrize(("before", "during", "busy"), [(0.4, 2.4, False), (0.6, 2.0, True), (0.0, 3.0, True)])
def test_a_machine_too_busy_to_judge_is_told(before, during, busy):
    assert ("THE MACHINE WAS BUSY" in bench.verdict([], before, during, threads=2, processors=2)) is busy


def test_the_command_line_knows_the_sections_of_the_bench_for_cards():
    assert (*bench_card.SECTIONS, *bench_card.EXTRA) == arguments.SECTIONS
