"""Two facilities and all who take part in a stream between them, on loopback; and what must be there in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
from conftest import relay_pids
from relay.apps import Applications, Payload
from relay.gateway import Gateway, eventually, is_running, split
from serving import Served, serving

from scistream_flows.facility import RestFacility
from scistream_flows.models import Listing, ListQuery, Role, Status, StatusQuery
from scistream_flows.stream import Stream, open_stream

from .cast import Actor

FACILITIES: Final[Mapping[Role, str]] = {"PROD": "site-a", "CONS": "site-b"}
ROLES: Final[tuple[Role, ...]] = ("PROD", "CONS")
# The lease of a stream that nobody is going to renew. Any other is longer than a service takes to start.
SHORT_LEASE_S: Final = 4
LEASE_S: Final = 120
# No stream outlives its lease by more: what docs/reliability.md states.
LEASE_SLACK_S: Final = 1.0
# What a facility keeps, and makes when it is first needed.
LASTING: Final = ("audit.jsonl", "metrics.sqlite")
OF_SQLITE: Final = ("-wal", "-shm", "-journal")  # beside a database, while it is used
# A dead relay shows in `status` within this.
DETECT_S: Final = 1.0


def free_port() -> int:
    """A port of loopback where nobody listens, to be taken at once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass(frozen=True)
class Inventory:
    """What is there: compared before and after a scenario, it must be the same.

    Attributes:
        processes: Relays, and programs that we have started, by name.
        ports: Where any of these listens.
        connections: TCP connections of any of these.
        files: Below the state directories: relays' sockets and logs, and the names of the rest.
        streams: Streams of the registries that have not ended, with their leases.
        threads: Of this process, by name.
    """

    processes: tuple[str, ...]
    ports: tuple[str, ...]
    connections: int
    files: tuple[str, ...]
    streams: tuple[str, ...]
    threads: tuple[str, ...]

    def differences(self, other: Inventory) -> list[str]:
        """What has changed, in words."""
        return [
            f"{name}: {getattr(self, name)} became {getattr(other, name)}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(other, name)
        ]


@dataclass
class Scene:
    """A stage: services first, then whoever a scenario calls.

    Attributes:
        base: Where the facilities keep their state.
        binary: The relay.
    """

    base: Path
    binary: Path
    gateway_toml: str = ""
    apps: Applications = field(default_factory=Applications)
    services: dict[Role, Served] = field(default_factory=dict)
    actors: list[Actor] = field(default_factory=list)
    _ports: dict[Role, int] = field(default_factory=dict)
    _closing: dict[Role, contextlib.ExitStack] = field(default_factory=dict)
    _clients: dict[Role, RestFacility] = field(default_factory=dict)
    _before: Inventory | None = None
    _bystander: tuple[Stream, socket.socket, socket.socket] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Where everybody finds the facilities' state, and the tokens in it."""
        return {
            "SCISTREAM_STATE_DIR": str(self.base),
            "SCISTREAM_CONFIG_DIR": str(self.base / "none"),
        }

    # --- services

    def start(self) -> None:
        """Starts both services."""
        for role in ROLES:
            self.start_service(role)

    def begin(self) -> None:
        """It is counted what is there; then a bystander's stream begins."""
        self.apps = Applications()
        self._before = self.inventory()
        self._bystander = self._begin_bystander()

    def start_service(self, role: Role, **options: Any) -> None:
        """Starts a service, for the second time at the same address."""
        self._ports.setdefault(role, free_port())
        stack = self._closing[role] = contextlib.ExitStack()
        options = {"port": self._ports[role], **options}
        self.services[role] = stack.enter_context(serving(self.base, FACILITIES[role], **options))

    def kill_service(self, role: Role) -> None:
        """SIGKILL to a service and its workers."""
        self.services[role].kill()
        self._closing.pop(role).close()

    def url(self, role: Role) -> str:
        return f"http://127.0.0.1:{self._ports[role]}"

    def client(self, role: Role) -> RestFacility:
        """A client of a service."""
        if role not in self._clients:
            self._clients[role] = RestFacility(
                self.url(role), authorizer=lambda _: self.services[role].token, deadline_s=20
            )
        return self._clients[role]

    def status(self, role: Role, uid: str = "s") -> Status:
        return self.client(role).status(StatusQuery(uid=uid, role=role))

    def list(self, role: Role) -> Listing:
        return self.client(role).list(ListQuery())

    # --- relays

    def gateway(self, role: Role) -> Gateway:
        """The gateway of a facility, past its service."""
        return Gateway(self.binary, self.base / FACILITIES[role] / "relays")

    def relay_pid(self, role: Role, uid: str = "s") -> int:
        """The process of a stream's relay."""
        (relay,) = self.status(role, uid).relays
        rows = self.gateway(role).verb("list")["relays"]
        return next(int(row["pid"]) for row in rows if row["relay_id"] == relay.relay_id)

    # --- actors

    def act(self, role: str, **arguments: Any) -> Actor:
        """Starts a program of ours."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SCISTREAM_")}
        self.actors.append(Actor(role, environment=clean | self.environment, **arguments))
        return self.actors[-1]

    def produce(self, payload: Payload, *, port: int = 0, bytes_per_s: float = 0) -> Actor:
        """Starts a producer, which listens when this returns."""
        actor = self.act("produce", port=port, seed=payload.seed, size=payload.size, bytes_per_s=bytes_per_s)
        actor.wait_for("listening")
        return actor

    def consume(self, address: str, payload: Payload) -> Actor:
        """Starts a consumer, which is connected when this returns."""
        actor = self.act("consume", address=address, seed=payload.seed, size=payload.size, bytes_per_s=0)
        actor.wait_for("connected")
        return actor

    def work(self, producer: str, *, holds: tuple[str, ...] = (), **options: Any) -> Actor:
        """Starts a workflow with a stream to this producer."""
        options = {"targets": [producer], "uid": "s", "lease_s": LEASE_S, "until": "released", **options}
        return self.act(
            "work", producer=self.url("PROD"), consumer=self.url("CONS"), holds=holds, options=options
        )

    def retire(self, actor: Actor) -> None:
        """An actor ends, and is counted no more."""
        self.actors.remove(actor)
        actor.close()

    # --- the bystander

    def _begin_bystander(self) -> tuple[Stream, socket.socket, socket.socket]:
        server = self.apps.listen()
        stream = self.open(server, uid="bystander")
        return (stream, *self.converse(server, stream.listeners[0]))

    def open(self, server: socket.socket, **options: Any) -> Stream:
        """A stream of the test itself."""
        target = "{}:{}".format(*server.getsockname()[:2])
        options = {"targets": [target], "until": "released", **options}
        return open_stream(self.client("PROD"), self.client("CONS"), **options)

    def converse(self, server: socket.socket, address: str) -> tuple[socket.socket, socket.socket]:
        """A connection over which a byte has gone each way: the consumer's and the producer's end."""
        consumer = self.apps.dial(split(address))
        consumer.sendall(b"?")
        producer = self.apps.accept(server)
        assert producer.recv(1) == b"?"
        producer.sendall(b"!")
        assert consumer.recv(1) == b"!"
        return consumer, producer

    def renew_bystander(self) -> None:
        """For a scenario that outlasts its lease of an hour: it says nothing until the end."""
        if self._bystander is not None:
            self._bystander[0].renew()

    def check_bystander(self) -> None:
        """A connection that was there before the fault carries whole payloads after it."""
        if self._bystander is not None:
            stream, consumer, producer = self._bystander
            self._bystander = None
            self.apps.exchange(consumer, producer, Payload(91, 3_000_000), Payload(92, 3_000_000))
            end = stream.release()
            assert end.in_order, end

    # --- the end

    def inventory(self) -> Inventory:
        """What is there now."""
        programs = {actor.pid: actor.role for actor in self.actors}
        ours = {one.process.pid: name for one, name in zip(self.services.values(), ROLES, strict=True)}
        relays = relay_pids(self.base)
        listens, connected = [], 0
        for pid in (*programs, *ours, *relays):
            with contextlib.suppress(psutil.Error):
                for one in psutil.Process(pid).net_connections("tcp"):
                    if one.status == psutil.CONN_LISTEN:
                        listens.append("{}:{}".format(*one.laddr))
                    elif one.status != psutil.CONN_CLOSE and not {one.laddr.port, one.raddr.port} & {
                        *self._ports.values()
                    }:
                        connected += 1
        streams = [
            f"{one.uid} ({role}): {one.state}, lease {one.lease_remaining_s}"
            for role in ROLES
            for one in self.list(role).streams
        ]
        states = [self.base / name for name in FACILITIES.values()]
        files = sorted(
            str(one.relative_to(self.base))
            for state in states
            for one in state.rglob("*")
            if one.name not in LASTING and not one.name.endswith(OF_SQLITE)
        )
        return Inventory(
            processes=(*sorted(programs.values()), *["relay"] * len(relays)),
            ports=tuple(sorted(listens)),
            connections=connected,
            files=tuple(files),
            streams=tuple(streams),
            threads=tuple(sorted(one.name for one in threading.enumerate() if "Task" not in repr(one))),
        )

    def check_nothing_left(self) -> None:
        """After the bystander has been served, everything is as it was before the scenario."""
        self.check_bystander()
        for actor in list(self.actors):
            self.retire(actor)
        self.apps.close()
        before = self._before
        assert before is not None

        def same() -> bool:
            differences = before.differences(self.inventory())
            assert not differences, differences
            return True

        eventually(same, within_s=5)

    def close(self) -> None:
        """Ends everything, whatever has happened."""
        for actor in self.actors:
            with contextlib.suppress(ProcessLookupError):
                os.kill(actor.pid, signal.SIGCONT)
            actor.close()
        for pid in relay_pids(self.base):
            os.kill(pid, signal.SIGKILL)
        for client in self._clients.values():
            client.close()
        for stack in self._closing.values():
            stack.close()
        with contextlib.suppress(AssertionError):
            self.apps.close()


class Stage:
    """One scene for many scenarios: its services go on, unless a scenario went wrong."""

    def __init__(self, make: Callable[[], Scene]) -> None:
        self._make = make
        self._scene: Scene | None = None

    @contextlib.contextmanager
    def scene(self) -> Iterator[Scene]:
        """The scene of one scenario, which leaves it as it was."""
        if self._scene is None:
            self._scene = self._make()
            self._scene.start()
        try:
            self._scene.begin()
            yield self._scene
            if self._scene is not None:
                self._scene.check_nothing_left()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the services, and whatever else is there; the next scenario has new ones."""
        if self._scene is not None:
            self._scene.close()
            self._scene = None


@contextlib.contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """These processes are stopped as long as the block runs."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGCONT)
