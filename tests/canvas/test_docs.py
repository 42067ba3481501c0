"""docs/canvas.md names a test for each construct, and each of those tests has its row."""

from __future__ import annotations

import re

from tests.cluster import ROOT

PAGE = (ROOT / "docs" / "canvas.md").read_text(encoding="utf-8")
CONSTRUCTS = (ROOT / "tests" / "canvas" / "test_constructs.py").read_text(encoding="utf-8")
#: Tests that show no construct.
OTHERS = {"test_no_step_is_left_behind"}


def test_the_table_and_the_tests_belong_together() -> None:
    named = re.findall(r"`(test_\w+)`", PAGE)
    defined = re.findall(r"^def (test_\w+)", CONSTRUCTS, re.MULTILINE)
    assert sorted(named) == sorted(set(defined) - OTHERS)


def test_each_row_has_as_many_cells_as_its_head() -> None:
    for table in re.findall(r"(?:^\|.*\|\n)+", PAGE, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(cells) == 1, table
