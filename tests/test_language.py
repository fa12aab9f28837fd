"""The language of Globus Flows: what is a definition, what it computes, and what is refused before it can do harm."""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scistream_flows.actions import choices, language
from scistream_flows.actions.expressions import (
    StateError,
    evaluate,
    fill,
    not_too_deep,
    read_path,
    reference_path,
    shown,
    write_path,
)
from scistream_flows.errors import BadRequest

ACTION = {
    "Type": "Action",
    "ActionUrl": "https://aps.example.org/actions/start",
    "Parameters": {"stream_id.$": "$._context.run_id"},
    "ResultPath": "$.start",
    "WaitTime": 60,
    "ExceptionOnActionFailure": True,
    "Catch": [{"ErrorEquals": ["States.ALL"], "ResultPath": "$.error", "Next": "Done"}],
    "Next": "Done",
}
DONE = {"Type": "Pass", "End": True}


def flow(**states: Any) -> language.Definition:
    """A definition whose first state is the first of `states`; `Done` is added."""
    return language.load({"StartAt": next(iter(states)), "States": {**states, "Done": DONE}})


def said(definition: language.Definition, level: str = "error") -> list[str]:
    return [one.message for one in language.problems(definition) if one.level == level]


def without(state: Mapping[str, Any], *keys: str, **more: Any) -> dict[str, Any]:
    return {**{key: value for key, value in state.items() if key not in keys}, **more}


def error_of(name: str, *arguments: Any, **options: Any) -> StateError:
    with pytest.raises(StateError) as raised:
        globals()[name](*arguments, **options)
    return raised.value


# Reading a definition


def test_a_definition_is_read_from_a_file_a_text_and_a_mapping(tmp_path: Path) -> None:
    document = {"StartAt": "Done", "States": {"Done": DONE}}
    file = tmp_path / "flow.json"
    file.write_text(json.dumps(document))
    for source in (file, str(file), json.dumps(document), document):
        definition = language.load(source)
        assert (definition.start_at, definition.states) == ("Done", {"Done": DONE})
        assert not language.problems(definition)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"StartAt": "A" "States": {}}', "not JSON: Expecting ',' delimiter: line 1 column 17"),
        ('{"States": {"A": {}, "A": {}}}', "the key 'A' is there twice"),
        ("[1]", "not an object"),
        ('{"StartAt": NaN}', "NaN is no number"),
        ("{" * 100_000, "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_definition_is_named_with_its_file_and_place(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "flow.json"
    file.write_text(text)
    with pytest.raises(BadRequest) as raised:
        language.load(file)
    assert words in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"none\.json cannot be read: No such file"):
        language.load(tmp_path / "none.json")
    (tmp_path / "latin").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(BadRequest, match="not UTF-8"):
        language.load(tmp_path / "latin")


# What is wrong with one


def test_a_good_definition_has_no_problem() -> None:
    assert not language.problems(flow(Start=ACTION))
    handler = {"Type": "ActionProvider", "Url": ACTION["ActionUrl"]}
    assert not language.problems(flow(Start=without(ACTION, "ActionUrl", Handler=handler)))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "States must be an object"),
        ({"States": {"A": DONE}}, "StartAt must name the first state"),
        ({"StartAt": "B", "States": {"A": DONE}}, "StartAt names 'B', which is not a state"),
        ({"StartAt": "A", "States": {"A": DONE}, "TimeoutSeconds": 3}, "there is no field TimeoutSeconds"),
        ({"StartAt": "A", "States": {"A": 1}}, "a state must be an object"),
        ({"StartAt": "A" * 129, "States": {"A" * 129: DONE}}, "this one 129"),
    ],
)
def test_a_definition_without_its_frame_is_an_error(document: dict[str, Any], words: str) -> None:
    assert any(words in one for one in said(language.load(document)))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"Type": "Nap"}, "no state of type 'Nap'"),
        ({}, "no state of type 'None'"),
        ({"Type": ["Pass"]}, "no state of type"),
        (without(ACTION, Next="Nowhere"), "the next state 'Nowhere' does not exist"),
        (without(ACTION, End=True), "exactly one of Next and End"),
        (without(ACTION, "Next"), "exactly one of Next and End"),
        (without(ACTION, "Next", End=False), "End must be true"),
        (without(ACTION, InputPath="$.x"), "exactly one of Parameters and InputPath"),
        (without(ACTION, "Parameters"), "exactly one of Parameters and InputPath"),
        (without(ACTION, "ActionUrl"), "exactly one of ActionUrl and Handler"),
        (without(ACTION, ActionUrl="aps.example.org"), "ActionUrl must be the address"),
        (without(ACTION, ActionUrl="https://user:secret@aps.example.org"), "ActionUrl must be the address"),
        (without(ACTION, ActionUrl="https://aps.example.org:99999"), "ActionUrl must be the address"),
        (without(ACTION, ActionUrl="file:///etc/passwd"), "ActionUrl must be the address"),
        (without(ACTION, "ActionUrl", **{"ActionUrl.$": "$.url"}), "cannot come from the state"),
        (without(ACTION, WaitTime=0), "WaitTime must be"),
        (without(ACTION, WaitTime="60"), "WaitTime must be"),
        (without(ACTION, WaitTime=True), "WaitTime must be"),
        (without(ACTION, ExceptionOnActionFailure="yes"), "ExceptionOnActionFailure must be true or false"),
        (without(ACTION, ResultPath="start"), "it must begin with `$`"),
        (without(ACTION, ResultPath="$.a[*]"), "names one place"),
        (without(ACTION, ResultPath=None), "ResultPath must be a path"),
        (without(ACTION, ResultPath="$._context.run_id"), "can only be read"),
        (without(ACTION, ResultPath="$['_context']"), "can only be read"),
        (without(ACTION, RunAs=1), "RunAs must be a text"),
        (without(ACTION, Parameters=[1]), "Parameters must be an object"),
        (without(ACTION, Parameters={"a": [{"b.$": "c"}]}), "Parameters.a[0].b.$: 'c' is not a JSONPath"),
        (without(ACTION, Parameters={"a.$": 1}), "must be a path"),
        (without(ACTION, Parameters={"a.$": "$.[["}), "is not a JSONPath"),
        (without(ACTION, Parameters={"a.=": "1 +"}), "is not an expression"),
        (without(ACTION, Parameters={"a.=": 1}), "an expression must be a text"),
        (without(ACTION, Parameters={"a.=": "open('x')"}), "there is no function open"),
        (without(ACTION, Parameters={"a.=": "`x`"}), "it must begin with `$`"),
        (without(ACTION, Parameters={"a": 1, "a.$": "$.x"}), "a is there twice"),
        (without(ACTION, Parameters={"__Private_Parameters": "a"}), "must be a list of names"),
        (without(ACTION, Parameters={"pass": 1, "__Private_Parameters": ["word"]}), "it hides nothing"),
        (without(ACTION, Catch=[]), "Catch must be a list"),
        (without(ACTION, Catch=[{"Next": "Done"}]), "must be a list of names of errors"),
        (without(ACTION, Catch=[{"ErrorEquals": ["States.ALL"]}]), "Catch[0].Next must name a state"),
        (
            without(ACTION, Catch=[{"ErrorEquals": ["States.ALL"], "Next": "Gone", "ResultPath": "$.e"}]),
            "the next state 'Gone' does not exist",
        ),
        ({"Type": "Pass", "Parameters": {"a.=": "1"}, "End": True}, "a Pass evaluates no expressions"),
        ({"Type": "Pass", "Parameters": {}, "Result": {}, "End": True}, "takes one of Parameters and Result"),
        ({"Type": "ExpressionEval", "ResultPath": "$.x", "Next": "Done"}, "needs Parameters"),
        ({"Type": "Wait", "Next": "Done"}, "exactly one of Seconds"),
        ({"Type": "Wait", "Seconds": 1, "SecondsPath": "$.s", "Next": "Done"}, "exactly one of Seconds"),
        ({"Type": "Wait", "Seconds": 31_536_001, "Next": "Done"}, "from 0 to 31536000"),
        ({"Type": "Wait", "Seconds": -1, "Next": "Done"}, "from 0 to 31536000"),
        ({"Type": "Wait", "Timestamp": "tomorrow", "Next": "Done"}, "Timestamp must be a time"),
        ({"Type": "Wait", "SecondsPath": "s", "Next": "Done"}, "it must begin with `$`"),
        ({"Type": "Fail", "Cause": {}}, "Cause must be a text"),
        ({"Type": "Fail", "Next": "Done"}, "has no field Next"),
        ({"Type": "Choice", "Choices": []}, "Choices must be a list of rules"),
        ({"Type": "Choice", "Choices": [{"Variable": "$.a", "IsNull": True}]}, "Next must name a state"),
    ],
)
def test_a_mistake_in_a_state_is_an_error_that_names_it(state: dict[str, Any], words: str) -> None:
    definition = flow(Start=state)
    assert any(words in one for one in said(definition)), said(definition)
    with pytest.raises(BadRequest) as raised:
        language.check(definition)
    assert "state 'Start'" in str(raised.value)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"Type": "CreateWebInput"}, "CreateWebInput is not supported here"),
        ({"Type": "AwaitWebInput"}, "AwaitWebInput is not supported here"),
        (
            without(ACTION, "ActionUrl", Handler={"Type": "RegisteredAPI", "Id": "x"}),
            "a Handler RegisteredAPI is not supported here",
        ),
        (
            without(ACTION, "ActionUrl", Handler="urn:globus:flows:handler:x"),
            "a Handler that is not an ActionProvider",
        ),
    ],
)
def test_what_only_globus_can_do_is_refused_by_name_and_marked_so(state: Any, words: str) -> None:
    (problem,) = [one for one in language.problems(flow(Start=state)) if one.level == "error"]
    assert words in problem.message
    assert problem.only_here


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"Type": "Parallel", "Branches": []}, "Globus Flows has no state of type Parallel"),
        ({"Type": "Map"}, "Globus Flows has no state of type Map"),
        ({"Type": "Succeed"}, "Globus Flows has no state of type Succeed"),
        (without(ACTION, Retry=[]), "Globus Flows has no Retry"),
        (without(DONE, OutputPath="$"), "Globus Flows has no OutputPath"),
        (without(ACTION, TimeoutSeconds=3), "Globus Flows has no TimeoutSeconds"),
    ],
)
def test_what_other_languages_have_is_refused_as_such(state: Any, words: str) -> None:
    problems = language.problems(flow(Start=state))
    assert [one.message for one in problems if one.level == "error"] == [words]
    assert not any(one.only_here for one in problems)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (without(ACTION, "ExceptionOnActionFailure"), "say ExceptionOnActionFailure"),
        (without(ACTION, "WaitTime"), "without WaitTime the action is given 300 s"),
        (without(ACTION, "ResultPath"), "without ResultPath the result replaces the whole state"),
        (without(ACTION, ResultPath="$"), "replaces the whole state"),
        (without(ACTION, RunAs="Flow"), "here every action runs as the user"),
        (
            without(ACTION, Catch=[{"ErrorEquals": ["States.ALL"], "Next": "Done"}]),
            "replaces the whole state by the error",
        ),
        (
            without(ACTION, Catch=[{"ErrorEquals": ["States.All"], "Next": "Done", "ResultPath": "$.e"}]),
            "no Action raises 'States.All'; write States.ALL",
        ),
        (
            without(ACTION, Catch=[ACTION["Catch"][0], ACTION["Catch"][0]]),  # type: ignore[index]
            "those after it never catch anything",
        ),
        ({"Type": "Pass", "Result": {"a": 1}, "Next": "Done"}, "Result is not in the present API"),
        ({"Type": "Wait", "Seconds": 1, "End": True}, "go on to a Pass that ends"),
        ({"Type": "ExpressionEval", "Parameters": {}, "ResultPath": "$.x", "End": True}, "go on to a Pass"),
        ({"Type": "ExpressionEval", "Parameters": {}, "Next": "Done"}, "without ResultPath"),
        (
            {"Type": "Choice", "Choices": [{"Variable": "$.a", "IsNull": True, "Next": "Done"}]},
            "without Default the run fails",
        ),
    ],
)
def test_what_globus_leaves_open_is_a_warning_and_runs(state: dict[str, Any], words: str) -> None:
    definition = flow(Start=state)
    assert any(words in one for one in said(definition, "warning")), said(definition, "warning")
    assert language.check(definition) is definition


def test_a_state_that_nothing_leads_to_and_one_without_an_end_are_found() -> None:
    definition = flow(
        Go={"Type": "Pass", "Next": "Round"},
        Round={"Type": "Wait", "Seconds": 1, "Next": "About"},
        About={"Type": "Pass", "Next": "Round"},
        Island={"Type": "Pass", "Next": "Done"},
    )
    found = {(one.state, one.message) for one in language.problems(definition)}
    assert found == {
        ("Go", "no end can be reached from it"),
        ("Round", "no end can be reached from it"),
        ("About", "no end can be reached from it"),
        ("Island", "nothing leads to it"),
        ("Done", "nothing leads to it"),
    }


def test_a_definition_is_not_nested_without_end() -> None:
    deep: Any = 1
    for _ in range(400):
        deep = {"in": deep}
    definition = language.Definition({"StartAt": "A", "States": {"A": {"Type": "Pass", "Parameters": deep}}})
    assert said(definition) == ["it is nested more than 200 deep"]


def test_every_problem_is_told_at_once_errors_first() -> None:
    definition = flow(Start=without(ACTION, "WaitTime", ResultPath="x", Next="Gone"))
    levels = [one.level for one in language.problems(definition)]
    assert levels == ["error", "error", "warning"]
    with pytest.raises(BadRequest, match="and 1 more") as raised:
        language.check(definition)
    assert len(raised.value.details["problems"]) == 2


KEYS = """StartAt States Type Next End Choices Catch And Not Variable Parameters a.$ b.= Handler ResultPath
ErrorEquals __Private_Parameters Pass Action Choice""".split()  # noqa: SIM905


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(KEYS),
                inner | st.sampled_from(["Action", "Choice", "Pass", "Wait", "$.a", "1+"]),
                max_size=4,
            )
        ),
        max_leaves=20,
    )
)
def test_no_document_makes_the_validation_fall_over(nonsense: Any) -> None:
    definition = language.load({"StartAt": "A", "States": {"A": nonsense, "B": {"Type": "Choice"}}})
    assert language.problems(definition)


# Paths

STATE = {
    "a": {"b": [{"x": 1}, {"x": 2}, {"x": 3}], "my-key": "hyphen", "two words": 2},
    "none": None,
    "_context": {"run_id": "r1"},
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("$.a.b[0].x", 1),
        ("$.a.b[-1].x", 3),
        ("$.a.my-key", "hyphen"),
        ("$.a['two words']", 2),
        ('$["a"]["two words"]', 2),
        ("$.none", None),
        ("$._context.run_id", "r1"),
        ("$.a.b[*].x", [1, 2, 3]),
        ("$.a.b[0:2].x", [1, 2]),
        ("$.a.b[?@.x > 1].x", [2, 3]),
        ("$..x", [1, 2, 3]),
        ("$.nothing[*]", []),
        ("$.a.b[7:9]", []),
    ],
)
def test_a_path_reads_one_value_or_a_list(path: str, value: Any) -> None:
    assert read_path(path, STATE) == value


def test_the_whole_state_does_not_include_the_context() -> None:
    assert read_path("$", STATE) == {"a": STATE["a"], "none": None}


@pytest.mark.parametrize(
    "path",
    [
        "$.b",
        "$.a.b[3]",
        "$.none.x",
        "$.a.b.x",
        "$.a[0]",
        "a.b",
        "$.a[",
        "",
        "$.a | $.b",
        "$.a[?isinstance(@, 'x')]",  # of the library alone, and not without faults
        "$.a[?typeof(@) == 'x']",
    ],
)
def test_a_path_to_nothing_is_an_error_that_names_it(path: str) -> None:
    error = error_of("read_path", path, STATE)
    assert error.name == "States.ParameterPathFailure"
    assert path in str(error.cause)


NAMES = st.text(alphabet=string.ascii_letters + string.digits + " -_$@*?'\"\\.[]:,é☃", min_size=1, max_size=8)


def written(steps: list[str]) -> str:
    """A Reference Path, each name in brackets."""
    return "$" + "".join("['{}']".format(one.replace("\\", "\\\\").replace("'", "\\'")) for one in steps)


@given(st.lists(NAMES, min_size=1, max_size=5).filter(lambda steps: steps[0] != "_context"), st.integers())
def test_what_is_written_at_a_path_is_read_there(steps: list[str], value: int) -> None:
    path = written(steps)
    assert reference_path(path) == tuple(steps)
    before = {"kept": {"x": [1]}}
    if steps[0] == "kept":
        steps[0] = "other"
        path = written(steps)
    after = write_path(path, before, value)
    assert read_path(path, after) == value
    assert after["kept"] == before["kept"] == {"x": [1]}
    assert set(after) == {"kept", steps[0]}


@pytest.mark.parametrize(
    ("path", "after"),
    [
        ("$", 7),
        ("$.n", {"l": [{"x": 1}, 2], "s": "text", "n": 7}),
        ("$.l[0].x", {"l": [{"x": 7}, 2], "s": "text"}),
        ("$.l[1]", {"l": [{"x": 1}, 7], "s": "text"}),
        ("$.s", {"l": [{"x": 1}, 2], "s": 7}),
        ("$.new.deep-er['one two']", {"l": [{"x": 1}, 2], "s": "text", "new": {"deep-er": {"one two": 7}}}),
    ],
)
def test_a_result_is_placed_and_the_old_state_stays_as_it_was(path: str, after: Any) -> None:
    before = {"l": [{"x": 1}, 2], "s": "text"}
    assert write_path(path, before, 7) == after
    assert before == {"l": [{"x": 1}, 2], "s": "text"}


@pytest.mark.parametrize(
    "path", ["$.l[2]", "$.s.x", "$.l.x", "$.s[0]", "$.l[*]", "$..x", "$._context", "$.a b", "x"]
)
def test_a_result_that_has_no_place_is_an_error(path: str) -> None:
    error = error_of("write_path", path, {"l": [1, 2], "s": "text"}, 7)
    assert error.name == "States.ResultPathMatchFailure"


def test_a_result_has_no_place_in_a_state_that_is_no_object() -> None:
    assert error_of("write_path", "$.a", [1], 7).name == "States.ResultPathMatchFailure"


# Parameters, and what of them is shown


def test_parameters_are_filled_by_constants_paths_and_expressions_at_any_depth() -> None:
    template = {
        "constant": 10,
        "reference.$": "$.a.b[0].x",
        "expression.=": "'n = ' + str(a.b[1].x)",
        "nested": [{"deep.$": "$.a.b[*].x", "plain": [1, {"deeper.=": "1 + 1"}]}],
        "__Private_Parameters": ["constant"],
    }
    assert fill(template, STATE) == {
        "constant": 10,
        "reference": 1,
        "expression": "n = 2",
        "nested": [{"deep": [1, 2, 3], "plain": [1, {"deeper": 2}]}],
    }


def test_a_pass_takes_an_expression_for_a_key() -> None:
    assert fill({"a.=": "1"}, {}, expressions=False) == {"a.=": "1"}


def test_private_parameters_and_private_keys_are_not_shown() -> None:
    template = {
        "server": {"password.$": "$._private.password", "user": "ada", "__Private_Parameters": ["password"]},
        "list": [{"key.=": "'k'", "__Private_Parameters": ["key.="]}],
        "token": "t",
        "__Private_Parameters": ["token"],
    }
    state = {"_private": {"password": "hush"}, "_private_too": 1, "open": {"_private_inside": 2, "x": 3}}
    filled = fill(template, state)
    assert filled == {"server": {"password": "hush", "user": "ada"}, "list": [{"key": "k"}], "token": "t"}
    assert shown(filled, template) == {"server": {"user": "ada"}, "list": [{}]}
    assert shown(state) == {"open": {"x": 3}}


# Expressions

VALUES = {
    "foo": "bar",
    "list_val": [1, 2, 3],
    "object_val": {"sub_val1": "embedded", "sub": {"n": 2}},
    "relays": [{"key": "k1", "from": ["10.0.0.1"]}, {"key": "k2", "from": []}],
    "path": "/a/b/",
    "half": 0.5,
    "_private": {"password": "hush hush"},
    "_context": {"run_id": "r1"},
}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("foo + ' ' + object_val.sub_val1", "bar embedded"),
        ("'Constant string ' + `$.object_val.sub_val1`", "Constant string embedded"),
        ("list_val + [4]", [1, 2, 3, 4]),
        ("list_val[-1] * 2 ** 3 - 1", 23),
        ("(list_val[0] + half) / 2", 0.75),
        ("pathsplit('/foo/bar/blech')", ["/foo/bar", "blech"]),
        ("pathsplit('/~/path')", ["/~/", "path"]),
        ("pathsplit(path)[1]", "b"),
        ("pathsplit('/')", ["/", ""]),
        ("foo if is_present('foo') else 10", "bar"),
        ("foo if is_present('$.object_val.none') else 10", 10),
        ("getattr('object_val.sub.n', 10)", 2),
        ("getattr('object_val.other', 10)", 10),
        ("getattr('missing_property')", None),
        ("len(list_val) > 2 and not foo == 'x'", True),
        (
            "[{'public_key': one.key, 'sources': one['from']} for one in relays if one['from']]",
            [{"public_key": "k1", "sources": ["10.0.0.1"]}],
        ),
        ("{one.key: len(one['from']) for one in relays}", {"k1": 1, "k2": 0}),
        ("f'{foo}-{half:.2f}'", "bar-0.50"),
        ("'%s/%03d' % (foo, 7)", "bar/007"),
        ("path.rstrip('/').split('/')[1:]", ["a", "b"]),
        ("path.rstrip('/').rpartition('/')", ["/a", "/", "b"]),
        ("', '.join([str(n) for n in list_val])", "1, 2, 3"),
        ("foo.replace('b', 'c').upper()", "CAR"),
        ("object_val.get('none', {'x': [None, True]})", {"x": [None, True]}),
        ("[k for k in object_val.keys()] + list(object_val.sub.values())", ["sub_val1", "sub", 2]),
        ("_context.run_id + `$._context.run_id`", "r1r1"),
        ("`$.relays[*].key`", ["k1", "k2"]),
        ("_private.password.upper()", "HUSH HUSH"),
        ("3 in list_val", True),
        ("int('7') // 2 % 2", 1),
        ("  1 +\n1 ", None),
    ],
)
def test_an_expression_has_the_value_that_python_would_give_it(expression: str, value: Any) -> None:
    if value is None and "\n" in expression:
        assert error_of("evaluate", expression, VALUES).name == "States.ParameterPathFailure"
        return
    before = json.dumps(VALUES)
    assert evaluate(expression, VALUES) == value
    assert json.dumps(VALUES) == before


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("missing + 1", "'missing' is not defined"),
        ("object_val.none", "KeyError: none"),
        ("1 / 0", "ZeroDivisionError"),
        ("foo + 1", "TypeError"),
        ("`$.object_val.none`", "nothing at $.object_val.none"),
        ("a = 1", "is not an expression"),
        ("1; 2", "is not an expression"),
        ("", "is not an expression"),
        ("len", "is not defined"),
        ("1e999", "cannot be written as JSON"),
        ("{1: 2}", "cannot be written as JSON"),
        ("(-1) ** 0.5", "cannot be written as JSON"),
        ("b'x'", "cannot be written as JSON"),
        ("rand()", "Function 'rand' not defined"),
        ("getattr('object_val.none', missing)", "'missing' is not defined"),
        ("object_val.items", "is the name of a method of objects"),
    ],
)
def test_an_expression_that_fails_says_why(expression: str, words: str) -> None:
    error = error_of("evaluate", expression, VALUES)
    assert error.name == "States.ParameterPathFailure"
    assert words in str(error.cause)


@pytest.mark.parametrize(
    "expression",
    [
        "().__class__.__bases__[0].__subclasses__()",
        "foo.__class__",
        "object_val.__init__.__globals__",
        "len.__self__",
        "`$.foo.__class__`",
        "str.mro()",
        "'{0.__class__}'.format(foo)",
        "foo.format_map({})",
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "eval('1')",
        "exec('1')",
        "globals()",
        "type(foo)",
        "dict.fromkeys([1])",
        "(lambda: 1)()",
        "[x for x in (1).__class__.__mro__]",
        "list_val.append(4)",
        "list_val.clear()",
        "object_val.pop('sub')",
        "object_val.update({'a': 1})",
        "foo.encode()",
        "(x := 5)",
        "[(yield 1)]",
        "f'{foo!r}'",
        "{1, 2}",
        "list_val.__len__()",
        "object_val._private",
    ],
)
def test_an_expression_cannot_leave_its_language(expression: str) -> None:
    before = json.dumps(VALUES)
    assert error_of("evaluate", expression, VALUES).name == "States.ParameterPathFailure"
    assert json.dumps(VALUES) == before


@pytest.mark.parametrize(
    "expression",
    [
        "9 ** 9 ** 9 ** 9",
        "2 ** 100000",
        "10 ** 4000 * 10 ** 4000 * 10 ** 4000",
        "1 << 10 ** 9",
        "'x' * 10 ** 9",
        "10 ** 9 * [0]",
        "[[0] * 100000] * 100000",
        "str([['x' * 1000] * 1000] * 1000)",
        "('x' * 100000).join([foo for a in 'x' * 1000])",
        "('x' * 90000).replace('x', 'y' * 90000)",
        "('x' * 90000).replace('', 'y' * 90000)",
        "f'{1:999999999}'",
        "f'{foo:{10 ** 9}}'",
        "'%999999999d' % 1",
        "'%*d' % (999999999, 1)",
        "len(('%(a)s' * 20000) % {'a': 'x' * 90000})",
        "foo.ljust(10 ** 9)",
        "foo.zfill(10 ** 9)",
        "[a for a in 'x' * 90000]",
        "[1 for a in 'x' * 9000 for b in 'x' * 9000]",
        "[('x' * 90000) for a in 'x' * 9000]",
        "int('9' * 90000)",
        "(" * 3000 + "1" + ")" * 3000,
        "-" * 3900 + "1",
        "1" + " + 1" * 2000,
        "x" * 4001,
    ],
)
def test_an_expression_cannot_eat_the_machine(expression: str) -> None:
    assert error_of("evaluate", expression, VALUES).name == "States.ParameterPathFailure"


def test_a_failing_expression_does_not_quote_what_is_private() -> None:
    error = error_of("evaluate", "int(_private.password)", VALUES)
    assert "hush" not in str(error.cause)
    assert "ValueError" in str(error.cause)


TOKENS = """foo list_val object_val relays _private _context . , ( ) [ ] { } : + - * ** / // % << >> & | ^ ~ == < in not
and or if else for lambda 0 1 2 -7 0.5 9999 'x' '' f' {foo} ' None True `$.foo` `$..x` `$` len str int list dict getattr
is_present pathsplit join split replace get items upper sub key = := ; # yield await async class""".split()  # noqa: SIM905


@given(st.lists(st.sampled_from(TOKENS), max_size=12), st.sampled_from(["", " "]))
def test_whatever_is_written_an_expression_has_a_json_value_or_an_error(
    tokens: list[str], between: str
) -> None:
    before = json.dumps(VALUES)
    with contextlib.suppress(StateError):
        json.dumps(evaluate(between.join(tokens), VALUES), allow_nan=False)
    assert json.dumps(VALUES) == before


@pytest.mark.parametrize(
    "path", ["$.a[?match(@, '(a+)+b')]", "$.a[?search(@, '(a+)+b')]", "$.a[?@ =~ /(a+)+b/]", "$.a[?@ =~ /(/]"]
)
def test_a_path_has_no_regular_expression_which_could_take_for_ever(path: str) -> None:
    assert error_of("read_path", path, {"a": ["a" * 40]}).name == "States.ParameterPathFailure"


def test_a_path_finds_no_more_than_a_state_can_hold() -> None:
    state: Any = 0
    for _ in range(100):
        state = {"x": [1, 2], "below": state}
    error = error_of("read_path", "$..*..*..*..*", state)
    assert "finds more than 100000 values" in str(error.cause)
    assert len(read_path("$..x", state)) == 100


def test_a_path_descends_into_the_deepest_state_there_may_be() -> None:
    state: Any = {"x": 1}
    for _ in range(198):
        state = {"below": state}
    assert not_too_deep(state)
    assert read_path("$..x", state) == [1]


# Choice rules


@pytest.mark.parametrize(
    ("rule", "value", "outcome"),
    [
        ({"StringEquals": "a"}, "a", True),
        ({"StringEquals": "a"}, "b", False),
        ({"StringEquals": "1"}, 1, False),
        ({"StringLessThan": "b"}, "a", True),
        ({"StringGreaterThan": "b"}, "a", False),
        ({"StringLessThanEquals": "a"}, "a", True),
        ({"StringGreaterThanEquals": "b"}, "a", False),
        ({"StringMatches": "log-*.txt"}, "log-7.txt", True),
        ({"StringMatches": "log-*.txt"}, "log-7.csv", False),
        ({"StringMatches": "*"}, 7, False),
        ({"NumericEquals": 1}, 1.0, True),
        ({"NumericEquals": 1}, True, False),
        ({"NumericEquals": 1}, "1", False),
        ({"NumericLessThan": 2}, 1.5, True),
        ({"NumericGreaterThan": 2}, 1.5, False),
        ({"NumericLessThanEquals": 2}, 2, True),
        ({"NumericGreaterThanEquals": 2}, 1, False),
        ({"BooleanEquals": False}, False, True),
        ({"BooleanEquals": True}, 1, False),
        ({"TimestampEquals": "2026-08-01T12:00:00Z"}, "2026-08-01T14:00:00+02:00", True),
        ({"TimestampLessThan": "2026-08-01T12:00:00Z"}, "2026-08-01T11:59:59.999Z", True),
        ({"TimestampGreaterThan": "2026-08-01T12:00:00Z"}, "2026-08-01T12:00:00.1234567Z", True),
        ({"TimestampLessThanEquals": "2026-08-01T12:00:00Z"}, "2026-08-01t12:00:00z", True),
        ({"TimestampGreaterThanEquals": "2026-08-01T12:00:00Z"}, "soon", False),
        ({"StringEqualsPath": "$.same"}, "same", True),
        ({"NumericLessThanPath": "$.ten"}, 9, True),
        ({"NumericLessThanPath": "$.same"}, 9, False),
        ({"BooleanEqualsPath": "$.yes"}, True, True),
        ({"TimestampLessThanPath": "$.when"}, "2026-08-01T11:00:00Z", True),
        ({"IsNull": True}, None, True),
        ({"IsNull": False}, None, False),
        ({"IsNumeric": True}, 1.5, True),
        ({"IsNumeric": True}, True, False),
        ({"IsString": True}, "x", True),
        ({"IsString": False}, 1, True),
        ({"IsBoolean": True}, False, True),
        ({"IsTimestamp": True}, "2026-08-01T12:00:00Z", True),
        ({"IsTimestamp": True}, "2026-13-01T12:00:00Z", False),
        ({"IsTimestamp": True}, "2026-08-01", False),
        ({"IsPresent": True}, None, True),
        ({"IsPresent": False}, 0, False),
    ],
)
def test_a_comparison_holds_or_not(rule: dict[str, Any], value: Any, *, outcome: bool) -> None:
    rule = {"Variable": "$.v", **rule}
    state = {"v": value, "same": "same", "ten": 10, "yes": True, "when": "2026-08-01T12:00:00Z"}
    assert not list(choices.mistakes(rule))
    assert choices.holds(rule, state) is outcome
    assert choices.holds({"Not": rule}, state) is not outcome


def test_every_operator_of_the_language_is_there() -> None:
    assert len(choices.OPERATORS) == len(set(choices.OPERATORS)) == 39


def test_rules_are_joined_by_and_or_and_not() -> None:
    yes, no = {"Variable": "$.a", "IsPresent": True}, {"Variable": "$.b", "IsPresent": True}
    missing = {"Variable": "$.b", "StringEquals": "x"}
    state = {"a": 1}
    assert choices.holds({"And": [yes, {"Not": no}]}, state)
    assert not choices.holds({"And": [no, missing]}, state), "what follows a rule that fails is not looked at"
    assert choices.holds({"Or": [yes, missing]}, state)
    assert not choices.holds({"Or": [no, {"Not": yes}]}, state)


@pytest.mark.parametrize("rule", [{"StringEquals": "x"}, {"IsNull": True}, {"NumericEqualsPath": "$.b"}])
def test_a_rule_about_nothing_fails_the_run(rule: dict[str, Any]) -> None:
    with pytest.raises(StateError) as raised:
        choices.holds({"Variable": "$.none", **rule}, {"b": 1})
    assert raised.value.name == "States.Runtime"
    assert "$.none" in raised.value.cause


def test_presence_is_asked_of_a_list_by_its_elements() -> None:
    rule = {"Variable": "$.l[*]", "IsPresent": True}
    assert [choices.holds(rule, {"l": one}) for one in ([1], [])] == [True, False]


@pytest.mark.parametrize(
    ("pattern", "text", "outcome"),
    [
        ("*", "", True),
        ("", "", True),
        ("", "x", False),
        ("a*", "abc", True),
        ("*c", "abc", True),
        ("a*b*c", "aXbYc", True),
        ("a*b*c", "acb", False),
        ("ab*ba", "aba", False),
        (r"a\*c", "a*c", True),
        (r"a\*c", "abc", False),
        (r"a\\*", r"a\bc", True),
        ("a.c", "abc", False),
        ("a*\nc", "ab\nc", True),
        ("*a" * 40, "a" * 39, False),
        ("*a" * 200 + "b", "a" * 10_000, False),
    ],
)
def test_a_pattern_matches_by_its_stars_only(pattern: str, text: str, *, outcome: bool) -> None:
    assert choices.matches(text, pattern) is outcome


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (7, "a rule must be an object"),
        ({}, "takes one operator, this one has 0"),
        ({"Variable": "$.a"}, "takes one operator, this one has 0"),
        ({"Variable": "$.a", "IsNull": True, "IsString": True}, "this one has 2"),
        ({"Variable": "$.a", "StringContains": "x"}, "there is no operator StringContains"),
        ({"Variable": "$.a", "BooleanLessThan": True}, "there is no operator BooleanLessThan"),
        ({"Variable": "$.a", "StringMatchesPath": "$.b"}, "there is no operator StringMatchesPath"),
        ({"StringEquals": "x"}, "needs a Variable"),
        ({"Variable": "a", "StringEquals": "x"}, "it must begin with `$`"),
        ({"Variable": "$.a", "StringEquals": 1}, "takes a value of type String, this is 1"),
        ({"Variable": "$.a", "NumericEquals": True}, "takes a value of type Numeric"),
        ({"Variable": "$.a", "TimestampEquals": "now"}, "takes a value of type Timestamp"),
        ({"Variable": "$.a", "IsPresent": "yes"}, "takes true or false"),
        ({"Variable": "$.a", "StringEqualsPath": 1}, "is not a JSONPath"),
        ({"And": []}, "And takes a list of rules"),
        ({"Not": []}, "a rule must be an object"),
        ({"Or": [{"Not": {"Variable": "$.a", "Is": 1}}]}, "there is no operator Is"),
        ({"Variable": "$.a", "Not": {"Variable": "$.a", "IsNull": True}}, "Not takes no Variable"),
    ],
)
def test_a_rule_that_is_none_is_named(rule: Any, words: str) -> None:
    state = {"Type": "Choice", "Choices": [rule], "Default": "Done"}
    assert any(words in one for one in said(flow(Start=state))), said(flow(Start=state))


def test_rules_are_not_nested_without_end() -> None:
    rule: dict[str, Any] = {"Variable": "$.a", "IsNull": True}
    for _ in range(500):
        rule = {"Not": rule}
    assert list(choices.mistakes(rule)) == ["rules are nested more than 20 deep"]
