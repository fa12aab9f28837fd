"""facility.toml < SCISTREAM_* environment < argument; each mistake with file, key and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from scistream_flows import config
from scistream_flows.config import FacilityConfig, PortRange, load_facility
from scistream_flows.errors import ConfigError

Load: TypeAlias = Callable[..., FacilityConfig]

SMALLEST = """
[facility]
name = "aps"
[[gateway]]
name = "gw1"
wan_bind = "192.0.2.10"
lan_bind = "10.0.0.10"
"""
BOTH = SMALLEST.replace('"192.0.2.10"', '["2001:db8::10", "192.0.2.10"]')
QUOTA = SMALLEST + '[[policy.quota]]\nusers = ["urn:x:bob"]\n'
ALICE = "urn:globus:auth:identity:46bd0f56-e24f-11e5-a510-131bef46955c"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "configuration"
    folder.mkdir()
    return folder


@pytest.fixture
def load(folder: Path, tmp_path: Path) -> Load:
    def load(
        text: str | None = SMALLEST, *, name: str = "aps", file: str = "aps.toml", **variables: str
    ) -> FacilityConfig:
        if text is not None:
            (folder / file).write_text(text)
        environment = {"SCISTREAM_CONFIG_DIR": str(folder), "SCISTREAM_STATE_DIR": str(tmp_path / "state")}
        return load_facility(name, environment=environment | variables)

    return load


def test_without_a_file_a_facility_is_a_development_one_on_loopback(load: Load, tmp_path: Path) -> None:
    facility = load(None, name="dev-6000")
    (gateway,) = facility.gateways
    assert (facility.name, facility.file, facility.state_dir) == (
        "dev-6000",
        None,
        tmp_path / "state" / "dev-6000",
    )
    assert (gateway.wan_bind, gateway.lan_bind, gateway.port_range) == (
        ("127.0.0.1",),
        ("127.0.0.1",),
        PortRange(0, 0),
    )
    assert list(map(str, facility.policy.targets)) == ["127.0.0.0/8", "[::1/128]"]
    assert facility.policy.modes == ["tls", "auth", "none"]


def test_the_smallest_file_allows_nothing_but_asks_for_little(load: Load, folder: Path) -> None:
    facility = load()
    assert facility.file == folder / "aps.toml"
    assert (facility.policy.targets, facility.policy.peers, facility.policy.consumers) == ([], [], [])
    assert "none" not in facility.policy.modes


def test_a_facility_toml_is_used_by_the_facility_it_names_only(load: Load) -> None:
    assert load(file="facility.toml").file is not None
    assert load(None, name="alcf").file is None


def test_the_environment_wins_over_the_file_and_an_argument_over_both(load: Load, folder: Path) -> None:
    text = SMALLEST + 'port_range = "5100-5200"\n[policy]\nmax_num_conn = 4\nmodes = ["tls"]\n'
    assert load(text).gateways[0].port_range == PortRange(5100, 5200)
    changed = load(
        text,
        SCISTREAM_PORT_RANGE="6000-6010",
        SCISTREAM_POLICY_MAX_NUM_CONN="9",
        SCISTREAM_POLICY_MODES='["auth"]',
    )
    assert (changed.gateways[0].port_range.size, changed.policy.max_num_conn, changed.policy.modes) == (
        11,
        9,
        ["auth"],
    )
    argued = load_facility(
        "aps",
        file=folder / "aps.toml",
        port_range="7000",
        state_dir="/x",
        environment={"SCISTREAM_PORT_RANGE": "1-2"},
    )
    assert (argued.gateways[0].port_range, argued.state_dir) == (PortRange(7000, 7000), Path("/x"))


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (SMALLEST.replace('"192.0.2.10"', '"gw.example.org"'), "gateway.0.wan_bind", "not a numeric IP address"),
        (SMALLEST + 'port_range = "5200-5100"', "gateway.0.port_range", "not a range such as"),
        (SMALLEST + 'port_range = "1-65536"', "gateway.0.port_range", "1 to 65535"),
        (SMALLEST + "port_range = [1, 2]", "gateway.0.port_range", "give a text such as"),
        (SMALLEST + 'kind = "rsh"', "gateway.0.kind", "'local' or 'ssh'"),
        (SMALLEST + 'colour = "red"', "gateway.0.colour", "allowed are name, kind, wan_bind"),
        (SMALLEST + "capacity_mbits_per_s = -1", "gateway.0.capacity_mbits_per_s", "greater than or equal to 0"),
        (SMALLEST.replace('"192.0.2.10"', '"0.0.0.0"'), "gateway.0.wan_advertise", "wan_bind takes every address"),
        (SMALLEST + SMALLEST[SMALLEST.index("[["):], "gateway", "two gateways have the name 'gw1'"),
        (SMALLEST.split("[[", maxsplit=1)[0], "gateway", "Field required"),
        (SMALLEST + "[policy]\nmodes = []", "policy.modes", "at least 1 item"),
        (SMALLEST + '[policy]\nmodes = ["ssl"]', "policy.modes.0", "'tls', 'auth' or 'none'"),
        (SMALLEST + '[policy]\ntargets = ["10.0.0.1/8"]', "policy.targets.0", "host bits set"),
        (SMALLEST + '[policy]\ntargets = ["10.0.0.0/8:0"]', "policy.targets.0", "NETWORK:PORTS"),
        (SMALLEST + '[policy]\nconsumers = ["10.0.0.0/8:80"]', "policy.consumers", "networks only"),
        (SMALLEST + '[policy]\nlongest_lease_s = "1h"', "policy.longest_lease_s", "valid integer"),
        (SMALLEST + "[polcy]\n", "polcy", "allowed are facility, gateway, policy"),
        (BOTH.replace("192.0.2.10", "2001:db8::11"), "gateway.0.wan_bind", "one IPv4 and one IPv6 address are allowed"),
        (SMALLEST.replace('"192.0.2.10"', "[]"), "gateway.0.wan_bind", "one IPv4 and one IPv6 address are allowed"),
        (SMALLEST.replace('"192.0.2.10"', "7"), "gateway.0.wan_bind", "give an IP address, or a list of two"),
        (SMALLEST + "connection_budget = -1", "gateway.0.connection_budget", "greater than or equal to 0"),
        (SMALLEST + 'pipe_budget_mib = "64"', "gateway.0.pipe_budget_mib", "valid integer"),
        (SMALLEST + '[policy]\nusers = ["alice"]', "policy.users.0", "urn:globus:groups:id:UUID"),
        (SMALLEST + '[policy]\nusers = "all"', "policy.users", "valid list"),
        (SMALLEST + '[policy]\nadministrators = ["all_authenticated_users"]', "policy.administrators.0", "not a URN"),
        (QUOTA.replace("urn:x:bob", "bob"), "policy.quota.0.users.0", "is not a URN, such as"),
        (SMALLEST + "[[policy.quota]]\nmax_num_conn = 2", "policy.quota.0.users", "Field required"),
        (SMALLEST + "[[policy.quota]]\nusers = []", "policy.quota.0.users", "at least 1 item"),
        (QUOTA + "colour = 2", "policy.quota.0.colour", "allowed are users, modes, longest_lease_s"),
        (QUOTA + "max_num_conn = 257", "policy.quota.0.max_num_conn", "less than or equal to 256"),
        (QUOTA + 'modes = ["ssl"]', "policy.quota.0.modes.0", "'tls', 'auth' or 'none'"),
        (SMALLEST.replace('"aps"', '"alcf"'), "facility.name", "is 'alcf', not 'aps'"),
    ],
    ids=lambda value: value.splitlines()[-1] if "\n" in value else value,
)  # fmt: skip
def test_each_mistake_names_file_key_and_what_is_allowed(
    load: Load, folder: Path, text: str, key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert caught.value.key == key
    assert caught.value.file == str(folder / "aps.toml")
    assert str(folder / "aps.toml") in str(caught.value)
    assert words in str(caught.value)


def test_a_mistake_in_the_environment_names_the_variable(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"^SCISTREAM_POLICY_MAX_NUM_CONN: policy\.max_num_conn: "):
        load(SCISTREAM_POLICY_MAX_NUM_CONN="many")
    with pytest.raises(ConfigError, match=r"SCISTREAM_POLICY_COLOUR: policy\.colour: there is no such key"):
        load(None, SCISTREAM_POLICY_COLOUR="red")
    with pytest.raises(ConfigError, match="SCISTREAM_PORT_RANGE: "):
        load(SCISTREAM_PORT_RANGE="all")


def test_a_file_that_is_no_toml_or_not_there_says_so(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aps\.toml is not TOML: .*line 2"):
        load("a = 1\nb =\nc = 2")
    with pytest.raises(ConfigError, match="No such file"):
        load_facility("aps", file=tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "x" * 65, "a\n"])
def test_a_name_that_could_be_a_path_is_no_facility(load: Load, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a facility"):
        load(None, name=name)


def test_the_state_is_where_it_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "SYSTEM_STATE", tmp_path / "none")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    home = {"HOME": "/home/me"}
    assert load_facility("x", environment=home).state_dir == Path("/home/me/.local/state/scistream/x")
    below = load_facility("x", environment=home | {"XDG_STATE_HOME": "/state"})
    assert below.state_dir == Path("/state/scistream/x")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert load_facility("x", environment=home).state_dir == tmp_path / "none" / "x"


def test_a_gateway_behind_a_translation_is_known_by_both_addresses(load: Load) -> None:
    gateway = load(SMALLEST + 'wan_advertise = "203.0.113.5"\nwan_source = "192.0.2.11"').gateways[0]
    assert gateway.dial_addresses() == ["192.0.2.11/32", "203.0.113.5/32"]
    assert gateway.listen_addresses("PROD") == ("192.0.2.10",)
    assert gateway.advertised_addresses("PROD", "192.0.2.10") == ("203.0.113.5",)
    assert (
        gateway.advertised_addresses("CONS", "10.0.0.10")
        == gateway.listen_addresses("CONS")
        == ("10.0.0.10",)
    )
    assert (gateway.onward_sources("PROD"), gateway.onward_sources("CONS")) == ((), ("192.0.2.11",))


def test_a_gateway_may_have_an_address_of_each_ip_version_and_ipv4_comes_first(load: Load) -> None:
    gateway = load(BOTH).gateways[0]
    assert gateway.listen_addresses("PROD") == ("192.0.2.10", "2001:db8::10")
    assert gateway.onward_sources("CONS") == ("192.0.2.10", "2001:db8::10")
    assert gateway.dial_addresses() == ["192.0.2.10/32", "2001:db8::10/128"]
    assert (gateway.wan_versions(), load().gateways[0].wan_versions()) == ({4, 6}, {4})


def test_what_is_advertised_of_two_addresses_replaces_the_one_of_its_version(load: Load) -> None:
    gateway = load(BOTH + 'wan_advertise = "203.0.113.5"\nwan_source = "2001:db8::11"').gateways[0]
    assert gateway.advertised_addresses("PROD", "192.0.2.10") == ("203.0.113.5",)
    assert gateway.advertised_addresses("PROD", "2001:db8::10") == ("2001:db8::10",)
    assert gateway.onward_sources("CONS") == ("192.0.2.10", "2001:db8::11")
    assert gateway.dial_addresses() == ["2001:db8::11/128", "203.0.113.5/32", "2001:db8::10/128"]
    anywhere = SMALLEST.replace('"192.0.2.10"', '["0.0.0.0", "::"]')
    with pytest.raises(
        ConfigError, match=r"wan_advertise: needed, because wan_bind takes every address \(::\)"
    ):
        load(anywhere + 'wan_advertise = "203.0.113.5"')
    both = load(anywhere + 'wan_advertise = ["203.0.113.5", "2001:db8::5"]').gateways[0]
    assert (both.advertised_addresses("PROD", "::"), both.onward_sources("CONS")) == (("2001:db8::5",), ())


def test_who_may_open_streams_is_named_or_nobody_but_the_user_of_the_service(load: Load) -> None:
    assert load().policy.users is None
    assert load(SMALLEST + f'[policy]\nusers = ["{ALICE}"]').policy.users == [ALICE]
    assert load(None, name="dev", SCISTREAM_POLICY_USERS="[]").policy.users == []
    assert load(None, name="dev").policy.users == ["all_authenticated_users"]


def test_the_first_quota_that_names_a_caller_replaces_the_limits_it_has(load: Load) -> None:
    policy = load(
        SMALLEST
        + "[policy]\nmax_num_conn = 4\nlongest_lease_s = 60\n"
        + f'[[policy.quota]]\nusers = ["{ALICE}"]\nmax_num_conn = 128\nmodes = ["none"]\n'
        + f'[[policy.quota]]\nusers = ["urn:x:bob", "{ALICE}"]\nmax_num_conn = 9\nlongest_lease_s = 10\n'
    ).policy
    hers, his, others = policy.of(["urn:x:her", ALICE]), policy.of(["urn:x:bob"]), policy.of(["urn:x:carol"])
    assert (hers.max_num_conn, hers.modes, hers.longest_lease_s) == (128, ["none"], 60)
    assert (his.max_num_conn, his.modes, his.longest_lease_s) == (9, ["tls", "auth"], 10)
    assert others is policy


def test_a_uuid_may_be_written_in_capitals(load: Load) -> None:
    capitals = ALICE.replace("46bd0f56", "46BD0F56")
    text = f'{SMALLEST}[policy]\nusers = ["{capitals}"]\nadministrators = ["{capitals}", "urn:x:Bob"]\n'
    facility = load(text + f'[[policy.quota]]\nusers = ["{capitals}"]\nmax_num_conn = 7\n')
    assert (facility.policy.users, facility.policy.administrators) == ([ALICE], [ALICE, "urn:x:Bob"])
    assert facility.policy.of([ALICE]).max_num_conn == 7


def test_an_address_with_a_zone_is_none(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"wan_bind: 'fe80::1%eth0' is not a numeric IP address"):
        load(SMALLEST.replace("192.0.2.10", "fe80::1%eth0"))


def test_what_cannot_be_laid_over_a_file_or_looked_for_is_a_mistake_and_no_crash(load: Load) -> None:
    with pytest.raises(ConfigError, match="policy: Input should be a valid dictionary"):
        load(f"policy = 3\n{SMALLEST}", SCISTREAM_POLICY_MAX_NUM_CONN="3")
    with pytest.raises(ConfigError, match="SCISTREAM_CONFIG_DIR"):
        load(None, SCISTREAM_CONFIG_DIR="/" + 300 * "a")
