"""The figures for Prometheus, read by its own client: what they count, what they do not tell, and to whom."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import LOCAL, Caller, Served, serving
from standins.globus import Globus

from scistream_flows.actions.metrics import metrics_token
from scistream_flows.actions.service import serve
from scistream_flows.config import load_facility
from scistream_flows.errors import ConfigError
from scistream_flows.s2cs import unix_owner

Relays = Callable[..., list[int]]
Within = Callable[..., None]
ADMINISTRATED = f'administrators = ["{unix_owner()}"]\n'
LIMITS = 'port_range = "42000-42099"\ncapacity_mbits_per_s = 1000\nconnection_budget = 256\n'
CARRIED = "scistream_carried_bytes_total"


def figures(text: str) -> dict[str, float]:
    """Every sample as `name{label="value",…}`, labels in alphabetical order."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("gauge", "counter", "histogram")
        for one in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(one.labels.items()))
            name = f"{one.name}{{{labels}}}" if labels else one.name
            assert name not in found
            found[name] = one.value
    return found


@pytest.fixture
def served(tmp_path: Path, relays_below: Relays) -> Iterator[Served]:
    with serving(tmp_path, "aps", gateway=LOCAL + LIMITS, more=ADMINISTRATED) as served:
        yield served
    assert relays_below(tmp_path, patience_s=5) == []


@pytest.fixture
def caller(served: Served) -> Iterator[Caller]:
    caller = Caller(served, served.token)
    yield caller
    for stream in caller.ask("GET", "/streams?all_owners=true").json()["streams"]:
        caller.ask("DELETE", f"/streams/{stream['uid']}/{stream['role']}").raise_for_status()
    caller.close()


def read(caller: Caller) -> dict[str, float]:
    answer = caller.ask("GET", "/metrics").raise_for_status()
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return figures(answer.text)


def until(caller: Caller, within: Within, **wanted: Any) -> dict[str, float]:
    """The figures when a look at the relays has brought these; one that is asked for is a second old at most."""
    seen: dict[str, float] = {}

    def there() -> bool:
        seen.update(read(caller))
        return all(seen.get(name) == value for name, value in wanted["figures"].items())

    within(there, timeout_s=15, what=f"{wanted['figures']} in {seen}")
    return seen


def opened(caller: Caller, uid: str, target: str, **more: Any) -> str:
    """Both sides of a stream, ready; the consumer's listener."""
    document = {"uid": uid, "until": "released", **more}
    first = caller.ask("POST", "/streams", json={**document, "role": "PROD", "targets": [target]})
    first.raise_for_status()
    second = caller.ask("POST", "/streams", json={**document, "role": "CONS", "offer": first.json()})
    (relay,) = second.raise_for_status().json()["relays"]
    peers = [{"public_key": relay["public_key"], "source_addresses": relay["dial_addresses"]}]
    caller.ask("PATCH", f"/streams/{uid}/PROD", json={"peers": peers}).raise_for_status()
    return str(relay["listeners"][0]["address"])


# --- what is counted


def test_the_figures_are_those_of_the_streams_and_stay_when_these_have_ended(
    caller: Caller, application: Any, talk: Callable[[str, bytes], str], within: Within
) -> None:
    assert read(caller)['scistream_streams_opened_total{mode="tls",role="PROD"}'] == 0
    listener = opened(caller, "s", application.address, rate_mbits_per_s=200)
    caller.ask("POST", "/streams", json={"uid": "no", "role": "PROD", "targets": ["192.0.2.1:1"]})
    caller.ask("POST", "/streams", json={"uid": "no", "role": "PROD", "rate_mbits_per_s": 9999})
    assert talk(listener, b"hello") == hashlib.sha256(application.payload).hexdigest()
    carried = {
        f'{CARRIED}{{direction="{direction}",role="{role}"}}': size
        for direction, size in (("to_consumer", len(application.payload)), ("to_producer", 5))
        for role in ("PROD", "CONS")
    }
    seen = until(caller, within, figures=carried)
    for name, value in {
        'scistream_streams{mode="tls",role="PROD",state="STREAMING"}': 1,
        'scistream_streams{mode="none",role="CONS",state="READY"}': 0,
        'scistream_streams_opened_total{mode="tls",role="CONS"}': 1,
        'scistream_streams_denied_total{reason="denied",role="PROD"}': 1,
        'scistream_streams_denied_total{reason="capacity",role="PROD"}': 1,
        'scistream_gateway_answers{gateway="local"}': 1,
        'scistream_gateway_draining{gateway="local"}': 0,
        'scistream_gateway_streams{gateway="local"}': 2,
        'scistream_gateway_ports_used{gateway="local"}': 2,
        'scistream_gateway_ports_free{gateway="local"}': 98,
        'scistream_gateway_connections_booked{gateway="local"}': 128,
        'scistream_gateway_connection_budget{gateway="local"}': 256,
        'scistream_gateway_reserved_bits_per_second{gateway="local"}': 4e8,
        'scistream_gateway_capacity_bits_per_second{gateway="local"}': 1e9,
        'scistream_http_requests_total{method="PATCH",route="/streams/{uid}/{role}",status="200"}': 1,
        'scistream_http_requests_total{method="POST",route="/streams",status="403"}': 1,
        'scistream_http_request_duration_seconds_count{route="/streams"}': 4,
    }.items():
        assert seen[name] == value, name
    assert 'scistream_bytes_per_second{direction="to_consumer",role="PROD"}' in seen
    for role in ("CONS", "PROD"):
        caller.ask("DELETE", f"/streams/s/{role}").raise_for_status()
    ended = {
        f'scistream_streams_ended_total{{reason="released",role="{role}"}}': 1 for role in ("PROD", "CONS")
    }
    gone = {'scistream_gateway_streams{gateway="local"}': 0}
    until(caller, within, figures={**carried, **ended, **gone})


def test_what_a_lost_relay_had_carried_is_not_taken_back(
    served: Served,
    caller: Caller,
    application: Any,
    talk: Callable[[str, bytes], str],
    within: Within,
    relays_below: Relays,
) -> None:
    talk(opened(caller, "s", application.address), b"hello")
    carried = {f'{CARRIED}{{direction="to_consumer",role="PROD"}}': len(application.payload)}
    until(caller, within, figures=carried)
    for pid in relays_below(served.state_dir.parent):
        os.kill(pid, signal.SIGKILL)
    lost = {'scistream_streams_ended_total{reason="relay_lost",role="PROD"}': 1}
    until(caller, within, figures={**carried, **lost})


def test_nothing_that_names_a_stream_a_person_or_a_place_is_told(caller: Caller, application: Any) -> None:
    opened(caller, "private-name", application.address)
    caller.ask("GET", "/streams/private-name/PROD")
    caller.ask("GET", "/private-path/../%22%7D")
    caller.http.request("BREW", caller.served.url + "/streams")
    text = caller.ask("GET", "/metrics").text
    caller.ask("DELETE", "/streams/private-name/PROD")
    for private in (
        "private",
        "urn:",
        "127.0.0",
        unix_owner(),
        socket.gethostname(),
        "BREW",
        str(caller.served.state_dir),
    ):
        assert private not in text, private
    labels = {
        label for one in text_string_to_metric_families(text) for s in one.samples for label in s.labels
    }
    named = {"facility", "version", "role", "mode", "state", "reason", "direction", "gateway"}
    assert labels == named | {"route", "method", "status", "le"}


def test_counters_are_the_facilitys_whoever_answers_and_whenever(tmp_path: Path, within: Within) -> None:
    count = 'scistream_http_requests_total{method="GET",route="/health",status="200"}'
    for already, workers in ((0, 2), (20, 1)):
        with (
            serving(tmp_path, "aps", more=ADMINISTRATED, workers=workers) as served,
            contextlib.ExitStack() as callers,
        ):
            for _ in range(20):  # each over a connection of its own, so that both workers have some
                httpx.get(served.url + "/health", timeout=30).raise_for_status()
            caller = Caller(served, served.token)
            callers.callback(caller.close)
            until(caller, within, figures={count: already + 20})
            for _ in range(6):
                other = Caller(served, served.token)
                callers.callback(other.close)
                assert read(other)[count] == already + 20


def test_figures_that_cannot_be_kept_are_an_error_and_stop_nothing_else(
    served: Served, caller: Caller, within: Within
) -> None:
    file = served.state_dir / "metrics.sqlite"
    assert read(caller)
    file.write_bytes(b"no database" * 1000)
    refused = caller.ask("GET", "/metrics")
    assert (refused.status_code, refused.json()["code"]) == (500, "registry")
    assert str(file) in refused.json()["message"]
    within(lambda: "requests are not counted for now" in served.log.read_text(), timeout_s=15)
    assert caller.ask("GET", "/gateways").status_code == 200
    file.unlink()
    within(lambda: caller.ask("GET", "/metrics").status_code == 200, timeout_s=15)


# --- who may read them


def test_without_a_token_that_counts_nobody_reads_them(tmp_path: Path) -> None:
    token = tmp_path / "metrics-token"
    token.write_text("the-token-of-prometheus\n")
    token.chmod(0o600)
    with Globus() as globus:
        client, scope = globus.add_facility()
        crew = "dabd2bdc-1af3-4aa8-bd21-8ffae4d4a0b4"
        ada, bob = globus.add_person("ada@example.org", groups=[crew]), globus.add_person("bob@example.org")
        secret = tmp_path / "secret"
        secret.write_text(str(client.secret))
        secret.chmod(0o600)
        more = f'administrators = ["urn:globus:groups:id:{crew}"]\n[globus]\nclient_id = "{client.id}"\n'
        more += f'client_secret_file = "{secret}"\n[service]\nmetrics_token_file = "{token}"\n'
        with serving(tmp_path, "aps", more=more, environment=globus.environment) as served:
            tokens: Mapping[str, tuple[int, int]] = {
                "guess": (401, 401),
                globus.mint(bob, scope): (403, 200),
                globus.mint(ada, scope): (200, 200),
                "the-token-of-prometheus": (200, 401),
            }
            for one, (metrics, streams) in tokens.items():
                headers = {"Authorization": f"Bearer {one}"}
                for path, status in (("/metrics", metrics), ("/streams", streams)):
                    assert httpx.get(served.url + path, headers=headers, timeout=30).status_code == status
            refused = httpx.get(served.url + "/metrics", timeout=30)
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"].startswith("Bearer")
    assert "the-token-of-prometheus" not in served.log.read_text()


def test_a_token_file_that_others_can_read_is_refused_at_the_start(tmp_path: Path, state_base: Path) -> None:
    token = tmp_path / "metrics-token"
    token.write_text("open")
    token.chmod(0o644)
    file = tmp_path / "aps.toml"
    file.write_text(f'[facility]\nname = "aps"\n{LOCAL}[service]\nmetrics_token_file = "{token}"\n')
    config = load_facility("aps", file=file, state_dir=state_base / "aps")
    for use in (metrics_token, serve):
        with pytest.raises(ConfigError, match="not a file of this user alone"):
            use(config)


# --- a gateway that hangs


def test_a_gateway_that_hangs_does_not_hang_the_figures(tmp_path: Path, within: Within) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        gateway = f'{LOCAL}[[gateway]]\nname = "far"\nkind = "ssh"\nhost = "127.0.0.1"\nport = {port}\n'
        gateway += 'connect_timeout_s = 60\nwan_bind = "127.0.0.1"\nlan_bind = "127.0.0.1"\n'
        with serving(tmp_path, "aps", gateway=gateway, more=ADMINISTRATED) as served:
            caller = Caller(served, served.token)
            answer = caller.ask("GET", "/metrics", timeout=30)  # of the 60 s that the gateway takes
            seen = figures(answer.raise_for_status().text)
            assert seen['scistream_info{facility="aps",version="0.1.0"}'] == 1
            assert "scistream_look_age_seconds" not in seen  # nothing was seen yet
            silent.close()  # whoever waits is told so now
            answers = {
                f'scistream_gateway_answers{{gateway="{name}"}}': up
                for name, up in (("local", 1), ("far", 0))
            }
            assert "scistream_look_age_seconds" in until(caller, within, figures=answers)
            caller.close()
