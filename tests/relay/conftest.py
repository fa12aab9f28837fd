"""Fixtures of the relay's tests: a gateway that must be empty in the end, and the applications on both sides."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .apps import Applications, Tap
from .gateway import MODES, Gateway, find_binary

NOBODY = 65534


@pytest.fixture(scope="session")
def binary() -> Path:
    return find_binary()


@pytest.fixture
def gateway(binary: Path) -> Iterator[Gateway]:
    gateway = Gateway(binary)
    yield gateway
    gateway.close()


@pytest.fixture
def nobodys_gateway(binary: Path) -> Iterator[Gateway]:
    """A gateway of a user who is not root, where root runs the tests; else one of our own."""
    place = Path(tempfile.mkdtemp(prefix="s2ds-"))
    place.chmod(0o755)
    copy = place / "s2ds"
    shutil.copy(binary, copy)
    copy.chmod(0o755)
    directory = place / "relays"
    directory.mkdir(mode=0o700)
    user = None
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
        user = NOBODY
    gateway = Gateway(copy, directory, user)
    yield gateway
    try:
        gateway.close()
    finally:
        shutil.rmtree(place)


@pytest.fixture
def apps(gateway: Gateway) -> Iterator[Applications]:  # noqa: ARG001 - closed before the gateway is
    apps = Applications()
    yield apps
    apps.close()


@pytest.fixture
def tap(apps: Applications) -> Tap:
    return Tap(apps)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[mode for mode in MODES if mode != "none"])
def proven_mode(request: pytest.FixtureRequest) -> str:
    """A mode in which the peers prove their keys."""
    return str(request.param)
