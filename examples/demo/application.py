"""The two programs of the demo, each a process of its own, started as a user would start them."""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent


class ApplicationError(Exception):
    """An application did not do what it is there for."""


class Application:
    """A running program, and the JSON lines it has printed so far."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", errors: IO[bytes]) -> None:
        self.name = name
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self._errors = errors
        self.reader = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def first_line(self, *, timeout_s: float) -> dict[str, Any]:
        """Wait for the first thing it says.

        Raises:
            ApplicationError: When it ends or the time is over before that.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self.lines:
            if not self.running or time.monotonic() > deadline_s:
                raise ApplicationError(
                    f"{self.name} said nothing within {timeout_s:g} s; {self._last_words()}"
                )
            time.sleep(0.01)
        return self.lines[0]

    def finish(self, *, timeout_s: float, well: Container[int] = (0,)) -> dict[str, Any]:
        """Wait for its end, with one of the exit codes in `well`; answer its last line.

        Raises:
            ApplicationError: When it does not end in time, or not well.
        """
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ApplicationError(f"{self.name} did not end within {timeout_s:g} s") from None
        self.reader.join()
        if code not in well or not self.lines:
            raise ApplicationError(f"{self.name} ended with exit code {code}; {self._last_words()}")
        return self.lines[-1]

    def _last_words(self) -> str:
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its last words: {words[-1]}" if words else "it left no words"


@contextlib.contextmanager
def application(script: str, *arguments: str) -> Iterator[Application]:
    """Start a program of this folder; it does not outlive the block."""
    with (
        tempfile.TemporaryFile() as errors,
        # A session of its own: Ctrl-C reaches the demo only, which then stops the others in order.
        subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        program = Application(script, process, errors)
        program.reader.start()
        try:
            yield program
        finally:
            if program.running:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
            program.reader.join()
