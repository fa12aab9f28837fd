"""Where the kernel has no splice for these sockets: the same bytes by copying, and the status says so."""

import errno
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .apps import Applications, Payload
from .gateway import Gateway


@pytest.fixture(params=[errno.EINVAL, errno.ENOSYS], ids=["EINVAL", "ENOSYS"])
def gateway(binary: Path, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """A gateway whose kernel fails each splice."""
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder) / "s2ds"
        command = [
            sys.executable,
            str(Path(__file__).with_name("without.py")),
            "splice",
            str(request.param),
            str(binary),
        ]
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        wrapper.chmod(0o755)
        gateway = Gateway(wrapper)
        yield gateway
        gateway.close()


@pytest.mark.parametrize("mode", ["none", "auth"])
def test_without_splice_all_bytes_arrive_by_copying(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 3_000_000), Payload(2, 5_000_000))
    pair.wait_closed(1)
    for relay in pair:
        (close,) = relay.events("close")
        assert close["path"] == {"to_consumer": "copy", "to_producer": "copy"}
        assert close["bytes"] == {"to_consumer": 5_000_000, "to_producer": 3_000_000}
