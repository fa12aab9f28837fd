"""The verbs in other deployments of the real endpoint: workers in blocks, a process that ends when it is idle.

As in test_compute.py, the web service is a stand-in. `scistream-flows` writes neither of these configurations itself;
an administrator may, and whatever an engine does with its processes, a stream that is open stays open.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import signal
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("globus_compute_sdk", reason="not installed: the extra compute")
pytest.importorskip("globus_compute_endpoint", reason="not installed: globus-compute-endpoint")

from globus_compute_sdk import Executor
from globus_compute_sdk.sdk.executor import _RESULT_WATCHERS
from standins.compute_cloud import ComputeCloud, Endpoint

from scistream_flows import NotFound, connect_facility, open_stream
from scistream_flows.actions.endpoint import TEMPLATE, register, write_configuration
from scistream_flows.compute import close_client, open_client
from scistream_flows.config import load_facility
from scistream_flows.facility import ComputeFacility, ExecutorFacility
from scistream_flows.models import Release, Request, StatusQuery

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("own_temporary"),
    # The SDK leaves a pair of sockets, by which pika wakes its loop, to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

HEARTBEAT_S = 5  # the shortest that the endpoint takes
THREADS = "  type: ThreadPoolEngine\n  max_workers: 4\n"
WORKERS = """\
  type: GlobusComputeEngine
  address: 127.0.0.1
  max_workers_per_node: 1
  provider:
    type: LocalProvider
    init_blocks: 1
    min_blocks: {min_blocks}
    max_blocks: 1
  job_status_kwargs:
    max_idletime: {idle_s}
    strategy_period: 1
"""
ALWAYS_ON = "idle_heartbeats_soft: 0 "
ENDS_WHEN_IDLE = "idle_heartbeats_soft: 1 "


@dataclass
class Deployment:
    """The facility `aps` behind an endpoint of its own.

    Attributes:
        base: Where everything is kept.
        endpoint: The endpoint, which runs.
        facility: It, as a client sees it.
        sessions: The user endpoints that were seen: each leads a session, of which everything it starts is a part.
    """

    base: Path
    endpoint: Endpoint
    facility: ComputeFacility
    sessions: set[int]

    def user_endpoint(self) -> psutil.Process:
        """The process that takes the verbs."""
        (pid,) = self.endpoint.user_processes()
        self.sessions.add(pid)
        return psutil.Process(pid)

    def processes(self) -> list[psutil.Process]:
        """What the user endpoints have started and that runs, without what has left them."""
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(one.pid) in self.sessions and runs(one):
                    found.append(one)
        return found

    def pools(self) -> list[psutil.Process]:
        """The first process of each block of workers."""
        found = []
        for one in self.processes():
            with contextlib.suppress(psutil.Error):
                if "parsl.executors.high_throughput.process_worker_pool" in one.cmdline():
                    found.append(one)
        return found


@pytest.fixture
def deploy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relays_below: Callable[..., list[int]]
) -> Iterator[Callable[..., Deployment]]:
    """A function that runs an endpoint with an engine, given as lines of its configuration."""
    for variable in [name for name in os.environ if name.startswith("SCISTREAM_")]:
        monkeypatch.delenv(variable)
    made: list[Deployment] = []
    with ComputeCloud() as cloud, contextlib.ExitStack() as stack:
        environment = {
            **cloud.environment,
            "GLOBUS_COMPUTE_USER_DIR": str(tmp_path / "client"),
            "SCISTREAM_STATE_DIR": str(tmp_path / "state"),
            "SCISTREAM_CONFIG_DIR": str(tmp_path / "configuration"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "configuration").mkdir()

        def deploy(engine: str, idle: str, *, runs_anything: bool = False) -> Deployment:
            endpoint = Endpoint(tmp_path / "endpoints" / "aps", cloud)
            configure(endpoint.directory, engine, idle)
            if runs_anything:
                open_up(endpoint.directory)
            stack.enter_context(endpoint)
            facility = stack.enter_context(ComputeFacility(endpoint.id, deadline_s=50))
            made.append(Deployment(tmp_path, endpoint, facility, set()))
            return made[-1]

        @stack.callback  # the last thing that is done, whatever else goes wrong
        def nothing_is_left() -> None:
            left = dict.fromkeys(relays_below(tmp_path, patience_s=5), "a relay")
            for one in made:
                _, alive = psutil.wait_procs(one.processes(), timeout=10)
                left |= {process.pid: "of the endpoint" for process in alive if runs(process)}
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert not left, "\n".join([f"left running: {left}", *(one.endpoint.log for one in made)])

        yield deploy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def open_up(directory: Path) -> None:
    """Let an endpoint run whatever its user sends, as Globus Compute makes it."""
    for name, restriction in (("config.yaml", "allowed_functions"), (TEMPLATE, "  allowed_serializers")):
        kept, found, _ = (directory / name).read_text().partition(f"{restriction}:")
        assert found  # to the end of the file
        (directory / name).write_text(kept)


def configure(directory: Path, engine: str, idle: str) -> None:
    """Write what `s2cs init --compute` writes, with another engine and another end."""
    aps = load_facility("aps")
    client = open_client()
    try:
        functions = register(client, facility=aps)
    finally:
        close_client(client)
    write_configuration(
        directory,
        facility=aps,
        functions=functions,
        email="admin@example.org",
        heartbeat_s=HEARTBEAT_S,
        environment={"TMPDIR": os.environ["TMPDIR"]},  # a user endpoint inherits nothing
    )
    template = directory / TEMPLATE
    text = template.read_text()
    for written, wanted in ((THREADS, engine), (ALWAYS_ON, idle)):
        assert text.count(written) == 1
        text = text.replace(written, wanted)
    assert "allowed_serializers" in text  # which holds for every engine
    template.write_text(text)


def runs(process: psutil.Process) -> bool:
    """Whether it runs; what nobody has reaped does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_stream_outlives_the_worker_that_opened_it_and_every_process_that_led_there(
    deploy: Callable[..., Deployment],
    application: Any,
    relays_below: Callable[..., list[int]],
    within: Callable[..., None],
) -> None:
    aps = deploy(WORKERS.format(min_blocks=1, idle_s=120), ALWAYS_ON)
    aps.facility.request(Request(uid="open", role="PROD", targets=[application.address], lease_s=600))
    relays = relays_below(aps.base)
    assert len(relays) == 1
    assert aps.facility.status(StatusQuery(uid="open", role="PROD")).state == "LISTENING"

    user_endpoint = aps.user_endpoint()
    (interchange,) = user_endpoint.children()
    (pool,) = aps.pools()
    worker = max(pool.children(), key=psutil.Process.create_time)
    for process, kill in (
        (worker, worker.kill),
        (pool, lambda: os.killpg(os.getpgid(pool.pid), signal.SIGKILL)),  # as a batch system ends a job
        (interchange, interchange.kill),
        (user_endpoint, user_endpoint.kill),
    ):
        kill()
        within(lambda one=process: not runs(one), timeout_s=10, what=f"{process} ends")
        assert relays_below(aps.base) == relays
    for process in aps.processes():  # a block that it has begun in place of the one that was killed
        process.kill()
    for left in aps.endpoint.directory.parent.glob("uep.*/daemon.pid"):
        left.unlink()  # as the endpoint's own message says; else it takes three heartbeats

    aps.endpoint.__exit__()
    assert relays_below(aps.base) == relays
    aps.endpoint.__enter__()
    with ComputeFacility(aps.endpoint.id, deadline_s=50) as again:
        assert again.status(StatusQuery(uid="open", role="PROD")).state == "LISTENING"
        assert aps.user_endpoint() != user_endpoint
    aps.endpoint.__exit__()  # in order this time, the block with it
    assert relays_below(aps.base) == relays
    with contextlib.closing(connect_facility("local:aps")) as here:
        assert here.release(Release(uid="open", role="PROD")).released
    assert relays_below(aps.base) == []


def test_a_stream_outlives_its_block_and_an_endpoint_that_ends_when_it_is_idle(
    deploy: Callable[..., Deployment],
    application: Any,
    relays_below: Callable[..., list[int]],
    within: Callable[..., None],
) -> None:
    aps = deploy(WORKERS.format(min_blocks=0, idle_s=1), ENDS_WHEN_IDLE)
    aps.facility.request(Request(uid="open", role="PROD", targets=[application.address], lease_s=600))
    relays = relays_below(aps.base)
    assert len(relays) == 1
    user_endpoint = aps.user_endpoint()
    within(lambda: aps.pools() == [], timeout_s=30, what="the idle block ends")
    assert user_endpoint.is_running()
    assert relays_below(aps.base) == relays
    within(lambda: aps.endpoint.user_processes() == [], timeout_s=40, what="the idle user endpoint ends")
    assert relays_below(aps.base) == relays

    assert aps.facility.status(StatusQuery(uid="open", role="PROD")).state == "LISTENING"
    assert aps.user_endpoint() != user_endpoint
    aps.facility.request(Request(uid="leased", role="PROD", targets=[application.address], lease_s=2))
    within(lambda: relays_below(aps.base) == relays, timeout_s=15, what="the lease ends the second stream")
    assert aps.facility.release(Release(uid="open", role="PROD")).released
    assert relays_below(aps.base) == []


def test_an_endpoint_that_ends_when_it_is_idle_starts_again_and_finds_the_stream(
    deploy: Callable[..., Deployment],
    application: Any,
    relays_below: Callable[..., list[int]],
    within: Callable[..., None],
) -> None:
    aps = deploy(THREADS, ENDS_WHEN_IDLE)
    aps.facility.request(Request(uid="open", role="PROD", targets=[application.address], lease_s=600))
    relays = relays_below(aps.base)
    assert len(relays) == 1
    user_endpoint = aps.user_endpoint()
    within(lambda: aps.endpoint.user_processes() == [], timeout_s=40, what="the idle user endpoint ends")
    assert "Idle heartbeats reached" in aps.endpoint.log
    assert relays_below(aps.base) == relays

    assert aps.facility.status(StatusQuery(uid="open", role="PROD")).state == "LISTENING"
    assert aps.user_endpoint() != user_endpoint
    assert aps.facility.release(Release(uid="open", role="PROD")).released
    assert relays_below(aps.base) == []


def test_an_endpoint_of_ones_own_that_runs_anything_is_an_executor_as_any_other(
    deploy: Callable[..., Deployment], application: Any, talk: Callable[[str, bytes], str]
) -> None:
    own = deploy(THREADS, ALWAYS_ON, runs_anything=True)
    client = open_client()
    group = uuid.uuid4()
    executor = Executor(
        own.endpoint.id, client=client, task_group_id=group, api_burst_limit=8, api_burst_window_s=1
    )
    try:
        aps = ExecutorFacility(executor, facility="aps")
        with open_stream(aps, "local:alcf", targets=[application.address], linger_s=0) as stream:
            payload = os.urandom(300_000)
            assert talk(stream.listeners[0], payload) == hashlib.sha256(application.payload).hexdigest()
            end = stream.wait(60).check()
        assert application.received == [hashlib.sha256(payload).hexdigest()]
        assert min(end.prod.bytes.to_consumer, end.cons.bytes.to_consumer) >= len(application.payload)
        with pytest.raises(NotFound):
            aps.status(StatusQuery(uid="nobody", role="PROD"))
    finally:
        executor.shutdown()
        _RESULT_WATCHERS[group].shutdown()  # the SDK keeps it until the process exits
        close_client(client)
