"""The flow of Compute functions alone, with each of its functions failing once: nothing is left, and it is said why.

Real relays, a real instrument and a real analysis; Globus Flows is replaced by the local runner, Globus Compute by a
stand-in.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
from standins.compute import Compute
from test_flows_end_to_end import COMPUTE, Lab, changed, go, visited

from scistream_flows import functions
from scistream_flows.actions.render import VERBS, Analysis, render
from scistream_flows.actions.runner import LARGEST_STATE_BYTES, Run
from scistream_flows.models import ListQuery
from scistream_flows.s2cs import S2CS

Manner: TypeAlias = Literal["refuses", "raises", "answers nothing", "answers too much"]
Function: TypeAlias = Callable[[Mapping[str, Any]], Any]

WORDS = "the disk of this node is full"
LEASE_S = 10  # shorter than `render` allows, so that its end can be seen
LONG_S = 60  # an instrument that sends for so long is still sending whenever something fails

# The steps that call a function, and where the run's data has its answer.
STEPS = {
    "StartProducerRelay": "producer_relay",
    "StartConsumerRelay": "consumer_relay",
    "ConnectRelays": "connection",
    "PollReady": "stream",
    "StartAnalysis": "analysis",
    "PollStream": "stream",
    "CollectAnalysis": "result",
}
RELEASES = {"ReleaseConsumerRelay": "consumer_release", "ReleaseProducerRelay": "producer_release"}


class Fault:
    """What goes wrong with the functions that some steps call, once each.

    One that `raises`, or `answers nothing`, has done what was asked before: so it looks when a worker is lost, and it
    is the harder case. The others have done nothing.

    Args:
        steps: The steps, and how they fail.
    """

    def __init__(self, steps: Mapping[str, Manner]) -> None:
        self._ahead = dict(steps)
        self._now: Manner | None = None

    @property
    def over(self) -> bool:
        """Whether all of it has happened."""
        return not self._ahead and self._now is None

    def watch(self, event: Mapping[str, Any]) -> None:
        """See a step begin: the next function that is called is its own."""
        if event["code"] == "ActionStarted":
            self._now = self._ahead.pop(event["details"]["state_name"], None)

    def around(self, function: Function) -> Function:
        """A function that does the same, and fails where it has to."""

        def call(document: Mapping[str, Any]) -> Any:
            manner, self._now = self._now, None
            if manner == "refuses":
                return {"protocol": 1, "ok": False, "error": {"code": "internal", "message": WORDS}}
            if manner == "answers too much":
                return {"protocol": 1, "ok": True, "value": "x" * LARGEST_STATE_BYTES}
            answer = function(document)
            if manner == "raises":
                raise OSError(WORDS)
            return {"protocol": 1, "ok": True} if manner == "answers nothing" else answer

        return call


class FaultyLab(Lab):
    """A lab whose functions meet a fault, and those of the facilities too."""

    def __init__(self, compute: Compute, fault: Fault) -> None:
        super().__init__(compute)
        self._fault = fault
        self.analysis = Analysis(
            endpoint_id=str(uuid.uuid4()),
            start_function_id=compute.register(fault.around(self._start)),
            collect_function_id=compute.register(fault.around(self._collect)),
        )

    def functions_of(self, facility: str) -> dict[str, str]:
        """The functions of a facility as they are registered, by verb: from their source text."""
        registered = {}
        for verb in VERBS:
            names: dict[str, Any] = {}
            exec(functions.source(verb, facility=facility), names)  # noqa: S102 - as a worker of Compute does
            registered[verb] = self.compute.register(self._fault.around(names[f"scistream_{verb}"]))
        return registered


@pytest.fixture
def failing(
    facility: Callable[..., S2CS], state_base: Path, relays_below: Callable[..., list[int]]
) -> Iterator[Callable[..., Run]]:
    """A function that runs the flow while some of its steps fail. In the end neither facility may have a stream."""
    services = [facility("aps"), facility("alcf")]
    labs: list[FaultyLab] = []
    with Compute() as compute:

        def run(steps: Mapping[str, Manner], *, seconds: float = LONG_S, lease_s: int | None = None) -> Run:
            fault = Fault(steps)
            lab = FaultyLab(compute, fault)
            labs.append(lab)
            flow = render(
                "compute-only",
                producer=str(uuid.uuid4()),
                consumer=str(uuid.uuid4()),
                producer_functions=lab.functions_of("aps"),
                consumer_functions=lab.functions_of("alcf"),
                analysis=lab.analysis,
                poll_every_s=1,
            )
            flow = changed(flow, f'"{COMPUTE}"', f'"{compute.url}"')
            flow = changed(flow, '"Seconds": 5', '"Seconds": 1')
            if lease_s is not None:
                flow = changed(flow, r'"lease_s": \d+', f'"lease_s": {lease_s}')
            target, _ = lab.instrument(seconds=seconds)
            ended = go(flow, {}, target, authorizer=lambda _: None, on_event=fault.watch)
            assert fault.over, visited(ended)
            return ended

        yield run
        for lab in labs:
            lab.close()
    assert relays_below(state_base) == []
    for service in services:
        assert service.list(ListQuery()).streams == []


def called(ended: Run) -> list[str]:
    """The steps that called a function, in their order."""
    return [one for one in visited(ended) if one in STEPS or one in RELEASES]


def answer_at(ended: Run, place: str) -> Any:
    """What a function has answered."""
    return ended.output[place]["details"]["results"][0]["output"]


@pytest.mark.parametrize("manner", ["refuses", "raises"])
@pytest.mark.parametrize("step", STEPS)
def test_whichever_function_fails_the_flow_says_why_and_releases_both_sides(
    failing: Callable[..., Run],
    state_base: Path,
    relays_below: Callable[..., list[int]],
    step: str,
    manner: Manner,
) -> None:
    # a result is collected when the stream is over; every other step finds the stream open
    ended = failing({step: manner}, seconds=1 if step == "CollectAnalysis" else LONG_S)
    assert relays_below(state_base) == []
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert called(ended)[-3:] == [step, *RELEASES]
    caught = ended.output["error"]
    if manner == "raises":
        assert caught["Error"] == "ActionFailedException"
        assert caught["Cause"]["state_name"] == step
        assert WORDS in caught["Cause"]["details"]["description"]
    else:
        assert caught["Error"] == ("AnalysisFailed" if "Analysis" in step else "StepRefused")
        assert "in this run's data" in caught["Cause"]
        assert answer_at(ended, STEPS[step])["error"]["message"] == WORDS
    for place in RELEASES.values():
        assert answer_at(ended, place)["value"]["released"] is True


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("StartProducerRelay", "States.ParameterPathFailure"),  # of the next step, which wants the value
        ("StartConsumerRelay", "States.ParameterPathFailure"),
        ("PollReady", "StepRefused"),
        ("StartAnalysis", "States.ParameterPathFailure"),
        ("PollStream", "StepRefused"),
    ],
)
def test_an_answer_without_a_value_fails_the_flow_and_both_sides_are_released(
    failing: Callable[..., Run],
    state_base: Path,
    relays_below: Callable[..., list[int]],
    step: str,
    error: str,
) -> None:
    # the value of the analysis' start is wanted when the stream is over
    ended = failing({step: "answers nothing"}, seconds=1 if step == "StartAnalysis" else LONG_S)
    assert relays_below(state_base) == []
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert ended.output["error"]["Error"] == error
    assert called(ended)[-2:] == [*RELEASES]
    for place in RELEASES.values():
        assert answer_at(ended, place)["value"]["released"] is True


@pytest.mark.parametrize("manner", ["refuses", "raises"])
@pytest.mark.parametrize("release", RELEASES)
def test_a_release_that_fails_after_the_stream_has_ended_is_told_and_fails_nothing(
    failing: Callable[..., Run],
    state_base: Path,
    relays_below: Callable[..., list[int]],
    release: str,
    manner: Manner,
) -> None:
    ended = failing({release: manner}, seconds=1).check()
    assert called(ended)[-3:] == ["CollectAnalysis", *RELEASES]
    assert answer_at(ended, "result")["value"]["bytes"] > 0
    place = RELEASES[release]
    caught = ended.output[f"{place}_error"]
    assert caught["Error"] == ("ReleaseRefused" if manner == "refuses" else "ActionFailedException")
    assert WORDS in json.dumps([caught, ended.output.get(place)])
    assert relays_below(state_base, patience_s=5) == []


@pytest.mark.parametrize("release", RELEASES)
def test_a_side_that_does_not_release_ends_by_its_lease(
    failing: Callable[..., Run], state_base: Path, relays_below: Callable[..., list[int]], release: str
) -> None:
    ended = failing({"PollStream": "raises", release: "refuses"}, lease_s=LEASE_S)
    assert len(relays_below(state_base)) == 1
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert WORDS in ended.output["error"]["Cause"]["details"]["description"]
    assert ended.output[f"{RELEASES[release]}_error"]["Error"] == "ReleaseRefused"
    (other,) = RELEASES.keys() - {release}
    assert answer_at(ended, RELEASES[other])["value"]["released"] is True
    assert relays_below(state_base, patience_s=LEASE_S + 10) == []


def test_an_answer_that_is_too_large_ends_the_run_at_once_and_both_sides_by_their_lease(
    failing: Callable[..., Run], state_base: Path, relays_below: Callable[..., list[int]]
) -> None:
    """The one failure that no step can catch: the run has nowhere to keep it."""
    ended = failing({"StartAnalysis": "answers too much"}, lease_s=LEASE_S)
    assert (ended.status, ended.error) == ("FAILED", "States.DataLimitExceeded")
    assert called(ended)[-1] == "StartAnalysis"
    assert len(relays_below(state_base)) == 2
    assert relays_below(state_base, patience_s=LEASE_S + 10) == []
