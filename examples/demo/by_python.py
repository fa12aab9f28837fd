"""A stream set up by a few lines of Python, without services and without a flow."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from scistream_flows import Stream, open_stream
from scistream_flows.models import Mode, Role, Status


class PythonStream:
    """A stream that this process has opened, and keeps alive."""

    def __init__(self, stream: Stream) -> None:
        self.steps: dict[str, str] = {}
        (self.listener,) = stream.listeners
        self._stream = stream

    def wait_connected(self) -> None:
        """`open_stream` returns connected streams only."""

    def sides(self) -> Sequence[Status]:
        """PROD and CONS now."""
        status = self._stream.status()
        return [status.prod, status.cons]

    def finish(self, *, timeout_s: float) -> Mapping[Role, Status]:
        """Wait for the end of the stream; answers how each side ended."""
        end = self._stream.wait(timeout_s)
        return {"PROD": end.prod, "CONS": end.cons}


@contextlib.contextmanager
def python_stream(
    facilities: Mapping[Role, str], *, targets: Sequence[str], mode: Mode, linger_s: int
) -> Iterator[PythonStream]:
    """Open a stream between two facilities of this machine."""
    prod, cons = (f"local:{facilities[role]}" for role in ("PROD", "CONS"))
    with open_stream(prod, cons, targets=targets, mode=mode, linger_s=linger_s) as stream:
        yield PythonStream(stream)
