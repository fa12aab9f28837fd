"""The groups of the control plane: how long until a stream is READY, and many streams."""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import socket
import statistics
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import psutil
from serving import Caller, serving
from sshd import Account, Server, make_key
from sshd import why_not as why_no_sshd
from standins.compute_cloud import ComputeCloud, Endpoint
from standins.globus import Globus

from scistream_flows.actions.endpoint import published, set_up
from scistream_flows.config import load_facility
from scistream_flows.facility import ComputeFacility, Facility, LocalFacility
from scistream_flows.s2cs import S2CS
from scistream_flows.stream import Progress, Stream, open_stream

from .groups import Bench
from .results import Group, Many, Opening, Way

POLICY: Final = """
[policy]
targets = ["127.0.0.0/8"]
peers = ["127.0.0.0/8"]
consumers = ["127.0.0.0/8"]
max_streams_per_owner = 100000
"""
POLL_S: Final = 0.01


@contextlib.contextmanager
def _world() -> Iterator[Path]:
    """A directory for the state of every facility, and an environment that knows of no other one."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        base = Path(name)
        for folder in ("state", "configuration"):
            (base / folder).mkdir()
        for variable in [one for one in os.environ if one.startswith("SCISTREAM_")]:
            del os.environ[variable]
        os.environ |= {
            "SCISTREAM_STATE_DIR": str(base / "state"),
            "SCISTREAM_CONFIG_DIR": str(base / "configuration"),
        }
        try:
            yield base
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _target() -> Iterator[str]:
    """A listening application that says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as server, selectors.DefaultSelector() as poll:
        stopping = threading.Event()
        poll.register(server, selectors.EVENT_READ)

        def serve() -> None:
            while not stopping.is_set():
                for key, _ in poll.select(0.05):
                    one = key.fileobj
                    if one is server:
                        poll.register(server.accept()[0], selectors.EVENT_READ)
                    elif isinstance(one, socket.socket):  # only its end can be heard of it
                        poll.unregister(one)
                        one.close()
            for key in list(poll.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield "{}:{}".format(*server.getsockname())
        finally:
            stopping.set()
            thread.join()


def opening(bench: Bench) -> None:
    """One stream after the other, in each way that leads to a facility."""
    ways: Mapping[
        Way, tuple[Callable[[Path, str], contextlib.AbstractContextManager[Callable[[], Any]]], int]
    ] = {
        "local": (_local, bench.plan.openings),
        "actions": (_actions, bench.plan.openings),
        "compute": (_compute, bench.plan.compute_openings),
        "ssh": (_ssh, bench.plan.openings),
    }
    for way in bench.plan.ways:
        prepare, count = ways[way]
        with (
            bench.cell(f"opening {way}"),
            _world() as base,
            _target() as target,
            prepare(base, target) as once,
        ):
            once()  # what is loaded or connected only once is not part of it
            for number in range(count):
                steps_s, release_s = once()
                bench.runs.append(Opening(way=way, number=number, steps_s=steps_s, release_s=release_s))


Once: TypeAlias = Callable[[], tuple[dict[str, float], float]]


def _timed(producer: Facility, consumer: Facility, target: str) -> tuple[dict[str, float], float]:
    """One stream by open_stream: seconds until each step, and of the release."""
    steps_s: dict[str, float] = {}

    def note(progress: Progress) -> None:
        steps_s.setdefault(progress.step, progress.elapsed_s)

    stream = open_stream(producer, consumer, targets=[target], on_progress=note)
    began = time.monotonic()
    stream.release()
    released = time.monotonic() - began
    stream.close()
    return steps_s, released


def _service(name: str) -> LocalFacility:
    return LocalFacility(S2CS(load_facility(name)))


@contextlib.contextmanager
def _local(base: Path, target: str) -> Iterator[Once]:  # noqa: ARG001
    with _service("aps") as aps, _service("alcf") as alcf:
        yield lambda: _timed(aps, alcf, target)


@contextlib.contextmanager
def _ssh(base: Path, target: str) -> Iterator[Once]:
    """The producer's gateway behind a real sshd; the connection to it stands."""
    if reason := why_no_sshd():
        raise RuntimeError(reason)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    account = Account()
    try:
        account.clean()
        key = base / ".ssh" / "id_ed25519"
        key.parent.mkdir(mode=0o700)
        make_key(key)
        os.environ["HOME"] = str(base)
        os.environ.pop("SSH_AUTH_SOCK", None)
        server = Server(account, key.with_suffix(".pub").read_text())
        server.start()
        try:
            (base / ".ssh" / "known_hosts").write_text(server.host_key)
            (base / "configuration" / "aps.toml").write_text(
                '[facility]\nname = "aps"\n[[gateway]]\nname = "dtn"\nkind = "ssh"\nwan_bind = "127.0.0.1"\n'
                f'lan_bind = "127.0.0.1"\nhost = "127.0.0.1"\nport = {server.port}\nuser = "{account.name}"\n'
                f'directory = "{account.directory}"\n{POLICY}'
            )
            with _service("aps") as aps, _service("alcf") as alcf:
                yield lambda: _timed(aps, alcf, target)
        finally:
            server.kill()
    finally:
        account.remove()


@contextlib.contextmanager
def _compute(base: Path, target: str) -> Iterator[Once]:
    """The producer's facility behind a real Globus Compute endpoint, under the stand-in of its web service."""
    with ComputeCloud() as cloud:
        endpoint = Endpoint(base / "endpoints" / "aps", cloud)
        os.environ |= {**cloud.environment, "GLOBUS_COMPUTE_USER_DIR": str(base / "client")}
        facility = load_facility("aps")
        set_up(endpoint.directory, facility=facility, email="admin@example.org")
        published(facility)
        with endpoint, ComputeFacility(endpoint.id, deadline_s=60) as aps, _service("alcf") as alcf:
            yield lambda: _timed(aps, alcf, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # the SDK leaves a pair of sockets to it


@contextlib.contextmanager
def _actions(base: Path, target: str) -> Iterator[Once]:
    """Two facilities that serve action providers, asked as Globus Flows asks, but without its pauses."""
    with contextlib.ExitStack() as stack:
        globus = stack.enter_context(Globus())
        alice = globus.add_person("alice@example.org")
        callers: list[Caller] = []
        for name in ("aps", "alcf"):
            client, scope = globus.add_facility()
            secret = base / f"{name}-secret"
            secret.write_text(str(client.secret))
            secret.chmod(0o600)
            more = f'[globus]\nclient_id = "{client.id}"\nclient_secret_file = "{secret}"\n'
            served = stack.enter_context(
                serving(base / "state", name, more=more, environment=globus.environment)
            )
            caller = Caller(served, globus.mint(alice, scope))
            stack.callback(caller.close)
            callers.append(caller)
        aps, alcf = callers
        yield lambda: _by_actions(aps, alcf, target)


def _by_actions(aps: Caller, alcf: Caller, target: str) -> tuple[dict[str, float], float]:
    stream = {"stream_id": f"bench-{uuid.uuid4()}"}
    began, steps_s = time.monotonic(), {}

    def step(name: str, caller: Caller, action: str, **body: Any) -> dict[str, Any]:
        steps_s[name] = time.monotonic() - began
        return _succeeded(caller, action, stream | body)

    first = step("request-prod", aps, "start", role="PROD", targets=[target])
    second = step("request-cons", alcf, "start", role="CONS", producer=first["offer"])
    step("connect", aps, "connect", role="PROD", consumer=second["offer"])
    steps_s["ready"] = time.monotonic() - began
    ended = time.monotonic()
    for caller, role in ((alcf, "CONS"), (aps, "PROD")):
        _succeeded(caller, "release", stream | {"role": role})
    return steps_s, time.monotonic() - ended


def _succeeded(caller: Caller, action: str, body: Mapping[str, Any]) -> dict[str, Any]:
    status = caller.run(action, body).raise_for_status().json()
    end = time.monotonic() + 60
    while status["status"] == "ACTIVE" and time.monotonic() < end:
        time.sleep(POLL_S)
        status = caller.status(action, status["action_id"])
    if status["status"] != "SUCCEEDED":
        raise RuntimeError(f"{action}: {status}")
    details: dict[str, Any] = status["details"]
    return details


# --- many ------------------------------------------------------------------------------------------------------------


def many(bench: Bench) -> None:
    """Streams at the same time, one after the other, and beside many that wait."""
    plan = bench.plan
    cases: tuple[tuple[str, Callable[[LocalFacility, LocalFacility, str, int], Many], int], ...] = (
        ("at once", _at_once, plan.at_once),
        ("cycles", _cycles, plan.cycles),
        ("waiting", _waiting, plan.waiting),
    )
    for name, measure, count in cases:
        with bench.cell(f"many: {count} {name}"), _world() as base, _target() as target:
            for facility in ("aps", "alcf"):
                (base / "configuration" / f"{facility}.toml").write_text(
                    f'[facility]\nname = "{facility}"\n[[gateway]]\nname = "local"\nwan_bind = "127.0.0.1"\n'
                    f'lan_bind = "127.0.0.1"\n{POLICY}'
                )
            with _service("aps") as aps, _service("alcf") as alcf:
                _timed(aps, alcf, target)
                before = _there(base)
                run = measure(aps, alcf, target, count)
                bench.runs.append(run.model_copy(update={"left": _left(base, before)}))


def _ready_s(aps: Facility, alcf: Facility, target: str) -> float:
    return _timed(aps, alcf, target)[0]["ready"]


def _at_once(aps: LocalFacility, alcf: LocalFacility, target: str, count: int) -> Many:
    began = time.monotonic()
    with ThreadPoolExecutor(count, thread_name_prefix="open") as pool:
        opened = list(pool.map(lambda _: _open_held(aps, alcf, target), range(count)))
        seconds = time.monotonic() - began
        list(pool.map(lambda one: one[0].release(), opened))
    times = sorted(one[1] for one in opened)
    return _many("at-once", count, seconds, times)


def _open_held(aps: Facility, alcf: Facility, target: str) -> tuple[Stream, float]:
    began = time.monotonic()
    stream = open_stream(aps, alcf, targets=[target], ready_timeout_s=120)
    return stream, time.monotonic() - began


def _cycles(aps: LocalFacility, alcf: LocalFacility, target: str, count: int) -> Many:
    began = time.monotonic()
    times = [_ready_s(aps, alcf, target) for _ in range(count)]
    return _many("cycles", count, time.monotonic() - began, times)


def _waiting(aps: LocalFacility, alcf: LocalFacility, target: str, count: int) -> Many:
    few = max(3, min(20, count // 5))

    def some(number: int) -> list[float]:
        return [_ready_s(aps, alcf, target) for _ in range(number)]

    alone = some(few)
    began = time.monotonic()
    with ThreadPoolExecutor(8, thread_name_prefix="wait") as pool:
        waiting = list(
            pool.map(
                lambda _: open_stream(aps, alcf, targets=[], lease_s=3600, hello_timeout_s=3600), range(count)
            )
        )
        seconds = time.monotonic() - began
        beside = some(2 * few)
        list(pool.map(Stream.release, waiting))
    alone += some(few)  # on both sides, because the machine changes meanwhile
    return Many(
        what="waiting",
        count=count,
        seconds=seconds,
        first_s=statistics.median(alone),
        last_s=statistics.median(beside),
        left={},
    )


def _many(what: Literal["at-once", "cycles"], count: int, seconds: float, times: list[float]) -> Many:
    fifth = max(1, len(times) // 5)
    return Many(
        what=what,
        count=count,
        seconds=seconds,
        first_s=statistics.median(times[:fifth]),
        last_s=statistics.median(times[-fifth:]),
        left={},
    )


def _there(base: Path) -> dict[str, int]:
    """What a stream could leave behind."""
    relays = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            relays += process.name() == "s2ds" and process.cwd().startswith(str(base))
    return {
        "relays": relays,
        "files of relays": len(list(base.glob("state/*/relays/*"))),
        "threads": threading.active_count(),
        "descriptors": psutil.Process().num_fds(),
    }


def _left(base: Path, before: Mapping[str, int]) -> dict[str, int]:
    """The same, against before; what ends by itself has five seconds for it."""
    end = time.monotonic() + 5
    while True:
        left = {name: count - before[name] for name, count in _there(base).items()}
        if max(left.values()) <= 0 or time.monotonic() > end:
            return left
        time.sleep(0.1)


CONTROL: Final[Mapping[Group, Callable[[Bench], None]]] = {"opening": opening, "many": many}
