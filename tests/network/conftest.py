"""Fixtures of the network's tests: the network itself, relays and applications on it, services of the facilities."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from relay.apps import Applications
from relay.gateway import MODES, find_binary
from sshd import Account
from sshd import why_not as why_no_sshd

from .services import Services, both_facilities
from .sites import Facilities, Site
from .topology import FAMILIES, Family, Network, remove_leftovers, why_not


@pytest.fixture(scope="session")
def binary() -> Path:
    return find_binary()


@pytest.fixture(scope="session")
def rights() -> None:
    """The right and the tools to make a network of namespaces. Where one is missing, a test says so and is skipped."""
    if reason := why_not():
        pytest.skip(reason)
    remove_leftovers()


@pytest.fixture
def network(rights: None) -> Iterator[Network]:  # noqa: ARG001 - without them there is none
    network = Network()
    try:
        network.build()
        yield network
    finally:
        network.close()


@pytest.fixture
def facilities(network: Network, binary: Path) -> Iterator[Facilities]:
    a, b = (Site(binary, host=host) for host in (network.gateway_a, network.gateway_b))
    apps = Applications()
    yield Facilities(network, a, b, apps)
    network.restore()
    apps.close()
    try:
        a.close()
    finally:
        b.close()


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return next(family for family in FAMILIES if family == request.param)


@pytest.fixture(scope="session")
def account_of(rights: None) -> Iterator[Callable[[str], Account]]:  # noqa: ARG001 - it takes them to make a user
    """A function from the name of a gateway to its user."""
    if reason := why_no_sshd():
        pytest.skip(reason)
    # where sshd locks itself in; any other may use it too: it stays
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with ExitStack() as stack:

        @cache
        def make(name: str) -> Account:  # noqa: ARG001 - one for each
            account = Account()
            stack.callback(account.remove)
            return account

        yield make


@pytest.fixture
def gateways_each() -> int:
    """How many gateways each facility has; modules with more replace this."""
    return 1


@pytest.fixture
def services(
    request: pytest.FixtureRequest,
    account_of: Callable[[str], Account],
    gateways_each: int,
    tmp_path: Path,
    state_base: Path,  # noqa: ARG001 - where the state goes
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Services]:
    """The services of both facilities; the test itself is on the control host, with a home of its own."""
    family: Family = request.getfixturevalue("family") if "family" in request.fixturenames else "IPv4"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path / "configuration"))
    network = Network(gateways_each)
    try:
        network.build()
        with both_facilities(
            network,
            account_of,
            home=tmp_path / "home",
            configuration=tmp_path / "configuration",
            family=family,
        ) as services:
            yield services
    finally:
        network.close()
