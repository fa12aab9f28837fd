"""The rules of a Choice state: how they are written, and which of them holds."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from .expressions import Json, StateError, compile_path, read_path

MOST_NESTED: Final = 20

_TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def timestamp(text: str) -> datetime:
    """A moment written as RFC 3339 asks, such as `2026-08-01T12:00:00Z`.

    Raises:
        ValueError: It is not written so.
    """
    if not _TIMESTAMP.fullmatch(text):
        raise ValueError(f"{text!r} is not a time such as 2026-08-01T12:00:00Z")
    moment = text.upper().replace("Z", "+00:00")
    # Python 3.10 reads three or six digits of a second's fraction only
    return datetime.fromisoformat(re.sub(r"\.([0-9]+)", lambda part: f".{part[1][:6]:0<6}", moment))


def is_number(value: Json) -> bool:
    """Whether a JSON value is a number; Python counts booleans among them, JSON does not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_timestamp(value: Json) -> bool:
    """Whether a JSON value is a string that is a time."""
    if not isinstance(value, str):
        return False
    try:
        timestamp(value)
    except ValueError:
        return False
    return True


def _is_string(value: Json) -> bool:
    return isinstance(value, str)


def _is_boolean(value: Json) -> bool:
    return isinstance(value, bool)


def _is_null(value: Json) -> bool:
    return value is None


def _itself(value: Json) -> Any:
    return value


_ORDER: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "Equals": operator.eq,
    "LessThan": operator.lt,
    "GreaterThan": operator.gt,
    "LessThanEquals": operator.le,
    "GreaterThanEquals": operator.ge,
}
# For each type: whether a value is of it, what is compared, and how it can be compared
_TYPES: Final[Mapping[str, tuple[Callable[[Json], bool], Callable[[Any], Any], tuple[str, ...]]]] = {
    "String": (_is_string, _itself, tuple(_ORDER)),
    "Numeric": (is_number, _itself, tuple(_ORDER)),
    "Boolean": (_is_boolean, _itself, ("Equals",)),
    "Timestamp": (is_timestamp, timestamp, tuple(_ORDER)),
}
_COMPARISONS: Final = {
    f"{kind}{order}": (kind, order) for kind, (_, _, orders) in _TYPES.items() for order in orders
}
_TESTS: Final[Mapping[str, Callable[[Json], bool]]] = {
    "IsNull": _is_null,
    "IsNumeric": is_number,
    "IsString": _is_string,
    "IsBoolean": _is_boolean,
    "IsTimestamp": is_timestamp,
}
OPERATORS: Final = (
    *_COMPARISONS,
    *(f"{one}Path" for one in _COMPARISONS),
    "StringMatches",
    "IsPresent",
    *_TESTS,
)
"""Every operator that stands beside a Variable."""


def holds(rule: Mapping[str, Json], state: Json) -> bool:
    """Whether a rule holds over a state. A comparison of values of different types does not hold.

    Args:
        rule: One without mistakes, as `mistakes` finds them.
        state: What the paths read, with `_context` in it.

    Raises:
        StateError: `States.Runtime`: nothing is at a path, and the operator is not IsPresent.
    """
    if "And" in rule:
        return all(holds(one, state) for one in rule["And"])
    if "Or" in rule:
        return any(holds(one, state) for one in rule["Or"])
    if "Not" in rule:
        return not holds(rule["Not"], state)
    name = next(key for key in rule if key in OPERATORS)
    wanted = rule[name]
    if name == "IsPresent":
        return _is_there(rule["Variable"], state) is wanted
    value = _at(rule["Variable"], state)
    if name in _TESTS:
        return _TESTS[name](value) is wanted
    if name == "StringMatches":
        return isinstance(value, str) and matches(value, wanted)
    if name.endswith("Path"):
        name, wanted = name.removesuffix("Path"), _at(wanted, state)
    kind, order = _COMPARISONS[name]
    is_one, comparable, _ = _TYPES[kind]
    return is_one(value) and is_one(wanted) and _ORDER[order](comparable(value), comparable(wanted))


def _is_there(path: str, state: Json) -> bool:
    try:
        found = read_path(path, state)
    except StateError:
        return False
    return compile_path(path).singular_query() or bool(found)


def _at(path: str, state: Json) -> Json:
    try:
        return read_path(path, state)
    except StateError as error:
        raise StateError("States.Runtime", f"Choice: {error.cause}") from None


def matches(text: str, pattern: str) -> bool:
    r"""Whether a text matches a pattern in which `*` stands for anything, `\*` for itself."""
    parts = [
        part.replace("\0", "*").replace("\1", "\\")
        for part in pattern.replace("\\\\", "\1").replace("\\*", "\0").split("*")
    ]
    if len(parts) == 1:
        return text == parts[0]
    first, *middle, last = parts
    if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
        return False
    place, end = len(first), len(text) - len(last)
    for part in middle:  # the leftmost place for each part leaves most room for the next
        found = text.find(part, place, end)
        if found < 0:
            return False
        place = found + len(part)
    return True


def mistakes(rule: Json, *, depth: int = 0) -> Iterator[str]:
    """What is wrong with a rule, apart from its Next."""
    if not isinstance(rule, dict):
        yield "a rule must be an object"
        return
    if depth > MOST_NESTED:
        yield f"rules are nested more than {MOST_NESTED} deep"
        return
    keys = set(rule) - {"Next", "Comment", "Variable"}
    logical = sorted(keys & {"And", "Or", "Not"})
    operators = sorted(keys & set(OPERATORS))
    if unknown := sorted(keys - {*logical, *operators}):
        yield f"there is no operator {unknown[0]}"
        return
    if len(logical) + len(operators) != 1:
        yield f"a rule takes one operator, this one has {len(logical) + len(operators)}"
        return
    if operators:
        yield from _mistakes_of_comparison(rule, operators[0])
        return
    if "Variable" in rule:
        yield f"{logical[0]} takes no Variable"
    nested = [rule["Not"]] if logical == ["Not"] else rule[logical[0]]
    if not isinstance(nested, list) or not nested:
        yield f"{logical[0]} takes a list of rules"
        return
    for one in nested:
        yield from mistakes(one, depth=depth + 1)


def _mistakes_of_comparison(rule: Mapping[str, Json], name: str) -> Iterator[str]:
    paths = [rule.get("Variable")]
    value = rule[name]
    if name.endswith("Path"):
        paths.append(value)
    elif name.startswith("Is"):
        if not isinstance(value, bool):
            yield f"{name} takes true or false"
    else:
        kind = "String" if name == "StringMatches" else _COMPARISONS[name][0]
        if not _TYPES[kind][0](value):
            yield f"{name} takes a value of type {kind}, this is {value!r}"
    for path in paths:
        if not isinstance(path, str):
            yield (
                f"{name} needs a Variable that is a JSONPath"
                if path is None
                else f"{path!r} is not a JSONPath"
            )
            continue
        try:
            compile_path(path)
        except ValueError as error:
            yield str(error)
