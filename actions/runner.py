"""Run a flow definition here: the states one after another, actions over HTTP against real action providers.

The order of reading: `run` starts a `_Runner`, whose `_visit` does one state; the Action state is `_Runner._action`,
whose requests `client.Provider` makes. What was chosen where Globus documents nothing: docs/flow-runner.md.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import ClassVar, Final, Literal, TypeAlias
from urllib.parse import quote

import jsonschema
import referencing

from scistream_flows.errors import BadRequest, ScistreamError
from scistream_flows.web import ANSWER_TIMEOUT_S, Authorizer, NoAnswer, new_session

from .choices import holds, is_number, timestamp
from .client import (
    TRIES,
    Provider,
    action_of,
    in_words,
    is_over,
    status_of,
)
from .expressions import (
    CONTEXT,
    PRIVATE_PREFIX,
    Json,
    StateError,
    fill,
    not_too_deep,
    read_path,
    shown,
    write_path,
)
from .language import DEFAULT_WAIT_TIME_S, LONGEST_WAIT_S, Definition, check

LARGEST_STATE_BYTES: Final = 200_000
"""What Globus Flows documents as the largest state of a run, bytes of JSON."""
LONGEST_LABEL: Final = 64
MOST_PRINCIPALS: Final = 16
LONGEST_SILENCE_S: Final = 60.0
"""How long an action's provider may be away, seconds; it may just be started anew."""
LAST_LOOK_S: Final = 2.0
"""How long an answer about an action is waited for at least, seconds, though its WaitTime is over."""
CANCEL_PATIENCE_S: Final = 10.0
"""How long a cancelled action is watched until it ends, seconds."""

RunStatus: TypeAlias = Literal["ACTIVE", "SUCCEEDED", "FAILED", "ENDED"]
OnEvent: TypeAlias = Callable[[Mapping[str, Json]], object]


@dataclass(frozen=True, kw_only=True)
class Polling:
    """When an action that is not over is asked again.

    Attributes:
        first_s: The first pause, seconds.
        factor: By what each pause grows.
        longest_s: The longest pause, seconds.
        scale: By what all pauses of the runner's own are multiplied, retries included: 0.01 is a time-lapse. WaitTime
            and Wait belong to the definition and are not scaled.
    """

    first_s: float = 0.2
    factor: float = 1.5
    longest_s: float = 2.0
    scale: float = 1.0

    @classmethod
    def globus(cls, *, scale: float = 1.0) -> Polling:
        """As the hosted service: doubling up to ten minutes, as documented; the first pause is not, 2 s is a guess."""
        return cls(first_s=2.0, factor=2.0, longest_s=600.0, scale=scale)

    def pauses_s(self) -> Iterator[float]:
        """The pauses between polls, seconds; without end."""
        pause_s = self.first_s
        while True:
            yield min(pause_s, self.longest_s) * self.scale
            pause_s = min(pause_s * self.factor, self.longest_s)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()


@dataclass(kw_only=True)
class Run:
    """A run of a flow, in the words of Globus Flows.

    Attributes:
        run_id: A UUID; `$._context.run_id` in the flow.
        status: ACTIVE while it runs; SUCCEEDED; FAILED; ENDED when it was cancelled.
        label: As it was given.
        start_time: RFC 3339, UTC.
        completion_time: The same; None while it runs.
        output: The state at the end, without what is private.
        error: The name of the error that ended it, such as `ActionTimeout`.
        cause: What went with it: words, or the document of the action.
        state_name: The state it is in, or ended in.
        log: The events, each `{time, code, description, details}`, oldest first. Of what an action that is not over
            said (`ActionPolled`), the latest only.
    """

    run_id: str
    label: str | None = None
    status: RunStatus = "ACTIVE"
    start_time: str = field(default_factory=_now)
    completion_time: str | None = None
    output: Json = None
    error: str | None = None
    cause: Json = None
    state_name: str | None = None
    log: list[Mapping[str, Json]] = field(default_factory=list)

    def check(self) -> Run:
        """Answer itself when the run succeeded.

        Raises:
            ScistreamError: It did not; says in which state, and why.
        """
        if self.status == "SUCCEEDED":
            return self
        if self.status == "ENDED":
            raise ScistreamError(f"the run was cancelled in state {self.state_name!r}", which=self.run_id)
        raise ScistreamError(
            f"the run failed in state {self.state_name!r}: {self.error}: {in_words(self.cause)}",
            which=self.run_id,
            hint="Its log has each step",
            error=self.error,
            cause=self.cause,
            state=self.state_name,
        )

    def to_document(self) -> dict[str, Json]:
        """The run as Globus Flows shows one, as far as there is something to show here."""
        document: dict[str, Json] = {
            "run_id": self.run_id,
            "status": self.status,
            "start_time": self.start_time,
            "details": dict(self.log[-1]) if self.log else {},
        }
        if self.label is not None:
            document["label"] = self.label
        if self.completion_time is not None:
            document["completion_time"] = self.completion_time
        return document


def run(
    definition: Definition,
    flow_input: Mapping[str, Json],
    *,
    authorizer: Authorizer = lambda address: None,  # noqa: ARG005 - the parameter's name is the documentation
    input_schema: Mapping[str, Json] | None = None,
    polling: Polling | None = None,
    label: str | None = None,
    managers: Sequence[str] = (),
    monitors: Sequence[str] = (),
    on_event: OnEvent | None = None,
    cancelled: threading.Event | None = None,
    context: Mapping[str, Json] | None = None,
) -> Run:
    """Run a flow and answer how it ended, whichever way it did.

    Args:
        definition: What `language.load` answers.
        flow_input: The state to begin with.
        authorizer: Which token goes to which action provider.
        input_schema: What the input must satisfy; JSON Schema, Draft 2020-12 if it does not say.
        polling: When actions are asked again; quick by default, `Polling.globus()` is as hosted.
        label: Goes to every action, 1 to 64 characters.
        managers: URNs that may manage the actions (`manage_by`), at most 16.
        monitors: URNs that may watch them (`monitor_by`), at most 16.
        on_event: Called with each entry of the log, in the thread of the caller. What it raises ends the run.
        cancelled: Set it from another thread to cancel the run: the action at work is cancelled, no state follows.
        context: What `$._context` should have instead of made-up values, such as `email`.

    Raises:
        BadRequest: The definition has errors, or the input, the label or a URN does not fit. Nothing was run.
        BaseException: What `on_event` raises, or a KeyboardInterrupt; the action at work has been cancelled.
    """
    check(definition)
    try:
        start = json.loads(json.dumps(dict(flow_input), allow_nan=False))
        not_too_deep(start)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(
            f"the input is not JSON: {error}", which="input", hint="Use JSON types only"
        ) from None
    if input_schema is not None:
        check_input(start, input_schema)
    if label is not None and not 1 <= len(label) <= LONGEST_LABEL:
        raise BadRequest(f"a label has 1 to {LONGEST_LABEL} characters, this one {len(label)}", which="label")
    for name, urns in (("managers", managers), ("monitors", monitors)):
        if len(urns) > MOST_PRINCIPALS:
            raise BadRequest(f"there are {len(urns)} {name}, at most {MOST_PRINCIPALS} can be", which=name)
    envelope: dict[str, Json] = {}
    if label is not None:
        envelope["label"] = label
    if managers:
        envelope["manage_by"] = list(managers)
    if monitors:
        envelope["monitor_by"] = list(monitors)
    runner = _Runner(
        definition,
        authorizer=authorizer,
        polling=polling or Polling(),
        envelope=envelope,
        on_event=on_event,
        cancelled=cancelled or threading.Event(),
        context=context or {},
    )
    with runner.session:
        return runner.run(start)


def check_input(flow_input: Json, schema: Mapping[str, Json]) -> None:
    """Hold an input against a flow's input schema.

    Raises:
        BadRequest: It does not fit; the message and `details["mistakes"]` name every mistake. Or the schema is none.
    """
    validator_class = jsonschema.validators.validator_for(
        dict(schema), default=jsonschema.Draft202012Validator
    )
    try:
        validator_class.check_schema(dict(schema))
        validator = validator_class(
            schema,
            # without a registry of its own jsonschema would fetch what a schema refers to
            registry=referencing.Registry(),
            format_checker=validator_class.FORMAT_CHECKER,
        )
        mistakes = [
            _mistake(one) for one in sorted(validator.iter_errors(flow_input), key=lambda one: str(one.path))
        ]
    except jsonschema.SchemaError as error:
        raise BadRequest(
            f"the input schema is no JSON Schema: {error.json_path}: {error.message}",
            which="input_schema",
            hint="Correct the schema",
        ) from None
    except (referencing.exceptions.Unresolvable, RecursionError) as error:
        raise BadRequest(
            f"the input schema refers to what is not in it: {error}",
            which="input_schema",
            hint="Put it below $defs of the schema",
        ) from None
    if mistakes:
        raise BadRequest(
            "the input does not fit the flow: " + "; ".join(mistakes),
            which="input",
            hint="Correct it and run again; nothing was run",
            mistakes=mistakes,
        )


def _mistake(error: jsonschema.ValidationError) -> str:
    """One mistake in words, without a private value."""
    private = any(str(step).startswith(PRIVATE_PREFIX) for step in error.path)
    if private or any(repr(one) in error.message for one in _private_values(error.instance, hidden=False)):
        return f"{error.json_path}: does not fit {error.validator!r} of the schema"
    return f"{error.json_path}: {error.message}"


def _private_values(value: Json, *, hidden: bool) -> Iterator[Json]:
    """Every text and number below a key that begins with `_private`."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _private_values(one, hidden=hidden or key.startswith(PRIVATE_PREFIX))
    elif isinstance(value, list):
        for one in value:
            yield from _private_values(one, hidden=hidden)
    elif hidden:
        yield value


class _Cancelled(Exception):
    """The run was cancelled; caught in `_Runner.run`."""


class _Runner:
    """One run; used once."""

    def __init__(
        self,
        definition: Definition,
        *,
        authorizer: Authorizer,
        polling: Polling,
        envelope: Mapping[str, Json],
        on_event: OnEvent | None,
        cancelled: threading.Event,
        context: Mapping[str, Json],
    ) -> None:
        self.session = new_session()
        self._definition = definition
        self._authorizer = authorizer
        self._polling = polling
        self._envelope = envelope
        self._on_event = on_event
        self._cancelled = cancelled
        self._run = Run(run_id=str(uuid.uuid4()), label=envelope.get("label"))
        now_s = int(time.time())
        flow_id = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(definition.document, sort_keys=True))
        self._context = {
            "flow_id": str(flow_id),
            "username": "local@localhost",
            "email": "local@localhost",
            "user_id": "urn:globus:auth:identity:00000000-0000-4000-8000-000000000000",
            "identities": ["urn:globus:auth:identity:00000000-0000-4000-8000-000000000000"],
            "token_info": {"iat": now_s, "nbf": now_s, "exp": now_s + 172_800},
            **context,
            "run_id": self._run.run_id,
        }

    def run(self, flow_input: Json) -> Run:
        """From the first state to an end."""
        run, state = self._run, flow_input
        self._tell("FlowStarted", "The Flow Instance started execution", input=shown(state))
        try:
            self._check_size(state, "the input")
            name: str | None = self._definition.start_at
            while name is not None:
                if self._cancelled.is_set():
                    raise _Cancelled
                run.state_name = name
                state, name = self._visit(name, state)
                self._check_size(state, f"state {run.state_name!r}")
        except StateError as error:
            run.status, run.error, run.cause = "FAILED", error.name, shown(error.cause)
            code, description = "FlowFailed", f"The Flow Instance failed: {error.name}: {in_words(run.cause)}"
        except _Cancelled:
            run.status, run.error, run.cause = "ENDED", "FlowCanceled", "the run was cancelled"
            code, description = "FlowCanceled", "The Flow Instance was canceled by the user"
        else:
            run.status = "SUCCEEDED"
            code, description = "FlowSucceeded", "The Flow Instance completed successfully"
        run.output, run.completion_time = shown(state), _now()
        why = {} if run.error is None else {"error": run.error, "cause": run.cause}
        self._tell(code, description, **why, output=run.output)
        return run

    def _visit(self, name: str, state: Json) -> tuple[Json, str | None]:
        """One state: the state of the run after it, and the name of the next."""
        spec = self._definition.states[name]
        try:
            return self._KINDS[spec["Type"]](self, name, spec, state)
        except StateError as error:
            catcher = next((one for one in spec.get("Catch", ()) if _catches(one, error)), None)
            self._tell_state(
                "Failed", name, f"failed: {error.name}", error=error.name, cause=shown(error.cause)
            )
            if catcher is None:
                raise
            caught = {"Error": error.name, "Cause": error.cause}
            return write_path(catcher.get("ResultPath", "$"), state, caught), catcher["Next"]

    # Each state but Action

    def _pass(self, name: str, spec: Mapping[str, Json], state: Json) -> tuple[Json, str | None]:
        scope, template = self._scope(state), spec.get("Parameters")
        if template is not None:
            value = fill(template, scope, expressions=False)
        elif "InputPath" in spec:
            value = read_path(spec["InputPath"], scope)
        else:
            value = spec.get("Result", state)
        self._tell_state("Started", name, "started", input=shown(value, template))
        return self._complete(name, spec, state, value, template)

    def _expression_eval(self, name: str, spec: Mapping[str, Json], state: Json) -> tuple[Json, str | None]:
        template = spec["Parameters"]
        value = fill(template, self._scope(state))
        self._tell_state("Started", name, "started", input=shown(value, template))
        return self._complete(name, spec, state, value, template)

    def _choice(self, name: str, spec: Mapping[str, Json], state: Json) -> tuple[Json, str | None]:
        self._tell_state("Started", name, "started", input={})
        scope = self._scope(state)
        chosen = next((rule["Next"] for rule in spec["Choices"] if holds(rule, scope)), spec.get("Default"))
        if chosen is None:
            raise StateError("States.NoChoiceMatched", "no rule holds, and there is no Default")
        self._tell_state("Completed", name, "completed", output={}, next=chosen)
        return state, chosen

    def _wait(self, name: str, spec: Mapping[str, Json], state: Json) -> tuple[Json, str | None]:
        wait_s = self._wait_s(spec, self._scope(state))
        self._tell_state("Started", name, "started", input={"seconds": wait_s})
        self._pause(wait_s)
        self._tell_state("Completed", name, "completed", output={})
        return state, spec.get("Next")

    def _wait_s(self, spec: Mapping[str, Json], scope: Json) -> float:
        key = next(one for one in ("Seconds", "SecondsPath", "Timestamp", "TimestampPath") if one in spec)
        value = read_path(spec[key], scope) if key.endswith("Path") else spec[key]
        if key.startswith("Seconds"):
            if not is_number(value) or not 0 <= value <= LONGEST_WAIT_S:
                raise StateError("States.Runtime", f"{value!r} is not a number of seconds up to a year")
            return float(value)
        try:
            moment = timestamp(str(value))
        except ValueError as error:
            raise StateError("States.Runtime", str(error)) from None
        return min(max(0.0, (moment - datetime.now(timezone.utc)).total_seconds()), LONGEST_WAIT_S)

    def _fail(self, name: str, spec: Mapping[str, Json], state: Json) -> tuple[Json, str | None]:  # noqa: ARG002 - one shape for all
        self._tell_state("Started", name, "started", input={})
        raise StateError(spec.get("Error", "States.Fail"), spec.get("Cause", ""))

    # The Action state

    def _action(self, name: str, spec: Mapping[str, Json], state: Json) -> tuple[Json, str | None]:
        scope, template = self._scope(state), spec.get("Parameters")
        body = fill(template, scope) if template is not None else read_path(spec["InputPath"], scope)
        self._tell_state("Started", name, "started", input=shown(body, template))
        provider = Provider(
            spec["ActionUrl"] if "ActionUrl" in spec else spec["Handler"]["Url"],
            session=self.session,
            authorizer=self._authorizer,
            pause=self._pause,
            scale=self._polling.scale,
        )
        deadline = time.monotonic() + spec.get("WaitTime", DEFAULT_WAIT_TIME_S)
        action = self._start(name, provider, body)
        try:
            action = self._watch(name, provider, action, deadline)
        except BaseException:
            self._stop(name, provider, action)
            raise
        result = {**action, "state_name": name}
        if action["status"] == "FAILED" and spec.get("ExceptionOnActionFailure", True):
            raise StateError("ActionFailedException", result)
        return self._complete(name, spec, state, result)

    def _start(self, name: str, provider: Provider, body: Json) -> dict[str, Json]:
        """Start an action: every try has the same request_id, so that a provider starts one only."""
        request = {"request_id": str(uuid.uuid4()), "body": body, **self._envelope}
        try:
            answer = provider.request("POST", "/run", body=request)
        except NoAnswer as error:
            unsure = "; whether it started an action is not known" if error.may_have_arrived else ""
            raise StateError("ActionUnableToRun", f"{error}{unsure}") from None
        except BaseException:
            if provider.owes_an_answer:
                self._take_back(name, provider, request)
            raise
        if not 200 <= answer.status < 300:
            raise StateError("ActionUnableToRun", answer.document)
        return action_of(answer, provider, "ActionUnableToRun")

    def _take_back(self, name: str, provider: Provider, request: Json) -> None:
        """Cancel what a request may have started whose answer nobody waited for: sent again, it answers the same."""
        try:
            answer = provider.request(
                "POST",
                "/run",
                body=request,
                tries=1,
                answer_timeout_s=CANCEL_PATIENCE_S,
                even_if_cancelled=True,
            )
            action = action_of(answer, provider, "ActionUnableToRun")
        except (NoAnswer, StateError) as error:
            self._tell_state("Abandoned", name, f"may have been started: {error}")
        else:
            self._stop(name, provider, action)

    def _watch(
        self, name: str, provider: Provider, action: dict[str, Json], deadline: float
    ) -> dict[str, Json]:
        """Ask for an action's status until it is over."""
        seen: Json = None
        silent_since_s: float | None = None
        for pause_s in self._polling.pauses_s():
            if action["status"] in ("SUCCEEDED", "FAILED"):
                return action
            look = [action.get(key) for key in ("status", "display_status", "details")]
            if silent_since_s is None and look != seen:
                seen = look
                words = action.get("display_status") or action["status"]
                self._tell_state(
                    "Polled", name, f"is at: {words}", output=shown({**action, "state_name": name})
                )
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise StateError("ActionTimeout", {**action, "state_name": name})
            self._pause(min(pause_s, left_s))
            try:
                action, silent_since_s = self._status(provider, action, deadline), None
            except NoAnswer as error:
                now_s = time.monotonic()
                if silent_since_s is None:
                    silent_since_s, seen = now_s, None
                    output = shown({**action, "display_status": "no answer", "state_name": name})
                    self._tell_state(
                        "Polled", name, f"cannot be watched at the moment: {error}", output=output
                    )
                elif now_s - silent_since_s > LONGEST_SILENCE_S:
                    words = f"the action cannot be watched: {error}"
                    raise StateError("ActionFailedException", words) from None
        raise AssertionError  # pauses have no end

    def _status(self, provider: Provider, action: Mapping[str, Json], deadline: float) -> dict[str, Json]:
        left_s = deadline - time.monotonic()
        answer = provider.request(
            "GET",
            f"/{quote(action['action_id'], safe='')}/status",
            # a provider that hangs does not make an action outlast its WaitTime by much
            tries=TRIES if left_s > LAST_LOOK_S else 1,
            answer_timeout_s=min(ANSWER_TIMEOUT_S, max(left_s, LAST_LOOK_S)),
        )
        if answer.status != 200:
            words = f"the action cannot be watched: HTTP {answer.status}: {in_words(answer.document)}"
            raise StateError("ActionFailedException", {**action, "details": {"description": words}})
        return action_of(answer, provider, "ActionFailedException")

    def _stop(self, name: str, provider: Provider, action: Mapping[str, Json]) -> None:
        """Cancel an action, see that it ends, and say so if it does not: it would work on with nobody watching."""
        path = f"/{quote(action['action_id'], safe='')}"
        why = "the runner was interrupted"
        deadline = time.monotonic() + CANCEL_PATIENCE_S
        try:
            answer = provider.request("POST", f"{path}/cancel", tries=3, even_if_cancelled=True)
            for pause_s in self._polling.pauses_s():
                if answer.status == 404 or is_over(answer):
                    break
                if answer.status not in (200, 202, 409) or time.monotonic() >= deadline:
                    why = f"cancelling it led to HTTP {answer.status}: {status_of(answer)}"
                    return
                time.sleep(min(pause_s, 1.0))
                answer = provider.request("GET", f"{path}/status", tries=3, even_if_cancelled=True)
            why = ""
            words = "is gone" if answer.status == 404 else "was cancelled"
            self._tell_state("Canceled", name, words, output=shown(answer.document))
        except (NoAnswer, StateError) as error:
            why = str(error)
        finally:
            if why:
                words = f"may still run, action {action['action_id']} of {provider.url}: {why}"
                self._tell_state("Abandoned", name, words, action_id=action["action_id"])

    # What all states use

    def _complete(
        self, name: str, spec: Mapping[str, Json], state: Json, result: Json, template: Json = None
    ) -> tuple[Json, str | None]:
        after = write_path(spec.get("ResultPath", "$"), state, result)
        self._tell_state("Completed", name, "completed", output=shown(result, template))
        return after, spec.get("Next")

    def _scope(self, state: Json) -> Json:
        return {**state, CONTEXT: self._context} if isinstance(state, dict) else {CONTEXT: self._context}

    def _pause(self, pause_s: float) -> None:
        if self._cancelled.wait(max(0.0, pause_s)):
            raise _Cancelled

    def _check_size(self, state: Json, what: str) -> None:
        try:
            size_bytes = len(json.dumps(not_too_deep(state)))
        except ValueError as error:
            raise StateError("States.DataLimitExceeded", f"after {what} the run's state: {error}") from None
        if size_bytes > LARGEST_STATE_BYTES:
            raise StateError(
                "States.DataLimitExceeded",
                f"after {what} the run's state has {size_bytes} bytes, more than {LARGEST_STATE_BYTES}",
            )

    def _tell_state(self, what: str, name: str, words: str, **details: Json) -> None:
        kind = self._definition.states[name]["Type"]
        self._tell(
            f"{kind}{what}",
            f"State {name} of type {kind} {words}",
            state_name=name,
            state_type=kind,
            **details,
        )

    def _tell(self, code: str, description: str, **details: Json) -> None:
        event = {"time": _now(), "code": code, "description": description, "details": details}
        log = self._run.log
        if code == "ActionPolled" and log[-1]["code"] == code:
            log.pop()  # the log has the latest only: it must not grow with each poll
        log.append(event)
        if self._on_event is not None:
            self._on_event(event)

    _KINDS: ClassVar[Mapping[str, Callable[..., tuple[Json, str | None]]]] = {
        "Action": _action,
        "Pass": _pass,
        "ExpressionEval": _expression_eval,
        "Choice": _choice,
        "Wait": _wait,
        "Fail": _fail,
    }


def _catches(catcher: Mapping[str, Json], error: StateError) -> bool:
    return error.name in catcher["ErrorEquals"] or "States.ALL" in catcher["ErrorEquals"]
