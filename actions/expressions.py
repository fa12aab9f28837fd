"""What a flow computes from its state: paths, expressions, parameters, and what of all this may be shown.

The state of a run is JSON. Nothing here changes it: `write_path` answers a new state that shares what did not change.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Final, NoReturn, TypeAlias

import jsonpath
import simpleeval  # type: ignore[import-untyped]
from jsonpath.function_extensions import Count, Length, Value
from jsonpath.parse import Parser
from jsonpath.stream import TokenStream

Json: TypeAlias = Any
"""A JSON value as Python has it; its shape is the flow author's business."""

CONTEXT: Final = "_context"
PRIVATE_PARAMETERS: Final = "__Private_Parameters"
PRIVATE_PREFIX: Final = "_private"

DEEPEST: Final = 200
"""How deep values may be nested: what reads them here is recursive."""
LONGEST_PATH: Final = 1000
MOST_FOUND: Final = 100_000
"""How many values one path may find: more than the state of a run can hold."""
LONGEST_EXPRESSION: Final = 4000
LONGEST_NUMBER_BITS: Final = 4096
MOST_WORK: Final = 3_000_000
"""Characters and elements that one expression may look at in all: about a second."""


class StateError(Exception):
    """A state raised an error of the language: `Catch` may catch it, else it ends the run. It never leaves the runner.

    Args:
        name: The name of the error, such as `ActionFailedException`, as in `ErrorEquals`.
        cause: What happened: words, or the document of the action.
    """

    def __init__(self, name: str, cause: Json) -> None:
        super().__init__(name, cause)
        self.name = name
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.name}: {self.cause}"


def parse_json(
    text: str, *, object_pairs_hook: Callable[[list[tuple[str, Json]]], Json] | None = None
) -> Json:
    """The value of a JSON text. What Python takes beyond JSON is refused, and so is a number that becomes infinite.

    Raises:
        ValueError: It is not JSON; the message says where.
        RecursionError: It is nested beyond all measure.
    """
    return json.loads(
        text, object_pairs_hook=object_pairs_hook, parse_float=_finite, parse_constant=_no_number
    )


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number that can be used")


def not_too_deep(value: Json) -> Json:
    """Answer a JSON value that is not nested too deeply.

    Raises:
        ValueError: It is nested more than 200 deep.
    """
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEEPEST} deep")


# Paths


class _Parser(Parser):
    def parse_regex(self, stream: TokenStream) -> NoReturn:
        raise jsonpath.JSONPathSyntaxError("regular expressions are not available", token=stream.current())


class _Paths(jsonpath.JSONPathEnvironment):
    """JSONPath without regular expressions: one of them can take for ever."""

    parser_class = _Parser
    max_recursion_depth = DEEPEST + 2  # the state, and `_context` beside it

    def setup_function_extensions(self) -> None:
        self.function_extensions |= {"count": Count(), "length": Length(), "value": Value()}


_PATHS: Final = _Paths()


def read_path(path: str, state: Json) -> Json:
    """The value at a JSONPath.

    A path that can mean one place only answers the value there; one with a wildcard, a slice, a filter or `..` answers
    a list, empty when nothing is there.

    Raises:
        StateError: `States.ParameterPathFailure`: nothing is at a path of the first kind, or it is no JSONPath.
    """
    if path == "$" and isinstance(state, dict):
        return {key: value for key, value in state.items() if key != CONTEXT}
    try:
        compiled = compile_path(path)
    except ValueError as error:
        raise StateError("States.ParameterPathFailure", str(error)) from None
    try:
        found = [match.obj for match in islice(compiled.finditer(state), MOST_FOUND + 1)]
    except (jsonpath.JSONPathError, *_FAILURES) as error:
        words = str(error).partition("\n")[0]  # what follows repeats the path
        raise StateError("States.ParameterPathFailure", f"{path}: {words}") from None
    if len(found) > MOST_FOUND:
        raise StateError("States.ParameterPathFailure", f"{path} finds more than {MOST_FOUND} values")
    if not compiled.singular_query():
        return found
    if not found:
        raise StateError("States.ParameterPathFailure", f"there is nothing at {path}")
    return found[0]


@lru_cache(maxsize=1024)
def compile_path(path: str) -> jsonpath.JSONPath:
    """A JSONPath, ready to use.

    Raises:
        ValueError: It is none; the message says where.
    """
    if not path.startswith("$"):
        raise ValueError(f"{path!r} is not a JSONPath: it must begin with `$`")
    if len(path) > LONGEST_PATH:
        raise ValueError(f"a JSONPath of {len(path)} characters is longer than {LONGEST_PATH}")
    try:
        compiled = _PATHS.compile(path)
    except (jsonpath.JSONPathError, RecursionError) as error:
        raise ValueError(f"{path!r} is not a JSONPath: {str(error).splitlines()[0]}") from None
    if not isinstance(compiled, jsonpath.JSONPath):
        raise ValueError(f"{path!r} joins several JSONPaths: write one")
    return compiled


_STEP = re.compile(
    r"""\.(?P<name>[^.\[\]\s*?'"@,:]+)
      | \[(?P<index>0|[1-9][0-9]{0,8})\]
      | \['(?P<single>(?:[^'\\]|\\['\\])*)'\]
      | \["(?P<double>(?:[^"\\]|\\["\\])*)"\]""",
    re.VERBOSE,
)


@lru_cache(maxsize=1024)
def reference_path(path: str) -> tuple[str | int, ...]:
    """The steps of a Reference Path, a JSONPath that names one place: `$.a.b[0]['c d']`.

    Raises:
        ValueError: It is none.
    """
    if not path.startswith("$"):
        raise ValueError(f"{path!r} is not a Reference Path: it must begin with `$`")
    steps: list[str | int] = []
    place = 1
    while place < len(path):
        step = _STEP.match(path, place)
        if step is None:
            raise ValueError(
                f"{path!r} is not a Reference Path, which names one place with `.name`, `['name']` and `[0]`"
            )
        if step["index"] is not None:
            steps.append(int(step["index"]))
        elif step["name"] is not None:
            steps.append(step["name"])
        else:
            quoted = step["single"] if step["single"] is not None else step["double"]
            steps.append(re.sub(r"\\(.)", r"\1", quoted))
        place = step.end()
    return tuple(steps)


def write_path(path: str, state: Json, value: Json) -> Json:
    """A state as `state`, with `value` at a Reference Path; objects on the way are made where there is nothing.

    Raises:
        StateError: `States.ResultPathMatchFailure`: something else is in the way, or the place is `$._context`.
    """
    try:
        steps = reference_path(path)
    except ValueError as error:
        raise StateError("States.ResultPathMatchFailure", str(error)) from None
    if steps[:1] == (CONTEXT,):
        raise StateError("States.ResultPathMatchFailure", f"{path}: $.{CONTEXT} can only be read")
    return _with(path, steps, state, value)


def _with(path: str, steps: Sequence[str | int], inside: Json, value: Json) -> Json:
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        if not isinstance(inside, list) or step >= len(inside):
            raise StateError("States.ResultPathMatchFailure", f"{path}: there is no element {step}")
        return [*inside[:step], _with(path, rest, inside[step], value), *inside[step + 1 :]]
    if not isinstance(inside, dict):
        raise StateError(
            "States.ResultPathMatchFailure", f"{path}: {step!r} would be inside a value that is no object"
        )
    return {**inside, step: _with(path, rest, inside.get(step, {}), value)}


# Parameters


def fill(template: Json, state: Json, *, expressions: bool = True) -> Json:
    """The `Parameters` of a state, filled: `name.$` by the value at a path, `name.=` by that of an expression.

    Args:
        template: `Parameters`, nested as you like.
        state: What paths and expressions read, with `_context` in it.
        expressions: Whether `name.=` means something here; in Pass states it does not.

    Raises:
        StateError: A path leads nowhere, an expression fails.
    """
    if isinstance(template, list):
        return [fill(one, state, expressions=expressions) for one in template]
    if not isinstance(template, dict):
        return template
    filled: dict[str, Json] = {}
    for key, value in template.items():
        if key == PRIVATE_PARAMETERS:
            continue
        if key.endswith(".$"):
            filled[key[:-2]] = read_path(value, state)
        elif key.endswith(".=") and expressions:
            filled[key[:-2]] = evaluate(value, state)
        else:
            filled[key] = fill(value, state, expressions=expressions)
    return filled


def plain_name(key: str) -> str:
    """The name of a parameter without the ending that says how it is computed."""
    return key[:-2] if key.endswith((".$", ".=")) else key


def shown(value: Json, template: Json = None) -> Json:
    """A copy of `value` with only what may be seen: no key that begins with `_private`, no private parameter.

    Args:
        value: A state, a result, or filled parameters.
        template: The `Parameters` that `value` was filled from, which list their private parameters.
    """
    if isinstance(value, list):
        below = (
            template if isinstance(template, list) and len(template) == len(value) else [None] * len(value)
        )
        return [shown(one, one_below) for one, one_below in zip(value, below, strict=True)]
    if not isinstance(value, dict):
        return value
    templates = template if isinstance(template, dict) else {}
    hidden = {plain_name(one) for one in templates.get(PRIVATE_PARAMETERS, ())}
    below_by_name = {plain_name(key): one for key, one in templates.items()}
    return {
        key: shown(one, below_by_name.get(key))
        for key, one in value.items()
        if key not in hidden and not key.startswith(PRIVATE_PREFIX)
    }


# Expressions


def evaluate(expression: str, state: Json) -> Json:
    """The value of an expression over the state: a small part of Python, without names other than the state's.

    `` `$.a.b` `` reads a JSONPath. Bounded in length, in the size of numbers and texts, and in work.

    Raises:
        StateError: `States.ParameterPathFailure`: what failed, and why; never with a private value.
    """
    names = dict(state) if isinstance(state, dict) else {}
    try:
        parsed = parse_expression(expression)
        for name, path in parsed.paths.items():
            names[name] = read_path(path, state)
        value = _Evaluator(names, _functions(state)).eval(expression, parsed.tree)
        return _json(value)
    except StateError:
        raise
    except _FAILURES as error:
        # Python's own words may quote a value: "invalid literal for int(): 'the password'"
        why = type(error).__name__
        if PRIVATE_PREFIX not in expression:
            why += f": {error.args[0]}" if isinstance(error, LookupError) and error.args else f": {error}"
        raise StateError("States.ParameterPathFailure", f"{expression}: {why}") from None


_FAILURES: Final = (
    simpleeval.InvalidExpression,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
_TICKED = re.compile(r"`([^`]*)`")


class Expression:
    """A parsed expression.

    Attributes:
        tree: Python's syntax tree of it.
        paths: The JSONPaths in backticks, by the name that stands for each.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_EXPRESSION:
            raise ValueError(f"an expression of {len(text)} characters is longer than {LONGEST_EXPRESSION}")
        self.paths: dict[str, str] = {}
        python = _TICKED.sub(self._stand_in, text).strip()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's advice on style, such as an unknown escape
                self.tree = ast.parse(python, mode="eval").body
        except (SyntaxError, MemoryError, RecursionError) as error:
            words = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"
            raise ValueError(f"{text!r} is not an expression: {words}") from None
        for path in self.paths.values():
            compile_path(path)

    def _stand_in(self, ticked: re.Match[str]) -> str:
        name = f"__path_{len(self.paths)}"
        self.paths[name] = ticked[1]
        return f" {name} "

    @property
    def unknown_functions(self) -> set[str]:
        """Functions that are called and do not exist."""
        called = {
            node.func.id
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        return called - {*_functions(None), *_CONVERSIONS}


@lru_cache(maxsize=1024)
def parse_expression(text: str) -> Expression:
    """An expression, ready to use.

    Raises:
        ValueError: It is none; the message says why.
    """
    return Expression(text)


def _pathsplit(path: str) -> list[str]:
    """A path of Globus Transfer as [all but the last name, last name]; `/~/` is one name."""
    trimmed = path if path in ("/", "/~/") else path.rstrip("/")
    head, _, tail = trimmed.rpartition("/")
    return ["/~/" if head == "/~" else head or "/", tail]


def _functions(state: Json) -> dict[str, Callable[..., Any]]:
    """The functions of the language; two of them look into the state by a path in a string."""

    def at(path: str) -> str:
        return path if path.startswith("$") else f"$.{path}"

    def is_present(path: str) -> bool:
        try:
            read_path(at(path), state)
        except StateError:
            return False
        return True

    def getattr_(path: str, default: Json = None) -> Json:
        try:
            return read_path(at(path), state)
        except StateError:
            return default

    return {"len": len, "pathsplit": _pathsplit, "is_present": is_present, "getattr": getattr_}


_CONVERSIONS: Final[dict[str, Callable[..., Any]]] = {
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "dict": dict,
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_METHODS: Final[Mapping[type, frozenset[str]]] = {
    # Nothing that changes the state, formats without bound, or leads out of JSON.
    str: _words(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
        "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
        "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
    ),
    list: _words("count index"),
    tuple: _words("count index"),
    dict: _words("get items keys values"),
    float: _words("is_integer"),
}


class _Evaluator(simpleeval.EvalWithCompoundTypes):  # type: ignore[misc] # simpleeval has no annotations
    """simpleeval, which Globus Flows names as its evaluator, with tighter limits and without access to attributes."""

    def __init__(self, names: dict[str, Json], functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(
            operators={
                **simpleeval.DEFAULT_OPERATORS,
                ast.Add: _add,
                ast.Mult: _multiply,
                ast.Mod: _modulo,
                ast.Pow: _power,
                ast.LShift: _shift_left,
            },
            functions=functions,
            names=names,
        )
        self.functions = {**functions, **_CONVERSIONS}
        del self.nodes[ast.Set], self.nodes[ast.Assign], self.nodes[ast.AugAssign]
        self._work = 0

    def _eval(self, node: ast.AST) -> Any:
        handler = self.nodes.get(type(node))
        if handler is None:
            raise simpleeval.FeatureNotAvailable(f"{type(node).__name__} is not available")
        value = handler(node)
        self._count_work(value)
        return value

    def _count_work(self, item: Any) -> None:
        """Count what the value of each part of the expression consists of, so that nothing grows without bound."""
        waiting = [item]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                self._work += 1 + len(one) // 16
            elif isinstance(one, (list, tuple)):
                self._work += 1 + len(one)
                waiting.extend(one)
            elif isinstance(one, dict):
                self._work += 1 + len(one)
                waiting.extend(one.values())
            else:
                self._work += 1
                _modest(one)
            if self._work > MOST_WORK:
                raise simpleeval.IterableTooLong("it takes too much work")

    def _eval_attribute(self, node: ast.Attribute) -> Any:
        """A key of an object. What would be a method at Globus is refused, so that nothing works only here."""
        owner = self._eval(node.value)
        if not isinstance(owner, dict):
            raise simpleeval.FeatureNotAvailable(
                f"{node.attr!r} of a value that is no object is not available"
            )
        if hasattr(dict, node.attr):
            raise simpleeval.FeatureNotAvailable(
                f"{node.attr!r} is the name of a method of objects: read that key by a path in backticks"
            )
        if node.attr.startswith("_"):
            raise simpleeval.FeatureNotAvailable(
                f"names that begin with `_`, as {node.attr!r}, are not available after a dot: use a path in backticks"
            )
        return owner[node.attr]

    def _eval_call(self, node: ast.Call) -> Any:
        arguments = [self._eval(one) for one in node.args]
        named = {one.arg: self._eval(one.value) for one in node.keywords if one.arg is not None}
        if len(named) != len(node.keywords):
            raise simpleeval.FeatureNotAvailable("`**` is not available in a call")
        if isinstance(node.func, ast.Name):
            if node.func.id not in self.functions:
                raise simpleeval.FunctionNotDefined(node.func.id, self.expr)
            return self.functions[node.func.id](*arguments, **named)
        if not isinstance(node.func, ast.Attribute):
            raise simpleeval.FeatureNotAvailable("only functions and methods can be called")
        return self._method(self._eval(node.func.value), node.func.attr, arguments, named)

    def _method(self, owner: Any, name: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        if name not in _METHODS.get(type(owner), ()):
            raise simpleeval.FeatureNotAvailable(f"the method {name!r} is not available")
        if name == "join":
            arguments = [list(arguments[0])]
            _short(sum(len(one) for one in arguments[0]) + len(owner) * len(arguments[0]))
        elif name == "replace":
            _short(len(owner) + (len(owner) + 1) * len(arguments[1]))
        value = getattr(owner, name)(*arguments, **named)
        return list(value) if isinstance(owner, dict) and name != "get" else value

    def _eval_subscript(self, node: ast.Subscript) -> Any:
        container, key = self._eval(node.value), self._eval(node.slice)
        if not isinstance(container, (str, list, tuple, dict)):
            raise simpleeval.FeatureNotAvailable("only texts, lists and objects can be indexed")
        return container[key]

    def _eval_name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise simpleeval.NameNotDefined(node.id, self.expr)
        return self.names[node.id]

    def _eval_formattedvalue(self, node: ast.FormattedValue) -> Any:
        value = self._eval(node.value)
        if node.conversion != -1:
            raise simpleeval.FeatureNotAvailable("conversions such as `!r` are not available")
        if node.format_spec is None:
            return value
        if not isinstance(value, (str, int, float)):
            raise simpleeval.FeatureNotAvailable("only texts and numbers take a format")
        return format(value, _modest_format(self._eval(node.format_spec)))


def _short(length: int) -> None:
    if length > simpleeval.MAX_STRING_LENGTH:
        raise simpleeval.IterableTooLong(f"the result would have a length of {length}")


def _modest(number: Any) -> Any:
    if isinstance(number, int) and number.bit_length() > LONGEST_NUMBER_BITS:
        raise simpleeval.NumberTooHigh(f"a number has more than {LONGEST_NUMBER_BITS} bits")
    return number


def _modest_format(text: str) -> str:
    if re.search(r"[0-9]{4}|\*", text):
        raise simpleeval.IterableTooLong("widths of a format have three digits at most")
    return text


def _add(left: Any, right: Any) -> Any:
    if hasattr(left, "__len__") and hasattr(right, "__len__"):
        _short(len(left) + len(right))
    return left + right


def _multiply(left: Any, right: Any) -> Any:
    for one, times in ((left, right), (right, left)):
        if hasattr(one, "__len__") and isinstance(times, int):
            _short(len(one) * times)
    return left * right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _modest_format(left)
        if isinstance(right, dict):  # a format may name each value any number of times
            _short(len(left) + left.count("%") * max((len(str(one)) for one in right.values()), default=0))
    return left % right


def _power(base: Any, exponent: Any) -> Any:
    if (
        isinstance(base, int)
        and isinstance(exponent, int)
        and base.bit_length() * exponent > LONGEST_NUMBER_BITS
    ):
        raise simpleeval.NumberTooHigh(f"a power has more than {LONGEST_NUMBER_BITS} bits")
    return base**exponent


def _shift_left(number: Any, places: Any) -> Any:
    if places > LONGEST_NUMBER_BITS:
        raise simpleeval.NumberTooHigh(f"a number has more than {LONGEST_NUMBER_BITS} bits")
    return number << places


def _json(value: Any) -> Json:
    """The value of an expression as JSON.

    Raises:
        ValueError: It is something else, such as a function, a complex number, or not a number.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [_json(one) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _json(one) for key, one in value.items()}
    raise ValueError(f"the value, of type {type(value).__name__}, cannot be written as JSON")
