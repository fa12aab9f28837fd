"""A stream set up by a flow: the definition that Globus Flows would run, on the runner of this package."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # one of its own before Python 3.11
from typing import Any

from scistream_flows import Facility, NotFound, ScistreamError, connect_facility
from scistream_flows.actions import runner
from scistream_flows.actions.language import Definition
from scistream_flows.actions.render import render
from scistream_flows.models import Mode, Release, Role, Status, StatusQuery
from scistream_flows.tokens import Tokens

SLICE_S = 5
READY_TIMEOUT_S = 60


class FlowStream:
    """A stream whose life is a run of a flow. The run goes on in a thread of its own.

    Attributes:
        listener: What the consumer is told, once `wait_connected` has returned.
        steps: The states that the run has come through, each with the last thing it showed.
    """

    def __init__(self, facilities: Mapping[Role, Facility]) -> None:
        self.listener = ""
        self.steps: dict[str, str] = {}
        self.cancelled = threading.Event()
        self.outcome: Future[runner.Run] = Future()
        self._connected = threading.Event()
        self._facilities = facilities
        self._uid = ""

    def see(self, event: Mapping[str, Any]) -> None:
        """Take in one entry of the run's log."""
        details = event["details"]
        name, output = details.get("state_name"), details.get("output") or {}
        if event["code"] in ("ActionPolled", "ActionCompleted"):
            self.steps[name] = output.get("display_status", output["status"])
        if event["code"] == "ActionStarted" and name == "StartProducerRelay":
            self._uid = details["input"]["stream_id"]
        if event["code"] == "ActionCompleted" and name == "StartConsumerRelay":
            (self.listener,) = output["details"]["listeners"]
        if event["code"] == "ActionCompleted" and name == "ConnectRelays":
            self._connected.set()

    def wait_connected(self) -> None:
        """Return when a probe has passed from end to end.

        Raises:
            ScistreamError: When the flow has ended instead.
        """
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not self._connected.wait(0.01):
            if self.outcome.done():
                self.outcome.result().check()
            if time.monotonic() > deadline_s:
                raise ScistreamError(f"the flow has not connected the stream within {READY_TIMEOUT_S} s")

    def sides(self) -> Sequence[Status]:
        """PROD and CONS now, as each facility sees it."""
        return [
            facility.status(StatusQuery(uid=self._uid, role=role))
            for role, facility in self._facilities.items()
        ]

    def finish(self, *, timeout_s: float) -> Mapping[Role, Status]:
        """Wait for the end of the flow; answers how each side ended.

        Raises:
            ScistreamError: When the flow has failed.
        """
        try:
            self.outcome.result(timeout_s).check()
        except FutureTimeout as late:
            raise ScistreamError(f"the flow has not ended within {timeout_s:g} s of its last frame") from late
        return dict(zip(self._facilities, self.sides(), strict=True))

    def release(self) -> None:
        """End both sides, if they have not ended: after a cancelled run no state releases them."""
        for role, facility in self._facilities.items() if self._uid else ():
            with contextlib.suppress(NotFound):
                facility.release(Release(uid=self._uid, role=role))


@contextlib.contextmanager
def flow_stream(
    services: Mapping[Role, tuple[str, str]], *, targets: Sequence[str], mode: Mode, linger_s: int
) -> Iterator[FlowStream]:
    """Run the flow for two facilities, each given by its name and the URL of its service."""
    (producer, producer_url), (consumer, consumer_url) = services["PROD"], services["CONS"]
    flow = render("slices", producer=producer_url, consumer=consumer_url, slice_s=SLICE_S)

    def run() -> None:
        try:
            stream.outcome.set_result(
                runner.run(
                    Definition(flow.definition),
                    {"targets": list(targets), "mode": mode, "linger_s": linger_s},
                    input_schema=flow.input_schema,
                    authorizer=Tokens([]),  # those of our own development facilities, each to its own service
                    on_event=stream.see,
                    cancelled=stream.cancelled,
                )
            )
        except BaseException as wrong:  # noqa: BLE001 - raised again where the outcome is waited for
            stream.outcome.set_exception(wrong)

    with (
        contextlib.closing(connect_facility(f"local:{producer}")) as prod,
        contextlib.closing(connect_facility(f"local:{consumer}")) as cons,
    ):
        stream = FlowStream({"PROD": prod, "CONS": cons})
        thread = threading.Thread(target=run, name="flow")
        thread.start()
        try:
            yield stream
        finally:
            stream.cancelled.set()
            thread.join()
            stream.release()
