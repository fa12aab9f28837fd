"""What our commands have in common: how errors, Ctrl-C, tables, units and spellings look. No command is here.

It imports only `errors` and `models`, so that every command can use it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, Protocol

import click
from click.shell_completion import get_completion_class
from rich.console import Console
from rich.measure import Measurement
from rich.status import Status
from rich.table import Table
from rich.text import Text

from scistream_flows.errors import PROTOCOL, ScistreamError
from scistream_flows.models import UID_PATTERN

CANCELLED: Final = 130
"""The exit code after Ctrl-C: 128 and the number of SIGINT."""

LONGEST_SPAN_S: Final = 10 * 366 * 86_400
"""Longer than anything here, and short enough for every clock, seconds."""

_UNITS_S: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


def as_spelled(token: str) -> str:
    """`_` and `-` are the same in commands and options: `--rate_mbits_per_s` is `--rate-mbits-per-s`."""
    return token.replace("_", "-")


SETTINGS: Final[Mapping[str, Any]] = {
    "token_normalize_func": as_spelled,  # passed on to subcommands
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
"""The `context_settings` of a command."""


class Asked(Protocol):
    """What the caller of `run` shares with its commands."""

    debug: bool


def run(command: click.Command, *, name: str, asked: Asked) -> NoReturn:
    """Run a command as a program, and exit: 0 done, 1 our error, 2 usage, 130 after Ctrl-C.

    Args:
        command: The command. Its `click.Context.obj` is `asked`.
        name: What it is called in messages.
        asked: With `debug` set by the time an error comes, its traceback is shown.
    """
    with contextlib.suppress(
        AttributeError, ValueError
    ):  # a name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = command.main(prog_name=name, standalone_mode=False, obj=asked)
        if sys.stdout is not None:  # closed by the caller: `>&-`
            sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        code = CANCELLED
    except BrokenPipeError:  # such as `| head`
        code = 1
    except click.UsageError as wrong:
        path = wrong.ctx.command_path if wrong.ctx else name
        code = _complain(name, wrong.format_message(), f"See {path} --help", wrong.exit_code)
    except click.ClickException as wrong:
        code = _complain(name, wrong.format_message(), "", wrong.exit_code)
    except ScistreamError as wrong:
        if asked.debug:
            traceback.print_exc()
        code = _complain(name, wrong.message, wrong.hint, wrong.exit_code)
    except OSError as wrong:
        if asked.debug:
            traceback.print_exc()
        place = f"{wrong.filename}: " if wrong.filename else ""
        code = _complain(name, f"{place}{wrong.strerror or wrong}", "See --debug for what was being done", 1)
    except Exception as wrong:  # noqa: BLE001 - the last one to catch it
        if asked.debug:
            traceback.print_exc()
        words = f"{type(wrong).__name__}: {wrong}".splitlines()[0]
        code = _complain(name, words, "This is a defect: please report what --debug says", 1)
    _give_up_what_stdout_does_not_take()
    sys.exit(code if isinstance(code, int) else 0)


def _give_up_what_stdout_does_not_take() -> None:
    """Python tries once more at its end, and would exit with 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def interrupted_by_sigterm() -> None:
    """SIGTERM, such as `timeout` sends it, ends a command as Ctrl-C does: what it has half done is taken back."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def completion(command: click.Group, *, name: str) -> click.Command:
    """A command that prints what a shell needs to complete the words of `command`."""

    @click.command("completion")
    @click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
    def complete(shell: str) -> None:
        """Print the completion script for SHELL: `eval "$(NAME completion bash)"`."""
        found = get_completion_class(shell)
        if found is None:
            raise click.UsageError(f"there is no completion for {shell}")
        click.echo(found(command, {}, name, f"_{name.replace('-', '_').upper()}_COMPLETE").source())

    return complete


def _complain(name: str, message: str, hint: str, code: int) -> int:
    say(f"{click.style(name, bold=True)}: {click.style(plain(message), fg='red')}")
    if hint:
        say(f"  {plain(hint)}")
    return code


def show_debugging() -> None:
    """Say on stderr what the package logs."""
    logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("paramiko").setLevel(logging.INFO)


def plain(text: str) -> str:
    """A text from elsewhere, as one line that cannot steer the terminal."""
    return "".join(
        one if one.isprintable() else "\\n" if one == "\n" else f"\\x{ord(one):02x}" for one in text
    )


def say(words: str) -> None:
    """Words for people, on stderr."""
    click.echo(words, err=True, color=_colour())


def put(line: str) -> None:
    """A line of data, on stdout."""
    click.echo(line, color=_colour())


def put_document(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout, with its protocol."""
    click.echo(json.dumps({"protocol": PROTOCOL} | dict(document), indent=2))


def put_long_document(document: Mapping[str, Any], name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """The same with one more field, a list, of which each row is written when it comes: all of them may be too many."""
    coming = iter(rows)
    first = list(itertools.islice(coming, 1))  # what cannot be read is said instead of half a document
    head = json.dumps({"protocol": PROTOCOL} | dict(document) | {name: []}, indent=2)
    if not first:
        click.echo(head)
        return
    click.echo(head.removesuffix("]\n}"), nl=False)
    between = "\n"
    for row in itertools.chain(first, coming):
        click.echo(between + textwrap.indent(json.dumps(row, indent=2), "    "), nl=False)
        between = ",\n"
    click.echo("\n  ]\n}")


def put_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout. A row is one line, however narrow the terminal: it can be searched and copied."""
    table = Table(*headings, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))  # other machines have written some of them
    console = Console(highlight=False)
    wide = console.options.update(max_width=10_000)
    console.width = Measurement.get(console, wide, table).maximum + 1
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        put(line.rstrip())


class Progress:
    """A line that says what is being done; `shows` is whether there is a terminal to show it."""

    def __init__(self, status: Status | None) -> None:
        self._status = status

    @property
    def shows(self) -> bool:
        """Whether anybody sees it."""
        return self._status is not None

    def says(self, words: str) -> None:
        """Replace the words."""
        if self._status is not None:
            self._status.update(Text(words))


@contextlib.contextmanager
def progress(words: str) -> Iterator[Progress]:
    """A line on stderr while something is done, if stderr is a terminal."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield Progress(None)
        return
    with console.status(Text(words)) as status:
        yield Progress(status)


def _colour() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None  # None: as the terminal can


# --- what words mean


class StreamName(click.ParamType):
    """The uid of a stream."""

    name = "uid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The uid that `value` is."""
        if not re.fullmatch(UID_PATTERN, str(value)):
            self.fail(
                f"{value!r} is no uid: letters, digits, '_', '-' and '.', 64 at most, the first a letter or digit",
                param,
                ctx,
            )
        return str(value)


class Span(click.ParamType):
    """Seconds, written as `90`, `90s`, `10m`, `1.5h` or `2d`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds that `value` spells."""
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]*)", str(value))
        unit = _UNITS_S.get(match[2] or "s") if match else None
        if match is None or unit is None:
            self.fail(f"{value!r} is not a duration such as 90s, 10m, 1h or 2d", param, ctx)
        span_s = float(match[1]) * unit
        if span_s > LONGEST_SPAN_S:
            self.fail(f"{_shortened(str(value))} is longer than {in_time(LONGEST_SPAN_S)}", param, ctx)
        return span_s


def _shortened(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:20]}…"


def in_units(value: float, unit: str) -> str:
    """`value` with three digits and a decimal prefix: `4.93 Gbit/s`, `0 B`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:  # what would be written as 1000 is 1 of the next
            return f"{_three_digits(value / factor)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def in_time(seconds: float) -> str:
    """A duration for people: `42 s`, `3 min 20 s`, `2 h 5 min`, `6 d 23 h`."""
    whole = int(seconds)
    for size_s, unit, below_s, below in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size_s:
            rest = whole % size_s // below_s
            return f"{whole // size_s} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"
