"""docs/performance.md from a run: every table between two marks is written anew, the words around it stay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import click

from . import arithmetic
from .results import Results, load
from .tables import markdown, tables

ROOT: Final = Path(__file__).resolve().parents[2]
DOCUMENT: Final = ROOT / "docs" / "performance.md"
RESULTS: Final = ROOT / "build" / "bench" / "results.json"
BLOCK: Final = re.compile(r"(<!-- bench: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
ABSENT: Final = "Not part of this run.\n"


def filled(document: str, results: Results) -> str:
    """The document with the tables of this run.

    Raises:
        ValueError: A mark names no table, or a table has no mark.
    """
    found = {table.name: markdown(table) + "\n" for table in (*tables(results), *arithmetic.tables(results))}
    marks = [mark for _, mark, _ in BLOCK.findall(document)]
    if forgotten := sorted(found.keys() - set(marks)):
        raise ValueError(f"no place for {', '.join(forgotten)}: add <!-- bench: NAME --> and <!-- end -->")
    return BLOCK.sub(lambda block: block[1] + found.get(block[2], ABSENT) + block[3], document)


@click.command()
@click.argument("results", type=click.Path(exists=True, path_type=Path), default=RESULTS)
@click.option("--document", type=click.Path(exists=True, path_type=Path), default=DOCUMENT)
def main(*, results: Path, document: Path) -> None:
    """Write the tables of a run into the report."""
    document.write_text(filled(document.read_text(), load(results)))
    click.echo(str(document))


if __name__ == "__main__":
    main()
