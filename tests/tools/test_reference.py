"""Every vector of the reference folder holds: the authors' own numbers."""

import pytest
from pulid_sdxl.tools import conformance
from pulid_sdxl.tools.conformance import FOLDER


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference vectors at {FOLDER} (set PULID_REFERENCE)")
@pytest.mark.parametrize("part", conformance.PARTS)
def test_every_vector_holds(part):
    lines = list(conformance.lines(FOLDER, {part: conformance.PARTS[part]}))
    assert lines, "the file holds no vector that is compared"
    assert [str(line) for line in lines if not line.holds] == []


def test_nan_never_holds():
    assert not conformance.Line("any", float("nan"), 1.0).holds
