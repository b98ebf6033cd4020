"""What is added to a step stays small: counted, not timed."""

import torch


def test_operators_bytes_and_memory_meet_their_targets():
    from pulid_sdxl.tools import bench  # brings torch's counters

    with torch.inference_mode(False):
        rows = {row.what: row for row in bench.counts()}
    limited = {what: row for what, row in rows.items() if row.target is not None}
    assert len(limited) == 3
    assert {what: row.ratio for what, row in limited.items() if row.ratio > row.target} == {}
    held = next(row for what, row in rows.items() if what.startswith("bytes held"))
    assert held.ours <= 16
