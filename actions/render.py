"""The flow definitions, rendered for a pair of facilities, and checked.

Where an action is and how long it may take are literals in a definition, so facilities cannot be chosen by a flow's
input: each pair gets a definition of its own. What a run may choose is in its input schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, Literal, TypeAlias, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scistream_flows.errors import BadRequest, MissingExtra
from scistream_flows.models import DAY_S, complaints, ip_of

from .language import Definition, Problem, problems, read_object

Kind: TypeAlias = Literal["slices", "action-providers", "compute-only"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
VERBS: Final = ("request", "update", "renew", "release")

# How Globus polls an action that is ACTIVE: the gap doubles from the first up to the longest. The longest is
# documented, the first is not; gaps of 4 s have been seen.
FIRST_GAP_S: Final = 4
LONGEST_GAP_S: Final = 600

COMPUTE_WAIT_S: Final = 300  # for one short function, the start of its endpoint included

_UUID = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_ANALYSIS = (("StartAnalysis", "AnalysisStarted"), ("CollectAnalysis", "AnalysisCollected"))


class FlowDocument(BaseModel):
    """A flow, as Globus Flows creates one: the definition, the schema of its input, and words for people."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field(min_length=1, max_length=128)
    subtitle: str = Field("", max_length=128)
    description: str = Field("", max_length=4096)
    keywords: list[str] = []
    definition: dict[str, Any]
    input_schema: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The Globus Compute functions that start an analysis beside the consumer's gateway and collect its result.

    Both take one document and answer `{"ok": true, "value": ...}` or `{"ok": false, "error": ...}`. The one that starts
    it is given `{stream_id, listeners, options}` and returns once the analysis runs; the one that collects is given
    `{stream_id, analysis}`, where `analysis` is the value of the first, and returns when the analysis has ended.
    """

    endpoint_id: str
    start_function_id: str
    collect_function_id: str


def render(
    definition: str,
    *,
    producer: str,
    consumer: str,
    producer_functions: Mapping[str, str] | None = None,
    consumer_functions: Mapping[str, str] | None = None,
    analysis: Analysis | None = None,
    lease_s: int | None = None,
    slice_s: int = 30,
    poll_every_s: int = 30,
    hello_timeout_s: int = 180,
    analysis_wait_s: int = 600,
) -> FlowDocument:
    """The flow `definition` for two facilities.

    Args:
        definition: `slices` (recommended), `action-providers` or `compute-only`.
        producer: The facility of the application that listens: the base URL of its service, such as
            `https://scistream.example.org`; for `compute-only` the UUID of its Globus Compute endpoint.
        consumer: The facility of the application that connects, likewise.
        producer_functions: `compute-only`: the UUIDs of its functions `request, update, renew, release`, as they were
            registered from `scistream_flows.functions.source`.
        consumer_functions: The same of the consumer's facility.
        analysis: Start and collect an analysis in the flow; without it the applications are started elsewhere.
        lease_s: Seconds after which a relay ends that nothing renews; by default the shortest that is safe.
        slice_s: `slices`: the length of one slice, 5 to 600 s: so old can progress be.
        poll_every_s: `compute-only`: seconds between two looks at the stream, 1 to 600.
        hello_timeout_s: Seconds for the stream to become ready, 1 to 86400.
        analysis_wait_s: Seconds for the analysis to start, 60 to 86400.

    Raises:
        BadRequest: For an argument that does not fit; for a lease so short that a stream would end between two polls.
    """
    if definition not in KINDS:
        raise BadRequest(
            f"there is no definition {definition!r}", which=definition, hint=f"Use one of {', '.join(KINDS)}"
        )
    _within("slice_s", slice_s, 5, LONGEST_GAP_S)
    _within("poll_every_s", poll_every_s, 1, LONGEST_GAP_S)
    _within("hello_timeout_s", hello_timeout_s, 1, DAY_S)
    _within("analysis_wait_s", analysis_wait_s, 60, DAY_S)
    values: dict[str, Any] = {
        "slice_s": slice_s,
        "poll_every_s": poll_every_s,
        "hello_timeout_s": hello_timeout_s,
        "analysis_wait_s": analysis_wait_s,
        "compute_wait_s": COMPUTE_WAIT_S,
        # The facility ends what does not become ready; the flow waits longer, so that it hears the reason.
        "connect_wait_s": 2 * hello_timeout_s + 60,
        "slice_wait_s": 2 * slice_s + 300,
        **_sides(
            definition,
            {"producer": producer, "consumer": consumer},
            {"producer": producer_functions, "consumer": consumer_functions},
        ),
    }
    template = json.loads(_read(f"{definition}.json"))
    if analysis is None:
        _leave_out_analysis(template)
    else:
        values["analysis_endpoint_id"] = _uuid("the analysis' endpoint", analysis.endpoint_id)
        values["start_analysis_function_id"] = _uuid(
            "the function that starts the analysis", analysis.start_function_id
        )
        values["collect_analysis_function_id"] = _uuid(
            "the function that collects it", analysis.collect_function_id
        )
    waits = _filled(template["definition"]["States"], {**values, "lease_s": 0})
    values["lease_s"] = _lease(definition, lease_s, waits, slice_s=slice_s, poll_every_s=poll_every_s)
    return FlowDocument.model_validate(_filled(template, values))


def longest_gap_s(definition: str, *, slice_s: int = 30, poll_every_s: int = 30) -> int:
    """The longest time, seconds, for which a running flow leaves a stream without a renewal of its lease.

    Polled at gaps that double, an action of D seconds is seen to be over at most D and the first gap late.
    """
    if definition == "slices":
        return min(slice_s + FIRST_GAP_S, LONGEST_GAP_S)
    if (
        definition == "compute-only"
    ):  # renewed at the very beginning of one function, then at the very end of the next
        return poll_every_s + 2 * COMPUTE_WAIT_S
    return LONGEST_GAP_S


def validate(
    definition: Mapping[str, Any], *, input_schema: Mapping[str, Any] | None = None
) -> Sequence[Problem]:
    """What is wrong with a flow: by the local runner, by Globus's schema, and in its input schema.

    Raises:
        MissingExtra: When jsonschema is not installed.
    """
    try:
        import jsonschema
    except ImportError:
        raise MissingExtra(
            "checking flows needs jsonschema", which="jsonschema", hint="pip install 'scistream-flows[flows]'"
        ) from None
    found = list(problems(Definition(definition)))
    if not any(one.level == "error" for one in found):  # it would only say the same in other words
        checker = jsonschema.Draft7Validator(language_schema(), format_checker=jsonschema.FormatChecker())
        found += [_of_schema(wrong) for wrong in checker.iter_errors(definition)]
    if input_schema:
        draft = jsonschema.validators.validator_for(dict(input_schema), jsonschema.Draft7Validator)
        try:
            draft.check_schema(dict(input_schema))
        except jsonschema.SchemaError as wrong:
            place = ".".join(["input_schema", *(str(part) for part in wrong.absolute_path)])
            found.append(Problem(level="error", state=None, message=f"{place}: {wrong.message}"))
    return sorted(found, key=lambda one: one.level != "error")


def language_schema() -> dict[str, Any]:
    """The JSON schema of the definition language."""
    schema: dict[str, Any] = json.loads(_read("language.schema.json"))
    return schema


def read_flow(text: str, *, what: str) -> FlowDocument:
    """A flow from JSON: what `render` writes, or a bare definition.

    Raises:
        BadRequest: When it is neither.
    """
    document = read_object(text, name=what)
    if "States" in document:
        document = {"title": what[-128:], "definition": document}
    try:
        return FlowDocument.model_validate(document)
    except ValidationError as wrong:
        words = "; ".join(f"{name}: {said}" for name, said in complaints(wrong))
        raise BadRequest(
            f"{what} is not a flow: {words}", which=what, hint="scistream-flows render writes one"
        ) from None


# --- rendering


def _sides(
    definition: str, places: Mapping[str, str], functions: Mapping[str, Mapping[str, str] | None]
) -> dict[str, str]:
    values = {}
    for side, place in places.items():
        given = functions[side]
        if definition != "compute-only":
            if given:
                raise BadRequest(f"{side}_functions: only for compute-only", which=f"{side}_functions")
            values[side] = _base_url(side, place)
            continue
        values[side] = _uuid(f"the {side}'s endpoint", place)
        missing = [verb for verb in VERBS if verb not in (given or {})]
        if given is None or missing:
            raise BadRequest(
                f"{side}_functions: the function of {', '.join(missing)} is missing",
                which=f"{side}_functions",
                hint="Give the compute-functions.json that the facility publishes: from verb to UUID",
            )
        values |= {
            f"{side}_{verb}_function_id": _uuid(f"the {side}'s function {verb}", given[verb])
            for verb in VERBS
        }
    return values


def _base_url(side: str, text: str) -> str:
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    address = ip_of(host)
    loopback = host == "localhost" or (address is not None and address.is_loopback)
    plain = re.fullmatch(r"[A-Za-z0-9:/._~\[\]-]+", text) and "/." not in text
    if not host or not plain or not (parts.scheme == "https" or (parts.scheme == "http" and loopback)):
        raise BadRequest(
            f"{side}: {text!r} is not the base URL of a facility's service",
            which=side,
            hint="Give one such as https://scistream.example.org; http is for loopback only",
        )
    return text.rstrip("/").removesuffix("/actions")


def _uuid(what: str, text: object) -> str:
    if not isinstance(text, str) or not re.fullmatch(_UUID, text):
        raise BadRequest(f"{what}: {text!r} is not a UUID", which=what)
    return text.lower()


def _within(name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise BadRequest(f"{name}: {value} is not within {lowest} to {highest}", which=name)


def _lease(
    definition: str, lease_s: int | None, states: Mapping[str, Any], *, slice_s: int, poll_every_s: int
) -> int:
    """The lease to write down: `lease_s` if it is safe, the shortest safe one in whole minutes without it."""
    gap_s = longest_gap_s(definition, slice_s=slice_s, poll_every_s=poll_every_s)
    # What may pass between the start of the first relay and the first renewal.
    setting_up_s = sum(
        states[name]["WaitTime"]
        for name in ("StartConsumerRelay", "ConnectRelays", "PollReady", "StartAnalysis", "PollStream")
        if name in states
    )
    shortest_s = max(2 * gap_s, setting_up_s)
    if lease_s is None:
        lease_s = 60 * math.ceil(shortest_s / 60)
    if lease_s < shortest_s:
        raise BadRequest(
            f"lease_s: {lease_s} is too short for {definition}: a running stream may not be renewed for {gap_s} s, of"
            f" which a lease must be twice as long, and setting it up may take {setting_up_s} s",
            which="lease_s",
            hint=f"Give {shortest_s} s or more, or shorten slice_s, poll_every_s, hello_timeout_s or analysis_wait_s",
            shortest_s=shortest_s,
        )
    _within("lease_s", lease_s, 1, 30 * DAY_S)
    return lease_s


def _leave_out_analysis(template: dict[str, Any]) -> None:
    """Remove the states of the analysis; whatever led to them leads past them."""
    states = template["definition"]["States"]
    past = {step: states[answered]["Choices"][-1]["Next"] for step, answered in _ANALYSIS}
    for name in (*sum(_ANALYSIS, ()), "AnalysisFailed"):
        del states[name]
    for state in states.values():
        for place in (state, *state.get("Choices", ()), *state.get("Catch", ())):
            for key in ("Next", "Default"):
                if place.get(key) in past:
                    place[key] = past[place[key]]
    schema = template["input_schema"]
    del schema["properties"]["analysis_options"]
    schema["propertyOrder"].remove("analysis_options")


def _filled(part: Any, values: Mapping[str, Any]) -> Any:
    """`part` with every `{name}` of `values` filled in; a text that is nothing else takes the value's own type."""
    if isinstance(part, dict):
        return {key: _filled(one, values) for key, one in part.items()}
    if isinstance(part, list):
        return [_filled(one, values) for one in part]
    if not isinstance(part, str):
        return part
    whole = re.fullmatch(r"\{([a-z_]+)\}", part)
    if whole:
        return values[whole[1]]
    return re.sub(r"\{([a-z_]+)\}", lambda found: str(values[found[1]]), part)


def _read(name: str) -> str:
    return (files(__package__) / "definitions" / name).read_text()


def _of_schema(wrong: Any) -> Problem:
    place = [str(part) for part in wrong.absolute_path]
    state = place[1] if len(place) > 1 else None
    said = str(wrong.message)
    if wrong.validator == "oneOf":
        said = "exactly one is needed of " + " | ".join(
            ", ".join(one.get("required", ())) for one in wrong.validator_value
        )
    where = ".".join(place[2:])
    return Problem(level="error", state=state, message=f"{where}: {said[:300]}" if where else said[:300])
