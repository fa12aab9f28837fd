"""Streams in Parsl workflows, tied to the life of a task: opened before it, released after it, also when it fails.

Two doors. `streaming` opens in the process that runs the workflow and hands the task the address, so that workers need
no access to the facilities. `StreamStaging` opens in the worker, just before the task begins, for a
`File("scistream://NAME")` among its inputs. In both, a task that is tried again finds the same stream.
"""

from __future__ import annotations

import functools
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # one of its own before Python 3.11
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from scistream_flows.errors import BadRequest, MissingExtra, ScistreamError
from scistream_flows.stream import Progress, Stream, StreamOptions, open_stream

try:
    from parsl.data_provider.files import File
    from parsl.data_provider.staging import Staging
except ImportError as missing:
    raise MissingExtra(
        f"streams in Parsl need Parsl: {missing}", which="parsl", hint="pip install 'scistream-flows[parsl]'"
    ) from None

if TYPE_CHECKING:
    from parsl.dataflow.futures import AppFuture
    from typing_extensions import Unpack

log = logging.getLogger(__name__)

SCHEME: Final = "scistream"
_LOOK_EVERY_S: Final = 1.0


def streaming(
    app: Callable[..., AppFuture],
    *,
    producer: str,
    consumer: str,
    argument: str = "stream",
    tickets: str | None = None,
    networks: Sequence[str] = (),
    **options: Unpack[StreamOptions],
) -> Callable[..., AppFuture]:
    """A Parsl app whose every call has a stream of its own.

    A call waits until the futures among its arguments are there, opens the stream, and lets the task begin with
    `argument` set to the listeners, a list of `ip:port`. The lease is renewed until the task is done, tries included;
    then both sides are released. A stream that cannot be opened is the failure of the task, a DependencyError of Parsl.

    Args:
        app: A `python_app`, `bash_app` or `join_app`.
        producer: The facility of the application that listens, such as `local:aps`.
        consumer: The facility that the task's node belongs to.
        argument: The keyword of the app that takes the addresses.
        tickets: The keyword of the app that takes tickets, where the node of the task is not known before it starts: a
            list, one for each try, with which the task calls `say_hello` before it connects.
        networks: Where the tickets may be used, such as those of the cluster's nodes. Empty: all that policy has.
        options: Those of `open_stream`. `until` is `released` unless given: a task that is tried again connects again.
    """
    chosen: StreamOptions = {"until": "released", **options}

    @functools.wraps(app)
    def call(*args: Any, **kwargs: Any) -> AppFuture:
        before = list(_futures([args, kwargs]))
        given: dict[str, Future[list[str]]] = {argument: Future()}
        if tickets is not None:
            given[tickets] = Future()
        task = app(*args, **kwargs, **given)

        def go_on(progress: Progress) -> None:
            # who opens a stream asks this at each look: nobody is there any more to wait until it is ready
            if task.task_record["dfk"].cleanup_called:
                raise _left()
            if (tell := chosen.get("on_progress")) is not None:
                tell(progress)

        opening: StreamOptions = {**chosen, "on_progress": go_on}

        def values(stream: Stream) -> list[list[str]]:
            if tickets is None:
                return [stream.listeners]
            tries = 1 + task.task_record["dfk"].config.retries
            drawn = [stream.ticket("CONS", networks=networks) for _ in range(tries)]
            return [stream.listeners, [one.model_dump_json() for one in drawn]]

        threading.Thread(
            target=_accompany,
            args=(
                task,
                before,
                list(given.values()),
                partial(open_stream, producer, consumer, **opening),
                values,
            ),
            name=f"stream of {getattr(app, '__name__', 'app')}",
        ).start()
        return task

    return call


def _accompany(
    task: AppFuture,
    before: Iterable[Future[Any]],
    given: Sequence[Future[list[str]]],
    open_it: Callable[[], Stream],
    values: Callable[[Stream], list[list[str]]],
) -> None:
    """Open when everything before is there, and stay until the task is done, or the workflow is."""
    try:
        for one in before:
            if not _done(one, task):
                raise _left()
            one.result()
        with open_it() as stream:
            for future, value in zip(given, values(stream), strict=True):
                future.set_result(value)
            if not _done(task, task):
                log.warning("the workflow ended before its task: the stream is released")
    except BaseException as wrong:  # noqa: BLE001 - handed to whoever waits for it
        waiting = [future for future in given if not future.done()]
        for future in waiting:
            future.set_exception(wrong)
        if not waiting:
            log.warning("the stream of a task: %s", wrong)


def _left() -> ScistreamError:
    return ScistreamError("the workflow ended before the task could begin", which="parsl")


def _done(future: Future[Any], task: AppFuture) -> bool:
    """Wait for a future; False when the workflow of the task ends first, which leaves futures as they are."""
    workflow = task.task_record["dfk"]
    while True:
        try:
            future.exception(timeout=_LOOK_EVERY_S)
        except FutureTimeout:
            if workflow.cleanup_called:
                return future.done()
            continue
        return True


def _futures(value: Any) -> Iterator[Future[Any]]:
    """Every future among arguments, as Parsl looks for them: in lists, tuples and dictionaries, too."""
    if isinstance(value, Future):
        yield value
    elif isinstance(value, Mapping):
        for one in (*value.keys(), *value.values()):
            yield from _futures(one)
    elif isinstance(value, (list, tuple, set)):
        for one in value:
            yield from _futures(one)


class Source:
    """Where a `scistream://NAME` leads.

    Args:
        producer: The facility of the application that listens, such as `local:aps`.
        consumer: The facility that the workers' nodes belong to.
        options: Those of `open_stream`, without `uid` and `on_progress`. `until` is `released` unless given.

    Raises:
        BadRequest: An option that is not possible.
    """

    def __init__(self, producer: str, consumer: str, **options: Unpack[StreamOptions]) -> None:
        for name in ("uid", "on_progress"):
            if options.get(name) is not None:
                raise BadRequest(
                    f"{name} is not possible for a source",
                    which=name,
                    hint="Each task has a stream of its own",
                )
        self.producer = producer
        self.consumer = consumer
        self.options: StreamOptions = {"until": "released", **options}


class StreamStaging(Staging):
    """For `storage_access` of an executor: tasks that have `File("scistream://NAME")` among their inputs get a stream.

    In the task, `filepath` of that file is `ip:port`, where the application connects. The worker opens the stream just
    before the task begins, and releases it after; it must reach both facilities. One that is killed leaves the stream
    to its lease, and a task that is tried again before that finds the same one.

    Args:
        sources: By NAME.
    """

    def __init__(self, **sources: Source) -> None:
        self._sources = sources

    def can_stage_in(self, file: File) -> bool:
        """Whether the file is a stream."""
        return bool(file.scheme == SCHEME)

    def replace_task(
        self,
        dm: Any,  # noqa: ARG002 - as Parsl calls it
        executor: str,  # noqa: ARG002
        file: File,
        func: Callable[..., Any],
    ) -> Callable[..., Any]:
        """The task with its stream around it."""
        source = self._sources.get(file.netloc)
        if source is None:
            raise BadRequest(
                f"there is no source {file.netloc!r} for {file.url}",
                which=file.url,
                hint=f"The executor's StreamStaging has: {', '.join(sorted(self._sources)) or 'none'}",
            )
        # Chosen here, once for a task: each try of it asks for the same stream, and is answered the same one.
        return _WithStream(func, file.url, f"{file.netloc}-{secrets.token_hex(8)}", source)


@dataclass(frozen=True)
class _WithStream:
    task: Callable[..., Any]
    url: str
    uid: str
    source: Source

    @property
    def __name__(self) -> str:
        return getattr(self.task, "__name__", "task")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options: StreamOptions = {**self.source.options, "uid": self.uid}
        with open_stream(self.source.producer, self.source.consumer, **options) as stream:
            for file in _files([args, kwargs]):
                if file.url == self.url:
                    file.local_path = stream.listeners[0]
            return self.task(*args, **kwargs)


def _files(value: Any) -> Iterator[File]:
    if isinstance(value, File):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _files(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _files(one)
