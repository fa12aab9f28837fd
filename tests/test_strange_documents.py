"""What users and strangers say to the control plane, chosen by Hypothesis: it is answered, or refused in words."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scistream_flows import policy
from scistream_flows.config import load_facility
from scistream_flows.doorway import LONGEST_QUESTION_BYTES, serve_socket
from scistream_flows.errors import ConfigError, PolicyDenied, ScistreamError
from scistream_flows.models import Offer, TicketHello, read, split_address
from scistream_flows.s2cs import S2CS, VERBS

TICKET: Final = "A" * 43
FACILITY: Final = """
[facility]
name = "aps"

[[gateway]]
name = "local"
wan_bind = "127.0.0.1"
lan_bind = "127.0.0.1"
port_range = "5100-5200"

[policy]
targets = ["127.0.0.0/8", "[::1/128]:1-1000"]
users = ["all_authenticated_users"]

[[policy.quota]]
users = ["urn:globus:auth:identity:00000000-0000-4000-8000-00000000000a"]
max_num_conn = 3

[service]
socket = "/run/scistream/aps/socket"
"""
# What has broken parsers before, beside what Hypothesis makes up.
HOSTILE: Final = [
    "", "\0", "\ud800", "s\n", "../../etc/passwd", "a" * 5000, "127.0.0.1:99999", "[::1]:0", "[::1%eth0]:80",
    "0177.0.0.1:80", "http://127.0.0.1/", "127.0.0.1:80\n", "::ffff:127.0.0.1", "0.0.0.0/0",
    "urn:globus:auth:identity:", "PROD ", -1, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), True, None,
    [], {}, [[]], {"": None}, "\u0663", "\U0001d7d9", "\uff11\uff12\uff17.0.0.1:80",
]  # fmt: skip

values = st.recursive(
    st.sampled_from(HOSTILE) | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
offer: dict[str, Any] = {
    "protocol": 1, "uid": "s", "role": "PROD", "mode": "tls", "dial": "cons", "lease_remaining_s": 60.0,
    "relays": [{
        "relay_id": "0" * 32, "gateway": "gw", "public_key": TICKET, "dial_addresses": [],
        "listeners": [{"index": 0, "address": "127.0.0.1:5100"}],
    }],
}  # fmt: skip
base: dict[str, Any] = {
    "protocol": 1, "uid": "s", "role": "PROD", "targets": ["127.0.0.1:9"], "num_conn": 1, "mode": "tls", "lease_s": 60,
    "lifetime_s": 600, "offer": offer, "peers": offer, "networks": ["127.0.0.1"], "ticket": TICKET,
    "monitors": ["urn:test:bob"],
}  # fmt: skip


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Some fields as they should be, some not, at any depth, and perhaps one that nobody knows."""
    document = {key: base[key] for key in draw(st.sets(st.sampled_from(sorted(base))))}
    document |= {"protocol": 1, "uid": "s", "role": draw(st.sampled_from(["PROD", "CONS"]))}
    for key in draw(st.sets(st.sampled_from([*base, "owner", "until", "rate_mbits_per_s", "x"]), max_size=3)):
        document[key] = draw(values)
    if draw(st.booleans()) and isinstance(document.get("offer"), dict):
        relay = offer["relays"][0] | {
            draw(st.sampled_from(["relay_id", "public_key", "listeners"])): draw(values)
        }
        document["offer"] = offer | {"relays": [relay]}
    return document


often = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


@pytest.fixture
def service(facility: Callable[..., S2CS]) -> Iterator[S2CS]:
    """A facility with one stream, `s`; whatever else the test has opened is released."""
    service = facility()
    service.request({"protocol": 1, "uid": "s", "role": "PROD", "targets": ["127.0.0.1:9"]})
    yield service
    for stream in service.list({"protocol": 1}).streams:
        service.release({"protocol": 1, "uid": stream.uid, "role": stream.role})


def is_answer(said: dict[str, Any]) -> None:
    """It is one of the two forms of docs/architecture.md, and JSON."""
    json.loads(json.dumps(said, allow_nan=False))
    if said["ok"]:
        assert set(said) == {"protocol", "ok", "value"}
    else:
        assert {"code", "message", "which", "hint"} <= set(said["error"])


@often
@given(verb=st.sampled_from([*VERBS, "close", "__init__", "answer"]), document=documents())
def test_any_document_is_answered_or_refused_in_words(
    service: S2CS, verb: str, document: dict[str, Any]
) -> None:
    is_answer(service.answer(verb, document))
    with contextlib.suppress(ValueError):  # as text it is the same
        is_answer(service.answer("status", json.dumps(document)))


@often
@given(verb=st.sampled_from(VERBS), text=st.text(max_size=60) | st.just("[" * 100_000) | st.just("1" * 5000))
def test_any_text_is_answered_or_refused_in_words(service: S2CS, verb: str, text: str) -> None:
    is_answer(service.answer(verb, text))


@often
@given(
    document=st.fixed_dictionaries(
        {"protocol": st.just(1), "ticket": st.just(TICKET) | values},
        optional={"targets": values, "x": values},
    ),
    address=st.sampled_from(["", "127.0.0.1", "::1", "testclient", "fe80::1%eth0"]),
)
def test_no_hello_with_a_ticket_is_let_in_by_a_strange_one(
    service: S2CS, document: dict[str, Any], address: str
) -> None:
    with pytest.raises(ScistreamError) as refused:
        service.hello_by_ticket(document, caller_address=address)
    json.dumps(refused.value.to_document(), allow_nan=False)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a facility that serves it."""
    folder = tmp_path_factory.mktemp("door")
    file = folder / "aps.toml"
    file.write_text(FACILITY.replace("/run/scistream/aps", str(folder / "served")))
    with serve_socket(load_facility("aps", file=file, state_dir=folder / "state", environment={})) as path:
        assert path is not None
        yield path


@often
@given(
    line=st.binary(max_size=80)
    | st.sampled_from([b"[" * 100_000, b"x" * (LONGEST_QUESTION_BYTES + 10), b"\xff\xfe{}", b"1" * 5000])
    | st.fixed_dictionaries(
        {
            "protocol": st.just(1) | values,
            "verb": st.sampled_from(["list", "status"]) | values,
            "document": documents() | values,
        }
    ).map(lambda asked: json.dumps(asked).encode())
)
def test_any_line_at_the_socket_is_answered_with_one_line(door: Path, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(door))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(line.replace(b"\n", b" ") + b"\n")
            connection.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                said += piece
    if said:  # a reset may take an answer along that came before all was read
        is_answer(json.loads(said))
        assert said.count(b"\n") == 1
        assert b"RecursionError" not in said
        assert b"Traceback" not in said


@often
@given(data=st.data())
def test_any_facility_toml_is_a_facility_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Lines lost, doubled, exchanged, and values of another kind."""
    lines = FACILITY.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        key = lines[at].partition(" = ")[0]
        strange = [
            "-1",
            "1e999",
            "nan",
            '"\\u0000"',
            "[[[]]]",
            "{}",
            "2026-01-01",
            '""',
            "'" + "x" * 5000 + "'",
            "[" * 2000,
            "true",
        ]
        lines[at] = data.draw(
            st.sampled_from(["", lines[at - 1], *(f"{key} = {value}" for value in strange)])
            | st.text(max_size=30)
        )
    file = tmp_path_factory.getbasetemp() / "strange.toml"
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    said = None
    try:
        assert load_facility("aps", file=file, environment={}).name == "aps"
    except ConfigError as wrong:
        said = json.dumps(wrong.to_document(), allow_nan=False)
    assert said is None or file.name in said


@often
@given(
    address=st.builds(
        "{}:{}".format, st.ip_addresses(v=4) | st.ip_addresses(v=6).map("[{}]".format), st.integers(0, 70_000)
    )
    | st.sampled_from([one for one in HOSTILE if isinstance(one, str)])
    | st.text(max_size=30),
    kind=st.sampled_from(["targets", "peers"]),
)
def test_an_address_is_admitted_only_within_the_allow_list(door: Path, address: str, kind: Any) -> None:
    """Whatever it looks like: what is admitted is within 127.0.0.0/8, or ::1 with a small port."""
    facility = load_facility("aps", file=door.parent.parent / "aps.toml", environment={})
    try:
        policy.admit_address(address, kind=kind, facility=facility)
    except (PolicyDenied, ValueError):
        return
    assert kind == "targets"
    host, port = split_address(address)
    ip = ipaddress.ip_address(host)
    assert ip in ipaddress.ip_network("127.0.0.0/8") or (ip == ipaddress.ip_address("::1") and port <= 1000)


@often
@given(document=values | documents())
def test_any_value_is_a_document_or_a_refusal(document: Any) -> None:
    for model in (Offer, TicketHello):
        with contextlib.suppress(ScistreamError):
            read(model, document)
