"""Policy: pure functions over a request, the configuration and what is in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scistream_flows import policy
from scistream_flows.config import FacilityConfig, GatewayConfig, Policy
from scistream_flows.errors import BadRequest, CapacityExhausted, NotSupported, PolicyDenied, PortsExhausted
from scistream_flows.models import Peer, Request
from scistream_flows.policy import Usage

KEY = "A" * 43


def gateway(name: str = "gw1", **changes: Any) -> GatewayConfig:
    return GatewayConfig.model_validate(
        {"name": name, "wan_bind": "192.0.2.10", "lan_bind": "10.0.0.10", "port_range": "5100-5109"} | changes
    )


def facility(*gateways: GatewayConfig, **changes: Any) -> FacilityConfig:
    return FacilityConfig(
        name="aps",
        gateways=gateways or (gateway(),),
        policy=Policy.model_validate(changes),
        state_dir=Path("/nowhere"),
    )


def request(**changes: Any) -> Request:
    return Request.model_validate({"uid": "s", "role": "PROD"} | changes)


@pytest.mark.parametrize(
    ("asked", "limit"),
    [
        ({"lease_s": 61}, {"longest_lease_s": 60}),
        ({"lifetime_s": 3601}, {"longest_lifetime_s": 3600}),
        ({"hello_timeout_s": 181}, {"longest_hello_timeout_s": 180}),
        ({"num_conn": 5}, {"max_num_conn": 4}),
        ({"max_connections": 65}, {"max_connections": 64}),
    ],
    ids=str,
)
def test_what_is_above_a_limit_is_denied_with_the_limit(asked: dict[str, int], limit: dict[str, int]) -> None:
    with pytest.raises(PolicyDenied, match=f"Ask for {next(iter(limit.values()))} at most"):
        policy.admit(request(**asked), facility(**limit))
    policy.admit(request(**{name: value - 1 for name, value in asked.items()}), facility(**limit))


def test_a_mode_that_is_not_allowed_is_denied_with_those_that_are() -> None:
    with pytest.raises(PolicyDenied, match="Allowed: tls, auth"):
        policy.admit(request(mode="none"), facility())


def test_dialling_from_prod_is_not_supported_yet() -> None:
    with pytest.raises(NotSupported, match="not supported yet"):
        policy.admit(request(dial="prod"), facility())


@pytest.mark.parametrize(
    ("address", "rules"),
    [
        ("10.1.2.3:5000", ["10.0.0.0/8"]),
        ("10.1.2.3:5000", ["10.0.0.0/8:5000"]),
        ("10.1.2.3:5001", ["10.0.0.0/8:5000-6000"]),
        ("11.1.2.3:5000", ["10.0.0.0/8", "11.0.0.0/8:5000"]),
        ("[2001:db8::1]:80", ["[2001:db8::/32]:80"]),
        ("[2001:db8::1]:80", ["2001:db8::/32"]),
        ("127.0.0.1:80", ["127.0.0.0/8"]),
        ("127.0.0.1:80", ["127.0.0.1/32:80"]),
        ("[::1]:80", ["[::1/128]:80"]),
        ("169.254.169.254:80", ["169.254.169.254/32"]),
        ("192.0.2.10:22", ["192.0.2.10/32:22"]),
    ],
)
def test_an_address_is_admitted_by_an_entry_that_covers_it(address: str, rules: list[str]) -> None:
    policy.admit_address(address, kind="targets", facility=facility(targets=rules))


# What means something to the gateway itself (loopback, metadata, its own addresses) must be listed itself.
@pytest.mark.parametrize(
    ("address", "rules"),
    [
        ("10.1.2.3:5001", ["10.0.0.0/8:5000"]),
        ("11.1.2.3:5000", ["10.0.0.0/8"]),
        ("10.1.2.3:5000", []),
        ("[2001:db8::1]:80", ["0.0.0.0/0"]),
        ("127.0.0.1:80", ["0.0.0.0/0"]),
        ("[::1]:80", ["::/0"]),
        ("[::ffff:127.0.0.1]:80", ["::/0", "0.0.0.0/0"]),
        ("169.254.169.254:80", ["0.0.0.0/0"]),
        ("[fd00:ec2::254]:80", ["fc00::/7"]),
        ("[fe80::1]:80", ["::/0"]),
        ("0.0.0.0:80", ["0.0.0.0/0"]),
        ("[::]:80", ["::/0"]),
        ("224.0.0.1:80", ["0.0.0.0/0"]),
        ("255.255.255.255:80", ["0.0.0.0/0"]),
        ("192.0.2.10:22", ["192.0.2.0/24"]),
        ("10.0.0.10:22", ["10.0.0.0/8"]),
    ],
)
def test_an_address_that_no_entry_covers_is_denied(address: str, rules: list[str]) -> None:
    with pytest.raises(PolicyDenied, match=r"does not allow .+ in targets"):
        policy.admit_address(address, kind="targets", facility=facility(targets=rules))


def test_targets_and_peers_are_lists_of_their_own() -> None:
    where = facility(targets=["10.0.0.0/8"])
    with pytest.raises(PolicyDenied, match="Allowed peers: none"):
        policy.admit_address("10.1.1.1:1", kind="peers", facility=where)


def test_consumers_are_admitted_within_the_facilitys_networks() -> None:
    where = facility(consumers=["10.0.0.0/8", "2001:db8::/32"])
    policy.admit_consumers(["10.1.0.0/16", "2001:db8::7/128"], where)
    for wide in ("0.0.0.0/0", "11.0.0.1/32", "::/0"):
        with pytest.raises(PolicyDenied):
            policy.admit_consumers([wide], where)


def test_loopback_is_the_default_consumer_only_where_the_policy_has_it() -> None:
    assert policy.default_consumers(facility()) == []
    assert policy.default_consumers(facility(consumers=["127.0.0.0/8", "::1/128"])) == [
        "127.0.0.0/8",
        "::1/128",
    ]


def test_a_peer_of_mode_none_needs_an_allowed_source() -> None:
    where = facility(peers=["192.0.2.0/24"])
    policy.admit_peers([Peer(public_key=KEY)], "tls", where)
    policy.admit_peers([Peer(public_key=KEY, source_addresses=["192.0.2.7/32"])], "none", where)
    with pytest.raises(BadRequest, match="needs source_addresses"):
        policy.admit_peers([Peer(public_key=KEY)], "none", where)
    with pytest.raises(PolicyDenied, match=r"0\.0\.0\.0/0 in peers"):
        policy.admit_peers([Peer(public_key=KEY, source_addresses=["0.0.0.0/0"])], "none", where)


def test_an_owner_has_no_more_streams_than_the_limit() -> None:
    where = facility(max_streams_per_owner=2)
    policy.place(request(), where, Usage(streams_of_owner=1))
    with pytest.raises(PolicyDenied, match="the limit is 2"):
        policy.place(request(), where, Usage(streams_of_owner=2))


def test_listeners_need_ports_and_the_message_says_how_many_are_free() -> None:
    usage = Usage(listeners={"gw1": 8})
    policy.place(request(num_conn=2), facility(), usage)
    with pytest.raises(PortsExhausted, match="num_conn=2 at most"):
        policy.place(request(num_conn=3), facility(), usage)


def test_a_reserved_rate_is_admitted_only_while_the_capacity_lasts() -> None:
    where = facility(gateway(capacity_mbits_per_s=1000))
    usage = Usage(reserved_mbits_per_s={"gw1": 900})
    policy.place(request(rate_mbits_per_s=100), where, usage)
    policy.place(request(rate_mbits_per_s=0), where, usage)
    policy.place(request(rate_mbits_per_s=9999, reserve_rate=False), where, usage)
    with pytest.raises(CapacityExhausted, match="100 Mbit/s are free") as caught:
        policy.place(request(rate_mbits_per_s=101), where, usage)
    assert caught.value.details["free_mbits_per_s"] == 100


def test_the_gateway_with_most_room_is_taken() -> None:
    where = facility(gateway("small", capacity_mbits_per_s=100), gateway("large", capacity_mbits_per_s=1000))
    assert placed(where) == ["large"]
    assert placed(where, Usage(reserved_mbits_per_s={"large": 950})) == ["small"]
    assert placed(where, Usage(listeners={"large": 10})) == ["small"]


def placed(where: FacilityConfig, usage: Usage | None = None, **asked: Any) -> list[str]:
    return [share.gateway for share in policy.place(request(**asked), where, usage or Usage())]


def test_of_gateways_with_as_much_capacity_free_the_one_with_most_connections_free_is_taken() -> None:
    where = facility(gateway("gw1", connection_budget=100), gateway("gw2", connection_budget=100))
    assert placed(where, Usage(connections={"gw1": 10, "gw2": 20})) == ["gw1"]
    assert placed(where, Usage(connections={"gw1": 30, "gw2": 20})) == ["gw2"]
    assert placed(where, Usage(connections={"gw1": 90, "gw2": 36})) == ["gw2"]


def test_connections_are_admitted_only_while_the_budget_lasts() -> None:
    where = facility(gateway(connection_budget=100))
    policy.place(request(num_conn=2, max_connections=50), where, Usage())
    with pytest.raises(CapacityExhausted, match=r"take 100 connections more.* 99 are free") as caught:
        policy.place(request(num_conn=2, max_connections=50), where, Usage(connections={"gw1": 1}))
    assert caught.value.details["free_connections"] == 99


def test_a_full_pipe_budget_is_avoided_and_never_refused() -> None:
    where = facility(
        gateway("fast", capacity_mbits_per_s=9000, pipe_budget_mib=8), gateway("slow", capacity_mbits_per_s=1)
    )
    assert placed(where, num_conn=4) == ["fast"]
    assert placed(where, num_conn=5) == ["slow"]
    assert placed(where, Usage(listeners={"fast": 1}), num_conn=4) == ["slow"]
    assert placed(where, Usage(listeners={"fast": 1}), num_conn=4, rate_mbits_per_s=100) == ["fast"]
    uncounted = facility(
        gateway("fast", capacity_mbits_per_s=9000, pipe_budget_mib=0), gateway("slow", capacity_mbits_per_s=1)
    )
    assert placed(uncounted, num_conn=10) == ["fast"]


def test_a_draining_gateway_takes_no_new_stream() -> None:
    where = facility(gateway("gw1"), gateway("gw2"))
    assert placed(where, Usage(draining=frozenset({"gw1"}))) == ["gw2"]
    with pytest.raises(CapacityExhausted, match=r"every gateway of facility aps is draining.*: gw1, gw2"):
        placed(where, Usage(draining=frozenset({"gw1", "gw2"})))
    with pytest.raises(
        CapacityExhausted, match=r"has 1 to use; draining for maintenance: gw2.*gateways=1 at most"
    ):
        placed(where, Usage(draining=frozenset({"gw2"})), num_conn=2, gateways=2)


def test_a_spread_stream_has_listener_i_on_the_i_mod_nth_of_different_gateways() -> None:
    where = facility(*(gateway(f"gw{number}") for number in range(4)))
    shares = policy.place(
        request(num_conn=8, gateways=3, rate_mbits_per_s=100, max_connections=5), where, Usage()
    )
    assert [share.indices for share in shares] == [(0, 3, 6), (1, 4, 7), (2, 5)]
    assert len({share.gateway for share in shares}) == 3
    assert [share.connections for share in shares] == [15, 15, 10]
    assert [share.reserved_mbits_per_s for share in shares] == [38, 38, 25]


def test_more_gateways_than_there_are_cannot_be_had() -> None:
    with pytest.raises(
        CapacityExhausted, match="2 gateways were asked for, facility aps has 1 to use"
    ) as caught:
        placed(facility(), num_conn=2, gateways=2)
    assert "gateways=1 at most" in str(caught.value)


@pytest.mark.parametrize(
    ("tables", "usage", "asked", "words"),
    [
        ({}, Usage(listeners={"gw2": 9}), {"num_conn": 4}, "fewer than 2 gateways of facility aps have 2 ports"),
        ({"capacity_mbits_per_s": 100}, Usage(reserved_mbits_per_s={"gw1": 60}),
         {"num_conn": 2, "rate_mbits_per_s": 99},
         "can carry 50 Mbit/s more. 40 Mbit/s are free on each of them"),
        ({"connection_budget": 100}, Usage(connections={"gw1": 60}), {"num_conn": 2, "max_connections": 41},
         "can take 41 connections more. 40 are free on each of them"),
    ],
    ids=["ports", "rate", "connections"],
)  # fmt: skip
def test_a_share_that_finds_no_room_is_refused_with_what_is_free(
    tables: dict[str, int], usage: Usage, asked: dict[str, Any], words: str
) -> None:
    where = facility(gateway("gw1", **tables), gateway("gw2", **tables))
    placed(where, gateways=2, **asked)
    with pytest.raises(CapacityExhausted) as caught:
        placed(where, usage, gateways=2, **asked)
    assert words in str(caught.value)


def test_the_larger_share_goes_where_it_fits() -> None:
    where = facility(
        gateway("wide", port_range="5100-5101"), gateway("narrow", port_range="5100", capacity_mbits_per_s=0)
    )
    assert placed(where, num_conn=3, gateways=2) == ["wide", "narrow"]
    awkward = facility(
        gateway("ports", connection_budget=64),
        gateway("connections", port_range="5100", connection_budget=9000),
    )
    with pytest.raises(CapacityExhausted, match="ports, rate and connections free at once for 3 listeners"):
        placed(awkward, num_conn=3, gateways=2)


@pytest.mark.parametrize("num_conn", [1, 2, 3, 7, 8, 16])
@pytest.mark.parametrize("gateways", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("rate", [0, 16, 17, 100, 999, 10_000])
def test_the_shares_of_a_rate_add_up_to_it_and_are_within_what_is_booked(
    num_conn: int, gateways: int, rate: int
) -> None:
    gateways = min(gateways, num_conn)
    where = facility(*(gateway(f"gw{number}", port_range="0") for number in range(gateways)))
    shares = policy.place(
        request(num_conn=num_conn, gateways=gateways, rate_mbits_per_s=rate), where, Usage()
    )
    enforced = [
        policy.share_of_rate(rate, share.indices, num_conn=num_conn, gateways=gateways) for share in shares
    ]
    assert sum(enforced) == rate
    assert all(share.reserved_mbits_per_s >= part for share, part in zip(shares, enforced, strict=True))


def test_no_share_of_a_rate_is_none_at_all() -> None:
    assert [policy.share_of_rate(1, (number,), num_conn=3, gateways=3) for number in range(3)] == [1, 1, 1]


def test_an_owner_reserves_no_more_than_the_limit() -> None:
    where = facility(max_reserved_mbits_per_s_per_owner=1000)
    usage = Usage(reserved_of_owner_mbits_per_s=900)
    policy.place(request(rate_mbits_per_s=100), where, usage)
    policy.place(request(rate_mbits_per_s=101, reserve_rate=False), where, usage)
    with pytest.raises(
        PolicyDenied, match=r"900 Mbit/s reserved.* with 101 more the limit of 1000 is passed"
    ):
        policy.place(request(rate_mbits_per_s=101), where, usage)


ME = "urn:scistream:unix:1000@here"


@pytest.mark.parametrize(
    ("users", "caller", "admitted"),
    [
        (None, (ME,), True),
        (None, ("urn:a",), False),
        (["urn:a"], ("urn:a",), True),
        (["urn:group"], ("urn:a", "urn:linked", "urn:group"), True),
        (["urn:a"], (ME,), False),
        ([], (ME,), False),
        (["all_authenticated_users"], ("urn:a",), True),
    ],
    ids=str,
)
def test_who_may_open_streams(users: list[str] | None, caller: tuple[str, ...], *, admitted: bool) -> None:
    where = facility(users=users)
    if admitted:
        policy.admit_user(caller, where, service=ME)
    else:
        with pytest.raises(PolicyDenied, match=f"^{caller[0]} may not open streams.*policy.users in"):
            policy.admit_user(caller, where, service=ME)


def test_rights_belong_to_owner_managers_and_for_seeing_monitors() -> None:
    stream = {"owner": "urn:a", "managers": ["urn:b", "urn:group"], "monitors": ["urn:c"]}
    for right, caller, allowed in (
        ("manage", ["urn:a"], True),
        ("manage", ["urn:x", "urn:group"], True),
        ("manage", ["urn:c"], False),
        ("monitor", ["urn:c"], True),
        ("monitor", ["urn:x"], False),
        ("monitor", [], False),
    ):
        assert policy.allows(right, caller=caller, **stream) is allowed  # type: ignore[arg-type]


def test_an_address_with_a_zone_is_no_way_round_what_is_denied() -> None:
    """The kernel ignores the zone of a routed address, so that it would reach the gateway itself."""
    site = facility(gateway(wan_bind="2001:db8::10"), targets=["[::/0]"])
    for address in ("[2001:db8::10]:22", "[2001:db8::10%1]:22"):
        with pytest.raises(PolicyDenied):
            policy.admit_address(address, kind="targets", facility=site)
    with pytest.raises(ValueError, match="neither an IP address nor a host name"):
        Request(uid="s", role="PROD", targets=["[2001:db8::10%1]:22"])
    with pytest.raises(ValueError, match="not an IP address or a network"):
        Request(uid="s", role="CONS", consumers=["2001:db8::10%1"])
