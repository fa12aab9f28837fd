"""What a run of the suite has seen: a document, a table for people, and the section of docs/reliability.md."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
RESULTS: Final = ROOT / "build" / "chaos" / "results.json"
PAGE: Final = ROOT / "docs" / "reliability.md"
BEGIN: Final = "<!-- results: written by tests/chaos/report.py -->"
END: Final = "<!-- end of results -->"
PAST: Final = "past_the_lease_s"
DEAD: Final = "dead_relay_in_status_s"
# What the page states as a number: under which name scenarios note it.
STATED: Final = {
    "The longest that a stream outlived its lease": PAST,
    "The longest until a dead relay was told by `status`": DEAD,
}


@dataclass
class Record:
    """One scenario.

    Attributes:
        scenario: The name of the test, with the cell of a matrix in brackets.
        holds: What must hold.
        outcome: `passed`, `failed`, `skipped`; empty while it runs.
        detect_s: From the fault until it was seen.
        recover_s: From the fault, or from the moment named in `notes`, until a whole transfer could be made again.
        notes: Other figures.
        took_s: The whole scenario.
    """

    scenario: str
    holds: str
    outcome: str = ""
    detect_s: float | None = None
    recover_s: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    took_s: float = 0.0
    _struck_at: float | None = None

    def struck(self) -> None:
        """The fault is happening now; times count from here."""
        self._struck_at = time.monotonic()

    def detected(self) -> float:
        """It has been seen; answers how long that took."""
        self.detect_s = self._since()
        return self.detect_s

    def recovered(self) -> float:
        """All is well again; answers how long that took."""
        self.recover_s = self._since()
        return self.recover_s

    @contextlib.contextmanager
    def recovering(self) -> Iterator[None]:
        """The block is the recovery: its time counts, not that since the fault."""
        began = time.monotonic()
        yield
        self.recover_s = round(time.monotonic() - began, 3)

    def _since(self) -> float:
        assert self._struck_at is not None, "no fault has happened yet"
        return round(time.monotonic() - self._struck_at, 3)

    def document(self) -> dict[str, Any]:
        """As it is written down."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}


def write(records: Sequence[Record], file: Path, *, seed: int, quick: bool, took_s: float) -> None:
    """Writes what a run has seen."""
    file.parent.mkdir(parents=True, exist_ok=True)
    run = {
        "seed": seed,
        "quick": quick,
        "took_s": round(took_s, 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "scenarios": [one.document() for one in records],
    }
    file.write_text(json.dumps(run, indent=1) + "\n")


def _seconds(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else ""


def grouped(run: Mapping[str, Any]) -> Mapping[str, list[dict[str, Any]]]:
    """The scenarios of a run by the name of their test: the cells of a matrix are one group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in run["scenarios"]:
        groups.setdefault(str(one["scenario"]).partition("[")[0], []).append(one)
    return groups


def table(run: Mapping[str, Any]) -> list[str]:
    """The results as lines of Markdown, one for each test."""
    lines = [
        "| scenario | passed | detect_s, worst | recover_s, worst | other figures, worst |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, cells in sorted(grouped(run).items()):
        ran = [one for one in cells if one["outcome"] != "skipped"]
        passed = sum(one["outcome"] == "passed" for one in ran)
        skipped = f", {len(cells) - len(ran)} skipped" if len(ran) < len(cells) else ""
        worst = [
            max((one[key] for one in ran if one[key] is not None), default=None)
            for key in ("detect_s", "recover_s")
        ]
        figures: dict[str, Any] = {}
        for one in ran:
            for key, value in one["notes"].items():
                figures[key] = value if key not in figures else max(figures[key], value)
        said = ", ".join(f"{key} {value}" for key, value in figures.items())
        lines.append(
            f"| `{name}` | {passed} of {len(ran)}{skipped} | {_seconds(worst[0])} | {_seconds(worst[1])} | {said} |"
        )
    return lines


def section(run: Mapping[str, Any]) -> str:
    """The results as they stand in docs/reliability.md."""
    outcomes = [one["outcome"] for one in run["scenarios"]]
    counts = ", ".join(f"{outcomes.count(one)} {one}" for one in ("passed", "failed", "skipped"))
    quick = " (`--quick`)" if run["quick"] else ""
    head = f"Seed {run['seed']}{quick}, {run['took_s']:.0f} s, Linux {run['kernel']}, Python {run['python']}: {counts}."
    stated = [f"{words}: {worst} s, in {count} scenarios." for words, worst, count in figures(run)]
    return "\n".join([BEGIN, "", head, *stated, "", *table(run), "", END])


def figures(run: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    """Of each figure that is stated: its words, the worst, and how many scenarios have it."""
    for words, name in STATED.items():
        seen = [one["notes"][name] for one in run["scenarios"] if name in one["notes"]]
        if seen:
            yield words, max(seen), len(seen)


def main(arguments: Sequence[str]) -> int:
    """`report.py [RESULTS [PAGE]]`: puts the results of a run into the page."""
    results, page = (Path(given) for given in (*arguments, *[str(RESULTS), str(PAGE)][len(arguments) :]))
    if not results.exists():
        print(f"report: {results} is not there; run: make chaos", file=sys.stderr)
        return 1
    run = json.loads(results.read_text())
    soak = results.with_name("soak.json")
    if soak.exists():
        run["scenarios"] += json.loads(soak.read_text())["scenarios"]
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + section(run) + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
