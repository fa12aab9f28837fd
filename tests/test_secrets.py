"""Tokens, tickets and secrets: nowhere but where they have to be, at the most verbose level too."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import LOCAL, TOML, Caller, Served, _serving_at
from standins import globus as standin
from standins.globus import Globus
from test_provider import GLOBUS_TABLE

from scistream_flows import connect_facility
from scistream_flows.models import ListQuery

RelaysBelow = Callable[..., list[int]]


def command(base: Path, name: str, *options: str, environment: dict[str, str]) -> Served:
    """The command `s2cs --debug`, serving."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SCISTREAM_")}
    clean |= {"SCISTREAM_STATE_DIR": str(base), "SCISTREAM_CONFIG_DIR": str(base / "none"), **environment}
    log = base / f"{name}.stderr"
    with log.open("wb") as stderr, (base / f"{name}.stdout").open("wb") as stdout:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("s2cs"), "--debug", "--port", "0", *options],
            stdout=stdout,
            stderr=stderr,
            env=clean,
        )
    served = Served(process, "", log, base / name)
    try:
        served.url = _serving_at(served)
    except BaseException:
        served.stop()
        raise
    return served


def found_in(base: Path, secrets: dict[str, str], *, but: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Each secret that is in a file below `base`, with the name of the file."""
    contents = {
        str(path.relative_to(base)): path.read_bytes()
        for path in base.rglob("*")
        if path.is_file() and path.name not in but
    }
    assert len(contents) > 3
    return [
        (what, name)
        for what, secret in secrets.items()
        for name, content in contents.items()
        if secret.encode() in content
    ]


def known_of(pids: list[int]) -> bytes:
    """Arguments and environment of processes."""
    files = [Path(f"/proc/{pid}/{name}") for pid in pids for name in ("cmdline", "environ")]
    return b"\0".join(file.read_bytes() for file in files)


@pytest.fixture
def base(tmp_path: Path, relays_below: RelaysBelow) -> Iterator[Path]:
    base = tmp_path / "base"
    base.mkdir()
    yield base
    assert relays_below(base, patience_s=5) == []


def test_no_token_ticket_or_secret_is_in_any_log_file_or_argument(
    base: Path, tmp_path: Path, relays_below: RelaysBelow
) -> None:
    with Globus() as globus:
        client, scope = globus.add_facility()
        secret = tmp_path / "client-secret"
        secret.write_text(str(client.secret))
        secret.chmod(0o600)
        file = tmp_path / "aps.toml"
        table = GLOBUS_TABLE.format(client_id=client.id, secret=secret)
        file.write_text(TOML.format(name="aps", gateway=LOCAL) + table)
        served = command(base, "aps", "--config", str(file), environment=globus.environment)
        try:
            group = str(uuid.uuid4())
            alice, bob = (
                globus.add_person("alice@example.org"),
                globus.add_person("bob@example.org", groups=[group]),
            )
            tokens = {one.username: globus.mint(one, scope) for one in (alice, bob)}
            alices, bobs = (Caller(served, token) for token in tokens.values())
            document = {"stream_id": "s", "role": "PROD"}
            alices.details("start", document, manage_by=[f"urn:globus:groups:id:{group}"])
            assert bobs.ask("GET", "/streams/s/PROD").status_code == 200  # his groups were asked for
            ticket = alices.ask("POST", "/streams/s/PROD/ticket", json={}).raise_for_status().json()["ticket"]
            for targets in (["192.0.2.1:1"], ["127.0.0.1:9"], ["127.0.0.1:10"]):  # denied, used, used twice
                httpx.post(f"{served.url}/hello", json={"ticket": ticket, "targets": targets}, timeout=30)
            revoked = globus.mint(alice, scope)
            globus.revoke(revoked)
            asked: list[tuple[str, str, dict[str, Any]]] = [
                ("GET", "/streams", {"headers": {"Authorization": f"Bearer {revoked}"}}),
                ("GET", "/streams", {"headers": {"Authorization": f"Basic {revoked}"}}),
                ("GET", f"/streams?token={tokens[alice.username]}", {}),
                ("POST", "/streams", {"content": f'{{"uid": "{tokens[alice.username]}"'}),
                ("POST", "/streams", {"json": {"uid": "x", "role": "PROD", "token": tokens[alice.username]}}),
                ("POST", "/hello", {"json": {"ticket": ticket, "secret": tokens[alice.username]}}),
                (
                    "DELETE",
                    "/streams/s/PROD",
                    {"headers": {"Authorization": f"Bearer {tokens[bob.username]}"}},
                ),
            ]
            relays = known_of(relays_below(base))
            said = [httpx.request(how, served.url + path, timeout=30, **more) for how, path, more in asked]
            globus.down("503")
            unknown = globus.mint(alice, scope)
            said.append(
                httpx.get(f"{served.url}/streams", headers={"Authorization": f"Bearer {unknown}"}, timeout=30)
            )
            assert [one.status_code for one in said] == [401, 401, 401, 401, 401, 422, 200, 502]
            arguments = known_of([served.process.pid])
            alices.close()
            bobs.close()
        finally:
            served.stop()
        dependent = [text for text, one in globus._tokens.items() if one.resource_server == standin.GROUPS]
        assert dependent
        secrets = {
            **tokens,
            "revoked": revoked,
            "unknown": unknown,
            "ticket": ticket,
            "client": str(client.secret),
            **{f"dependent-{number}": text for number, text in enumerate(dependent)},
        }
    assert b"s2ds" in relays
    assert found_in(base, secrets) == []
    assert "opening s (PROD)" in served.log.read_text()  # it was verbose
    answers = "".join(one.text + repr(one.headers) for one in said)
    for what, text in secrets.items():
        assert text.encode() not in relays + arguments, what
        assert text not in answers, what


def test_the_development_token_is_in_its_file_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    served = command(base, "dev-aps", "--facility", "dev-aps", environment={})
    try:
        monkeypatch.setenv("SCISTREAM_STATE_DIR", str(base))
        monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(base / "none"))
        with connect_facility(served.url) as facility:  # type: ignore[attr-defined]
            assert facility.list(ListQuery()).streams == []
        token = served.token
        mode = stat.S_IMODE((served.state_dir / "token").stat().st_mode)
    finally:
        served.stop()
    assert mode == 0o600
    assert found_in(base, {"token": token}, but=("token",)) == []
    assert token not in caplog.text
