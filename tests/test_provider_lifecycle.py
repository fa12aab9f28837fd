"""The life of an action whatever the action is: an operation of the test's own, on real records, without a server."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from scistream_flows.actions.auth import DevelopmentToken
from scistream_flows.actions.documents import ActionRequest, ActionStatus
from scistream_flows.actions.lifecycle import Lifecycle
from scistream_flows.actions.operations import Call, Operation, Start, StartInput
from scistream_flows.actions.records import Outcome, Record, Records
from scistream_flows.errors import GatewayUnreachable, NotFound, RelayError
from scistream_flows.models import Release, Request, StatusQuery
from scistream_flows.s2cs import S2CS


class Anything(BaseModel):
    """What the operation takes."""

    stream_id: str = "s"


class Scripted(Operation[Any]):  # type: ignore[misc]  # mypy does not see the package of actions/ by its name
    """Does at each step what comes next in its script; the last one again and again."""

    name = "scripted"
    title = "Scripted"
    input = Anything

    def __init__(self, script: Sequence[Outcome | Exception | threading.Event], *, patient: bool) -> None:
        self.script = list(script)
        self.patient = patient
        self.memories: list[Any] = []
        self.withdrawn = 0

    def step(self, call: Call[Any]) -> Outcome:
        self.memories.append(call.memory)
        now = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(now, threading.Event):
            assert now.wait(30)
            return DONE
        if isinstance(now, Exception):
            raise now
        return now

    def withdraw(self, call: Call[Any]) -> None:  # noqa: ARG002
        self.withdrawn += 1


DONE = Outcome(status="SUCCEEDED", display_status="done", details={"n": 1})
ON = Outcome(status="ACTIVE", display_status="on", details={"n": 0}, memory={"seen": 1})


@pytest.fixture
def life(facility: Callable[..., S2CS]) -> Iterator[tuple[Lifecycle, str]]:
    """The lifecycle, and the header of a known caller."""
    service = facility()
    auth = DevelopmentToken(service.config.state_dir)
    lifecycle = Lifecycle(service, auth=auth, records=Records(service.config.state_dir))
    yield lifecycle, f"Bearer {DevelopmentToken.read(service.config.state_dir)}"
    lifecycle.close()


def run(life: tuple[Lifecycle, str], operation: Operation[Any]) -> Record:
    lifecycle, header = life
    request = ActionRequest[Anything](request_id=str(uuid.uuid4()), body=Anything())
    record, new = lifecycle.run(operation, request, header)
    assert new
    return record


def test_an_operation_finds_what_it_remembered(life: tuple[Lifecycle, str]) -> None:
    operation = Scripted([ON, ON, DONE], patient=False)
    record = run(life, operation)
    for _ in range(3):
        record = life[0].status(operation, record.action_id, life[1])
    assert (record.status, record.details) == ("SUCCEEDED", {"n": 1})
    assert operation.memories == [None, {"seen": 1}, {"seen": 1}]


def test_an_operation_that_waits_anyway_waits_for_a_silent_gateway_too(life: tuple[Lifecycle, str]) -> None:
    silent = GatewayUnreachable("gateway g did not answer", which="g")
    operation = Scripted([silent, ON, silent, DONE], patient=True)
    looks = [run(life, operation)]
    looks += [life[0].status(operation, looks[0].action_id, life[1]) for _ in range(3)]
    assert [one.status for one in looks] == ["ACTIVE", "ACTIVE", "ACTIVE", "SUCCEEDED"]
    assert looks[2].details == {"n": 0, "warning": "gateway g did not answer"}
    assert operation.memories == [None, None, {"seen": 1}, {"seen": 1}]


def test_another_operation_fails_with_the_words_of_the_gateway(life: tuple[Lifecycle, str]) -> None:
    record = run(
        life, Scripted([GatewayUnreachable("no answer", which="g", hint="Look at g")], patient=False)
    )
    assert record.status == "FAILED"
    assert record.details == {
        "code": "gateway-unreachable",
        "description": "no answer",
        "which": "g",
        "hint": "Look at g",
    }


def test_what_does_not_pass_by_itself_fails_the_patient_too(life: tuple[Lifecycle, str]) -> None:
    for wrong in (RelayError("broken"), NotFound("gone", reason="released")):
        record = run(life, Scripted([wrong], patient=True))
        assert (record.status, record.details["description"]) == ("FAILED", wrong.message)
    assert record.details["reason"] == "released"


def test_a_mistake_of_ours_fails_the_action_and_is_in_the_log_only(
    life: tuple[Lifecycle, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        record = run(life, Scripted([ValueError("secret thoughts")], patient=True))
    assert (record.status, record.details["code"]) == ("FAILED", "error")
    assert "secret thoughts" not in str(record)
    assert "secret thoughts" in caplog.text


def test_a_step_that_ends_after_the_action_was_cancelled_is_undone(
    life: tuple[Lifecycle, str], within: Callable[..., None]
) -> None:
    gate = threading.Event()
    operation = Scripted([gate], patient=False)
    record = run(life, operation)
    assert record.status == "ACTIVE"
    cancelled = life[0].cancel(operation, record.action_id, life[1])
    gate.set()
    within(lambda: operation.withdrawn == 2)  # when it was cancelled, and when the step had ended
    assert life[0].status(operation, record.action_id, life[1]) == cancelled
    assert cancelled.details["code"] == "cancelled"


def test_a_start_that_is_cancelled_releases_the_callers_own_stream_only(
    facility: Callable[..., S2CS],
) -> None:
    service, ada = facility(), f"urn:globus:auth:identity:{uuid.uuid4()}"
    me = f"urn:globus:auth:identity:{uuid.uuid4()}"
    shared = Request(uid="s", role="PROD", targets=["127.0.0.1:9"], managers=[me])
    service.request(shared, owner=ada)
    begun = StartInput.model_validate({"stream_id": "s", "role": "PROD", "targets": ["127.0.0.1:9"]})
    call = Call(
        service=service, input=begun, caller=(me,), managers=(), monitors=(), elapsed_s=0.0, memory=None
    )
    Start().withdraw(call)
    assert service.status(StatusQuery(uid="s", role="PROD"), owner=ada).state == "LISTENING"
    service.release(Release(uid="s", role="PROD"), owner=ada)


def test_one_step_at_a_time_is_done_however_many_look(life: tuple[Lifecycle, str]) -> None:
    gate = threading.Event()
    operation = Scripted([gate], patient=False)
    record = run(life, operation)
    for _ in range(2):
        assert life[0].status(operation, record.action_id, life[1]).status == "ACTIVE"
    assert len(operation.memories) == 1
    gate.set()
    assert life[0].status(operation, record.action_id, life[1]).status == "SUCCEEDED"


def test_a_status_document_has_no_null(life: tuple[Lifecycle, str]) -> None:
    record = run(life, Scripted([DONE], patient=False))
    document = ActionStatus.of(record).model_dump(mode="json", exclude_none=True)
    assert None not in document.values()
    assert {"action_id", "status", "creator_id", "details"} <= set(document)
