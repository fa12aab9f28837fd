"""The page of guarantees: what it names is there, and what it shows was written by a run."""

import re

from relay.gateway import ROOT

from .report import BEGIN, END, PAGE, PAST, Record, section


def test_every_scenario_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert named
    assert named <= there


def test_the_cells_of_a_matrix_are_one_line_with_the_worst_of_each_figure() -> None:
    cells = [Record(scenario=f"test_it[{number}]", holds="", outcome="passed") for number in range(3)]
    cells[0].detect_s, cells[1].detect_s, cells[2].outcome = 0.1, 0.2, "failed"
    cells[1].notes[PAST], cells[2].notes[PAST] = 0.25, 0.5
    run = {"seed": 1, "quick": True, "took_s": 2, "kernel": "", "python": ""}
    said = section({**run, "scenarios": [one.document() for one in cells]})
    assert said.startswith(BEGIN)
    assert said.endswith(END)
    assert "2 passed, 1 failed, 0 skipped" in said
    assert f"| `test_it` | 2 of 3 | 0.200 |  | {PAST} 0.5 |" in said
    assert "The longest that a stream outlived its lease: 0.5 s, in 2 scenarios." in said
