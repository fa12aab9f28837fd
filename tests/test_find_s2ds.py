"""Finding the relay binary: where it is sought, what is checked, what an absent one says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scistream_flows.errors import ProtocolMismatch, RelayError
from scistream_flows.relay import find_s2ds


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)
    return path


def test_the_binary_of_this_installation_is_found_and_speaks_our_protocol() -> None:
    assert Path(find_s2ds()).name == "s2ds"


def test_s2ds_in_the_environment_wins(tmp_path: Path) -> None:
    named = program(tmp_path / "mine", """echo '{"name": "s2ds", "version": "9", "protocol": 1}'""")
    assert find_s2ds({"S2DS": str(named), "PATH": os.defpath}) == str(named)


def test_a_binary_that_is_not_there_names_the_places_and_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(RelayError, match=r"cargo build --release") as caught:
        find_s2ds({"S2DS": str(tmp_path / "none")})
    assert caught.value.details["looked_at"] == [str(tmp_path / "none")]
    assert str(tmp_path / "none") in str(caught.value)


def test_every_place_is_named_when_there_is_none_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RelayError) as caught:
        find_s2ds({"PATH": "/nowhere"})
    places = caught.value.details["looked_at"]
    assert len(places) >= 5
    assert places[-1].endswith("relay/target/release/s2ds")


def test_another_protocol_is_a_mismatch_that_names_both(tmp_path: Path) -> None:
    other = program(tmp_path / "s2ds", """echo '{"name": "s2ds", "version": "9", "protocol": 7}'""")
    with pytest.raises(ProtocolMismatch, match="speaks protocol 7, this package speaks 1") as caught:
        find_s2ds({"S2DS": str(other)})
    assert (caught.value.theirs, caught.value.ours) == (7, 1)


@pytest.mark.parametrize("says", ["exit 3", "echo no", "echo []", "kill -9 $$"])
def test_a_program_that_is_no_relay_is_named(tmp_path: Path, says: str) -> None:
    with pytest.raises(RelayError, match="is not a relay binary"):
        find_s2ds({"S2DS": str(program(tmp_path / "s2ds", says))})


def test_a_binary_that_was_replaced_is_asked_again(tmp_path: Path) -> None:
    path = program(tmp_path / "s2ds", """echo '{"protocol": 7}'""")
    with pytest.raises(ProtocolMismatch):
        find_s2ds({"S2DS": str(path)})
    program(path, """echo '{"protocol": 1}'""")
    os.utime(path, ns=(1, 1))
    assert find_s2ds({"S2DS": str(path)}) == str(path)
