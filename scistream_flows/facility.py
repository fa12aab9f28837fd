"""A facility as its clients see it: the same verbs, wherever it is."""

from __future__ import annotations

import contextlib
import contextvars
import json
import re
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeout  # one of its own before Python 3.11
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from pydantic import BaseModel

from scistream_flows import doorway, functions
from scistream_flows.compute import DEADLINE_S, ComputeEndpoint
from scistream_flows.config import load_facility
from scistream_flows.errors import (
    BadRequest,
    FacilityUnreachable,
    error_from_document,
)
from scistream_flows.models import (
    Hello,
    Listing,
    ListQuery,
    Offer,
    Release,
    Released,
    Renewal,
    Request,
    Status,
    StatusQuery,
    Ticket,
    TicketRequest,
    Update,
    read,
)
from scistream_flows.s2cs import S2CS

if TYPE_CHECKING:
    from globus_compute_sdk import Client
    from typing_extensions import Self

    from scistream_flows.web import Authorizer

_ADDRESSES: Final = (
    "Use https://HOST, where its s2cs serves, compute:ENDPOINT_UUID, behind Globus Compute, or local:NAME, on this"
    " machine"
)

A = TypeVar("A", bound=BaseModel)
T = TypeVar("T")


class Facility(Protocol):
    """What a client can ask of a facility. Every verb raises the errors of `S2CS`, and FacilityUnreachable."""

    @property
    def name(self) -> str:
        """The address it was given by, as `connect_facility` takes it."""
        ...

    def request(self, document: Request) -> Offer:
        """Open one side of a stream."""
        ...

    def hello(self, document: Hello) -> Offer:
        """Say where the application is."""
        ...

    def ticket(self, document: TicketRequest) -> Ticket:
        """A ticket for one hello."""
        ...

    def update(self, document: Update) -> Status:
        """Change a running side."""
        ...

    def status(self, document: StatusQuery) -> Status:
        """See one side."""
        ...

    def renew(self, document: Renewal) -> Status:
        """Renew the lease."""
        ...

    def release(self, document: Release) -> Released:
        """End one side."""
        ...

    def list(self, document: ListQuery | None = None) -> Listing:
        """See the caller's streams."""
        ...

    def close(self) -> None:
        """Give back the connection. Streams live on."""
        ...


class _Verbs(ABC):
    """The verbs, as questions and answers in JSON: what differs is only how they travel."""

    @property
    @abstractmethod
    def name(self) -> str:
        """How it is addressed."""

    @abstractmethod
    def close(self) -> None:
        """Give back the connection. Streams live on."""

    @abstractmethod
    def _answer(self, verb: str, document: str) -> dict[str, Any]:
        """The answer to a document, which is JSON text."""

    def request(self, document: Request) -> Offer:
        """Open one side of a stream."""
        return self._ask("request", document, Offer)

    def hello(self, document: Hello) -> Offer:
        """Say where the application is."""
        return self._ask("hello", document, Offer)

    def ticket(self, document: TicketRequest) -> Ticket:
        """A ticket for one hello."""
        return self._ask("ticket", document, Ticket)

    def update(self, document: Update) -> Status:
        """Change a running side."""
        return self._ask("update", document, Status)

    def status(self, document: StatusQuery) -> Status:
        """See one side."""
        return self._ask("status", document, Status)

    def renew(self, document: Renewal) -> Status:
        """Renew the lease."""
        return self._ask("renew", document, Status)

    def release(self, document: Release) -> Released:
        """End one side."""
        return self._ask("release", document, Released)

    def list(self, document: ListQuery | None = None) -> Listing:
        """See the caller's streams."""
        return self._ask("list", document or ListQuery(), Listing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, verb: str, document: BaseModel, answer: type[A]) -> A:
        return _understood(self._answer(verb, document.model_dump_json()), answer, self.name)


class LocalFacility(_Verbs):
    """A facility on this machine, its service in this process.

    Documents and errors pass through JSON text, as they would to a facility far away.
    """

    def __init__(self, service: S2CS) -> None:
        self._service = service

    @property
    def name(self) -> str:
        """How it is addressed."""
        return f"local:{self._service.config.name}"

    def close(self) -> None:
        """Close the service's files. Streams live on."""
        self._service.close()

    def _answer(self, verb: str, document: str) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(
            json.dumps(_uninterrupted(lambda: self._service.answer(verb, document)))
        )
        return said


class SocketFacility(_Verbs):
    """A facility on this machine, its service in another process, which knows this account by its Unix socket.

    Args:
        path: The socket.
        facility: The facility's name.
        deadline_s: For each verb, seconds.
    """

    def __init__(self, path: str | Path, *, facility: str, deadline_s: float = doorway.DEADLINE_S) -> None:
        self._path = Path(path)
        self._facility = facility
        self._deadline_s = deadline_s

    @property
    def name(self) -> str:
        """How it is addressed."""
        return f"local:{self._facility}"

    def close(self) -> None:
        """There is nothing to give back: each verb has a connection of its own."""

    def _answer(self, verb: str, document: str) -> dict[str, Any]:
        return _uninterrupted(
            lambda: doorway.ask(self._path, verb, json.loads(document), deadline_s=self._deadline_s)
        )


class ExecutorFacility(_Verbs):
    """A facility whose verbs run where an executor runs functions: a process pool, Parsl, Dask, Globus Compute.

    The workers need this package and the facility's configuration, and run on a machine that may start its relays.

    Args:
        executor: Any `concurrent.futures.Executor`. It is not shut down here. A pool of processes starts them by
            `spawn` or `forkserver`: a fork copies the locks that other threads hold, SQLite's too.
        facility: The facility's name, where the workers are.
        deadline_s: For each verb, from its submission on; a worker may have to start first.
    """

    def __init__(self, executor: Executor, *, facility: str, deadline_s: float = 120.0) -> None:
        self._executor = executor
        self._facility = facility
        self._deadline_s = deadline_s

    @property
    def name(self) -> str:
        """How it is addressed."""
        return f"{type(self._executor).__name__}:{self._facility}"

    def close(self) -> None:
        """The executor stays open: it belongs to who made it."""

    def _answer(self, verb: str, document: str) -> dict[str, Any]:
        question = {"verb": verb, "facility": self._facility, "document": json.loads(document)}
        try:
            future = self._executor.submit(functions.call, question)
        except RuntimeError as wrong:  # it is shut down
            raise FacilityUnreachable(f"{self.name} takes no work: {wrong}", which=self.name) from wrong
        try:
            said = json.loads(json.dumps(future.result(self._deadline_s)))
        except FutureTimeout:
            raise FacilityUnreachable(
                f"{self.name} has not answered {verb} within {self._deadline_s:g} s",
                which=self.name,
                hint="See whether its workers run; what it did is unknown, and ends by its lease",
            ) from None
        except Exception as wrong:
            raise FacilityUnreachable(
                f"{self.name} could not run {verb}: {type(wrong).__name__}: {wrong}",
                which=self.name,
                hint="See that scistream-flows is installed where its workers run",
            ) from wrong
        finally:
            with contextlib.suppress(NotImplementedError):  # Parsl's
                future.cancel()  # nobody waits any more: what has not begun need not
        if not isinstance(said, dict):
            raise FacilityUnreachable(f"{self.name} answered {verb} with no document", which=self.name)
        return said


class ComputeFacility(_Verbs):
    """A facility whose verbs run at a Globus Compute endpoint that its administrator has configured for it.

    Args:
        endpoint_id: The endpoint's UUID.
        functions: The ids of the facility's functions, from verb to UUID; by default those that the endpoint allows.
        client: A `globus_compute_sdk.Client` for this facility alone; by default one with the login of this user.
        deadline_s: For each verb, in seconds; the endpoint may have to start a process first.

    Raises:
        BadRequest: `endpoint_id` is no UUID, or `functions` has what is no verb.
    """

    def __init__(
        self,
        endpoint_id: str,
        *,
        functions: Mapping[str, str] | None = None,
        client: Client | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._endpoint = ComputeEndpoint(
            endpoint_id, functions=functions, client=client, deadline_s=deadline_s
        )

    @property
    def name(self) -> str:
        """How it is addressed."""
        return self._endpoint.name

    def close(self) -> None:
        """Give back the connection to Globus Compute. Streams live on."""
        self._endpoint.close()

    def _answer(self, verb: str, document: str) -> dict[str, Any]:
        return self._endpoint.answer(verb, json.loads(document))


class RestFacility(_Verbs):
    """A facility whose `s2cs` serves at an address of its own.

    Args:
        address: `https://HOST[:PORT][/PATH]`, or `HOST:PORT`: HTTPS except on this machine's loopback.
        authorizer: From an address to the bearer token for it, asked before each request. By default the tokens that
            `tokens.toml` pins, and those of the caller's own development facilities.
        ca_file: Certificates of authorities to trust, PEM; by default those of `$REQUESTS_CA_BUNDLE`, or of certifi.
        deadline_s: For each verb, seconds.

    Raises:
        BadRequest: `address` is none, or plain HTTP to another machine.
        ConfigError: `tokens.toml` cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        authorizer: Authorizer | None = None,
        ca_file: str | None = None,
        deadline_s: float = 60.0,
    ) -> None:
        from scistream_flows.rest import RestService  # loads requests
        from scistream_flows.tokens import Tokens

        self._rest = RestService(
            address, authorizer=authorizer or Tokens(), ca_file=ca_file, deadline_s=deadline_s
        )

    @property
    def name(self) -> str:
        """How it is addressed."""
        return self._rest.url

    def close(self) -> None:
        """Give back the connections. Streams live on."""
        self._rest.close()

    def _answer(self, verb: str, document: str) -> dict[str, Any]:
        return self._rest.answer(verb, json.loads(document))


def _uninterrupted(call: Callable[[], T]) -> T:
    """What `call` answers. Ctrl-C is raised here after it has come to its end, not in the middle of it.

    Python raises KeyboardInterrupt in the main thread only, between any two steps: also right after a transaction has
    begun, or a relay has started, and before anything could remember that. So the main thread lets another one do it.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    outcome: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # programs started from here take it over
        try:
            outcome.set_result(context.run(call))
        except BaseException as wrong:  # noqa: BLE001 - raised again where it is waited for
            outcome.set_exception(wrong)

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    thread = threading.Thread(target=run, name="verb")
    try:
        thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return outcome.result()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if thread.ident is not None:
            thread.join()


def connect_facility(address: str) -> Facility:
    """The facility at `address`.

    Args:
        address: `local:NAME`, a facility on this machine, by the socket of its service where its configuration names
            one; without a configuration file of that name it is a development facility, loopback only.
            `compute:ENDPOINT_UUID`, a facility behind an endpoint of Globus Compute. `https://HOST[:PORT][/PATH]` or
            `HOST:PORT`, one whose `s2cs` serves there; without `https://` it is plain HTTP on loopback, and nowhere
            else.

    Raises:
        BadRequest: When it is no address of a facility.
        ConfigError: When the facility's configuration, or the user's `tokens.toml`, is wrong.
    """
    kind, separator, rest = address.partition(":")
    if separator and kind == "local":
        config = load_facility(rest)
        if config.service.socket is not None:
            return SocketFacility(config.service.socket, facility=config.name)
        return LocalFacility(S2CS(config))
    if separator and kind == "compute":
        return ComputeFacility(rest)
    if re.fullmatch(r"https?://.+|[^/]+:[0-9]+", address):
        return RestFacility(address)
    raise BadRequest(
        f"{address!r} is not the address of a facility",
        which=address,
        hint=_ADDRESSES,
    )


def _understood(answer: dict[str, Any], model: type[A], name: str) -> A:
    if answer.get("ok") is True:
        value: dict[str, Any] = answer.get("value") or {}
        return read(model, value, error=FacilityUnreachable)
    error = answer.get("error")
    if not isinstance(error, dict):
        raise FacilityUnreachable(f"facility {name} gave an answer without value and error", which=name)
    raise error_from_document(error)
