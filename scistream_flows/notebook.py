"""Streams in Jupyter: one that is opened in a cell shows itself live, and ends when the kernel is interrupted or ends.

from scistream_flows.notebook import open_stream
stream = open_stream("local:aps", "local:alcf", targets=["127.0.0.1:5555"])
stream
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
from collections import deque
from html import escape
from typing import TYPE_CHECKING, Any, Final

from scistream_flows import stream as plain
from scistream_flows.errors import MissingExtra, ScistreamError
from scistream_flows.stream import Stream, StreamEnd, StreamOptions, StreamStatus

try:
    from IPython.core.getipython import get_ipython
    from IPython.display import display, update_display
except ImportError as missing:
    raise MissingExtra(
        f"streams that show themselves need IPython: {missing}",
        which="notebook",
        hint="pip install 'scistream-flows[notebook]'",
    ) from None

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from scistream_flows.facility import Facility

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
SAMPLES: Final = 120
_WIDTH, _HEIGHT = 480, 72
_UNITS: Final = ("", "k", "M", "G", "T")

_open: set[LiveStream] = set()
_hooking = threading.Lock()
_hooked = False


class LiveStream(Stream):
    """A stream that belongs to a kernel: it renews its lease by itself until it is released.

    As the value of a cell it shows itself, and the picture follows it to its end. Interrupting the kernel releases it,
    and so does the end of the kernel; one that is killed leaves it to its lease.
    """

    def __init__(self, opened: Stream) -> None:
        vars(self).update(vars(opened))  # what was opened goes on under this name
        self._shows: list[threading.Thread] = []
        self._look_again = threading.Event()
        super().__enter__()
        _open.add(self)

    def __enter__(self) -> Self:
        return self  # the lease is being renewed already

    def release(self) -> StreamEnd:
        """End both sides, leaving no relay. Repeating it is no error."""
        self._block_left.set()
        end = super().release()
        _open.discard(self)
        self._look_again.set()
        for show in self._shows:
            show.join(LOOK_EVERY_S)  # so that the end is in the picture before the kernel may be gone
        return end

    def _ipython_display_(self) -> None:
        history: deque[float] = deque(maxlen=SAMPLES)
        picture, over = _picture(self, history)
        handle: Any = display(picture, raw=True, display_id=True)
        if over or handle is None:
            return
        identifier = handle.display_id

        def follow() -> None:
            over = False
            while not over:
                self._look_again.wait(LOOK_EVERY_S)
                picture, over = _picture(self, history)
                update_display(picture, raw=True, display_id=identifier)

        show = threading.Thread(target=follow, name=f"show {self.uid}", daemon=True)
        self._shows.append(show)
        show.start()


def open_stream(
    producer: str | Facility, consumer: str | Facility, **options: Unpack[StreamOptions]
) -> LiveStream:
    """Open a stream for this kernel and return when both sides are READY.

    The arguments and errors are those of `scistream_flows.open_stream`. `with` works, and needs not be used.
    """
    opened = LiveStream(plain.open_stream(producer, consumer, **options))
    _follow_the_kernel()
    return opened


def release_all() -> None:
    """Release every stream that this kernel has open."""
    for one in tuple(_open):
        _release_or_warn(one)


def _release_or_warn(one: LiveStream) -> None:
    try:
        one.release()
    except ScistreamError as wrong:
        _open.discard(one)
        log.warning("stream %s was not released, its lease ends it: %s", one.uid, wrong)


def _follow_the_kernel() -> None:
    global _hooked  # noqa: PLW0603 - a process has one kernel
    with _hooking:
        # What was registered last is called first: registries, which close at exit too, are still open then.
        atexit.unregister(release_all)
        atexit.register(release_all)
        if _hooked:
            return
        shell: Any = get_ipython()
        if shell is not None:
            shell.events.register("post_run_cell", _after_cell)
        _hooked = True


def _after_cell(result: Any) -> None:
    if isinstance(result.error_in_exec, (KeyboardInterrupt, asyncio.CancelledError)):
        release_all()


# --- how it looks


def _picture(stream: LiveStream, history: deque[float]) -> tuple[dict[str, str], bool]:
    """The stream now, as what a notebook shows; and whether it is over."""
    try:
        status = stream.status()
    except ScistreamError as wrong:
        words = f"stream {stream.uid}: {wrong}"
        return {"text/plain": words, "text/html": f"<div>{escape(words)}</div>"}, stream not in _open
    history.append(status.bits_per_s.to_consumer + status.bits_per_s.to_producer)
    rows = _rows(stream, status)
    lines = [f"{name}: {value}" for name, value in rows]
    cells = "".join(
        f'<tr><th style="text-align:left;padding-right:1.5em">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows
    )
    html = f'<div><table style="margin:0">{cells}</table>{_plot(history)}</div>'
    return {"text/plain": "\n".join(lines), "text/html": html}, status.ended


def _rows(stream: LiveStream, status: StreamStatus) -> list[tuple[str, str]]:
    sides = {"producer": status.prod, "consumer": status.cons}
    rows = [
        ("stream", f"{status.uid}, {stream.mode}"),
        ("connect to", ", ".join(stream.listeners)),
        *(
            (name, f"{side.state}: {side.reason}" if side.reason else side.state)
            for name, side in sides.items()
        ),
        ("to the consumer", _both(status.bytes.to_consumer, status.bits_per_s.to_consumer)),
        ("to the producer", _both(status.bytes.to_producer, status.bits_per_s.to_producer)),
    ]
    if not status.ended:
        leg = status.limiting.leg if status.limiting else None
        rows.append(("limited by", (leg or "nothing moves").replace("_", " ")))
        rows.append(("connections", str(status.cons.connections.active)))
    return rows


def _both(count_bytes: int, rate_bits_per_s: float) -> str:
    return f"{_in_units(count_bytes, 'B')}, {_in_units(rate_bits_per_s, 'bit/s')}"


def _in_units(value: float, unit: str) -> str:
    step = 0
    while value >= 1000 and step < len(_UNITS) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {_UNITS[step]}{unit}"


def _plot(history: deque[float]) -> str:
    """The rate over the last looks, newest at the right. In the colour of the text, so that it fits every theme."""
    most = max(history) or 1.0
    step = _WIDTH / (SAMPLES - 1)
    left = _WIDTH - step * (len(history) - 1)
    points = [
        (left + step * at, _HEIGHT - 2 - (_HEIGHT - 16) * rate / most) for at, rate in enumerate(history)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    area = f"{left:.1f},{_HEIGHT} {line} {_WIDTH},{_HEIGHT}"
    label = f"{_in_units(max(history), 'bit/s')} at most, over {len(history)} s"
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' aria-label="{escape(label)}" style="display:block;margin-top:0.5em">'
        f'<polygon points="{area}" fill="#2a7fb8" fill-opacity="0.25"/>'
        f'<polyline points="{line}" fill="none" stroke="#2a7fb8" stroke-width="1.5"/>'
        f'<line x1="0" y1="{_HEIGHT - 0.5}" x2="{_WIDTH}" y2="{_HEIGHT - 0.5}" stroke="currentColor"'
        ' stroke-opacity="0.4"/>'
        f'<text x="2" y="11" font-size="11" fill="currentColor">{escape(label)}</text></svg>'
    )
