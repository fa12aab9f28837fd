"""Errors: one tree, picklable, with a document form that keeps them whole."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from scistream_flows import errors
from scistream_flows.errors import ScistreamError, error_classes, error_from_document

CLASSES = error_classes()


def made(cls: type[ScistreamError]) -> ScistreamError:
    return cls(
        "it broke", which="stream-1", hint="Mend it", leg="wan", reason="refused", errno="EADDRINUSE", ours=1
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_every_error_survives_a_pickle(cls: type[ScistreamError]) -> None:
    again = pickle.loads(pickle.dumps(made(cls)))  # noqa: S301 - our own bytes
    assert type(again) is cls
    assert (again.message, again.which, again.hint) == ("it broke", "stream-1", "Mend it")
    assert again.details == made(cls).details


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_every_error_survives_its_document_form(cls: type[ScistreamError]) -> None:
    again = error_from_document(json.loads(json.dumps(made(cls).to_document())))
    assert type(again) is cls
    assert str(again) == str(made(cls)) == "it broke. Mend it"
    assert again.to_document() == made(cls).to_document()


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in CLASSES]
    assert sorted(set(codes)) == sorted(codes)


def test_every_error_of_the_module_is_in_the_tree() -> None:
    exceptions = [
        one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)
    ]
    assert set(exceptions) == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_exit_codes_and_http_statuses_are_in_range(cls: type[ScistreamError]) -> None:
    assert cls.exit_code in (1, 2)
    assert 400 <= cls.http_status <= 599


def test_a_code_from_a_newer_version_becomes_the_root_with_its_words() -> None:
    error = error_from_document(
        {"protocol": 1, "code": "from-the-future", "message": "new", "hint": "Update"}
    )
    assert type(error) is ScistreamError
    assert str(error) == "new. Update"


def test_a_document_that_is_no_error_still_becomes_one() -> None:
    assert isinstance(error_from_document({}), ScistreamError)
    assert error_from_document({"details": "none", "message": 3}).details == {}


def test_details_may_have_any_name() -> None:
    error = error_from_document(
        {"code": "denied", "message": "no", "details": {"which": "x", "message": "y"}}
    )
    assert error.details == {"which": "x", "message": "y"}
    assert type(pickle.loads(pickle.dumps(error))) is errors.PolicyDenied  # noqa: S301 - our own bytes


def test_details_are_readable_by_name() -> None:
    assert errors.StreamNotReady("x", leg="wan", reason="refused").leg == "wan"
    assert errors.StreamNotReady("x", leg="wan", reason="refused").reason == "refused"
    assert errors.RelayError("x", errno="EADDRINUSE").errno == "EADDRINUSE"
    assert errors.RelayError("x").errno is None
    assert errors.ProtocolMismatch("x", theirs=2, ours=1).theirs == 2
    assert errors.ConfigError("x", file="f", key="k").key == "k"
    assert errors.RateLimited("x", retry_after_s=3).retry_after_s == 3
    assert errors.RateLimited("x", retry_after_s="soon").retry_after_s == 1


def test_a_wait_that_times_out_is_a_timeout_error() -> None:
    assert issubclass(errors.WaitTimeout, TimeoutError)


def test_the_documented_table_is_the_tree() -> None:
    page = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
    for cls in CLASSES:
        assert f"| `{cls.__name__}` | `{cls.code}` | {cls.exit_code} | {cls.http_status} |" in page
