"""Documents: requests are exact, answers are read with patience, protocols are compared first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from scistream_flows import models
from scistream_flows.errors import BadRequest, ProtocolMismatch, RelayError
from scistream_flows.models import Offer, Request, Status, join_address, read, split_address

SCHEMAS = Path(__file__).parent / "schemas"
KEY = "A" * 43


def offer(**changes: Any) -> dict[str, Any]:
    relay = {
        "relay_id": "0" * 32,
        "gateway": "gw",
        "public_key": KEY,
        "dial_addresses": [],
        "listeners": [{"index": 0, "address": "192.0.2.1:5100"}],
    }
    document = {
        "protocol": 1, "uid": "s", "role": "PROD", "mode": "tls", "dial": "cons", "lease_remaining_s": 60.0,
        "relays": [relay],
    }  # fmt: skip
    return document | changes


def request(**changes: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": "s", "role": "PROD"} | changes


def refusal(document: dict[str, Any] | str | bytes) -> str:
    with pytest.raises(BadRequest) as caught:
        read(Request, document)
    return str(caught.value)


def test_the_smallest_request_has_the_documented_defaults() -> None:
    small = read(Request, request())
    assert (small.mode, small.num_conn, small.rate_mbits_per_s, small.dial) == ("tls", 1, 0, "cons")
    assert (small.lease_s, small.lifetime_s, small.hello_timeout_s) == (60, 86_400, 180)
    assert (small.until, small.linger_s, small.probe, small.max_connections) == ("closed", 5, "target", 64)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"uid": "../etc/passwd"}, "uid"),
        ({"uid": ""}, "uid"),
        ({"uid": "-x"}, "uid"),
        ({"uid": "x" * 65}, "uid"),
        ({"uid": "x\n"}, "uid"),
        ({"uid": 7}, "uid"),
        ({"role": "prod"}, "role"),
        ({"mode": "ssl"}, "mode"),
        ({"num_conn": 0}, "num_conn"),
        ({"num_conn": 257}, "num_conn"),
        ({"num_conn": "5"}, "num_conn"),
        ({"num_conn": True}, "num_conn"),
        ({"gateways": 0}, "gateways"),
        ({"num_conn": 32, "gateways": 17}, "gateways"),
        ({"num_conn": 2, "gateways": 3}, "gateways"),
        ({"rate_mbits_per_s": -1}, "rate_mbits_per_s"),
        ({"lease_s": 0}, "lease_s"),
        ({"lease_s": 1e9}, "lease_s"),
        ({"targets": ["example.org"]}, "targets.0"),
        ({"targets": ["example.org:0"]}, "targets.0"),
        ({"targets": ["example.org:65536"]}, "targets.0"),
        ({"targets": ["2001:db8::1:5000"]}, "targets.0"),
        ({"targets": ["[2001:db8::1]"]}, "targets.0"),
        ({"targets": ["1.2.3:80"]}, "targets.0"),
        ({"targets": ["a b:80"]}, "targets.0"),
        ({"targets": ["ok:80", "exec = /bin/sh:80"]}, "targets.1"),
        ({"targets": "localhost:80"}, "targets"),
        ({"managers": ["me"]}, "managers.0"),
        ({"consumers": ["10.0.0.0/8"]}, "consumers"),
        ({"role": "CONS"}, "offer"),
        ({"role": "CONS", "offer": offer(), "targets": ["a:1"]}, "targets"),
        ({"role": "CONS", "offer": offer(), "consumers": ["10.0.0.0/33"]}, "consumers.0"),
        ({"role": "CONS", "offer": offer(mode="none")}, "offer.mode"),
        ({"role": "CONS", "offer": offer(uid="other")}, "offer.uid"),
        ({"role": "CONS", "offer": offer(role="CONS")}, "offer.role"),
        ({"role": "CONS", "offer": offer(relays=[])}, "offer.relays"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_each_mistake_in_a_request_is_named(changes: dict[str, Any], field: str) -> None:
    assert f"{field}: " in refusal(request(**changes))


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    assert "hunter2" not in refusal(request(num_conn="hunter2"))


@pytest.mark.parametrize(
    "document", ["", "[", "[]", "null", "7", '"x"', "[" * 100_000, b"\xff\xfe"], ids=lambda d: repr(d)[:9]
)
def test_what_is_no_json_object_is_a_bad_request(document: str | bytes) -> None:
    refusal(document)


@pytest.mark.parametrize("protocol", [2, 0, None, "1", True, 1.5, [1]], ids=str)
def test_another_protocol_is_a_mismatch_that_names_both(protocol: object) -> None:
    with pytest.raises(ProtocolMismatch, match=r"this side speaks 1") as caught:
        read(Request, request(protocol=protocol, unknown_field_of_the_future=1))
    assert caught.value.ours == 1
    assert caught.value.theirs == (protocol if isinstance(protocol, int) else None)


def test_a_document_without_protocol_is_a_mismatch() -> None:
    with pytest.raises(ProtocolMismatch, match="none"):
        read(Request, {"uid": "s", "role": "PROD"})


def test_the_protocol_of_the_offer_within_a_request_is_compared_too() -> None:
    with pytest.raises(ProtocolMismatch, match="Offer carries protocol 2"):
        read(Request, request(role="CONS", offer=offer(protocol=2)))


def test_answers_are_read_although_they_say_more_than_we_know() -> None:
    newer = offer(news=1)
    newer["relays"][0]["news"] = 2
    assert read(Offer, newer).addresses == ["192.0.2.1:5100"]


def test_a_wrong_answer_raises_the_class_that_its_reader_chose() -> None:
    with pytest.raises(RelayError):
        read(Offer, {"protocol": 1}, error=RelayError)


def test_listeners_of_several_relays_come_in_the_order_of_their_index() -> None:
    two = offer()
    two["relays"] = [
        two["relays"][0] | {"listeners": [{"index": 1, "address": "192.0.2.1:5101"}]},
        two["relays"][0] | {"listeners": [{"index": 0, "address": "[2001:DB8:0::1]:5100"}]},
    ]
    assert read(Offer, two).addresses == ["[2001:db8::1]:5100", "192.0.2.1:5101"]


def test_a_listener_of_both_ip_versions_is_one_address_of_the_offer() -> None:
    both = {"index": 0, "address": "192.0.2.1:5100", "also": ["[2001:db8::1]:5100"]}
    read_offer = read(Offer, offer(relays=[offer()["relays"][0] | {"listeners": [both]}]))
    assert read_offer.addresses == ["192.0.2.1:5100"]
    assert read_offer.relays[0].listeners[0].also == ["[2001:db8::1]:5100"]
    assert read(Offer, offer()).relays[0].listeners[0].also == []


def test_listeners_are_numbers_never_names() -> None:
    with pytest.raises(BadRequest, match="not a numeric IP address"):
        read(
            Offer, offer(relays=[offer()["relays"][0] | {"listeners": [{"index": 0, "address": "gw:5100"}]}])
        )


def test_requests_that_ask_for_the_same_do_not_differ() -> None:
    one = read(Request, request(role="CONS", offer=offer(), managers=["urn:b", "urn:a"]))
    two = read(Request, request(role="CONS", offer=offer(lease_remaining_s=3.5), managers=["urn:a", "urn:b"]))
    assert one.differences(two) == []


def test_differences_name_each_field() -> None:
    one = read(Request, request())
    assert one.differences(read(Request, request(num_conn=2, mode="auth"))) == ["num_conn", "mode"]


def test_a_target_is_written_in_one_way() -> None:
    asked = read(Request, request(targets=["LocalHost:80", "[::FFFF:10.0.0.1]:80", "[0:0::1]:9"]))
    assert asked.targets == ["localhost:80", "10.0.0.1:80", "[::1]:9"]


@given(st.ip_addresses(), st.integers(1, 65_535))
def test_an_address_survives_joining_and_splitting(ip: object, port: int) -> None:
    assert split_address(join_address(str(ip), port)) == (str(ip), port)


@given(st.text(max_size=80))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        host, port = split_address(text)
    except ValueError:
        return
    assert host
    assert 1 <= port <= 65_535


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["uid", "relays", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Request.model_fields, "x"]), json_values))
def test_any_object_is_a_request_or_a_typed_refusal(document: dict[str, Any]) -> None:
    try:
        read(Request, {"uid": "s", "role": "PROD", **document, "protocol": 1})
    except (BadRequest, ProtocolMismatch) as refused:
        json.dumps(refused.to_document())


def test_documents_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read(Request, request()).num_conn = 5


def test_a_side_that_has_finished_counts_as_having_been_ready() -> None:
    side = {"protocol": 1, "uid": "s", "role": "PROD", "owner": "urn:a", "mode": "tls"}
    assert read(Status, side | {"state": "ENDED", "reason": "finished"}).ready
    assert not read(Status, side | {"state": "ENDED", "reason": "lease_expired"}).ready


DOCUMENTS: list[type[BaseModel]] = [
    *(
        models.Request,
        models.Hello,
        models.TicketRequest,
        models.TicketHello,
        models.Update,
        models.StatusQuery,
        models.Renewal,
        models.Release,
        models.ListQuery,
    ),
    *(models.Offer, models.Ticket, models.Status, models.Released, models.Listing),
    *(models.GatewayReport, models.GatewayListing),
    *(models.RelayReady, models.RelayFailed, models.RelayStatus, models.RelayList),
]


@pytest.mark.parametrize("model", DOCUMENTS, ids=lambda model: model.__name__)
def test_the_schema_is_the_committed_one(model: type[BaseModel]) -> None:
    # A change here is a change of the interface: docs/architecture.md goes with it. SCISTREAM_WRITE_SCHEMAS=1 writes.
    file = SCHEMAS / f"{model.__name__}.json"
    schema = json.dumps(model.model_json_schema(), indent=1, sort_keys=True) + "\n"
    if os.environ.get("SCISTREAM_WRITE_SCHEMAS"):
        SCHEMAS.mkdir(exist_ok=True)
        file.write_text(schema)
    assert json.loads(file.read_text()) == json.loads(schema)
