"""The flow definitions: valid, rendered for a pair of facilities, and releasing both sides on every path."""

from __future__ import annotations

import copy
import itertools
import json
import re
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from scistream_flows.actions.language import successors
from scistream_flows.actions.render import (
    FIRST_GAP_S,
    KINDS,
    LONGEST_GAP_S,
    VERBS,
    Analysis,
    FlowDocument,
    language_schema,
    longest_gap_s,
    read_flow,
    render,
    validate,
)
from scistream_flows.errors import BadRequest
from scistream_flows.models import Request, read
from scistream_flows.s2cs import VERBS as S2CS_VERBS

ENDPOINTS = {side: str(uuid.uuid5(uuid.NAMESPACE_DNS, side)) for side in ("producer", "consumer", "analysis")}
FUNCTIONS = {verb: str(uuid.uuid5(uuid.NAMESPACE_DNS, verb)) for verb in VERBS}
ANALYSIS = Analysis(
    endpoint_id=ENDPOINTS["analysis"],
    start_function_id=str(uuid.uuid5(uuid.NAMESPACE_DNS, "start")),
    collect_function_id=str(uuid.uuid5(uuid.NAMESPACE_DNS, "collect")),
)
PAIR = {"producer": "https://aps.example.org", "consumer": "https://alcf.example.org:8443/scistream"}


def rendered(definition: str, **options: Any) -> FlowDocument:
    if definition == "compute-only":
        sides: dict[str, Any] = {side: ENDPOINTS[side] for side in ("producer", "consumer")}
        sides |= {"producer_functions": FUNCTIONS, "consumer_functions": FUNCTIONS}
    else:
        sides = dict(PAIR)
    return render(definition, **{**sides, **options})


def every_variant() -> Iterator[Any]:
    for definition in KINDS:
        for analysis in (None, ANALYSIS):
            name = f"{definition}{' with analysis' if analysis else ''}"
            yield pytest.param(rendered(definition, analysis=analysis), id=name)


VARIANTS = list(every_variant())


@pytest.fixture(params=VARIANTS)
def flow(request: pytest.FixtureRequest) -> FlowDocument:
    document: FlowDocument = request.param
    return document


def states(flow: FlowDocument) -> dict[str, Any]:
    found: dict[str, Any] = flow.definition["States"]
    return found


def reachable(flow: FlowDocument, start: str, *, without: str) -> set[str]:
    """The states on any way from `start`, success or error, that does not go through `without`."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in reached and name != without:
            reached.add(name)
            waiting.extend(successors(states(flow)[name]))
    return reached


def texts(part: Any) -> Iterator[tuple[str, str]]:
    """Every key and text within a part of a definition."""
    if isinstance(part, dict):
        for key, value in part.items():
            if isinstance(value, str):
                yield key, value
            yield from texts(value)
    elif isinstance(part, list):
        for value in part:
            yield from texts(value)


# --- what keeps a stream from outliving its flow


@pytest.mark.parametrize("side", ["Consumer", "Producer"])
def test_every_path_from_the_first_start_goes_through_the_release_of_each_side(
    flow: FlowDocument, side: str
) -> None:
    ends = {name for name, state in states(flow).items() if state.get("End") or state["Type"] == "Fail"}
    assert ends == {"Done", "Failed"}
    assert not reachable(flow, "StartProducerRelay", without=f"Release{side}Relay") & ends


def test_from_every_state_the_run_can_come_to_its_end(flow: FlowDocument) -> None:
    for name in states(flow):
        assert {"Done", "Failed"} & reachable(flow, name, without="")


def test_every_action_catches_every_error_and_keeps_the_state(flow: FlowDocument) -> None:
    for name, state in states(flow).items():
        if state["Type"] != "Action":
            continue
        assert state["ExceptionOnActionFailure"] is True
        (caught,) = state["Catch"]
        assert caught["ErrorEquals"] == ["States.ALL"]
        assert caught["ResultPath"].startswith("$.")
        assert caught["ResultPath"].endswith("error"), name


def test_no_state_that_cannot_catch_can_fail_once_a_relay_may_run(flow: FlowDocument) -> None:
    for name in reachable(flow, "StartProducerRelay", without=""):
        state = states(flow)[name]
        if state["Type"] == "Choice":
            assert "Default" in state
            assured: set[str] = set()
            for rule in state["Choices"]:
                # a missing Variable fails the run, past every Catch: so it is asked for before it is looked at
                assert rule["Variable"] in assured or "IsPresent" in rule, name
                if rule.get("IsPresent") is False:
                    assured.add(rule["Variable"])
        elif state["Type"] != "Action":
            assert not [key for key, _ in texts(state) if key.endswith((".$", ".="))], name


def test_releasing_needs_nothing_but_the_run_and_the_side(flow: FlowDocument) -> None:
    for side, role in (("Consumer", "CONS"), ("Producer", "PROD")):
        release = states(flow)[f"Release{side}Relay"]
        assert {text for key, text in texts(release["Parameters"]) if key.endswith(".$")} == {
            "$._context.run_id"
        }
        assert ("role", role) in set(texts(release["Parameters"]))


def test_a_success_is_only_what_ended_in_order(flow: FlowDocument) -> None:
    over = states(flow)["StreamOver"]
    onwards = [
        rule for rule in over["Choices"] if rule["Next"] in ("CollectAnalysis", "ReleaseConsumerRelay")
    ]
    assert [rule["StringEquals"] for rule in onwards] in (["closed"], ["finished"])
    assert states(flow)["Outcome"]["Choices"][0]["Variable"] == "$.error"
    for name in ("NotFinished", "AnalysisFailed", "StepRefused"):
        if name in states(flow):
            assert states(flow)[name]["ResultPath"] == "$.error"


def test_after_every_compute_step_a_choice_looks_at_ok(flow: FlowDocument) -> None:
    for name, state in states(flow).items():
        if "compute.actions.globus.org" not in state.get("ActionUrl", ""):
            continue
        answered = states(flow)[state["Next"]]
        path = f"{state['ResultPath']}.details.results[0].output.ok"
        absent, yes = answered["Choices"]
        assert absent == {"Variable": path, "IsPresent": False, "Next": answered["Default"]}, name
        assert {**yes, "Next": ""} == {"Variable": path, "BooleanEquals": True, "Next": ""}
        assert yes["Next"] != answered["Default"]


# --- valid, and rendered for this pair


def test_what_is_rendered_is_valid(flow: FlowDocument) -> None:
    assert validate(flow.definition, input_schema=flow.input_schema) == []
    assert read_flow(flow.model_dump_json(), what="flow.json") == flow


def test_no_placeholder_is_left(flow: FlowDocument) -> None:
    assert not re.search(r'"[^"]*\{[a-z_]+\}[^"]*"', flow.model_dump_json())


def test_every_literal_fits_what_the_language_takes(flow: FlowDocument) -> None:
    for name, state in states(flow).items():
        assert len(name) <= 128
        for key in ("WaitTime", "Seconds"):
            assert isinstance(state.get(key, 1), int)


def test_the_sides_are_set_up_in_order(flow: FlowDocument) -> None:
    order = [
        "StartProducerRelay",
        "StartConsumerRelay",
        "ConnectRelays",
        "ReleaseConsumerRelay",
        "ReleaseProducerRelay",
    ]
    for before, after in itertools.pairwise(order):
        assert after in reachable(flow, before, without="")
        if not after.startswith("Release"):
            assert after not in reachable(flow, "Settings", without=before)


def test_actions_are_those_of_the_pair() -> None:
    found = {name: state.get("ActionUrl") for name, state in states(rendered("slices")).items()}
    assert found["StartProducerRelay"] == "https://aps.example.org/actions/start"
    assert found["ConnectRelays"] == "https://aps.example.org/actions/connect"
    assert found["MonitorStream"] == "https://alcf.example.org:8443/scistream/actions/monitor"
    assert found["ReleaseConsumerRelay"] == "https://alcf.example.org:8443/scistream/actions/release"


def test_compute_steps_ask_what_the_verbs_take() -> None:
    """Each document of the Compute steps, with every path filled in, is one that the verb reads."""
    flow = rendered("compute-only")
    values: dict[str, Any] = {"$._context.run_id": "run-1", "$.targets": ["192.0.2.1:5000"]}
    values |= {"$.settings.mode": "tls", "$.settings.probe": "target", "$.settings.reserve_rate": True}
    values |= {"$.settings.consumers": []}
    numbers = {
        "num_conn": 1,
        "gateways": 1,
        "rate_mbits_per_s": 0,
        "max_connections": 64,
        "lifetime_s": 600,
        "linger_s": 5,
    }
    values |= {f"$.settings.{name}": number for name, number in numbers.items()}
    (task,) = states(flow)["StartProducerRelay"]["Parameters"]["tasks"]
    (document,) = task["args"]
    filled = {
        key.removesuffix(".$"): values[text] if key.endswith(".$") else text for key, text in document.items()
    }
    request = read(Request, filled)
    assert (request.uid, request.role, request.until) == ("run-1", "PROD", "closed")
    assert task["function_id"] == FUNCTIONS["request"]


def test_without_an_analysis_nothing_of_it_is_left() -> None:
    for definition in KINDS:
        assert "nalysis" not in json.dumps(rendered(definition).definition["States"])
        assert "analysis_options" not in json.dumps(rendered(definition).input_schema)


@pytest.mark.parametrize("definition", KINDS)
def test_the_analysis_is_started_before_the_stream_is_watched_and_collected_after_it(definition: str) -> None:
    flow = rendered(definition, analysis=ANALYSIS)
    watch = "PollStream" if definition == "compute-only" else "MonitorStream"
    assert watch not in reachable(flow, "ConnectRelays", without="StartAnalysis")
    assert "CollectAnalysis" not in reachable(flow, "StartAnalysis", without="StreamOver")
    assert "Done" in reachable(flow, "StreamOver", without="")


# --- inputs


@pytest.mark.parametrize(
    "given",
    [
        {"targets": ["beamline.example.org:5000"]},
        {
            "targets": ["192.0.2.1:1", "[2001:db8::1]:65535"],
            "num_conn": 16,
            "mode": "auth",
            "lifetime_s": 604_800,
        },
        {"targets": ["a:1"], "consumers": ["192.0.2.0/24"], "rate_mbits_per_s": 40_000, "linger_s": 0},
    ],
)
def test_inputs_that_are_taken(flow: FlowDocument, given: dict[str, Any]) -> None:
    jsonschema.validate(given, flow.input_schema)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"targets": []},
        {"targets": ["no-port"]},
        {"targets": ["a:1"], "uid": "mine"},
        {"targets": ["a:1"], "mode": "plain"},
        {"targets": ["a:1"], "num_conn": 0},
        {"targets": ["a:1"], "gateways": 17},
        {"targets": ["a:1"], "probe": "none"},
        {"targets": ["a:1"], "lifetime_s": 700_000},
    ],
)
def test_inputs_that_are_refused(flow: FlowDocument, given: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(given, flow.input_schema)


def test_what_an_input_may_leave_out_is_filled_in_as_its_schema_says(flow: FlowDocument) -> None:
    settings = states(flow)["Settings"]["Parameters"]
    for name, about in flow.input_schema["properties"].items():
        if name in ("targets", "analysis_options"):
            continue
        default = about["default"]
        assert settings[f"{name}.="] == f"getattr('{name}', {default!r})"


# --- the lease


def polled(over_s: float, *, first_s: float, longest_s: float = LONGEST_GAP_S) -> tuple[float, float]:
    """When an action that is over after `over_s` is seen to be, and the longest gap between two polls."""
    at_s, gap_s = 0.0, first_s
    longest = 0.0
    while at_s < over_s:
        at_s += gap_s
        longest = max(longest, gap_s)
        gap_s = min(2 * gap_s, longest_s)
    return at_s, longest


@pytest.mark.parametrize("slice_s", [5, 30, 31, 59, 200, 600])
@pytest.mark.parametrize("first_s", [1, 2, FIRST_GAP_S])
def test_the_longest_gap_is_one_that_doubling_polls_cannot_exceed(slice_s: int, first_s: float) -> None:
    assert polled(slice_s, first_s=first_s)[1] <= longest_gap_s("slices", slice_s=slice_s)
    assert polled(86_400, first_s=first_s)[1] <= longest_gap_s("action-providers") == 600


@pytest.mark.parametrize("definition", KINDS)
def test_a_lease_shorter_than_twice_the_longest_gap_is_refused_with_the_numbers(definition: str) -> None:
    gap_s = longest_gap_s(definition)
    with pytest.raises(
        BadRequest, match=rf"for {gap_s} s, of which a lease must be twice as long"
    ) as refused:
        rendered(definition, lease_s=2 * gap_s - 1)
    shortest_s = refused.value.details["shortest_s"]
    assert shortest_s >= 2 * gap_s
    assert f"Give {shortest_s} s or more" in refused.value.hint
    assert states(rendered(definition, lease_s=shortest_s))
    with pytest.raises(BadRequest):
        rendered(definition, lease_s=shortest_s - 1)


def test_the_lease_that_is_chosen_is_whole_minutes_and_in_every_place() -> None:
    flow = rendered("slices")
    leases = {
        state["Parameters"]["lease_s"]
        for state in states(flow).values()
        if "lease_s" in state.get("Parameters", {})
    }
    assert leases == {540}
    assert "540 s" in states(flow)["Failed"]["Cause"]


@pytest.mark.parametrize(
    ("definition", "alone_s", "with_analysis_s"),
    [("slices", 540, 1140), ("action-providers", 1200, 1200), ("compute-only", 1260, 1800)],
)
def test_the_default_leases_are_those_of_the_documentation(
    definition: str, alone_s: int, with_analysis_s: int
) -> None:
    for analysis, lease_s in ((None, alone_s), (ANALYSIS, with_analysis_s)):
        assert f"by its lease of {lease_s} s" in json.dumps(
            rendered(definition, analysis=analysis).definition
        )
    page = (Path(__file__).parents[1] / "docs" / "flows.md").read_text()
    assert "540, 1200 and 1260 s" in page


def test_the_lease_covers_a_slow_start_of_the_analysis() -> None:
    with pytest.raises(BadRequest, match="setting it up may take 1140 s"):
        rendered("slices", analysis=ANALYSIS, lease_s=600)
    assert states(rendered("slices", analysis=ANALYSIS, lease_s=1140))


def test_a_flow_waits_longer_for_a_stream_than_the_facility_does() -> None:
    waits = states(rendered("slices", hello_timeout_s=600, lease_s=3600))
    assert waits["ConnectRelays"]["WaitTime"] > polled(600, first_s=FIRST_GAP_S)[0] - 600 + 600
    assert waits["MonitorStream"]["WaitTime"] > polled(30, first_s=FIRST_GAP_S)[0]


# --- arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"producer": "http://aps.example.org"}, "producer: .* not the base URL"),
        ({"producer": "aps.example.org"}, "producer: .* not the base URL"),
        ({"consumer": "https://user@alcf.example.org"}, "consumer: .* not the base URL"),
        ({"consumer": "https://alcf.example.org/?x=1"}, "consumer: .* not the base URL"),
        ({"consumer": "https://alcf.example.org/?"}, "consumer: .* not the base URL"),
        ({"consumer": "https://alcf.example.org/#"}, "consumer: .* not the base URL"),
        ({"consumer": "https://alcf.example.org/a b"}, "consumer: .* not the base URL"),
        ({"consumer": "https://alcf.example.org/a/.."}, "consumer: .* not the base URL"),
        ({"consumer": "https://alcf.example.org\n"}, "consumer: .* not the base URL"),
        ({"consumer": "https://alcf.example.org/{producer}"}, "consumer: .* not the base URL"),
        ({"consumer": "https://alcf.example.org:99999"}, "consumer: .* not the base URL"),
        ({"slice_s": 4}, "slice_s: 4 is not within 5 to 600"),
        ({"hello_timeout_s": 0}, "hello_timeout_s"),
        ({"producer_functions": FUNCTIONS}, "only for compute-only"),
        (
            {"analysis": Analysis(endpoint_id="x", start_function_id="y", collect_function_id="z")},
            "not a UUID",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        render("slices", **{**PAIR, **options})


def test_an_unknown_definition_is_told_the_known_ones() -> None:
    with pytest.raises(BadRequest) as wrong:
        render("sliced", **PAIR)
    assert all(kind in wrong.value.hint for kind in KINDS)


def test_compute_only_needs_endpoints_and_the_function_of_every_verb() -> None:
    with pytest.raises(BadRequest, match="producer's endpoint"):
        render("compute-only", **PAIR)
    with pytest.raises(BadRequest, match="function renew: 7 is not a UUID"):
        rendered("compute-only", producer_functions=FUNCTIONS | {"renew": 7})
    some = {"request": FUNCTIONS["request"], "hello": FUNCTIONS["renew"]}
    with pytest.raises(BadRequest, match="function of update, renew, release is missing"):
        rendered("compute-only", producer_functions=some)


def test_the_functions_are_taken_from_what_a_facility_publishes() -> None:
    published = {verb: str(uuid.uuid4()) for verb in S2CS_VERBS}
    flow = rendered("compute-only", producer_functions=published)
    (task,) = states(flow)["ConnectRelays"]["Parameters"]["tasks"]
    assert task["function_id"] == published["update"]


def test_loopback_may_be_http_and_a_trailing_slash_is_no_other_facility() -> None:
    for place in ("http://127.0.0.1:5000/", "http://[::1]:5000", "http://localhost:5000"):
        flow = render("slices", producer=place, consumer="https://alcf.example.org/")
        assert states(flow)["StartProducerRelay"]["ActionUrl"] == place.rstrip("/") + "/actions/start"
        assert states(flow)["StartConsumerRelay"]["ActionUrl"] == "https://alcf.example.org/actions/start"


# --- the language


def damaged(change: str) -> dict[str, Any]:
    definition: dict[str, Any] = copy.deepcopy(rendered("slices").definition)
    start = definition["States"]["StartProducerRelay"]
    match change:
        case "no Next":
            del start["Next"]
        case "a Retry":
            start["Retry"] = []
        case "no ActionUrl":
            del start["ActionUrl"]
        case "a state of Amazon":
            definition["States"]["Done"] = {"Type": "Succeed"}
        case "a state that is nowhere":
            start["Next"] = "Nowhere"
        case "a state that nothing leads to":
            definition["States"]["Lost"] = {"Type": "Pass", "End": True}
        case "a WaitTime of words":
            start["WaitTime"] = "soon"
        case "two comparisons":
            definition["States"]["Outcome"]["Choices"][0]["IsNull"] = True
        case "a path that is none":
            start["Parameters"]["targets.$"] = "targets"
        case "an expression at the end":
            definition["States"]["Settings"]["End"] = True
            del definition["States"]["Settings"]["Next"]
        case "nothing to start at":
            definition["StartAt"] = "Nowhere"
    return definition


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("no Next", "exactly one of Next and End"),
        ("a Retry", "Globus Flows has no Retry"),
        ("no ActionUrl", "exactly one of ActionUrl and Handler"),
        ("a state of Amazon", "no state of type Succeed"),
        ("a state that is nowhere", "the next state 'Nowhere' does not exist"),
        ("a state that nothing leads to", "state 'Lost': nothing leads to it"),
        ("a WaitTime of words", "WaitTime must be"),
        ("two comparisons", "state 'Outcome': Choices[0]"),
        ("a path that is none", "targets.$"),
        ("an expression at the end", "state 'Settings': 'Next' is a required"),
        ("nothing to start at", "StartAt names 'Nowhere'"),
    ],
)
def test_a_definition_that_globus_would_refuse_is_refused_with_its_place(change: str, words: str) -> None:
    assert any(words in str(problem) for problem in validate(damaged(change))), validate(damaged(change))


def test_an_input_schema_that_is_none_is_a_problem() -> None:
    (problem,) = validate(rendered("slices").definition, input_schema={"type": "objekt"})
    assert problem.message.startswith("input_schema.type: ")


def test_the_schema_of_the_language_is_a_schema() -> None:
    jsonschema.Draft7Validator.check_schema(language_schema())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"States": 3, "x": 1}', ""),
        ('{"title": "x"}', "definition"),
    ],
)
def test_a_file_that_is_no_flow_says_so(text: str, words: str) -> None:
    if not words:
        assert validate(read_flow(text, what="flow.json").definition)
        return
    with pytest.raises(BadRequest, match=words):
        read_flow(text, what="flow.json")


@pytest.mark.package
@pytest.mark.timeout(300)
def test_each_definition_is_valid_by_the_schema_that_globus_has_published(tmp_path: Path) -> None:
    """The last release of Globus's own client that has the schema; ours knows newer states too."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--dest", tmp_path, "globus-automate-client==0.17.0"], check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        schema = json.loads(archive.read("globus_automate_client/flows_schema.json"))
    published = jsonschema.validators.validator_for(schema)(schema)
    assert list(published.iter_errors({"StartAt": "A", "States": {"A": {"Type": "Parallel"}}}))
    for kind in KINDS:
        for analysis in (None, ANALYSIS):
            assert list(published.iter_errors(rendered(kind, analysis=analysis).definition)) == [], kind
