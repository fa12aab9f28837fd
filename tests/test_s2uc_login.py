"""`s2uc login`: a person logs in at Globus for a facility; the token goes to that facility, and nowhere else.

Globus Auth has a stand-in over HTTP, which the real globus_sdk speaks with; the facilities are real services.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from serving import Served, serving
from standins.globus import Globus, Person
from users import Done, assert_no_relay_below, program

MORE = """
[globus]
client_id = "{client_id}"
client_secret_file = "{secret}"
scope = "{scope}"
"""

pytestmark = pytest.mark.timeout(100)


@dataclass
class World:
    """Globus, a facility that knows its callers by it, and Ada, who uses it."""

    globus: Globus
    facility: Served
    scope: str
    app: str
    ada: Person
    environment: dict[str, str]
    config: Path

    def s2uc(self, *arguments: object, **variables: str) -> Done:
        return subprocess.run(
            [*program("s2uc"), *map(str, arguments)],
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def log_in(self, *more: str) -> Done:
        """Log in as a person does: open the URL, copy the code."""
        words = [*program("s2uc"), "login", "--s2cs", self.facility.url, "--client-id", self.app, *more]
        login = subprocess.Popen(
            words,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert login.stderr is not None
            said = ""
            for line in login.stderr:
                said += line
                if line.startswith("http"):
                    break
            code = ""
            if login.poll() is None and "http" in said:
                url = said.splitlines()[-1].strip()
                shown = httpx.get(url).headers["Location"]
                code = re.findall(r"[?&]code=([^&]+)", shown)[0] + "\n"
            assert login.stdin is not None
            assert login.stdout is not None
            login.stdin.write(code)
            login.stdin.close()
            rest, stdout = login.stderr.read(), login.stdout.read()
            login.wait(60)
            return subprocess.CompletedProcess(words, login.returncode, stdout, said + rest)
        finally:
            login.kill()
            login.wait()
            for one in (login.stdin, login.stdout, login.stderr):
                if one is not None:
                    one.close()

    @property
    def kept(self) -> str:
        return "".join(one.read_text() for one in (self.config / "s2uc" / "login").glob("*.json"))


@pytest.fixture
def world(tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[World]:
    chain, key = map(str, certificate)
    with Globus() as globus:
        client, scope = globus.add_facility(groups=False)
        secret = tmp_path / "secret"
        secret.write_text(str(client.secret))
        secret.chmod(0o600)
        more = MORE.format(client_id=client.id, secret=secret, scope=scope)
        ada = globus.login_as = globus.add_person("ada@example.org")
        with serving(
            tmp_path, "aps", more=more, certificate=chain, key=key, environment=globus.environment
        ) as served:
            clean = {
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SCISTREAM_", "S2UC_"))
            }
            config = tmp_path / "config"
            clean |= {**globus.environment, "SCISTREAM_CONFIG_DIR": str(config), "REQUESTS_CA_BUNDLE": chain}
            yield World(globus, served, scope, globus.add_native_app().id, ada, clean, config)
    assert_no_relay_below(tmp_path)


def test_a_login_opens_streams_of_that_person_and_no_token_is_shown(world: World) -> None:
    url = world.facility.url
    refused = world.s2uc("list", "--s2cs", url)
    assert refused.returncode == 1
    assert "there is no token" in refused.stderr

    done = world.log_in()
    assert done.returncode == 0, done.stderr
    assert "please open the URL" in done.stderr
    assert "Enter the resulting Authorization Code here" in done.stderr
    assert done.stdout == ""
    again = world.log_in()
    assert again.stdout == "You are already logged in, to try different credentials please log out!\n"

    opened = world.s2uc(
        "inbound-request", "--s2cs", url, "--remote-ip", "127.0.0.1", "--num-conn", 1, "--format", "json"
    )
    assert opened.returncode == 0, opened.stderr
    uid = json.loads(opened.stdout)["uid"]
    try:
        (status,) = json.loads(world.s2uc("status", uid, "--format", "json").stdout)["streams"]
        assert status["owner"] == world.ada.urn
    finally:
        assert world.s2uc("release", uid, "--scope", world.scope).returncode == 0

    tokens = re.findall(r'"(?:access|refresh)_token": "([^"]+)"', world.kept)
    auth = world.s2uc("check-auth")
    assert auth.returncode == 0
    assert re.fullmatch(r"Access Token for scope '(\S+)': \*+\S{4}\n", auth.stdout)
    assert world.scope in auth.stdout
    for one in (done, again, opened, auth):
        assert not [token for token in tokens if token in one.stdout + one.stderr]
    shown = world.s2uc("check_auth", "--show-token").stdout
    assert len([token for token in tokens if token in shown]) == 1
    for file in (world.config / "s2uc" / "login").glob("*.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    out = world.s2uc("logout")
    assert (out.returncode, out.stdout) == (0, "Successfully logged out!\n")
    assert list((world.config / "s2uc" / "login").glob("*.json")) == []
    assert world.globus.calls["POST /v2/oauth2/token/revoke"] >= 2
    assert world.s2uc("check-auth").returncode == 1


def test_a_token_goes_to_the_address_of_its_login_only(world: World) -> None:
    assert world.log_in().returncode == 0
    other = world.facility.url.replace("127.0.0.1", "localhost")
    done = world.s2uc("list", "--s2cs", other, "--scope", world.scope)
    assert done.returncode == 1
    assert "no login has pinned the scope" in done.stderr


def test_a_scope_that_changes_is_an_error(world: World) -> None:
    assert world.log_in().returncode == 0
    _, other = world.globus.add_facility()
    for words in (("list",), ("login",)):
        done = world.s2uc(*words, "--s2cs", world.facility.url, "--scope", other)
        assert done.returncode == 1
        assert "since the login, not" in done.stderr


@pytest.mark.parametrize("name", ["action_all", "manage"])
def test_a_server_that_names_a_scope_of_another_facility_gets_no_login(
    world: World, certificate: tuple[Path, Path], name: str
) -> None:
    assert world.log_in().returncode == 0

    class Evil(BaseHTTPRequestHandler):
        seen: ClassVar[list[str | None]] = []

        def do_GET(self) -> None:
            self.seen.append(self.headers["Authorization"])
            scope = world.scope.replace(
                "action_all", name
            )  # the SDK keeps one token for all scopes of a client
            body = json.dumps({"globus_auth_scope": scope}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Evil) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        address = f"https://127.0.0.1:{server.server_port}"
        before = world.kept
        done = world.s2uc("login", "--s2cs", address, "--client-id", world.app)
        listed = world.s2uc("list", "--s2cs", address)
        server.shutdown()
        thread.join(10)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"names a scope of {world.facility.url}, to which it is pinned" in done.stderr
    assert listed.returncode == 1
    assert {*Evil.seen} == {None}
    assert world.kept == before


def test_an_expired_token_is_renewed_without_the_person(world: World) -> None:
    assert world.log_in("--scope", world.scope).returncode == 0
    file = world.config / "s2uc" / "login" / "tokens.json"
    kept = json.loads(file.read_text())
    for one in kept["data"]["DEFAULT"].values():
        one["expires_at_seconds"] = 1
    file.write_text(json.dumps(kept))
    done = world.s2uc("list", "--s2cs", world.facility.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text()) != kept


def test_tokens_that_were_torn_are_said_in_words_and_logout_mends_it(world: World) -> None:
    assert world.log_in().returncode == 0
    file = world.config / "s2uc" / "login" / "tokens.json"
    file.write_text(file.read_text()[:-20])  # the SDK writes it in place: a kill leaves this
    done = world.s2uc("list", "--s2cs", world.facility.url)
    assert done.returncode != 0
    assert f"{file} cannot be read as the tokens of s2uc" in done.stderr
    assert "s2uc logout removes it" in done.stderr
    assert world.s2uc("logout").returncode == 0
    assert world.log_in().returncode == 0
    assert world.s2uc("list", "--s2cs", world.facility.url).returncode == 0


def test_a_login_without_an_application_or_a_facility_says_what_to_do(world: World) -> None:
    without = world.s2uc("login", "--s2cs", world.facility.url)
    assert without.returncode == 2
    assert "--client-id or $SCISTREAM_FLOWS_CLIENT_ID" in without.stderr
    nobody = world.s2uc("login", "--s2cs", "127.0.0.1:1", "--client-id", world.app)
    assert nobody.returncode == 1
    assert "does not say what its scope is" in nobody.stderr
    wrong = world.s2uc("login", "--s2cs", world.facility.url, "--scope", "x", "--client-id", world.app)
    assert wrong.returncode == 2
    assert "no scope of a facility" in wrong.stderr


def test_globus_that_is_away_is_said_in_words(world: World) -> None:
    assert world.log_in("--scope", world.scope).returncode == 0
    file = world.config / "s2uc" / "login" / "tokens.json"
    file.write_text(re.sub(r'"expires_at_seconds": \d+', '"expires_at_seconds": 1', file.read_text()))
    world.globus.down()
    done = world.s2uc("list", "--s2cs", world.facility.url)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Globus Auth" in done.stderr
    out = world.s2uc("logout", "--format", "json")
    assert out.returncode == 0
    assert json.loads(out.stdout)["logged_out"] == [world.facility.url]
    assert "expire by themselves" in out.stderr
    assert not file.exists()
    world.globus.up()
