"""The verbs of a facility, asked through its Globus Compute endpoint.

JSON goes both ways, and nothing else is taken back: the answer of an endpoint is never run here. Every call ends by
its deadline. A task whose answer was lost is forgotten with the connection that it came by, so that it keeps no
process from exiting.

The SDK is loaded by the first call. It starts threads when it is loaded: do not fork after that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout  # one of its own before Python 3.11
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from scistream_flows.errors import (
    BadRequest,
    Busy,
    FacilityUnreachable,
    MissingExtra,
    PolicyDenied,
    ScistreamError,
    Unauthenticated,
)
from scistream_flows.s2cs import VERBS

if TYPE_CHECKING:
    from globus_compute_sdk import Client
    from globus_compute_sdk.serialize import ComputeSerializer
    from globus_sdk import GlobusAPIError

log = logging.getLogger(__name__)

DEADLINE_S: Final = 120.0
STATUS_S: Final = 5.0  # for the endpoint's status, when a call is already late
MOST_FUNCTIONS: Final = 64  # looked at in an allow list
LOOK_S: Final = 0.05  # how often the SDK looks for results that have arrived; by itself every half second
_NAME: Final = "scistream_"

T = TypeVar("T")

# What an id is the name of never changes, so a process asks once.
_names: dict[str, str] = {}


class ComputeEndpoint:
    """One facility behind one Globus Compute endpoint.

    Args:
        endpoint_id: The endpoint's UUID.
        functions: The ids of the facility's functions, from verb to UUID. By default those of the endpoint's allow
            list that are named `scistream_VERB`.
        client: A `globus_compute_sdk.Client` to use, for this endpoint alone. By default one with the login of this
            user, or of the application that GLOBUS_COMPUTE_CLIENT_ID and _SECRET name.
        deadline_s: For each verb, in seconds; the endpoint may have to start a process first. A call that is late
            takes up to ten more, to see what became of it.

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
        self.endpoint_id = _uuid(endpoint_id, "an endpoint")
        self._given = client
        self._ours: Client | None = None
        self._logging_in = threading.Lock()
        self._deadline_s = deadline_s
        self._functions: dict[str, str] | None = None
        self._connection: _Connection | None = None
        self._lock = threading.Lock()
        if functions is not None:
            unknown = sorted(set(functions) - set(VERBS))
            if unknown:
                raise BadRequest(f"there is no verb {unknown[0]!r}", which=unknown[0])
            self._functions = {verb: _uuid(one, f"the function of {verb}") for verb, one in functions.items()}

    @property
    def name(self) -> str:
        """How it is addressed."""
        return f"compute:{self.endpoint_id}"

    def answer(self, verb: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """What the facility answers to a verb.

        Raises:
            MissingExtra: globus-compute-sdk is not installed.
            Unauthenticated: Nobody is logged in to Globus Compute here, or not for this endpoint.
            PolicyDenied: The endpoint does not let this caller run the function.
            BadRequest: The endpoint publishes no such function, or does not exist. Nothing was done.
            Busy: Globus Compute takes no more requests for the moment. Nothing was done.
            FacilityUnreachable: No answer came: what was done is unknown.
        """
        until = time.monotonic() + self._deadline_s
        try:
            function = self._within(until, lambda: self._function(verb))
            with self._connected() as connection:
                said = connection.ask(function, document, until)
        except ScistreamError:
            raise
        except _Late as late:
            said = self._kept(verb, late.task_id)
        except (FutureTimeout, CancelledError):
            raise self._too_late(verb) from None
        except Exception as wrong:  # noqa: BLE001 - the SDK's, and whatever it hands on from afar
            self._explain(verb, wrong)
        if not isinstance(said, dict):
            raise FacilityUnreachable(f"{self.name} answered {verb} with no document", which=self.name)
        return said

    def close(self) -> None:
        """Give back the connection. A later call makes a new one."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.retire()
        ours, self._ours = self._ours, None
        if ours is not None:
            close_client(ours)

    # --- whom to ask

    def _client(self) -> Client:
        with self._logging_in:
            if self._given is not None:
                return self._given
            if self._ours is None:
                self._ours = open_client()
            return self._ours

    def _function(self, verb: str) -> str:
        if self._functions is None:
            self._functions = self._published()
        if verb not in self._functions:
            raise BadRequest(
                f"Globus Compute endpoint {self.endpoint_id} publishes no function {_NAME}{verb}",
                which=self.name,
                hint="Its administrator allows the functions of the facility in its config.yaml, or tells their ids",
                functions=sorted(self._functions),
            )
        return self._functions[verb]

    def _published(self) -> dict[str, str]:
        allowed = self._client().get_allowed_functions(self.endpoint_id)
        if not allowed.get("restricted"):
            raise BadRequest(
                f"Globus Compute endpoint {self.endpoint_id} is no facility: it has no list of allowed functions",
                which=self.name,
                hint="Give the UUID of an endpoint that a facility publishes",
            )
        found: dict[str, str] = {}
        for function_id in map(str, list(allowed["functions"])[:MOST_FUNCTIONS]):
            if not self._named(function_id):
                continue
            verb = _names[function_id].removeprefix(_NAME)
            if verb not in VERBS or not _names[function_id].startswith(_NAME):
                continue
            if verb in found:
                raise BadRequest(
                    f"Globus Compute endpoint {self.endpoint_id} serves several facilities",
                    which=self.name,
                    hint="Give the ids of the functions of the one you mean",
                )
            found[verb] = function_id
        return found

    def _named(self, function_id: str) -> bool:
        """Whether the name of a function is known; one that this caller may not look at is left out."""
        if function_id not in _names:
            _, globus_sdk = _sdk()
            try:
                about = self._client().get_function(function_id)
            except globus_sdk.GlobusAPIError as wrong:
                if wrong.http_status in (403, 404):
                    return False
                raise
            _names[function_id] = str(about.get("function_name"))
        return True

    # --- by which connection

    @contextlib.contextmanager
    def _connected(self) -> Iterator[_Connection]:
        client = self._client()
        with self._lock:
            if self._connection is None or not self._connection.usable:
                self._connection = _Connection(self.endpoint_id, client)
            connection = self._connection
            connection.calls += 1
        try:
            yield connection
        except BaseException:
            connection.usable = False  # the SDK's executor may have stopped, or waits for what will not come
            raise
        finally:
            with self._lock:
                connection.calls -= 1
                over = connection.calls == 0 and not connection.usable
            if over:
                connection.retire()

    def _within(self, until: float, call: Callable[[], T]) -> T:
        """What `call` answers, or FutureTimeout: the SDK's requests have time-outs of their own, and repeat."""
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(call())
            except BaseException as wrong:  # noqa: BLE001 - raised again where it is waited for
                outcome.set_exception(wrong)

        threading.Thread(target=run, name="globus compute", daemon=True).start()
        return outcome.result(max(0.0, until - time.monotonic()))

    # --- what went wrong

    def _kept(self, verb: str, task_id: str) -> Any:
        """The result that the service keeps; it may be there although word of it was lost on the way here.

        Raises:
            FacilityUnreachable: There is none, or the function has failed.
        """
        try:
            task = self._within(time.monotonic() + STATUS_S, lambda: self._client().get_task(task_id))
        except (FutureTimeout, OSError):
            raise self._too_late(verb) from None
        except Exception as wrong:  # noqa: BLE001 - the SDK's, and whatever it hands on from afar
            self._explain(verb, wrong)
        if task.get("pending", True):
            raise self._too_late(verb)
        return task.get("result")

    def _too_late(self, verb: str) -> FacilityUnreachable:
        return FacilityUnreachable(
            f"{self.name} has not answered {verb} within {self._deadline_s:g} s; {self._status()}",
            which=self.name,
            hint="What it did is unknown, and ends by its lease. Its administrator sees the endpoint's log",
        )

    def _status(self) -> str:
        """The endpoint's status, in words."""
        try:
            said = self._within(
                time.monotonic() + STATUS_S,
                lambda: self._client().get_endpoint_status(self.endpoint_id),
            )
        except Exception as wrong:  # noqa: BLE001 - what matters is the call that is late
            return f"the service does not tell the endpoint's status ({type(wrong).__name__})"
        return f"the endpoint is {said.get('status', 'unknown')}"

    def _explain(self, verb: str, wrong: Exception) -> NoReturn:
        if isinstance(wrong.__cause__, ScistreamError):
            raise wrong.__cause__ from None
        _, globus_sdk = _sdk()
        if isinstance(wrong, globus_sdk.GlobusAPIError):
            raise self._refused(verb, wrong) from wrong
        if isinstance(wrong, globus_sdk.NetworkError):
            raise FacilityUnreachable(
                f"Globus Compute cannot be reached: {wrong}",
                which=self.name,
                hint="Look at the network and the proxy settings of this machine",
            ) from wrong
        raise FacilityUnreachable(
            f"{self.name} could not run {verb}: {_last_line(wrong)}",
            which=self.name,
            hint="Its administrator sees the endpoint's log",
        ) from wrong

    def _refused(self, verb: str, wrong: GlobusAPIError) -> ScistreamError:
        words = f"{wrong.message or wrong.code or 'no reason given'}"
        about: dict[str, Any] = {"status": wrong.http_status, "code": wrong.code}
        if wrong.http_status == 401:
            return Unauthenticated(
                f"Globus Compute does not accept the login: {words}",
                which=self.name,
                hint="Log in again, with an identity that may use this endpoint",
            )
        if wrong.http_status == 403:
            return PolicyDenied(
                f"{self.name} does not let you run {verb}: {words}",
                which=self.name,
                hint="Ask the administrator of the endpoint",
                **about,
            )
        if wrong.http_status in (400, 404, 413):
            hint = "Look at its UUID" if wrong.http_status == 404 else ""
            return BadRequest(f"{self.name}: {words}", which=self.name, hint=hint, **about)
        if wrong.http_status == 429:
            return Busy(f"Globus Compute takes no more requests now: {words}", which=self.name, **about)
        return FacilityUnreachable(
            f"{self.name} could not run {verb}: {words}; {self._status()}",
            which=self.name,
            hint="Its administrator sees the endpoint's log",
            **about,
        )


def open_client() -> Client:
    """A client of Globus Compute, with the login of this user or of the application that the environment names.

    Nobody is asked for anything: who is not logged in is told how to. Close it with `close_client`.

    Raises:
        MissingExtra: globus-compute-sdk is not installed.
        Unauthenticated: Nobody is logged in here.
    """
    sdk, globus_sdk = _sdk()
    client: Client = sdk.Client(do_version_check=False)
    if isinstance(client.app, globus_sdk.UserApp) and client.app.login_required():
        close_client(client)
        raise Unauthenticated(
            "nobody is logged in to Globus Compute here",
            which="Globus Compute",
            hint='Log in once: python -c "import globus_compute_sdk as g; g.Client().app.login()"; an application sets'
            " GLOBUS_COMPUTE_CLIENT_ID and GLOBUS_COMPUTE_CLIENT_SECRET",
        )
    return client


def close_client(client: Client) -> None:
    """Give back the connections and the file that a client holds; the SDK has no public way to."""
    web = getattr(client, "_compute_web_client", None)
    for one in (getattr(web, "v2", None), getattr(web, "v3", None), client.app):
        if one is not None:
            one.close()


class _Late(Exception):
    def __init__(self, task_id: str) -> None:
        super().__init__(task_id)
        self.task_id = task_id


class _Connection:
    """One executor of the SDK, with a task group and hence a watcher of results of its own.

    `calls` counts those under way, under the lock of its owner. When one of them fails it is `usable` no more, and is
    retired by the last.
    """

    def __init__(self, endpoint_id: str, client: Client) -> None:
        from globus_compute_sdk.serialize import JSONData

        self.calls = 0
        self.usable = True
        self._group = uuid.uuid4()
        self._executor: Any = _executor()(
            endpoint_id=endpoint_id,
            client=client,
            task_group_id=self._group,
            serializer=_json_only(),
            result_serializers=[JSONData],
            api_burst_limit=8,  # with its own limits, every call after the fourth waits for seconds
            api_burst_window_s=1,
        )

    def ask(self, function: str, document: Mapping[str, Any], until: float) -> Any:
        """The answer to one document.

        Raises:
            _Late: The service has the task, but no answer came.
            FutureTimeout: Not even that is known.
        """
        future = self._executor.submit_to_registered_function(function, args=(dict(document),))
        try:
            return future.result(max(0.0, until - time.monotonic()))
        except FutureTimeout:
            if future.task_id is not None:
                raise _Late(str(future.task_id)) from None
            raise
        finally:
            if future.task_id is None:
                future.cancel()  # not submitted yet: then nobody will wait for it

    def retire(self) -> None:
        """Stop its threads. What it still waits for is given up."""
        self.usable = False
        self._executor.shutdown(wait=False, cancel_futures=True)
        # The watcher goes on while a result is missing, and the process with it; the SDK has no public way to stop it.
        from globus_compute_sdk.sdk import executor

        watcher: Any = getattr(executor, "_RESULT_WATCHERS", {}).get(self._group)
        if watcher is not None:
            watcher.shutdown(wait=False, cancel_futures=True)


def _sdk() -> tuple[Any, Any]:
    try:
        import globus_compute_sdk
        import globus_sdk
    except ImportError as missing:
        raise MissingExtra(
            f"facilities over Globus Compute need globus-compute-sdk: {missing}",
            which="compute",
            hint="pip install 'scistream-flows[compute]'",
        ) from None
    return globus_compute_sdk, globus_sdk


def _executor() -> type[Any]:
    """The SDK's executor, whose results are taken soon after they have arrived.

    It has no public way to say so; where a version of it does without what is said here, it is as slow as by itself.
    """
    sdk, _ = _sdk()
    base: type[Any] = sdk.Executor

    class Prompt(base):  # type: ignore[misc]
        def _get_result_watcher(self) -> Any:
            watcher = super()._get_result_watcher()
            if getattr(watcher, "poll_period_s", 0) < 1:  # it slows down where results have to be fetched
                watcher.poll_period_s = LOOK_S
            return watcher

    return Prompt


def _json_only() -> ComputeSerializer:
    """A serializer that sends JSON and takes nothing else back: the other kinds may run code when they are read."""
    from globus_compute_sdk.serialize import ComputeSerializer, JSONData, PureSourceTextInspect

    class JSONOnly(ComputeSerializer):
        def deserialize(self, payload: str) -> Any:
            if not payload.startswith(JSONData.identifier):
                raise FacilityUnreachable("the answer is no JSON, and was not read")
            return json.loads(payload.removeprefix(JSONData.identifier))

    return JSONOnly(strategy_code=PureSourceTextInspect, strategy_data=JSONData)


def _uuid(text: str, what: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text):
        raise BadRequest(f"{text!r} is not the UUID of {what}", which=text)
    return text.lower()


def _last_line(wrong: Exception) -> str:
    """The end of a traceback that came as text, where its reason is."""
    lines = [line.strip() for line in str(wrong).splitlines() if line.strip(" -=")]
    return lines[-1][:500] if lines else type(wrong).__name__
