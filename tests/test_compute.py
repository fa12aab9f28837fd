"""Facilities over Globus Compute: its real SDK and its real endpoint, under a stand-in of its web service."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("globus_compute_sdk", reason="not installed: the extra compute")
pytest.importorskip("globus_compute_endpoint", reason="not installed: globus-compute-endpoint")

from standins.compute_cloud import ComputeCloud, Endpoint, Refused

from scistream_flows import (
    BadRequest,
    Conflict,
    FacilityUnreachable,
    NotFound,
    PolicyDenied,
    connect_facility,
    open_stream,
)
from scistream_flows.actions.endpoint import check, published, set_up
from scistream_flows.compute import LOOK_S, ComputeEndpoint, _json_only, close_client, open_client
from scistream_flows.config import load_facility
from scistream_flows.errors import MissingExtra, Unauthenticated
from scistream_flows.facility import ComputeFacility
from scistream_flows.models import Release, Request, StatusQuery

# The SDK leaves a pair of sockets, by which pika wakes its loop, to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

VERSIONS = {"python_version": "any", "sdk_version": "any"}


@dataclass
class World:
    """Two facilities on this machine, `aps` behind an endpoint; and the service that leads there."""

    base: Path
    cloud: ComputeCloud
    endpoint: Endpoint
    functions: dict[str, str]

    @property
    def address(self) -> str:
        return f"compute:{self.endpoint.id}"

    def environment(self) -> dict[str, str]:
        return {
            **self.cloud.environment,
            "GLOBUS_COMPUTE_USER_DIR": str(self.base / "client"),
            "SCISTREAM_STATE_DIR": str(self.base / "state"),
            "SCISTREAM_CONFIG_DIR": str(self.base / "configuration"),
        }


@contextlib.contextmanager
def login() -> Iterator[Any]:
    client = open_client()
    try:
        yield client
    finally:
        close_client(client)


@pytest.fixture(scope="module")
def world_of_this_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("compute")
    (base / "configuration").mkdir()
    with pytest.MonkeyPatch.context() as patch, ComputeCloud() as cloud:
        world = World(base, cloud, Endpoint(base / "endpoints" / "aps", cloud), {})
        for variable in [name for name in os.environ if name.startswith("SCISTREAM_")]:
            patch.delenv(variable)
        for name, value in world.environment().items():
            patch.setenv(name, value)
        aps = load_facility("aps")
        set_up(world.endpoint.directory, facility=aps, email="admin@example.org")
        world.functions.update(published(aps))
        assert set(cloud.functions) == set(world.functions.values())
        assert list(check(world.endpoint.directory, facility=aps))
        with world.endpoint:
            yield world
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def world(
    world_of_this_module: World, monkeypatch: pytest.MonkeyPatch, relays_below: Callable[..., list[int]]
) -> Iterator[World]:
    for variable in [name for name in os.environ if name.startswith("SCISTREAM_")]:
        monkeypatch.delenv(variable)
    for name, value in world_of_this_module.environment().items():
        monkeypatch.setenv(name, value)
    cloud = world_of_this_module.cloud
    yield world_of_this_module
    cloud.deliveries, cloud.checks_allow_list, cloud.start_s = 1, True, 30.0
    cloud.refusals.clear()
    left = relays_below(world_of_this_module.base, patience_s=5)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"{len(left)} relays were left running; {world_of_this_module.endpoint.log}"


@pytest.fixture
def aps(world: World) -> Iterator[ComputeFacility]:
    """The facility behind the endpoint."""
    with ComputeFacility(world.endpoint.id, deadline_s=40) as facility:
        yield facility


@contextlib.contextmanager
def frozen(world: World) -> Iterator[None]:
    """Whatever is sent to the endpoint now is not answered before the block ends."""
    processes = world.endpoint.user_processes()
    assert processes
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("sides", ["producer", "both"])
def test_a_stream_is_set_up_through_an_endpoint(
    world: World, sides: str, application: Any, talk: Callable[[str, bytes], str]
) -> None:
    consumer = "local:alcf" if sides == "producer" else world.address
    with open_stream(world.address, consumer, targets=[application.address], linger_s=0) as stream:
        payload = os.urandom(300_000)
        assert talk(stream.listeners[0], payload) == hashlib.sha256(application.payload).hexdigest()
        end = stream.wait(60).check()
    assert application.received == [hashlib.sha256(payload).hexdigest()]
    assert min(end.prod.bytes.to_consumer, end.cons.bytes.to_consumer) >= len(application.payload)


def test_an_administrator_writes_an_endpoint_with_one_command(world: World, tmp_path: Path) -> None:
    def s2cs(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("s2cs"), *arguments],
            env={
                **os.environ,
                "SCISTREAM_CONFIG_DIR": str(tmp_path / "configuration"),
                "GLOBUS_COMPUTE_USER_DIR": str(tmp_path / "endpoints"),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    registered = len(world.cloud.functions)
    refused = s2cs("init", "aps", "--compute", "dtn")
    assert refused.returncode == 2
    assert "Write and edit it first: s2cs init aps" in refused.stderr
    assert s2cs("init", "aps").returncode == 0
    done = s2cs("init", "aps", "--compute", "dtn", "--email", "admin@example.org")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/endpoints/dtn/config.yaml" in done.stdout.splitlines()
    assert "globus-compute-endpoint start dtn" in done.stderr
    assert len(world.cloud.functions) == registered  # published once, whatever endpoints there are
    assert "endpoint dtn allows the functions of facility aps and no other" in s2cs("doctor").stdout


def test_an_error_arrives_as_what_it_is(aps: ComputeFacility) -> None:
    with pytest.raises(NotFound) as missing:
        aps.status(StatusQuery(uid="nobody", role="PROD"))
    assert missing.value.which == "nobody"
    with pytest.raises(PolicyDenied, match="does not allow"):
        aps.request(Request(uid="far", role="PROD", targets=["192.0.2.1:5000"]))


def test_a_task_that_is_delivered_twice_opens_one_side(
    world: World, aps: ComputeFacility, relays_below: Callable[..., list[int]]
) -> None:
    world.cloud.deliveries = 2
    wanted = Request(uid="twice", role="PROD", targets=["127.0.0.1:9"])
    offer = aps.request(wanted)
    assert len(relays_below(world.base)) == 1
    assert aps.request(wanted).relays == offer.relays
    with pytest.raises(Conflict):
        aps.request(wanted.model_copy(update={"targets": ["127.0.0.1:10"]}))
    assert aps.release(Release(uid="twice", role="PROD")).end is not None
    assert relays_below(world.base) == []


def test_calls_of_several_threads_share_a_connection(world: World, aps: ComputeFacility) -> None:
    aps.list()
    before = len(world.cloud.asked)
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.append(aps.list())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 4
    assert {one.rsplit("/", 1)[1] for one in world.cloud.asked[before:]} == {"submit"}


def test_results_are_taken_soon_after_they_have_arrived(aps: ComputeFacility) -> None:
    """By a setting of the SDK that is not public: a version that has it no more fails here, and is only slower."""
    from globus_compute_sdk.sdk import executor

    before = set(executor._RESULT_WATCHERS)
    aps.list()
    (ours,) = set(executor._RESULT_WATCHERS) - before
    assert executor._RESULT_WATCHERS[ours].poll_period_s == LOOK_S


def test_a_lost_task_ends_the_call_by_its_deadline_and_the_next_one_works(world: World) -> None:
    with ComputeFacility(world.endpoint.id, deadline_s=3) as aps:
        aps.list()
        with (
            frozen(world),
            pytest.raises(FacilityUnreachable, match=r"not answered list within 3 s; .* is online"),
        ):
            aps.list()
    with ComputeFacility(world.endpoint.id) as aps:
        aps.list()


def test_a_lost_task_keeps_no_process_from_exiting(world: World, aps: ComputeFacility) -> None:
    aps.list()  # the endpoint's process runs
    program = f"""
from scistream_flows import FacilityUnreachable
from scistream_flows.facility import ComputeFacility
facility = ComputeFacility({world.endpoint.id!r}, deadline_s=4)
try:
    facility.list()
except FacilityUnreachable as late:
    print(late)
"""  # and it is not closed
    with frozen(world):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ.copy()
        )
    assert "has not answered list within 4 s" in done.stdout, done.stderr
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("who", ["service", "endpoint"])
def test_a_function_that_is_not_allowed_does_not_run(world: World, who: str) -> None:
    traces = world.base / f"ran-{who}"
    with login() as client:
        text = f"def scistream_list(document):\n    open({str(traces)!r}, 'w').close()\n    return {{}}\n"
        foreign = client.register_source_code(text, "scistream_list", metadata=VERSIONS)
    world.cloud.checks_allow_list = who == "service"
    expected: type[Exception] = PolicyDenied if who == "service" else FacilityUnreachable
    with ComputeFacility(world.endpoint.id, functions={"list": foreign}, deadline_s=5) as facility:
        with pytest.raises(expected, match="not permitted"):
            facility.list()
        with pytest.raises(BadRequest, match="no function scistream_request"):
            facility.request(Request(uid="s", role="PROD"))
    assert not traces.exists()


def test_a_caller_chooses_no_settings(world: World) -> None:
    from globus_sdk import GlobusAPIError

    traces = world.base / "worker-init"
    with login() as client:
        batch = client.create_batch(user_endpoint_config={"worker_init": f"touch {traces}"})
        batch.add(world.functions["list"], ({"protocol": 1},))
        with pytest.raises(GlobusAPIError, match="worker_init"):
            client.batch_run(world.endpoint.id, batch)
    assert not traces.exists()


def test_arguments_that_may_run_code_are_not_read(world: World, aps: ComputeFacility) -> None:
    aps.list()
    with login() as client:
        task = client.run({"protocol": 1}, endpoint_id=world.endpoint.id, function_id=world.functions["list"])
        pause = threading.Event()
        for _ in range(300):
            if world.cloud.tasks[task].status != "waiting-for-ep":
                break
            pause.wait(0.1)
    assert "disabled by current" in world.cloud.tasks[task].outcome["exception"]


def test_an_answer_that_may_run_code_is_not_read() -> None:
    from globus_compute_sdk.serialize import ComputeSerializer

    reader = _json_only()
    assert reader.deserialize(reader.serialize({"ok": True})) == {"ok": True}
    for sent in (ComputeSerializer().serialize({"ok": True}), "st\nf:raise SystemExit\ndef f(): pass"):
        with pytest.raises(FacilityUnreachable, match="no JSON"):
            reader.deserialize(sent)


def test_relays_outlive_an_endpoint_process_that_is_killed(
    world: World, aps: ComputeFacility, application: Any, relays_below: Callable[..., list[int]]
) -> None:
    aps.request(Request(uid="killed", role="PROD", targets=[application.address]))
    relays = relays_below(world.base)
    assert len(relays) == 1
    for pid in world.endpoint.user_processes():
        os.kill(pid, signal.SIGKILL)
    assert relays_below(world.base) == relays
    # as the endpoint's own message says; else it takes three heartbeats
    for left in world.endpoint.directory.parent.glob("uep.*/daemon.pid"):
        left.unlink()
    with ComputeFacility(world.endpoint.id, deadline_s=5) as again:
        state = None
        for _ in range(8):  # a task that comes while the endpoint still takes its process for alive is lost
            with contextlib.suppress(FacilityUnreachable):
                state = again.status(StatusQuery(uid="killed", role="PROD")).state
                break
        assert state == "LISTENING", world.endpoint.log
    aps.release(Release(uid="killed", role="PROD"))


def test_relays_outlive_an_endpoint_that_is_stopped(
    world: World, aps: ComputeFacility, application: Any, relays_below: Callable[..., list[int]]
) -> None:
    aps.request(Request(uid="stopped", role="PROD", targets=[application.address]))
    relays = relays_below(world.base)
    assert len(relays) == 1
    world.endpoint.__exit__()
    assert relays_below(world.base) == relays
    world.cloud.start_s = 0  # the task is taken, and waits for the endpoint
    with (
        ComputeFacility(world.endpoint.id, deadline_s=2) as late,
        pytest.raises(FacilityUnreachable, match="within 2 s; the endpoint is offline"),
    ):
        late.list()
    world.cloud.start_s = 30
    world.endpoint.__enter__()
    assert aps.status(StatusQuery(uid="stopped", role="PROD")).state == "LISTENING"
    aps.release(Release(uid="stopped", role="PROD"))


@pytest.mark.parametrize("address", ["compute:", "compute:8a5b", f"compute:{uuid.uuid4()}x"])
def test_what_is_no_uuid_is_no_address(address: str) -> None:
    with pytest.raises(BadRequest, match="is not the UUID of an endpoint"):
        connect_facility(address)


def registered(cloud: ComputeCloud, **settings: object) -> str:
    """An endpoint that is known to the service, and never came up."""
    return str(cloud.answer("POST", "/v3/endpoints", settings)["endpoint_id"])


def test_an_endpoint_that_is_no_facility_says_so(world: World) -> None:
    other = next(iter(world.functions.values()))
    with login() as client:
        twin = client.register_source_code("def f(): pass", "scistream_list", metadata=VERSIONS)
    for endpoint_id, words in (
        (str(uuid.uuid4()), "could not be resolved"),
        (registered(world.cloud), "no facility: it has no list of allowed functions"),
        (registered(world.cloud, allowed_functions=[other]), "publishes no function scistream_list"),
        (
            registered(world.cloud, allowed_functions=[twin, world.functions["list"]]),
            "serves several facilities",
        ),
    ):
        with ComputeFacility(endpoint_id) as facility, pytest.raises(BadRequest, match=words):
            facility.list()


@pytest.mark.parametrize(
    ("status", "expected"),
    [(401, Unauthenticated), (403, PolicyDenied), (413, BadRequest), (422, FacilityUnreachable)],
)
def test_a_refusal_of_the_service_has_a_type_and_its_words(
    world: World, aps: ComputeFacility, status: int, expected: type[Exception]
) -> None:
    aps.list()
    world.cloud.refusals = [Refused(status, "NO", "because of the moon")] * 10  # the SDK repeats some
    with pytest.raises(expected, match="because of the moon"):
        aps.list()
    world.cloud.refusals.clear()
    aps.list()


def test_nobody_is_asked_to_log_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOBUS_COMPUTE_CLIENT_ID")
    monkeypatch.delenv("GLOBUS_COMPUTE_CLIENT_SECRET")
    with ComputeFacility(world.endpoint.id) as facility, pytest.raises(Unauthenticated, match="Log in once"):
        facility.list()


def test_a_service_out_of_reach_is_a_facility_out_of_reach(
    world: World, monkeypatch: pytest.MonkeyPatch, free_address: str
) -> None:
    for variable in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(variable, f"http://{free_address}")
    with (
        ComputeFacility(world.endpoint.id, deadline_s=2) as facility,
        pytest.raises(FacilityUnreachable, match=r"cannot be reached|within 2 s; the service does not tell"),
    ):
        facility.list()


def test_without_the_sdk_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "globus_compute_sdk", None)
    with (
        ComputeFacility(str(uuid.uuid4())) as facility,
        pytest.raises(MissingExtra, match=r"pip install 'scistream-flows\[compute\]'"),
    ):
        facility.list()


def test_the_sdk_is_not_loaded_before_it_is_used() -> None:
    program = (
        "import sys; from scistream_flows import connect_facility\n"
        f"connect_facility('compute:{uuid.uuid4()}').close()\n"
        "print(*[one for one in ('globus_compute_sdk', 'globus_sdk', 'pika') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_functions_that_are_no_verbs_or_have_no_uuid_are_refused() -> None:
    with pytest.raises(BadRequest, match="no verb 'paint'"):
        ComputeEndpoint(str(uuid.uuid4()), functions={"paint": str(uuid.uuid4())})
    with pytest.raises(BadRequest, match="not the UUID of the function of list"):
        ComputeEndpoint(str(uuid.uuid4()), functions={"list": "8a5b"})
