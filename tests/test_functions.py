"""The verbs as functions: the same over every executor, JSON only, and nothing is raised where it runs."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scistream_flows import (
    FacilityUnreachable,
    NotFound,
    PolicyDenied,
    StreamNotReady,
    connect_facility,
    functions,
    open_stream,
)
from scistream_flows.errors import BadRequest
from scistream_flows.facility import ExecutorFacility
from scistream_flows.functions import answer, source
from scistream_flows.models import Request, StatusQuery
from scistream_flows.s2cs import VERBS

pytestmark = pytest.mark.usefixtures("state_base")


@pytest.fixture
def parsl_workers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_temporary: Path,  # noqa: ARG001 - where they put sockets
) -> Iterator[Executor]:
    """Parsl's own workers: other processes, started by a provider as a batch job would be."""
    # its programs are installed beside this Python
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    parsl = pytest.importorskip("parsl", reason="not installed: the extra parsl")
    from parsl.concurrent import ParslPoolExecutor
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    workers = HighThroughputExecutor(
        address="127.0.0.1",
        max_workers_per_node=1,
        provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
        loopback_address="127.0.0.1",
    )
    config = parsl.Config(run_dir=str(tmp_path / "parsl"), executors=[workers], initialize_logging=False)
    with ParslPoolExecutor(config) as executor:
        yield executor


@pytest.fixture
def dask_workers(tmp_path: Path) -> Iterator[Executor]:
    """A worker of Dask, which is another process, and its scheduler, which is here."""
    distributed = pytest.importorskip("distributed", reason="not installed: the extra test")
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",  # with None it has the fixed port of its page
            local_directory=str(tmp_path / "dask"),
        ) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
    ):
        yield executor


@pytest.fixture(params=["threads", "processes", "parsl", "dask"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param in ("parsl", "dask"):
        yield request.getfixturevalue(f"{request.param}_workers")
        return
    pool: Executor = ThreadPoolExecutor(2)
    if request.param == "processes":
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with pool:
        yield pool


def test_a_stream_is_set_up_by_any_executor(
    executor: Executor, application: Any, talk: Callable[[str, bytes], str]
) -> None:
    aps, alcf = (ExecutorFacility(executor, facility=name) for name in ("aps", "alcf"))
    with open_stream(aps, alcf, targets=[application.address], linger_s=0, ready_timeout_s=100) as stream:
        payload = os.urandom(300_000)
        assert talk(stream.listeners[0], payload) == hashlib.sha256(application.payload).hexdigest()
        end = stream.wait(60).check()
    assert application.received == [hashlib.sha256(payload).hexdigest()]
    assert min(end.prod.bytes.to_consumer, end.cons.bytes.to_consumer) >= len(application.payload)


def test_an_error_arrives_as_what_it_is(executor: Executor) -> None:
    facility = ExecutorFacility(executor, facility="aps")
    with pytest.raises(NotFound) as missing:
        facility.status(StatusQuery(uid="nobody", role="PROD"))
    assert missing.value.which == "nobody"
    with pytest.raises(PolicyDenied, match="does not allow"):
        facility.request(Request(uid="far", role="PROD", targets=["192.0.2.1:5000"]))


def test_a_relay_outlives_the_worker_that_started_it(
    application: Any, relays_below: Callable[..., list[int]], state_base: Path
) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        worker = pool.submit(os.getpid).result(60)
        aps = ExecutorFacility(pool, facility="aps")
        aps.request(Request(uid="s", role="PROD", targets=[application.address]))
        (relay,) = relays_below(state_base)
        os.kill(worker, signal.SIGKILL)
    assert relays_below(state_base) == [relay]
    with ThreadPoolExecutor(1) as pool:
        facility = ExecutorFacility(pool, facility="aps")
        assert facility.status(StatusQuery(uid="s", role="PROD")).state == "LISTENING"
        assert answer("release", document(uid="s", role="PROD"), facility="aps")["ok"]
    assert relays_below(state_base) == []


class Remembering(ThreadPoolExecutor):
    """Threads that remember which verbs they were given."""

    def __init__(self) -> None:
        super().__init__(2)
        self.verbs: list[str] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.verbs.append(args[0]["verb"])
        return super().submit(fn, *args, **kwargs)


def test_opening_asks_the_facility_of_the_producer_twice_only(
    application: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question is half a second by Globus Compute: READY is waited for where the relay is."""
    monkeypatch.setattr(functions, "READY_S", 60)
    with Remembering() as executor, connect_facility("local:alcf") as alcf:  # type: ignore[attr-defined]
        aps = ExecutorFacility(executor, facility="aps")
        with open_stream(aps, alcf, targets=[application.address]) as stream:
            assert executor.verbs == ["request", "update"]
            assert stream.status().ready


def test_an_update_does_not_wait_for_what_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "READY_S", 0.3)
    with Remembering() as executor:
        aps, alcf = (ExecutorFacility(executor, facility=name) for name in ("aps", "alcf"))
        open_stream(aps, alcf, targets=[]).release()
        assert "status" not in executor.verbs
        with socket.create_server(("127.0.0.1", 0)) as server:
            nobody = "{}:{}".format(*server.getsockname())
        with pytest.raises(StreamNotReady) as late:
            open_stream(aps, alcf, targets=[nobody], ready_timeout_s=2)
        assert late.value.details["reason"] == "unreachable"


def test_an_update_that_was_done_is_no_error_when_the_service_goes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The looks for READY come after it; another one than `update` would be given up for them."""
    monkeypatch.setattr(functions, "READY_S", 60)
    offer = answer("request", document(uid="s", role="PROD", targets=["127.0.0.1:9"]), facility="aps")[
        "value"
    ]
    peer = {"public_key": offer["relays"][0]["public_key"], "source_addresses": ["127.0.0.1"]}
    asked = functions._asked

    def goes_away(config: object, verb: str, text: str, **limits: float) -> dict[str, Any]:
        if verb == "status":
            raise FacilityUnreachable("nobody serves", which="aps")
        return asked(config, verb, text, **limits)  # type: ignore[arg-type]

    with monkeypatch.context() as away:
        away.setattr(functions, "_asked", goes_away)
        said = answer("update", document(uid="s", role="PROD", peers=[peer]), facility="aps")
    assert said["ok"]
    assert said["value"]["state"] == "LISTENING"
    assert answer("release", document(uid="s", role="PROD"), facility="aps")["ok"]


def test_a_worker_that_does_not_answer_is_given_up() -> None:
    free = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(free.wait, 60)
        try:
            with pytest.raises(FacilityUnreachable, match=r"has not answered list within 0\.2 s"):
                ExecutorFacility(pool, facility="aps", deadline_s=0.2).list()
        finally:
            free.set()


def test_an_executor_that_is_shut_down_or_broken_is_a_facility_out_of_reach() -> None:
    with ThreadPoolExecutor(1) as pool:
        pass
    with pytest.raises(FacilityUnreachable, match="takes no work"):
        ExecutorFacility(pool, facility="aps").list()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as broken:
        broken.submit(os.getpid).result(60)
        pending = broken.submit(signal.pause)
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(FacilityUnreachable):
            ExecutorFacility(broken, facility="aps").list()
        assert pending.exception(60) is not None


def document(**fields: object) -> dict[str, Any]:
    return {"protocol": 1, **fields}


def test_every_answer_is_json_and_says_who_gave_it() -> None:
    for verb, asked in (
        ("list", document()),
        ("status", document(uid="nobody", role="PROD")),
        ("paint", document()),
        ("list", {"protocol": 1, "include_ended": {1, 2}}),
        ("list", {"protocol": 2}),
    ):
        said = json.loads(json.dumps(answer(verb, asked, facility="aps")))
        assert said["ok"] is (verb == "list" and asked == document())
        assert said["protocol"] == 1
        assert said["worker"].keys() == {"python", "host", "version"}


@pytest.mark.parametrize("verb", ["update", "status"])
def test_a_document_that_is_no_object_is_a_bad_request(verb: str) -> None:
    for asked in (["no", "object"], "text", 5, None):
        said = answer(verb, asked, facility="aps")  # type: ignore[arg-type]
        assert said["error"]["code"] == "bad-request"


def test_a_changed_configuration_counts_from_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCISTREAM_POLICY_MODES", '["auth"]')
    asked = document(uid="s", role="PROD", mode="tls")
    assert answer("request", asked, facility="aps")["error"]["code"] == "denied"
    monkeypatch.delenv("SCISTREAM_POLICY_MODES")
    assert answer("request", asked, facility="aps")["ok"]
    assert answer("release", document(uid="s", role="PROD"), facility="aps")["ok"]


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_registered_is_short_source_text_that_runs_by_itself(verb: str) -> None:
    text = source(verb, facility="aps")
    assert len(text) < 1000
    names: dict[str, Any] = {}
    exec(text, names)  # noqa: S102 - as a worker does with a function that came as text
    said = names[f"scistream_{verb}"](document(uid="nobody", role="PROD", surplus=1))
    assert said["error"]["code"] == "bad-request"


def test_what_administrators_have_registered_and_allowed_stays_what_it_was() -> None:
    texts = "".join(source(verb, facility="aps") for verb in sorted(VERBS))
    assert hashlib.sha256(texts.encode()).hexdigest() == (
        "108f0c0f5ef4aa952e4c47f232ee87fcbcc6aeb6a068e0fcf7d44dc3071b9759"
    )


def test_where_the_package_is_missing_the_function_says_so() -> None:
    program = source("list", facility="aps") + "\nprint(scistream_list({'protocol': 1}))"
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert "scistream-flows is not installed where this function runs" in done.stdout, done.stderr


def test_no_loader_is_made_for_what_is_no_verb_or_no_name() -> None:
    with pytest.raises(BadRequest, match="no verb"):
        source("paint", facility="aps")
    from scistream_flows.errors import ConfigError

    with pytest.raises(ConfigError):
        source("list", facility='"); import os #')
