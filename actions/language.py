"""The language of Globus Flows definitions: read one, and say everything that is wrong with it before it runs.

What is supported, and what this package chose where Globus documents nothing, is in docs/flow-runner.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit

from scistream_flows.errors import BadRequest

from . import choices
from .expressions import (
    CONTEXT,
    PRIVATE_PARAMETERS,
    Json,
    compile_path,
    not_too_deep,
    parse_expression,
    parse_json,
    plain_name,
    reference_path,
)

LONGEST_NAME: Final = 128
LONGEST_WAIT_S: Final = 31_536_000
"""The longest Wait, seconds: a year."""
DEFAULT_WAIT_TIME_S: Final = 300
"""How long an action may take when its state does not say, seconds."""
LARGEST_DEFINITION_BYTES: Final = 4 << 20

ERROR_NAMES: Final = frozenset(
    {
        "States.ALL",
        "ActionUnableToRun",
        "ActionFailedException",
        "ActionTimeout",
        "NoTokenException",
        "States.IntrinsicFailure",
        "States.ParameterPathFailure",
        "States.ResultPathMatchFailure",
    }
)
"""What an Action may raise, and so what `ErrorEquals` may name."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "Action": _words(
        "ActionUrl Handler ActionScope Parameters InputPath ResultPath WaitTime ExceptionOnActionFailure RunAs Catch "
        "Next End"
    ),
    "Pass": _words("Parameters InputPath Result ResultPath Next End"),
    "ExpressionEval": _words("Parameters ResultPath Next End"),
    "Choice": _words("Choices Default"),
    "Wait": _words("Seconds SecondsPath Timestamp TimestampPath Next End"),
    "Fail": _words("Error Cause"),
}
_ONLY_AT_GLOBUS: Final = frozenset({"CreateWebInput", "AwaitWebInput"})
_OF_OTHERS: Final = frozenset({"Succeed", "Parallel", "Map", "Task"})
_FIELDS_OF_OTHERS: Final = _words(
    "Retry OutputPath ResultSelector TimeoutSeconds TimeoutSecondsPath HeartbeatSeconds Assign Output Arguments "
    "QueryLanguage ErrorPath CausePath Resource ItemsPath Iterator Branches"
)

Level: TypeAlias = Literal["error", "warning"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something about a definition that its author should know.

    Attributes:
        level: `error`: it will not be run; `warning`: it runs, perhaps otherwise than meant.
        state: The name of the state; None when it concerns the whole.
        message: What it is, without a final stop.
        only_here: Whether only this runner minds: Globus Flows has the feature.
    """

    level: Level
    state: str | None
    message: str
    only_here: bool = False

    def __str__(self) -> str:
        return f"{self.level}: {f'state {self.state!r}: ' if self.state is not None else ''}{self.message}"


@dataclass(frozen=True)
class Definition:
    """A flow definition as it was read; `problems` says whether it is any good.

    Attributes:
        document: The definition, JSON.
        source: Where it comes from, for messages.
    """

    document: Mapping[str, Json]
    source: str = field(default="the definition", compare=False)

    @property
    def start_at(self) -> str:
        """The name of the first state."""
        return str(self.document["StartAt"])

    @property
    def states(self) -> Mapping[str, Mapping[str, Json]]:
        """The states by name; empty when there are none."""
        states = self.document.get("States")
        return states if isinstance(states, dict) else {}


def load(source: str | Path | Mapping[str, Json]) -> Definition:
    """Read a definition.

    Args:
        source: The definition as a mapping, the path of a JSON file, or JSON text (which begins with `{`).

    Raises:
        BadRequest: It cannot be read, is no JSON object, or has a key twice.
    """
    if isinstance(source, Mapping):
        try:
            text = json.dumps(dict(source))
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRequest(f"the definition is not JSON: {error}", hint="Use JSON types only") from None
        return Definition(read_object(text, name="the definition"))
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    name = "the definition" if is_text else str(source)
    return Definition(read_object(str(source) if is_text else _text_of(Path(source)), name=name), name)


def read_object(text: str, *, name: str) -> dict[str, Json]:
    """A JSON object from its text. A key that is there twice is a mistake, not a second opinion.

    Args:
        text: The JSON.
        name: What it is, for messages.

    Raises:
        BadRequest: It is not JSON, not an object, or has a key twice.
    """
    try:
        document = parse_json(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise BadRequest(
            f"{name} is not JSON: {error}", which=name, hint="Correct it at that place; comments are not JSON"
        ) from None
    if not isinstance(document, dict):
        raise BadRequest(f"{name} is JSON, but not an object", which=name, hint="Begin it with `{`")
    return document


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_DEFINITION_BYTES + 1)
        if len(content) > LARGEST_DEFINITION_BYTES:
            raise BadRequest(
                f"{path} has more than {LARGEST_DEFINITION_BYTES} bytes",
                which=str(path),
                hint="Name another file",
            )
        return content.decode()
    except OSError as error:
        words = error.strerror or str(error)
        raise BadRequest(
            f"{path} cannot be read: {words}", which=str(path), hint="Name another file"
        ) from None
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"{path} is not UTF-8: {error.reason}", which=str(path), hint="Save it as UTF-8"
        ) from None


def _without_repetition(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    document: dict[str, Json] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"the key {key!r} is there twice in one object")
        document[key] = value
    return document


def problems(definition: Definition) -> Sequence[Problem]:
    """Everything that is wrong with a definition, and what Globus leaves open; errors first."""
    try:
        not_too_deep(definition.document)
    except ValueError as error:
        return [Problem(level="error", state=None, message=str(error))]
    found = list(_problems_of_whole(definition))
    for name, state in definition.states.items():
        found += _problems_of_state(name, state, definition)
    found += _problems_of_ways(definition)
    return sorted(found, key=lambda one: one.level != "error")


def check(definition: Definition) -> Definition:
    """Answer the definition when it can be run.

    Raises:
        BadRequest: It cannot; the message has the first error, `details["problems"]` all of them.
    """
    errors = [one for one in problems(definition) if one.level == "error"]
    if not errors:
        return definition
    first = str(errors[0]).removeprefix("error: ")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise BadRequest(
        f"{definition.source} cannot be run: {first}{more}",
        which=definition.source,
        hint="`scistream-flows validate` names every problem",
        problems=[str(one) for one in errors],
    )


def _problems_of_whole(definition: Definition) -> Iterator[Problem]:
    def error(message: str) -> Problem:
        return Problem(level="error", state=None, message=message)

    document = definition.document
    states = document.get("States")
    if not isinstance(states, dict) or not states:
        yield error("States must be an object with at least one state")
    if not isinstance(document.get("StartAt"), str):
        yield error("StartAt must name the first state")
    elif document["StartAt"] not in definition.states:
        yield error(f"StartAt names {document['StartAt']!r}, which is not a state")
    for unknown in sorted(set(document) - {"Comment", "StartAt", "States"}):
        yield error(f"there is no field {unknown} beside Comment, StartAt and States")


def successors(state: Mapping[str, Json]) -> list[str]:
    """The states that may come after one, in the order they are written."""
    rules = [one for key in ("Choices", "Catch") for one in _list(state.get(key)) if isinstance(one, dict)]
    named = [state.get("Next"), *(one.get("Next") for one in rules), state.get("Default")]
    return [one for one in named if isinstance(one, str)]


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def _problems_of_ways(definition: Definition) -> Iterator[Problem]:
    """States that nothing leads to, and states from which nothing leads to an end."""
    states = {name: state for name, state in definition.states.items() if isinstance(state, dict)}
    reached: set[str] = set()
    waiting = [definition.document.get("StartAt")]
    while waiting:
        name = waiting.pop()
        if isinstance(name, str) and name in states and name not in reached:
            reached.add(name)
            waiting += successors(states[name])
    ending = {name for name, one in states.items() if one.get("End") is True or one.get("Type") == "Fail"}
    while more := {
        name for name, one in states.items() if name not in ending and ending & {*successors(one)}
    }:
        ending |= more
    for name in states:
        if name not in reached:
            yield Problem(level="warning", state=name, message="nothing leads to it")
        elif name not in ending:
            yield Problem(level="warning", state=name, message="no end can be reached from it")


def _problems_of_state(name: str, state: Json, definition: Definition) -> Iterator[Problem]:
    def problem(level: Level, message: str, *, only_here: bool = False) -> Problem:
        return Problem(level=level, state=name, message=message, only_here=only_here)

    if not 1 <= len(name) <= LONGEST_NAME:
        yield problem("error", f"a name has 1 to {LONGEST_NAME} characters, this one {len(name)}")
    if not isinstance(state, dict):
        yield problem("error", "a state must be an object")
        return
    kind = str(state.get("Type"))
    if kind in _ONLY_AT_GLOBUS:
        yield problem("error", f"{kind} is not supported here: it needs a person at Globus", only_here=True)
    elif kind in _OF_OTHERS:
        yield problem("error", f"Globus Flows has no state of type {kind}")
    elif kind not in _FIELDS:
        yield problem("error", f"there is no state of type {kind!r}; there are {', '.join(_FIELDS)}")
    else:
        yield from _problems_of_fields(state, problem)
        for check_kind in _CHECKS[kind]:
            yield from check_kind(state, problem)
        yield from (
            problem("error", f"the next state {one!r} does not exist")
            for one in dict.fromkeys(successors(state))
            if one not in definition.states
        )


Make: TypeAlias = Callable[..., Problem]
State: TypeAlias = Mapping[str, Json]


def _problems_of_fields(state: State, problem: Make) -> Iterator[Problem]:
    for unknown in sorted(set(state) - _FIELDS[state["Type"]] - {"Type", "Comment"}):
        if unknown in _FIELDS_OF_OTHERS:
            yield problem("error", f"Globus Flows has no {unknown}")
        elif plain_name(unknown) in _FIELDS[state["Type"]]:
            yield problem(
                "error", f"{plain_name(unknown)} is written as it is: it cannot come from the state"
            )
        else:
            yield problem("error", f"a state of type {state['Type']} has no field {unknown}")
    if "Comment" in state and not isinstance(state["Comment"], str):
        yield problem("error", "Comment must be a text")


def _check_next(state: State, problem: Make) -> Iterator[Problem]:
    if "End" in state and state["End"] is not True:
        yield problem("error", "End must be true, or left out")
    elif ("Next" in state) == ("End" in state):
        yield problem("error", "exactly one of Next and End must be there")
    if "Next" in state and not isinstance(state["Next"], str):
        yield problem("error", "Next must name a state")


def _check_end_elsewhere(state: State, problem: Make) -> Iterator[Problem]:
    if state.get("End") is True:
        yield problem(
            "warning",
            f"the schema of Globus Flows asks a state of type {state['Type']} for Next: go on to a Pass that ends",
        )


def _check_paths(state: State, problem: Make) -> Iterator[Problem]:
    for key in ("InputPath", "SecondsPath", "TimestampPath"):
        if key in state:
            yield from _path_problems(key, state[key], compile_path, problem)
    if "ResultPath" in state:
        yield from _check_result_path(state["ResultPath"], problem)


def _check_result_path(path: Json, problem: Make) -> Iterator[Problem]:
    yield from _path_problems("ResultPath", path, reference_path, problem)
    if path == "$":
        yield problem(
            "warning", "ResultPath `$` replaces the whole state; Globus's schema wants it left out instead"
        )
    elif isinstance(path, str) and path.startswith((f"$.{CONTEXT}", f"$['{CONTEXT}']", f'$["{CONTEXT}"]')):
        yield problem("error", f"ResultPath {path}: $.{CONTEXT} can only be read")


def _path_problems(key: str, path: Json, read: Callable[[str], object], problem: Make) -> Iterator[Problem]:
    if not isinstance(path, str):
        yield problem("error", f"{key} must be a path, a text that begins with `$`")
        return
    try:
        read(path)
    except ValueError as error:
        yield problem("error", f"{key}: {error}")


def _check_parameters(state: State, problem: Make) -> Iterator[Problem]:
    if "Parameters" not in state:
        return
    if not isinstance(state["Parameters"], dict):
        yield problem("error", "Parameters must be an object")
        return
    yield from _parameter_problems(state["Parameters"], "Parameters", state["Type"] != "Pass", problem)


def _parameter_problems(template: Json, where: str, expressions: bool, problem: Make) -> Iterator[Problem]:  # noqa: FBT001 - private
    if isinstance(template, list):
        for place, one in enumerate(template):
            yield from _parameter_problems(one, f"{where}[{place}]", expressions, problem)
    if not isinstance(template, dict):
        return
    names: set[str] = set()
    for key, value in template.items():
        if key == PRIVATE_PARAMETERS:
            continue
        at = f"{where}.{key}"
        if plain_name(key) in names:
            yield problem("error", f"{at}: {plain_name(key)} is there twice")
        names.add(plain_name(key))
        if key.endswith(".$"):
            yield from _path_problems(at, value, compile_path, problem)
        elif key.endswith(".="):
            yield from _expression_problems(at, value, expressions, problem)
        else:
            yield from _parameter_problems(value, at, expressions, problem)
    yield from _private_problems(template.get(PRIVATE_PARAMETERS, []), where, names, problem)


def _expression_problems(at: str, text: Json, expressions: bool, problem: Make) -> Iterator[Problem]:  # noqa: FBT001 - private
    if not expressions:
        yield problem("error", f"{at}: a Pass evaluates no expressions; use ExpressionEval")
        return
    if not isinstance(text, str):
        yield problem("error", f"{at}: an expression must be a text")
        return
    try:
        parsed = parse_expression(text)
    except ValueError as error:
        yield problem("error", f"{at}: {error}")
        return
    for unknown in sorted(parsed.unknown_functions):
        yield problem("error", f"{at}: there is no function {unknown}")


def _private_problems(private: Json, where: str, names: set[str], problem: Make) -> Iterator[Problem]:
    if not isinstance(private, list) or not all(isinstance(one, str) for one in private):
        yield problem("error", f"{where}.{PRIVATE_PARAMETERS} must be a list of names")
        return
    for unknown in [one for one in private if plain_name(one) not in names]:
        yield problem(
            "error",
            f"{where}.{PRIVATE_PARAMETERS} names {unknown!r}, which is not beside it: it hides nothing",
        )


def _check_action(state: State, problem: Make) -> Iterator[Problem]:
    yield from _check_url(state, problem)
    if ("Parameters" in state) == ("InputPath" in state):
        yield problem("error", "exactly one of Parameters and InputPath must be there")
    if "ResultPath" not in state:
        yield problem("warning", "without ResultPath the result replaces the whole state")
    if "WaitTime" not in state:
        yield problem("warning", f"without WaitTime the action is given {DEFAULT_WAIT_TIME_S} s")
    elif not _is_integer(state["WaitTime"]) or state["WaitTime"] < 1:
        yield problem("error", "WaitTime must be a whole number of seconds, at least 1")
    if "ExceptionOnActionFailure" not in state:
        yield problem(
            "warning",
            "say ExceptionOnActionFailure: Globus documents its default as true, its schema as false (here: true)",
        )
    elif not isinstance(state["ExceptionOnActionFailure"], bool):
        yield problem("error", "ExceptionOnActionFailure must be true or false")
    if "ActionScope" in state and not isinstance(state["ActionScope"], str):
        yield problem("error", "ActionScope must be a text")
    if not isinstance(state.get("RunAs", "User"), str):
        yield problem("error", "RunAs must be a text")
    elif state.get("RunAs", "User") != "User":
        yield problem(
            "warning", f"RunAs {state['RunAs']!r}: here every action runs as the user", only_here=True
        )


def _check_url(state: State, problem: Make) -> Iterator[Problem]:
    if ("ActionUrl" in state) == ("Handler" in state):
        yield problem("error", "exactly one of ActionUrl and Handler must be there")
        return
    key, url = "ActionUrl", state.get("ActionUrl")
    if "Handler" in state:
        handler = state["Handler"]
        kind = handler.get("Type") if isinstance(handler, dict) else None
        if kind != "ActionProvider":
            what = kind if isinstance(kind, str) else "that is not an ActionProvider"
            yield problem("error", f"a Handler {what} is not supported here", only_here=True)
            return
        key, url = "Handler.Url", handler.get("Url")
        for unknown in sorted(set(handler) - {"Type", "Url"}):
            yield problem("error", f"Handler has no field {unknown}")
    if not isinstance(url, str) or not _is_web_address(url):
        yield problem(
            "error", f"{key} must be the address of an action provider, https://…, written as it is"
        )


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it raises for a port that is none
    except ValueError:
        return False
    return (
        parts.scheme in ("https", "http")
        and bool(parts.hostname)
        and not (parts.username or parts.password or parts.query or parts.fragment)
        and url.isascii()
        and url.isprintable()
        and " " not in url
    )


def _check_catch(state: State, problem: Make) -> Iterator[Problem]:
    if "Catch" not in state:
        return
    catchers = state["Catch"]
    if not isinstance(catchers, list) or not catchers or not all(isinstance(one, dict) for one in catchers):
        yield problem("error", "Catch must be a list of objects, each with ErrorEquals and Next")
        return
    for place, one in enumerate(catchers):
        for unknown in sorted(set(one) - {"ErrorEquals", "Next", "ResultPath", "Comment"}):
            yield problem("error", f"Catch[{place}] has no field {unknown}")
        if not isinstance(one.get("Next"), str):
            yield problem("error", f"Catch[{place}].Next must name a state")
        if "ResultPath" in one:
            yield from _check_result_path(one["ResultPath"], problem)
        else:
            yield problem(
                "warning", f"Catch[{place}] without ResultPath replaces the whole state by the error"
            )
        yield from _name_problems(one.get("ErrorEquals"), f"Catch[{place}].ErrorEquals", problem)
    caught_all = [
        place for place, one in enumerate(catchers) if "States.ALL" in _list(one.get("ErrorEquals"))
    ]
    if caught_all and caught_all[0] < len(catchers) - 1:
        yield problem(
            "warning", f"Catch[{caught_all[0]}] catches States.ALL: those after it never catch anything"
        )


def _name_problems(names: Json, where: str, problem: Make) -> Iterator[Problem]:
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        yield problem("error", f"{where} must be a list of names of errors")
        return
    for unknown in [one for one in names if one not in ERROR_NAMES]:
        likely = next((one for one in ERROR_NAMES if one.lower() == unknown.lower()), None)
        yield problem(
            "warning", f"{where}: no Action raises {unknown!r}" + (f"; write {likely}" if likely else "")
        )


def _check_pass(state: State, problem: Make) -> Iterator[Problem]:
    given = [key for key in ("Parameters", "InputPath", "Result") if key in state]
    if len(given) > 1:
        yield problem("error", f"a Pass takes one of {' and '.join(given)}")
    if "Result" in state:
        yield problem("warning", "Result is not in the present API of Globus Flows; use Parameters")


def _check_expression_eval(state: State, problem: Make) -> Iterator[Problem]:
    if "Parameters" not in state:
        yield problem("error", "ExpressionEval needs Parameters")
    if "ResultPath" not in state:
        yield problem(
            "warning",
            "without ResultPath the result replaces the whole state, and Globus's schema asks for one",
        )


def _check_choice(state: State, problem: Make) -> Iterator[Problem]:
    rules = state.get("Choices")
    if not isinstance(rules, list) or not rules:
        yield problem("error", "Choices must be a list of rules")
        return
    for place, rule in enumerate(rules):
        for mistake in choices.mistakes(rule):
            yield problem("error", f"Choices[{place}]: {mistake}")
        if isinstance(rule, dict) and not isinstance(rule.get("Next"), str):
            yield problem("error", f"Choices[{place}].Next must name a state")
    if "Default" not in state:
        yield problem("warning", "without Default the run fails where no rule holds")
    elif not isinstance(state["Default"], str):
        yield problem("error", "Default must name a state")


def _check_wait(state: State, problem: Make) -> Iterator[Problem]:
    given = [key for key in ("Seconds", "SecondsPath", "Timestamp", "TimestampPath") if key in state]
    if len(given) != 1:
        yield problem(
            "error", "exactly one of Seconds, SecondsPath, Timestamp and TimestampPath must be there"
        )
    seconds = state.get("Seconds", 0)
    if not _is_integer(seconds) or not 0 <= seconds <= LONGEST_WAIT_S:
        yield problem("error", f"Seconds must be a whole number from 0 to {LONGEST_WAIT_S}")
    if "Timestamp" in state and not choices.is_timestamp(state["Timestamp"]):
        yield problem("error", "Timestamp must be a time such as 2026-08-01T12:00:00Z")


def _check_fail(state: State, problem: Make) -> Iterator[Problem]:
    for key in ("Error", "Cause"):
        if not isinstance(state.get(key, ""), str):
            yield problem("error", f"{key} must be a text")


def _is_integer(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_CHECKS: Final[Mapping[str, tuple[Callable[[State, Make], Iterator[Problem]], ...]]] = {
    "Action": (_check_action, _check_parameters, _check_paths, _check_catch, _check_next),
    "Pass": (_check_pass, _check_parameters, _check_paths, _check_next),
    "ExpressionEval": (
        _check_expression_eval,
        _check_parameters,
        _check_paths,
        _check_next,
        _check_end_elsewhere,
    ),
    "Choice": (_check_choice,),
    "Wait": (_check_wait, _check_paths, _check_next, _check_end_elsewhere),
    "Fail": (_check_fail,),
}
