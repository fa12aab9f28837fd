"""Fixtures of the network's tests: the network itself, and relays and applications on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from relay.apps import Applications
from relay.gateway import MODES, find_binary

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
