"""The table of bytes by degree holds the plans' own counts."""

from __future__ import annotations

import pytest

from benchmarks import degrees, documents
from benchmarks.rows import ResultsError
from crypten_espn.masked.inference import online_bytes
from crypten_espn.wire.packing import packed_bytes


@pytest.mark.parametrize("kind", [degrees.SHARED, degrees.BY_CHANNEL])
def test_rows_are_what_the_plan_counts_less_input_and_output(kind):
    plan, polynomial = degrees.planned(kind, 4)
    row = degrees.masked_row(kind, 4, plan)
    elements = plan.sources[0].elements
    taken = packed_bytes(elements, plan.input.ring)
    given = packed_bytes(plan.elements(1), plan.output.ring)
    assert row.elements == plan.activation_elements == 1024
    assert row.online_bytes == sum(online_bytes(plan)) - taken - given
    assert row.dealer_bytes == plan.dealer_bytes() - given
    found = list(degrees.declared_rows(kind, 4, polynomial, row.elements))
    assert [one.engine for one in found] == ["espn", "opened_mask", "beaver"]
    # Three products of values known to one party each, 8 bytes from both.
    assert found[0].online_bytes == 2 * 3 * 8 * 1024
    assert found[1].online_bytes == 2 * 8 * 1024


def test_results_become_the_table_of_the_documents(tmp_path):
    rows = [
        degrees.DegreeRow(kind, degree, engine, 100, count, 250 * degree, 3600)
        for kind in (degrees.SHARED, degrees.BY_CHANNEL)
        for degree in (2, 10)
        for engine, count in (("masked", 2), ("espn", 0))
    ]
    path = tmp_path / "degrees.json"
    degrees.write(path, rows)
    assert degrees.read(path)[1] == rows
    made = documents.markdown(tmp_path, "degrees")
    assert made is not None
    lines = made.splitlines()
    assert lines[0] == "| polynomial | degree | truncations | masked | espn |"
    assert lines[2] == "| one for all | 2 | 2 | 5 + 36 | 5 + 36 |"
    assert lines[5].startswith("| one a channel | 10 | 2 | 25 + 36 |")


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "degrees.json"
    path.write_text('{"rows": [{"degree": 2}], "machine": {}}')
    with pytest.raises(ResultsError, match=r"degrees\.json"):
        degrees.read(path)
