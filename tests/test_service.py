"""The server around a facility: what it binds, whom it lets in, what it says, how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Caller, Served, serving
from standins.globus import Globus

from scistream_flows.actions.answers import REFUSALS_AT_ONCE
from scistream_flows.actions.service import serve
from scistream_flows.config import FacilityConfig, load_facility
from scistream_flows.errors import BadRequest, ConfigError, ScistreamError

GLOBUS = """
[globus]
client_id = "{client_id}"
client_secret_file = "{secret}"
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A development facility without any file."""
    with serving(tmp_path_factory.mktemp("served"), "aps", development=True) as served:
        yield served


@pytest.fixture
def caller(served: Served, relays_below: Callable[..., list[int]]) -> Iterator[Caller]:
    caller = Caller(served, served.token)
    yield caller
    caller.close()
    assert relays_below(served.state_dir.parent, patience_s=5) == []


def with_a_client(tmp_path: Path) -> FacilityConfig:
    """The configuration of a facility that has a Globus client."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    file = tmp_path / "aps.toml"
    file.write_text(
        '[facility]\nname = "aps"\n[[gateway]]\nname = "g"\nwan_bind = "127.0.0.1"\nlan_bind = "127.0.0.1"\n'
        + GLOBUS.format(client_id="45d14160-9ad2-42da-9e7c-5640886b2945", secret=secret)
    )
    return load_facility("aps", file=file)


# --- development mode


def test_a_development_facility_is_served_on_loopback_with_a_token_in_a_file(
    served: Served, caller: Caller
) -> None:
    assert served.url.startswith("http://127.0.0.1:")
    token = served.state_dir / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert f"the token is in {token}" in served.log.read_text()
    status = caller.details("start", {"stream_id": "s", "role": "PROD", "targets": ["127.0.0.1:9"]})
    assert status["state"] == "LISTENING"
    (stream,) = caller.ask("GET", "/streams").json()["streams"]
    assert stream["owner"] == f"urn:scistream:unix:{os.geteuid()}@{socket.gethostname()}"
    caller.details("release", {"stream_id": "s", "role": "PROD"})


def test_without_the_token_of_the_file_nobody_comes_in(served: Served) -> None:
    for headers in ({}, {"Authorization": "Bearer guess"}):
        answer = httpx.get(served.url + "/streams", headers=headers, timeout=30)
        assert answer.status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": "localhost.evil.example:80"},
        {"Host": "evil.example:{port}"},  # a name of theirs that was made to point here
        {"Host": "127.0.0.1:1"},
        {"Host": "localhost:{port}.evil.example"},
        {"Host": "evil@localhost:{port}"},
        {"Host": "localhost.:{port}"},
        {"Host": "127.1:{port}"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://evil.example:{port}"},
        {"Origin": "http://127.0.0.1:1"},  # another program of this machine serves pages too
        {"Origin": "http://localhost"},
        {"Origin": "null"},
    ],
)
def test_a_page_of_elsewhere_cannot_call_a_development_facility(
    served: Served, caller: Caller, headers: dict[str, str]
) -> None:
    port = served.url.rpartition(":")[2]
    sent = {name: value.replace("{port}", port) for name, value in headers.items()}
    for method, path in (
        ("GET", "/streams"),
        ("GET", "/health"),
        ("GET", "/openapi.json"),
        ("POST", "/hello"),
    ):
        answer = caller.ask(method, path, headers=sent)
        assert (answer.status_code, answer.json()["code"]) == (403, "denied")
    for name in ("localhost", "127.0.0.1", "[::1]"):
        own = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        assert caller.ask("GET", "/streams", headers=own).status_code == 200


def test_two_host_headers_are_no_request(served: Served) -> None:
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=40) as connection:
        good, evil = f"Host: {host}:{port}\r\n", "Host: evil.example\r\n"
        connection.sendall(f"GET /health HTTP/1.1\r\n{good}{evil}Connection: close\r\n\r\n".encode())
        assert everything(connection).startswith(b"HTTP/1.1 400 ")


def test_who_connects_and_does_not_ask_loses_the_connection(served: Served, caller: Caller) -> None:
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    head = f"GET /health HTTP/1.1\r\nHost: {host}:{port}\r\n"
    body = head.replace("GET /health", "POST /actions/start/run") + "Content-Length: 9\r\n\r\n{"
    with contextlib.ExitStack() as open_ones:
        said = {}
        for begun in ("", head, f"{head}\r\n{head}", body):
            said[begun] = open_ones.enter_context(socket.create_connection((host, int(port)), timeout=40))
            said[begun].sendall(begun.encode())
        answers = {begun: everything(connection) for begun, connection in said.items()}
    assert (answers[""], answers[head]) == (b"", b"")
    assert answers[f"{head}\r\n{head}"].startswith(b"HTTP/1.1 200 ")
    assert answers[body].startswith(b"HTTP/1.1 408 ")
    assert caller.ask("GET", "/health").status_code == 200


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(4096):
            content += data
    return content


def test_a_flood_of_refusals_does_not_fill_the_log(tmp_path: Path) -> None:
    with serving(tmp_path, "flooded", development=True) as flooded:
        with httpx.Client(base_url=flooded.url, timeout=30) as stranger:
            count = 2 * REFUSALS_AT_ONCE
            assert {stranger.get("/streams").status_code for _ in range(count)} == {401}
            known = {"Authorization": f"Bearer {flooded.token}"}
            assert stranger.get("/streams", headers=known).status_code == 200
        flooded.stop()
        lines = [line for line in flooded.log.read_text().splitlines() if "scistream_flows.access" in line]
    refused = [line for line in lines if " 401 " in line]
    assert REFUSALS_AT_ONCE <= len(refused) < count
    said = [int(found[1]) for line in lines if (found := re.search(r", (\d+) before it not logged", line))]
    assert len(refused) + sum(said) == count


@pytest.mark.parametrize(
    "says",
    [
        b"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n",
        b"POST /hello HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"\x16\x03\x01 no HTTP\r\n\r\n",
    ],
    ids=["page", "422", "upgrade", "garbage"],
)
def test_strangers_do_not_fill_the_log_whatever_they_say(tmp_path: Path, says: bytes) -> None:
    with serving(tmp_path, "flooded", development=True) as flooded:
        host = httpx.URL(flooded.url)
        for _ in range(3 * REFUSALS_AT_ONCE):
            with socket.create_connection((host.host, host.port or 0), timeout=30) as stranger:
                stranger.sendall(says.replace(b"{host}", f"{host.host}:{host.port}".encode()))
                assert stranger.recv(4096)
        flooded.stop()
        lines = flooded.log.read_text().splitlines()
    assert REFUSALS_AT_ONCE <= len(lines) < 2.5 * REFUSALS_AT_ONCE


def test_health_says_that_it_answers_and_nothing_else(served: Served) -> None:
    answer = httpx.get(served.url + "/health", timeout=30)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert "server" not in answer.headers


# --- what is refused


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1"])
def test_without_a_globus_client_only_loopback_is_bound(
    state_base: Path, address: str, certificate: tuple[Path, Path]
) -> None:
    chain, key = certificate
    with pytest.raises(BadRequest, match="without a Globus client only loopback"):
        serve(load_facility("aps"), listener_ip=address, certificate=chain, key=key)
    assert not (state_base / "aps").exists()


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1"])
def test_without_a_certificate_only_loopback_is_bound(tmp_path: Path, state_base: Path, address: str) -> None:
    with pytest.raises(BadRequest, match="not served without a certificate"):
        serve(with_a_client(tmp_path), listener_ip=address)
    assert not (state_base / "aps").exists()


@pytest.mark.usefixtures("state_base")
def test_an_address_that_cannot_be_bound_is_named(free_address: str) -> None:
    host, port = free_address.rsplit(":", 1)
    with (
        socket.create_server((host, int(port))),
        pytest.raises(BadRequest, match=f"{free_address} cannot be bound"),
    ):
        serve(load_facility("aps"), port=int(port))
    with pytest.raises(BadRequest, match="numeric"):
        serve(load_facility("aps"), listener_ip="gateway.example.org")


@pytest.mark.usefixtures("state_base")
def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    for chain, key in ((tmp_path / "none.pem", None), (broken, broken)):
        with pytest.raises(ConfigError, match=chain.name):
            serve(load_facility("aps"), certificate=chain, key=key)
    with pytest.raises(BadRequest, match="a key without a certificate"):
        serve(load_facility("aps"), key=broken)


def test_what_is_wrong_with_the_state_is_said_before_anything_is_served(state_base: Path) -> None:
    (state_base / "aps").mkdir(mode=0o755)
    (state_base / "aps").chmod(0o755)
    with pytest.raises(ScistreamError, match="not a directory of this user alone"):
        serve(load_facility("aps"))


# --- with a Globus client


def test_with_a_certificate_it_speaks_tls_only(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    chain, key = certificate
    options: dict[str, Any] = {"certificate": str(chain), "key": str(key), "workers": 2}
    with Globus() as globus:
        client, scope = globus.add_facility()
        secret = tmp_path / "secret"
        secret.write_text(str(client.secret))
        secret.chmod(0o600)
        more = GLOBUS.format(client_id=client.id, secret=secret)
        with serving(tmp_path, "aps", more=more, environment=globus.environment, **options) as served:
            assert served.url.startswith("https://127.0.0.1:")
            token = globus.mint(globus.add_person("ada@example.org"), scope)
            context = ssl.create_default_context(cafile=str(chain))
            with httpx.Client(verify=context, timeout=30) as http:
                answer = http.get(served.url + "/streams", headers={"Authorization": f"Bearer {token}"})
                assert (answer.status_code, answer.json()["streams"]) == (200, [])
                # a proxy or a name in front of it is no concern of ours here: TLS and the token say who is who
                named = http.get(served.url + "/health", headers={"Host": "gateway.example.org"})
                assert named.status_code == 200
            with pytest.raises(httpx.TransportError):
                httpx.get(served.url.replace("https", "http") + "/health", timeout=30)
    said = served.log.read_text()
    assert str(client.secret) not in said
    assert token not in said


def test_who_may_not_run_actions_is_forbidden_to(tmp_path: Path) -> None:
    with Globus() as globus:
        client, scope = globus.add_facility()
        ada, bob = (globus.add_person(f"{name}@example.org") for name in ("ada", "bob"))
        secret = tmp_path / "secret"
        secret.write_text(str(client.secret))
        secret.chmod(0o600)
        more = GLOBUS.format(client_id=client.id, secret=secret)
        more += f'runnable_by = ["{ada.urn}"]\nvisible_to = ["all_authenticated_users"]\n'
        with serving(tmp_path, "aps", more=more, environment=globus.environment) as served:
            adas, bobs = (Caller(served, globus.mint(one, scope)) for one in (ada, bob))
            body = {"stream_id": "s", "role": "PROD", "targets": ["127.0.0.1:9"]}
            assert httpx.get(f"{served.url}/actions/start", timeout=30).status_code == 401
            description = bobs.ask("GET", "/actions/start").json()
            assert description["runnable_by"] == [ada.urn]
            refused = bobs.run("start", body)
            assert (refused.status_code, refused.json()["code"]) == (403, "denied")
            document = {"uid": "s", "role": "PROD", "targets": ["127.0.0.1:9"]}
            assert bobs.ask("POST", "/streams", json=document).status_code == 403
            # what he may do with a stream, its owner says
            adas.details("start", body, manage_by=[bob.urn])
            assert (
                bobs.details("release", {"stream_id": "s", "role": "PROD"})["final"]["reason"] == "released"
            )
            adas.close()
            bobs.close()
