"""The local runner, over HTTP: what a flow's states do, and that no action is left at work unnoticed."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from globus_sdk.testing.data.flows import get_run_logs
from standins.actions import Action, ActionServer, Behaviour, Reply
from standins.compute import Compute

from scistream_flows.actions import client, language, runner
from scistream_flows.actions.runner import Polling, Run
from scistream_flows.errors import BadRequest, NotFound, ScistreamError
from scistream_flows.web import LARGEST_ANSWER_BYTES

QUICK = Polling(first_s=0.5, longest_s=2, scale=0.02)
TOKEN = "token-of-the-producer"
DONE = {"Type": "Pass", "End": True}


class Waiting(Behaviour):
    """Actions are ACTIVE until the test lets go, or for so many polls."""

    def __init__(self, polls: int | None = None) -> None:
        self.polls = polls

    def start(self, action: Action) -> None:
        action.details = {"progress": 0}

    def poll(self, action: Action) -> None:
        action.details = {"progress": action.polls}
        if self.polls is not None and action.polls >= self.polls:
            action.succeed(progress="done")


class Stubborn(Waiting):
    """Actions that go on when they are cancelled."""

    def cancel(self, action: Action) -> None:
        pass


@pytest.fixture
def provider() -> Iterator[ActionServer]:
    with ActionServer() as server:
        yield server


def flow(**states: Any) -> language.Definition:
    """A definition whose first state is the first of `states`; `Done` is added."""
    return language.load({"StartAt": next(iter(states)), "States": {**states, "Done": DONE}})


def action(server: ActionServer | Compute | str, **more: Any) -> dict[str, Any]:
    """An Action state that goes on to Done."""
    state = {
        "Type": "Action",
        "ActionUrl": server if isinstance(server, str) else server.url,
        "Parameters": {"x": 1},
        "ResultPath": "$.result",
        "WaitTime": 30,
        "ExceptionOnActionFailure": True,
        "Next": "Done",
        **more,
    }
    return {key: value for key, value in state.items() if value is not None}


def go(definition: language.Definition, flow_input: Mapping[str, Any] | None = None, **options: Any) -> Run:
    return runner.run(definition, flow_input or {}, **{"polling": QUICK, **options})


def codes(run: Run, *, of: str | None = None) -> list[str]:
    return [one["code"] for one in run.log if of is None or one["details"].get("state_name") == of]


def catch(next_state: str = "Done", *names: str) -> list[dict[str, Any]]:
    return [{"ErrorEquals": list(names) or ["States.ALL"], "ResultPath": "$.error", "Next": next_state}]


class InThread:
    """A run in a thread of its own, which a test can cancel."""

    def __init__(self, definition: language.Definition, **options: Any) -> None:
        self.cancelled = threading.Event()
        self.outcome: Run | BaseException | None = None
        self._thread = threading.Thread(target=self._go, args=(definition, options))
        self._thread.start()

    def _go(self, definition: language.Definition, options: Mapping[str, Any]) -> None:
        try:
            self.outcome = go(definition, cancelled=self.cancelled, **options)
        except BaseException as error:  # noqa: BLE001 - told to the test
            self.outcome = error

    def cancel(self) -> Run:
        self.cancelled.set()
        self._thread.join(30)
        assert isinstance(self.outcome, Run), self.outcome
        return self.outcome


# The log, and what a run shows


def test_the_log_has_the_shape_that_globus_shows(provider: ActionServer) -> None:
    theirs = get_run_logs.RUN_LOGS_RESPONSE["entries"]
    ours = go(
        language.load(
            {
                "StartAt": "SyncHelloWorld",
                "States": {
                    "SyncHelloWorld": {
                        "Type": "Action",
                        "ActionUrl": provider.url,
                        "Parameters": {"echo_string": "sync!"},
                        "ExceptionOnActionFailure": True,
                        "WaitTime": 60,
                        "End": True,
                    }
                },
            }
        )
    ).log
    assert isinstance(theirs, list)
    assert [one["code"] for one in ours] == [one["code"] for one in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["description"] == other["description"]
        assert set(mine) == set(other)
        assert set(mine["details"]) == set(other["details"])
    assert ours[1]["details"] == theirs[1]["details"]
    assert ours[2]["details"]["output"]["state_name"] == "SyncHelloWorld"


def test_an_action_is_watched_until_it_is_over_and_its_result_placed(provider: ActionServer) -> None:
    provider.behaviour = Waiting(polls=3)
    events: list[Mapping[str, Any]] = []
    run = go(flow(Start=action(provider)), {"kept": 1}, on_event=events.append)
    assert run.status == "SUCCEEDED"
    assert run.check() is run
    assert run.output["kept"] == 1
    result = run.output["result"]
    assert (result["status"], result["state_name"], result["details"]) == (
        "SUCCEEDED",
        "Start",
        {"progress": "done"},
    )
    polled = [one for one in events if one["code"] == "ActionPolled"]
    assert [one["details"]["output"]["details"]["progress"] for one in polled] == [0, 1, 2]
    assert [one for one in events if one not in polled[:-1]] == run.log, (
        "the log does not grow with each poll"
    )


def test_an_unchanged_status_is_not_told_again(provider: ActionServer) -> None:
    class Quiet(Waiting):
        def poll(self, action: Action) -> None:
            if action.polls >= 5:
                action.succeed()

    provider.behaviour = Quiet()
    events: list[Mapping[str, Any]] = []
    go(flow(Start=action(provider)), on_event=events.append)
    assert [one["code"] for one in events if one["code"].startswith("Action")] == [
        "ActionStarted",
        "ActionPolled",
        "ActionCompleted",
    ]


def test_a_run_is_shown_as_a_document(provider: ActionServer) -> None:
    document = go(flow(Start=action(provider)), label="my run").to_document()
    assert (document["status"], document["label"], document["details"]["code"]) == (
        "SUCCEEDED",
        "my run",
        "FlowSucceeded",
    )
    assert document["start_time"] <= document["completion_time"]
    json.dumps(document)


def test_an_action_gets_what_globus_would_send(provider: ActionServer) -> None:
    managers = ["urn:globus:auth:identity:22222222-2222-4222-8222-222222222222"]
    monitors = ["urn:globus:groups:id:33333333-3333-4333-8333-333333333333"]
    parameters = {"id.$": "$._context.run_id", "n.=": "a + 1"}
    run = go(
        flow(Start=action(provider, Parameters=parameters)),
        {"a": 1},
        label="lab",
        managers=managers,
        monitors=monitors,
    )
    (asked,) = provider.requests("POST", "/run")
    assert set(asked.body) == {"request_id", "body", "label", "manage_by", "monitor_by"}
    assert asked.body["body"] == {"id": run.run_id, "n": 2}
    assert (asked.body["label"], asked.body["manage_by"], asked.body["monitor_by"]) == (
        "lab",
        managers,
        monitors,
    )


def test_an_action_without_label_and_people_gets_none(provider: ActionServer) -> None:
    go(flow(Start=action(provider)))
    assert set(provider.requests("POST", "/run")[0].body) == {"request_id", "body"}


def test_an_input_path_is_the_body_of_the_action(provider: ActionServer) -> None:
    go(flow(Start=action(provider, Parameters=None, InputPath="$.body")), {"body": {"y": 2}})
    assert provider.requests("POST", "/run")[0].body["body"] == {"y": 2}


def test_a_handler_of_an_action_provider_is_an_action_url(provider: ActionServer) -> None:
    state = action(provider, ActionUrl=None, Handler={"Type": "ActionProvider", "Url": provider.url + "/"})
    assert go(flow(Start=state)).status == "SUCCEEDED"


# Nothing is run that cannot be


def test_a_wrong_definition_runs_nothing(provider: ActionServer) -> None:
    definition = flow(Start=action(provider, Next="Later"), Later={"Type": "AwaitWebInput"})
    with pytest.raises(BadRequest, match="state 'Later': AwaitWebInput is not supported here"):
        go(definition)
    assert not provider.asked


SCHEMA = {
    "type": "object",
    "required": ["targets", "lease_s"],
    "additionalProperties": False,
    "properties": {
        "targets": {"type": "array", "items": {"type": "string"}},
        "lease_s": {"type": "integer", "minimum": 60},
        "_private_key": {"type": "string", "minLength": 30},
    },
}


def test_every_mistake_of_the_input_is_named_and_nothing_runs(provider: ActionServer) -> None:
    with pytest.raises(BadRequest) as raised:
        go(
            flow(Start=action(provider)),
            {"targets": ["a", 7], "lease_s": 5, "other": 1, "_private_key": "hush"},
            input_schema=SCHEMA,
        )
    assert len(raised.value.details["mistakes"]) == 4
    words = str(raised.value)
    for part in (
        "$.targets[1]: 7 is not of type 'string'",
        "$.lease_s: 5 is less than",
        "'other' was unexpected",
    ):
        assert part in words
    assert "hush" not in words
    assert not provider.asked


def test_an_input_that_fits_its_schema_runs(provider: ActionServer) -> None:
    run = go(flow(Start=action(provider)), {"targets": [], "lease_s": 60}, input_schema=SCHEMA)
    assert run.status == "SUCCEEDED"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "thing"}, "is no JSON Schema"),
        ({"$ref": "https://example.org/schema.json"}, "refers to what is not in it"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "required": "a"}, "is no JSON Schema"),
    ],
)
def test_a_schema_that_is_none_is_refused(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        go(flow(Start=DONE), input_schema=schema)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": "x" * 65}, "1 to 64 characters"),
        ({"label": ""}, "1 to 64 characters"),
        ({"managers": ["urn:x"] * 17}, "17 managers"),
        ({"monitors": ["urn:x"] * 17}, "17 monitors"),
        ({"flow_input": {"a": {1}}}, "not JSON"),
        ({"flow_input": {"a": float("nan")}}, "not JSON"),
        ({"flow_input": [1]}, "not JSON"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        go(flow(Start=DONE), **options)


# Tokens


def test_each_provider_gets_its_own_token_and_no_other(provider: ActionServer) -> None:
    with ActionServer() as other, ActionServer() as third:
        tokens = {provider.url: "token-one", other.url: "token-two"}
        run = go(
            flow(
                One=action(provider, Next="Two", ActionScope="scope-of-two"),
                Two=action(other, Next="Three"),
                Three=action(third),
            ),
            authorizer=tokens.get,
        )
        assert run.status == "SUCCEEDED"
        assert {one.headers.get("Authorization") for one in provider.asked} == {"Bearer token-one"}
        assert {one.headers.get("Authorization") for one in other.asked} == {"Bearer token-two"}
        assert {one.headers.get("Authorization") for one in third.asked} == {None}
    assert "token-" not in json.dumps(run.log)


def test_a_token_is_asked_for_before_each_request_so_that_it_may_be_renewed(provider: ActionServer) -> None:
    provider.behaviour = Waiting(polls=2)
    numbers = itertools.count()
    go(flow(Start=action(provider)), authorizer=lambda _: f"token-{next(numbers)}")
    assert [one.headers["Authorization"] for one in provider.asked] == [
        "Bearer token-0",
        "Bearer token-1",
        "Bearer token-2",
    ]


def test_a_token_that_a_provider_sends_back_is_not_logged(provider: ActionServer) -> None:
    provider.next.append(Reply(403, {"description": f"Bearer {TOKEN} may not"}))
    run = go(flow(Start=action(provider)), authorizer=lambda _: TOKEN)
    assert TOKEN not in json.dumps([run.log, run.output, run.cause])
    assert run.cause["description"] == "Bearer *** may not"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(403, text='{"description": "' + TOKEN.replace("t", "\\u0074") + '"}'),
        Reply(403, {TOKEN: [TOKEN]}),
        Reply(403, text=f"no JSON, {TOKEN}"),
        Reply(302, headers={"Location": f"https://elsewhere.example/?token={TOKEN}"}),
    ],
)
def test_a_token_is_not_logged_however_it_is_sent_back(provider: ActionServer, reply: Reply) -> None:
    provider.next.append(reply)
    run = go(flow(Start=action(provider)), authorizer=lambda _: TOKEN)
    assert run.error == "ActionUnableToRun"
    assert TOKEN not in json.dumps([run.log, run.output, run.cause])
    assert "***" in json.dumps(run.cause)


def test_no_token_is_an_error_of_the_state(provider: ActionServer) -> None:
    def authorizer(address: str) -> str:
        raise NotFound(f"you are not logged in for {address}")

    run = go(flow(Start=action(provider, Catch=catch("Done", "NoTokenException"))), authorizer=authorizer)
    assert run.status == "SUCCEEDED"
    assert "not logged in" in run.output["error"]["Cause"]
    assert not provider.asked


def test_what_is_no_token_is_not_sent_and_not_told(provider: ActionServer) -> None:
    run = go(flow(Start=action(provider)), authorizer=lambda _: f"{TOKEN}\nX-Evil: 1")
    assert run.error == "NoTokenException"
    assert TOKEN not in json.dumps(run.log)
    assert codes(run) == ["FlowStarted", "ActionStarted", "ActionFailed", "FlowFailed"]
    assert not provider.asked


def test_a_token_is_not_sent_in_clear_to_another_machine() -> None:
    run = go(flow(Start=action("http://192.0.2.1:9/")), authorizer=lambda _: TOKEN)
    assert run.error == "ActionUnableToRun"
    assert "not sent over plain http" in run.cause


def test_a_redirect_is_not_followed(provider: ActionServer) -> None:
    with ActionServer() as other:
        provider.next.append(Reply(307, headers={"Location": f"{other.url}/run"}))
        run = go(flow(Start=action(provider)), authorizer=lambda _: TOKEN)
        assert not other.asked
    assert run.error == "ActionUnableToRun"
    assert f"redirects to {other.url}/run" in run.cause


def test_neither_a_proxy_nor_netrc_has_a_part_in_requests_to_this_machine(
    provider: ActionServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password hush\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with ActionServer() as proxy:
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert go(flow(Start=action(provider)), authorizer=lambda _: TOKEN).status == "SUCCEEDED"
        assert go(flow(Start=action(provider))).status == "SUCCEEDED"
        assert not proxy.asked
    assert [one.headers.get("Authorization") for one in provider.asked] == [f"Bearer {TOKEN}", None]


def test_cookies_are_not_kept(provider: ActionServer) -> None:
    provider.behaviour = Waiting(polls=1)
    provider.next.append(Reply(503, headers={"Set-Cookie": "session=1"}))
    go(flow(Start=action(provider)))
    assert not any("Cookie" in one.headers for one in provider.asked)


# Requests that fail on the way


def test_a_request_that_is_tried_again_starts_one_action(provider: ActionServer) -> None:
    provider.next.extend(["lose the answer", "hang up", Reply(503), Reply(429, headers={"Retry-After": "1"})])
    run = go(flow(Start=action(provider)))
    assert run.status == "SUCCEEDED"
    tries = provider.requests("POST", "/run")
    assert len(tries) == 5
    assert len({one.body["request_id"] for one in tries}) == 1
    assert len(provider.actions) == 1


def test_each_visit_of_a_state_is_an_action_of_its_own(provider: ActionServer) -> None:
    again = {"Variable": "$.n.value", "NumericLessThan": 3, "Next": "Start"}
    run = go(
        flow(
            Start=action(provider, Next="Count"),
            Count={
                "Type": "ExpressionEval",
                "Parameters": {"value.=": "getattr('n.value', 0) + 1"},
                "ResultPath": "$.n",
                "Next": "Again",
            },
            Again={"Type": "Choice", "Choices": [again], "Default": "Done"},
        )
    )
    assert run.output["n"] == {"value": 3}
    assert len(provider.actions) == 3


@pytest.mark.parametrize("failure", ["hang up", "lose the answer", Reply(502, {"description": "no S2CS"})])
def test_a_provider_that_never_answers_is_unable_to_run(provider: ActionServer, failure: Any) -> None:
    provider.next.extend([failure] * client.TRIES)
    run = go(flow(Start=action(provider, Catch=catch("Done", "ActionUnableToRun"))))
    assert run.status == "SUCCEEDED"
    assert "whether it started an action is not known" in run.output["error"]["Cause"]
    assert len(provider.asked) == client.TRIES


def test_a_provider_that_is_not_there_was_asked_nothing() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = "http://{}:{}".format(*reserved.getsockname())
        run = go(flow(Start=action(url)))
    assert (run.status, run.error, run.state_name) == ("FAILED", "ActionUnableToRun", "Start")
    assert run.cause == f"POST {url}/run: Connection refused"
    with pytest.raises(ScistreamError, match="the run failed in state 'Start': ActionUnableToRun: POST"):
        run.check()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
def test_a_refusal_is_not_tried_again_and_its_document_is_the_cause(
    provider: ActionServer, status: int
) -> None:
    refusal = {"code": "Refused", "description": "not you"}
    provider.next.append(Reply(status, refusal))
    run = go(flow(Start=action(provider)))
    assert (run.error, run.cause) == ("ActionUnableToRun", refusal)
    assert len(provider.asked) == 1
    assert codes(run) == ["FlowStarted", "ActionStarted", "ActionFailed", "FlowFailed"]
    assert run.log[-1]["details"] == {"error": "ActionUnableToRun", "cause": refusal, "output": {}}


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, text="<html>welcome</html>"),
        Reply(200, [1]),
        Reply(
            200, text='{"action_id": "a", "status": "SUCCEEDED", "details": ' + "[" * 300 + "]" * 300 + "}"
        ),
        Reply(200, {"status": "ACTIVE"}),
        Reply(200, {"action_id": "..", "status": "ACTIVE"}),
        Reply(200, {"action_id": "\ud800", "status": "ACTIVE"}),
        Reply(200, text='{"action_id": "a", "status": "SUCCEEDED", "details": {"n": 1e999}}'),
        Reply(200, {"action_id": "a", "status": "WHATEVER"}),
        Reply(200, text='{"action_id": "a", "status": "SUCCEEDED", "details": {"n": NaN}}'),
    ],
)
def test_what_is_no_action_provider_is_told_from_one(provider: ActionServer, reply: Reply) -> None:
    provider.next.append(reply)
    run = go(flow(Start=action(provider)))
    assert run.error == "ActionUnableToRun"
    assert "does not answer as an action provider" in run.cause


def test_an_endless_answer_is_not_read_to_its_end(provider: ActionServer) -> None:
    provider.next.extend([Reply(200, text="x" * (LARGEST_ANSWER_BYTES + 1))] * client.TRIES)
    run = go(flow(Start=action(provider)))
    assert run.error == "ActionUnableToRun"
    assert "more than 1048576 bytes" in run.cause


def test_a_poll_that_fails_on_the_way_is_repeated(provider: ActionServer) -> None:
    provider.behaviour = Waiting(polls=2)
    provider.next.extend([lambda: None, "hang up", Reply(500), Reply(429)])
    assert go(flow(Start=action(provider))).status == "SUCCEEDED"


def test_a_provider_that_is_started_anew_finds_its_action_still_watched(provider: ActionServer) -> None:
    provider.behaviour = Waiting(polls=2)
    provider.next.extend([lambda: None, *[Reply(503)] * 3 * client.TRIES])
    events: list[Mapping[str, Any]] = []
    run = go(flow(Start=action(provider)), on_event=events.append)
    assert run.status == "SUCCEEDED"
    shown = [one["details"]["output"] for one in events if one["code"] == "ActionPolled"]
    assert [one.get("display_status") or one["details"]["progress"] for one in shown] == [0, "no answer", 1]


def test_a_provider_that_stays_away_fails_its_action(
    provider: ActionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LONGEST_SILENCE_S", 0.05)
    provider.behaviour = Waiting()
    provider.next.extend([lambda: None, *[Reply(503)] * 1000])
    run = go(flow(Start=action(provider)))
    assert run.error == "ActionFailedException"
    assert run.cause.startswith("the action cannot be watched: GET ")
    assert "ActionAbandoned" in codes(run)


def test_an_action_that_cannot_be_watched_any_more_is_cancelled(provider: ActionServer) -> None:
    provider.behaviour = Waiting()
    provider.next.extend([lambda: None, Reply(403, {"description": "your token has expired"})])
    run = go(flow(Start=action(provider, Catch=catch("Done", "ActionFailedException"))))
    assert run.status == "SUCCEEDED"
    assert "your token has expired" in run.output["error"]["Cause"]["details"]["description"]
    assert not provider.active
    assert "ActionCanceled" in codes(run)


# How actions end


class Failing(Behaviour):
    def start(self, action: Action) -> None:
        action.fail(code="Broken", description="the relay did not start")


def test_a_failed_action_is_an_exception_with_its_document(provider: ActionServer) -> None:
    provider.behaviour = Failing()
    run = go(flow(Start=action(provider)))
    assert (run.status, run.error) == ("FAILED", "ActionFailedException")
    assert run.cause["details"]["code"] == "Broken"
    assert run.log[-1]["description"].endswith("ActionFailedException: the relay did not start")


def test_a_failed_action_is_an_exception_unless_the_state_says_otherwise(provider: ActionServer) -> None:
    provider.behaviour = Failing()
    assert go(flow(Start=action(provider, ExceptionOnActionFailure=None))).error == "ActionFailedException"
    run = go(flow(Start=action(provider, ExceptionOnActionFailure=False)))
    assert run.status == "SUCCEEDED"
    assert run.output["result"]["status"] == "FAILED"


def test_an_error_is_caught_by_the_first_that_names_it(provider: ActionServer) -> None:
    provider.behaviour = Failing()
    catchers = [*catch("Wrong", "ActionTimeout"), *catch("Right", "ActionFailedException"), *catch("Wrong")]
    run = go(
        flow(
            Start=action(provider, Catch=catchers),
            Right={"Type": "Pass", "Next": "Done"},
            Wrong={"Type": "Fail", "Error": "Wrong"},
        ),
        {"kept": 1},
    )
    assert run.status == "SUCCEEDED"
    assert run.output["kept"] == 1
    assert run.output["error"]["Error"] == "ActionFailedException"
    assert run.output["error"]["Cause"]["details"]["code"] == "Broken"


def test_a_catch_without_result_path_replaces_the_state(provider: ActionServer) -> None:
    provider.behaviour = Failing()
    run = go(
        flow(Start=action(provider, Catch=[{"ErrorEquals": ["States.ALL"], "Next": "Done"}])), {"gone": 1}
    )
    assert set(run.output) == {"Error", "Cause"}


def test_an_action_that_takes_too_long_is_cancelled_and_its_last_status_kept(provider: ActionServer) -> None:
    provider.behaviour = Waiting()
    run = go(flow(Start=action(provider, WaitTime=1)))
    assert (run.status, run.error) == ("FAILED", "ActionTimeout")
    assert run.cause["status"] == "ACTIVE"
    assert run.cause["details"]["progress"] > 1
    assert not provider.active
    assert codes(run)[-3:] == ["ActionCanceled", "ActionFailed", "FlowFailed"]


def test_an_action_whose_provider_hangs_does_not_outlast_its_time(provider: ActionServer) -> None:
    provider.behaviour = Waiting()
    given_up = threading.Event()
    in_time: list[bool] = []
    hangs = [lambda: in_time.append(given_up.wait(20))]

    def on_event(event: Mapping[str, Any]) -> None:
        if event["code"] == "ActionPolled" and hangs:
            provider.next.append(hangs.pop())
        if event["code"] == "ActionCanceled":
            given_up.set()

    run = go(flow(Start=action(provider, WaitTime=1)), on_event=on_event)
    assert run.error == "ActionTimeout"
    assert not provider.active
    provider.wait_for(lambda: in_time, patience_s=30)
    assert in_time == [True]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (None, "cancelling it led to HTTP 200: ACTIVE"),
        ("hang up", "Remote end closed connection"),
        (Reply(403), "HTTP 403"),
    ],
)
def test_an_action_that_cannot_be_cancelled_is_not_left_silently(
    provider: ActionServer, monkeypatch: pytest.MonkeyPatch, fault: Any, words: str
) -> None:
    monkeypatch.setattr(runner, "CANCEL_PATIENCE_S", 0.2)
    provider.behaviour = Stubborn()
    cancelled = threading.Event()

    def on_event(event: Mapping[str, Any]) -> None:
        if event["code"] == "ActionPolled":
            provider.next.extend([fault] * 20 if fault else [])
            cancelled.set()

    run = go(flow(Start=action(provider)), on_event=on_event, cancelled=cancelled)
    (told,) = [one for one in run.log if one["code"] == "ActionAbandoned"]
    (left,) = provider.active
    assert run.status == "ENDED"
    assert told["details"]["action_id"] == left.action_id
    assert f"may still run, action {left.action_id} of {provider.url}: " in told["description"]
    assert words in told["description"]


def test_inactive_actions_are_watched_on(provider: ActionServer) -> None:
    class Asleep(Waiting):
        def poll(self, action: Action) -> None:
            action.status = "INACTIVE" if action.polls == 1 else "ACTIVE"
            if action.polls == 3:
                action.succeed()

    provider.behaviour = Asleep()
    events: list[Mapping[str, Any]] = []
    run = go(flow(Start=action(provider)), on_event=events.append)
    seen = [one["details"]["output"]["status"] for one in events if one["code"] == "ActionPolled"]
    assert seen == ["ACTIVE", "INACTIVE", "ACTIVE"]
    assert run.status == "SUCCEEDED"


# Cancelling a run


def test_a_cancelled_run_cancels_its_action_and_runs_nothing_further(provider: ActionServer) -> None:
    provider.behaviour = Waiting()
    with ActionServer() as later:
        running = InThread(
            flow(Start=action(provider, Catch=catch("Later"), Next="Later"), Later=action(later))
        )
        provider.wait_for(lambda: any(one.polls > 1 for one in provider.active))
        run = running.cancel()
        assert not later.asked
    assert not provider.active
    assert (run.status, run.error, run.state_name) == ("ENDED", "FlowCanceled", "Start")
    assert codes(run)[-2:] == ["ActionCanceled", "FlowCanceled"]
    with pytest.raises(ScistreamError, match="was cancelled in state 'Start'"):
        run.check()


def test_a_run_that_waits_can_be_cancelled() -> None:
    waits = threading.Event()
    running = InThread(
        flow(Start={"Type": "Wait", "Seconds": 3600, "Next": "Done"}),
        on_event=lambda event: waits.set() if event["code"] == "WaitStarted" else None,
    )
    assert waits.wait(10)
    assert running.cancel().status == "ENDED"


def test_a_run_that_is_cancelled_before_it_starts_runs_nothing(provider: ActionServer) -> None:
    cancelled = threading.Event()
    cancelled.set()
    run = go(flow(Start=action(provider)), cancelled=cancelled)
    assert run.status == "ENDED"
    assert codes(run) == ["FlowStarted", "FlowCanceled"]
    assert not provider.asked


def test_what_was_started_without_an_answer_is_taken_back(provider: ActionServer) -> None:
    provider.behaviour = Waiting()
    provider.next.extend(["lose the answer"])
    running = InThread(
        flow(Start=action(provider)), polling=Polling(first_s=0.1, scale=50)
    )  # 10 s until the next try
    provider.wait_for(lambda: provider.active)
    run = running.cancel()
    assert run.status == "ENDED"
    assert len(provider.actions) == 1
    assert not provider.active
    assert "ActionCanceled" in codes(run)


def test_what_surely_was_not_started_is_not_taken_back(provider: ActionServer) -> None:
    provider.next.extend([Reply(429)] * 20)
    running = InThread(flow(Start=action(provider)), polling=Polling(scale=50))
    provider.wait_for(lambda: provider.asked)
    assert codes(running.cancel()) == ["FlowStarted", "ActionStarted", "FlowCanceled"]
    assert len(provider.asked) == 1


def test_an_interrupted_cancellation_is_not_silent(provider: ActionServer) -> None:
    provider.behaviour = Stubborn()
    events: list[Mapping[str, Any]] = []

    def on_event(event: Mapping[str, Any]) -> None:
        events.append(event)
        if event["code"] == "ActionPolled":
            provider.next.append(lambda: signal.raise_signal(signal.SIGINT))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(flow(Start=action(provider)), on_event=on_event)
    assert events[-1]["code"] == "ActionAbandoned"
    assert "the runner was interrupted" in events[-1]["description"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the screen is gone")])
def test_whatever_ends_the_runner_ends_its_action(provider: ActionServer, error: BaseException) -> None:
    provider.behaviour = Waiting()

    def on_event(event: Mapping[str, Any]) -> None:
        if event["code"] == "ActionPolled":
            raise error

    with pytest.raises(type(error)):
        go(flow(Start=action(provider)), on_event=on_event)
    assert not provider.active


# The other states


def test_a_pass_places_parameters_a_value_or_its_input() -> None:
    run = go(
        flow(
            Start={
                "Type": "Pass",
                "Parameters": {"b.$": "$.a.b", "c": 1},
                "ResultPath": "$.p",
                "Next": "Path",
            },
            Path={"Type": "Pass", "InputPath": "$.a.b", "ResultPath": "$.i", "Next": "Result"},
            Result={"Type": "Pass", "Result": {"x": [1]}, "ResultPath": "$.r", "Next": "Done"},
        ),
        {"a": {"b": 2}},
    )
    assert run.output == {"a": {"b": 2}, "p": {"b": 2, "c": 1}, "i": 2, "r": {"x": [1]}}
    assert codes(run, of="Path") == ["PassStarted", "PassCompleted"]


def test_an_expression_that_fails_fails_the_run() -> None:
    run = go(
        flow(
            Start={"Type": "ExpressionEval", "Parameters": {"a.=": "b"}, "ResultPath": "$.a", "Next": "Done"}
        )
    )
    assert (run.status, run.error) == ("FAILED", "States.ParameterPathFailure")
    assert codes(run) == ["FlowStarted", "ExpressionEvalFailed", "FlowFailed"]


def test_a_failure_in_the_parameters_of_an_action_can_be_caught(provider: ActionServer) -> None:
    run = go(flow(Start=action(provider, Parameters={"a.$": "$.none"}, Catch=catch())))
    assert run.output["error"] == {
        "Error": "States.ParameterPathFailure",
        "Cause": "there is nothing at $.none",
    }
    assert not provider.asked


def test_a_choice_takes_the_first_rule_that_holds() -> None:
    rules = [
        {"Variable": "$.n", "NumericGreaterThan": 10, "Next": "Big"},
        {
            "And": [{"Variable": "$.n", "NumericGreaterThan": 5}, {"Variable": "$.s", "IsPresent": True}],
            "Next": "Some",
        },
    ]
    definition = flow(
        Start={"Type": "Choice", "Choices": rules, "Default": "Done"},
        Big={"Type": "Fail", "Error": "TooBig", "Cause": "it is too big"},
        Some={"Type": "Pass", "Parameters": {"some": True}, "End": True},
    )
    assert go(definition, {"n": 6, "s": 1}).output == {"some": True}
    assert go(definition, {"n": 6}).output == {"n": 6}
    big = go(definition, {"n": 11})
    assert (big.status, big.error, big.cause, big.state_name) == ("FAILED", "TooBig", "it is too big", "Big")
    assert big.output == {"n": 11}


def test_a_choice_without_rule_or_variable_fails_the_run() -> None:
    definition = flow(
        Start={"Type": "Choice", "Choices": [{"Variable": "$.n", "IsNull": True, "Next": "Done"}]}
    )
    assert go(definition, {"n": 1}).error == "States.NoChoiceMatched"
    missing = go(definition)
    assert (missing.error, missing.cause) == ("States.Runtime", "Choice: there is nothing at $.n")


@pytest.mark.parametrize(
    "wait",
    [
        {"Seconds": 0},
        {"SecondsPath": "$.seconds"},
        {"Timestamp": "2020-01-01T00:00:00Z"},
        {"TimestampPath": "$.when"},
    ],
)
def test_a_wait_for_nothing_goes_on(wait: dict[str, Any]) -> None:
    state = {"seconds": 0.01, "when": "2020-01-01T00:00:00+01:00"}
    run = go(flow(Start={"Type": "Wait", **wait, "Next": "Done"}), state)
    assert (run.status, run.output) == ("SUCCEEDED", state)
    assert codes(run, of="Start") == ["WaitStarted", "WaitCompleted"]


@pytest.mark.parametrize(
    ("wait", "state"),
    [
        ({"SecondsPath": "$.s"}, {"s": "1"}),
        ({"SecondsPath": "$.s"}, {"s": -1}),
        ({"SecondsPath": "$.s"}, {"s": 10**9}),
        ({"TimestampPath": "$.s"}, {"s": "tomorrow"}),
        ({"TimestampPath": "$.s"}, {"s": 5}),
    ],
)
def test_a_wait_for_what_is_no_time_fails_the_run(wait: dict[str, Any], state: dict[str, Any]) -> None:
    assert go(flow(Start={"Type": "Wait", **wait, "Next": "Done"}), state).error == "States.Runtime"


def test_a_fail_without_words_fails() -> None:
    run = go(flow(Start={"Type": "Fail"}))
    assert (run.status, run.error, run.cause) == ("FAILED", "States.Fail", "")


def test_the_state_of_a_run_is_limited(provider: ActionServer) -> None:
    class Talkative(Behaviour):
        def start(self, action: Action) -> None:
            action.succeed(text="x" * runner.LARGEST_STATE_BYTES)

    provider.behaviour = Talkative()
    run = go(flow(Start=action(provider)))
    assert (run.error, run.state_name) == ("States.DataLimitExceeded", "Start")
    assert go(flow(Start=DONE), {"x": "y" * runner.LARGEST_STATE_BYTES}).error == "States.DataLimitExceeded"


def test_a_state_does_not_nest_without_end() -> None:
    deeper = {"Type": "Pass", "Parameters": {"in.$": "$"}, "Next": "Start"}
    run = go(flow(Start=deeper))
    assert run.error == "States.DataLimitExceeded"
    assert "nested more than 200 deep" in run.cause


# The context, and what is private


def test_the_context_can_be_read_and_not_written() -> None:
    look = {"Type": "Pass", "InputPath": "$._context", "ResultPath": "$.seen", "Next": "Done"}
    run = go(flow(Start=look), context={"email": "ada@example.org", "run_id": "forged"})
    seen = run.output["seen"]
    assert set(seen) == {"flow_id", "run_id", "username", "email", "user_id", "identities", "token_info"}
    assert (seen["run_id"], seen["email"]) == (run.run_id, "ada@example.org")
    assert set(seen["token_info"]) == {"exp", "iat", "nbf"}
    whole = go(
        flow(Start={"Type": "Pass", "InputPath": "$", "ResultPath": "$.all", "Next": "Done"}), {"a": 1}
    )
    assert whole.output == {"a": 1, "all": {"a": 1}}


def test_two_runs_of_a_flow_share_its_id_only() -> None:
    look = {"Type": "Pass", "InputPath": "$._context", "Next": "Done"}
    first, second = (go(flow(Start=look)).output for _ in range(2))
    assert first["flow_id"] == second["flow_id"]
    assert first["run_id"] != second["run_id"]


def test_what_is_private_is_used_and_never_shown(provider: ActionServer) -> None:
    class Discreet(Behaviour):
        def start(self, action: Action) -> None:
            action.succeed()

    provider.behaviour = Discreet()
    events: list[Any] = []
    run = go(
        flow(
            Start=action(
                provider,
                Parameters={
                    "password.$": "$._private.password",
                    "user": "ada",
                    "__Private_Parameters": ["password"],
                },
                Next="Keep",
            ),
            Keep={
                "Type": "ExpressionEval",
                "Parameters": {"secret.=": "_private.password", "__Private_Parameters": ["secret"]},
                "ResultPath": "$._private_copy",
                "Next": "Use",
            },
            Use=action(
                provider,
                Parameters={"copy.$": "$._private_copy.secret", "__Private_Parameters": ["copy"]},
                ResultPath="$._private_result",
            ),
        ),
        {"_private": {"password": "hush hush"}, "open": 1},
        on_event=events.append,
    )
    first, second = provider.requests("POST", "/run")
    assert first.body["body"] == {"password": "hush hush", "user": "ada"}
    assert second.body["body"] == {"copy": "hush hush"}
    started = [one for one in run.log if one["code"] == "ActionStarted"]
    assert [one["details"]["input"] for one in started] == [{"user": "ada"}, {}]
    assert set(run.output) == {"open", "result"}
    assert "hush" not in json.dumps([events, run.log, run.to_document()])


# Schedules


def test_the_schedule_of_globus_doubles_to_ten_minutes() -> None:
    pauses = list(itertools.islice(Polling.globus().pauses_s(), 12))
    assert pauses == [2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600]
    scaled = list(itertools.islice(Polling.globus(scale=0.01).pauses_s(), 12))
    assert scaled == pytest.approx([one / 100 for one in pauses])


def test_our_own_schedule_stays_quick() -> None:
    pauses = list(itertools.islice(Polling().pauses_s(), 20))
    assert pauses[0] == 0.2
    assert pauses == sorted(pauses)
    assert pauses[-1] == 2.0


def test_a_flow_runs_on_the_schedule_of_globus_in_time_lapse(provider: ActionServer) -> None:
    provider.behaviour = Waiting(polls=4)
    assert go(flow(Start=action(provider)), polling=Polling.globus(scale=0.001)).status == "SUCCEEDED"


# Whole flows


def test_a_flow_counts_and_handles_a_list_in_batches(provider: ActionServer) -> None:
    """As the examples of Globus do: a counter, a slice computed by an expression, and a loop through a Choice."""
    run = go(
        flow(
            Begin={
                "Type": "Pass",
                "Parameters": {"from": 0, "size": 2},
                "ResultPath": "$.batch",
                "Next": "Cut",
            },
            Cut={
                "Type": "ExpressionEval",
                "Parameters": {
                    "items.=": "[{'path': '/data/' + one} for one in files[batch['from']:batch['from'] + batch.size]]",
                    "from.=": "batch['from'] + batch.size",
                    "size.$": "$.batch.size",
                    "more.=": "batch['from'] + batch.size < len(files)",
                },
                "ResultPath": "$.batch",
                "Next": "Move",
            },
            Move=action(provider, Parameters={"items.=": "`$.batch.items`"}, Next="More"),
            More={
                "Type": "Choice",
                "Choices": [{"Variable": "$.batch.more", "BooleanEquals": True, "Next": "Cut"}],
                "Default": "Done",
            },
        ),
        {"files": ["a", "b", "c", "d", "e"]},
    )
    assert run.status == "SUCCEEDED", run.cause
    moved = [
        [item["path"] for item in one.body["body"]["items"]] for one in provider.requests("POST", "/run")
    ]
    assert moved == [["/data/a", "/data/b"], ["/data/c", "/data/d"], ["/data/e"]]


def test_a_failure_on_the_way_still_releases_what_was_started(provider: ActionServer) -> None:
    """The form of the SciStream flows: every step caught, releases that catch into each other, an outcome."""
    with ActionServer(Failing()) as monitor, ActionServer() as release:
        outcome = {"Variable": "$.error", "IsPresent": True, "Next": "Failed"}
        run = go(
            flow(
                Start=action(provider, Catch=catch("ReleaseConsumer"), ResultPath="$.start", Next="Monitor"),
                Monitor=action(monitor, Catch=catch("ReleaseConsumer"), Next="ReleaseConsumer"),
                ReleaseConsumer=action(
                    "http://127.0.0.1:9", Catch=catch("ReleaseProducer"), Next="ReleaseProducer"
                ),
                ReleaseProducer=action(
                    release, Catch=catch("Outcome"), ResultPath="$.released", Next="Outcome"
                ),
                Outcome={"Type": "Choice", "Choices": [outcome], "Default": "Done"},
                Failed={"Type": "Fail", "Error": "StreamFailed", "Cause": "A step failed"},
            )
        )
        assert len(release.actions) == 1
    assert (run.status, run.error) == ("FAILED", "StreamFailed")
    assert run.output["released"]["status"] == "SUCCEEDED"


# The stand-in for Globus Compute

ENDPOINT, NOWHERE = "aaaaaaaa-0000-4000-8000-000000000000", "bbbbbbbb-0000-4000-8000-000000000000"


@pytest.fixture
def compute() -> Iterator[Compute]:
    with Compute(endpoints=[ENDPOINT]) as server:
        yield server


def compute_step(compute: Compute, function_id: str, endpoint: str = ENDPOINT, **more: Any) -> dict[str, Any]:
    tasks = [{"function_id": function_id, "args": [2], "kwargs": {"by.$": "$.by"}}]
    return action(compute, Parameters={"endpoint_id": endpoint, "tasks": tasks}, **more)


def test_a_compute_step_runs_a_function_and_the_flow_reads_its_result(compute: Compute) -> None:
    product = {"Variable": "$.result.details.results[0].output.product", "NumericEquals": 6, "Next": "Done"}
    run = go(
        flow(
            Start=compute_step(compute, compute.register(lambda n, by: {"product": n * by}), Next="Look"),
            Look={"Type": "Choice", "Choices": [product]},
        ),
        {"by": 3},
    )
    assert run.status == "SUCCEEDED", run.cause
    assert run.output["result"]["details"]["result"] == [{"product": 6}]
    assert set(run.output["result"]["details"]["results"][0]) == {"task_id", "output"}


def test_a_compute_step_is_active_while_its_function_runs_and_fails_with_it(compute: Compute) -> None:
    proceed = threading.Event()

    def divide(n: int, by: int) -> float:
        assert proceed.wait(10)
        return n / by

    def on_event(event: Mapping[str, Any]) -> None:
        if event["code"] == "ActionPolled":
            proceed.set()

    run = go(flow(Start=compute_step(compute, compute.register(divide))), {"by": 0}, on_event=on_event)
    assert proceed.is_set()
    assert run.error == "ActionFailedException"
    assert run.cause["details"]["description"] == "ZeroDivisionError: division by zero"


def test_a_compute_step_of_an_unknown_function_or_endpoint_is_unable_to_run(compute: Compute) -> None:
    for function, endpoint in ((NOWHERE, ENDPOINT), (compute.register(print), NOWHERE)):
        run = go(flow(Start=compute_step(compute, function, endpoint)), {"by": 1})
        assert run.error == "ActionUnableToRun"
        assert NOWHERE in run.cause["description"]


def test_a_compute_step_with_a_wrong_form_is_refused(compute: Compute) -> None:
    run = go(flow(Start=action(compute, Parameters={"endpoint": "x", "tasks": []})))
    assert run.error == "ActionUnableToRun"
    assert "'endpoint_id' is a required property" in run.cause["description"]
