"""Where the applications and the relays of a cell stand: all on loopback, or each on a host of its own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from network.topology import Host, Network
from relay.gateway import join, listening

from .results import NetworkName

T = TypeVar("T")
Address = tuple[str, int]


@dataclass(frozen=True)
class Spot:
    """One place: the IP to listen at, and the host, if it is not this machine."""

    ip: str
    host: Host | None = None

    def command(self, *command: str) -> list[str]:
        """The same command, to be run here."""
        return self.host.command(*command) if self.host else list(command)

    def inside(self, what: Callable[[], T]) -> T:
        """The answer of `what`, called here."""
        return self.host.inside(what) if self.host else what()

    def free_address(self) -> Address:
        """An address for a program that cannot let the kernel choose."""

        def free() -> int:
            with socket.create_server((self.ip, 0)) as server:
                return int(server.getsockname()[1])

        return self.ip, self.inside(free)

    def listens(self, address: Address) -> bool:
        """Whether somebody listens at this address of it."""
        if self.host:
            return f"LISTEN {join(address)} " in "".join(f"{one} " for one in self.host.connections())
        return address in listening()


@dataclass(frozen=True)
class Place:
    """Applications and gateways; `gateways` in the order in which a connection of the consumer meets them.

    Attributes:
        sources: Networks from which connections come to the gateways.
    """

    name: NetworkName
    producer: Spot
    consumer: Spot
    gateways: tuple[Spot, Spot]
    sources: tuple[str, ...]


LOOPBACK = Place(
    "loopback",
    producer=Spot("127.0.0.1"),
    consumer=Spot("127.0.0.1"),
    gateways=(Spot("127.0.0.1"), Spot("127.0.0.1")),
    sources=("127.0.0.0/8",),
)


@contextlib.contextmanager
def namespaces() -> Iterator[Place]:
    """A host for each application and each gateway, joined by bridges, while the block runs."""
    network = Network()
    try:
        network.build()
        yield Place(
            "namespaces",
            producer=Spot(network.producer.address("IPv4"), network.producer),
            consumer=Spot(network.consumer.address("IPv4"), network.consumer),
            gateways=(
                Spot(network.gateway_b.address("IPv4", "lan-b"), network.gateway_b),
                Spot(network.gateway_a.address("IPv4", "wan"), network.gateway_a),
            ),
            sources=(
                network.consumer.address("IPv4"),
                network.gateway_b.address("IPv4", "wan"),
            ),
        )
    finally:
        network.close()
