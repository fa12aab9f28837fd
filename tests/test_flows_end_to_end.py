"""The flow definitions against two facilities' real services: real relays, a real instrument, a real analysis.

Replaced are Globus Flows, by the local runner; Globus Compute, where a flow uses it, and Globus Auth, by stand-ins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import Served, serving
from standins.compute import Compute
from standins.globus import Globus

from scistream_flows import functions
from scistream_flows.actions.language import Definition
from scistream_flows.actions.render import VERBS, Analysis, FlowDocument, render
from scistream_flows.actions.runner import Polling, Run, run
from scistream_flows.config import load_facility
from scistream_flows.models import ListQuery
from scistream_flows.s2cs import S2CS

EXAMPLE = Path(__file__).parents[1] / "examples" / "flow"
COMPUTE = "https://compute.actions.globus.org/v3"
QUICK = Polling(first_s=0.05, factor=1.5, longest_s=0.3, scale=1.0)

pytestmark = pytest.mark.timeout(180)


class Lab:
    """What is at both ends of a stream: instruments and analyses, each a process, and the Compute stand-in."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.processes: list[subprocess.Popen[str]] = []
        self._analyses: dict[str, subprocess.Popen[str]] = {}
        self.analysis = Analysis(
            endpoint_id=str(uuid.uuid4()),
            start_function_id=compute.register(self._start),
            collect_function_id=compute.register(self._collect),
        )

    def instrument(self, *, blocks: int = 100, seconds: float = 0.5) -> tuple[str, subprocess.Popen[str]]:
        """An instrument that sends `blocks` of 64 KiB to who connects; its address, and the process."""
        process = self._program("instrument.py", "--blocks", str(blocks), "--seconds", str(seconds))
        assert process.stdout is not None
        return json.loads(process.stdout.readline())["listening"], process

    def functions_of(self, facility: str) -> dict[str, str]:
        """The functions of a facility as they are registered, by verb: from their source text."""
        registered = {}
        for verb in VERBS:
            names: dict[str, Any] = {}
            exec(functions.source(verb, facility=facility), names)  # noqa: S102 - as a worker of Compute does
            registered[verb] = self.compute.register(names[f"scistream_{verb}"])
        return registered

    def _program(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, EXAMPLE / script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def _start(self, document: Mapping[str, Any]) -> dict[str, Any]:
        if document["options"].get("refuse"):
            return {"ok": False, "error": {"code": "busy", "message": "no node is free"}}
        (listener,) = document["listeners"]
        process = self._analyses[document["stream_id"]] = self._program("analysis.py", listener)
        if document["options"].get("die"):
            process.kill()
        return {"ok": True, "value": {"pid": process.pid}}

    def _collect(self, document: Mapping[str, Any]) -> dict[str, Any]:
        process = self._analyses[document["stream_id"]]
        assert document["analysis"] == {"pid": process.pid}
        said, complaint = process.communicate(timeout=60)
        if process.returncode:
            return {"ok": False, "error": {"code": "analysis", "message": complaint}}
        return {"ok": True, "value": json.loads(said)}

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Compute() as compute:
        lab = Lab(compute)
        yield lab
        lab.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both facilities keep their state."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def pair(base: Path) -> Iterator[dict[str, Served]]:
    """The services of two facilities."""
    with serving(base, "aps", development=True) as aps, serving(base, "alcf", development=True) as alcf:
        yield {"producer": aps, "consumer": alcf}


@pytest.fixture
def nothing_dangles(
    base: Path, relays_below: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], None]]:
    """A function that holds once no relay, no stream and no listening socket is left; held at the end of the test."""
    monkeypatch.setenv("SCISTREAM_STATE_DIR", str(base))
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(base / "none"))

    def hold() -> None:
        assert relays_below(base, patience_s=40) == []
        for name in ("aps", "alcf"):
            with S2CS(load_facility(name)) as service:
                assert service.list(ListQuery()).streams == []

    yield hold
    hold()


def tokens_of(*facilities: Served) -> Callable[[str], str | None]:
    """The development token of the facility that an address belongs to."""
    known = {one.url: one.token for one in facilities}
    return lambda address: next(
        (token for url, token in known.items() if address.startswith(url + "/")), None
    )


def rendered(pair: Mapping[str, Served], lab: Lab, kind: str = "slices", **options: Any) -> FlowDocument:
    """A flow for the pair that starts an analysis, with slices of a moment and the Compute stand-in."""
    flow = render(
        kind,
        producer=pair["producer"].url,
        consumer=pair["consumer"].url,
        analysis=lab.analysis,
        slice_s=5,
        **options,
    )
    return changed(flow, f'"{COMPUTE}"', f'"{lab.compute.url}"')


def changed(flow: FlowDocument, pattern: str, replacement: str) -> FlowDocument:
    """The flow with another text in its definition."""
    text, count = re.subn(pattern, replacement, json.dumps(flow.definition))
    assert count
    return flow.model_copy(update={"definition": json.loads(text)})


def go(
    flow: FlowDocument, pair: Mapping[str, Served], target: str, *, polling: Polling = QUICK, **options: Any
) -> Run:
    given = {"targets": [target], "linger_s": 0, **options.pop("given", {})}
    return run(
        Definition(flow.definition),
        given,
        input_schema=flow.input_schema,
        authorizer=options.pop("authorizer", None) or tokens_of(*pair.values()),
        polling=polling,
        **options,
    )


def result_of(run: Run) -> Any:
    return run.output["result"]["details"]["results"][0]["output"]["value"]


def visited(run: Run) -> list[str]:
    return [
        one["details"]["state_name"]
        for one in run.log
        if one["code"].endswith("Started") and "state_name" in one["details"]
    ]


def was_released(run: Run) -> bool:
    """Whether both sides were asked to release, and did."""
    return all(run.output[f"{side}_release"]["details"]["released"] for side in ("consumer", "producer"))


# --- everything as it should be


@pytest.mark.parametrize("kind", ["slices", "action-providers"])
def test_a_stream_is_carried_whole_and_both_sides_are_released(
    kind: str, pair: dict[str, Served], lab: Lab, nothing_dangles: Callable[[], None]
) -> None:
    target, instrument = lab.instrument(blocks=1000, seconds=4)
    ended = go(rendered(pair, lab, kind), pair, target, label="the lab").check()
    sent = json.loads(instrument.communicate(timeout=30)[0])
    assert result_of(ended) == sent
    assert sent["bytes"] == 1000 * 65_536
    assert was_released(ended)
    for side in ("consumer", "producer"):
        final = ended.output[f"{side}_release"]["details"]["final"]
        assert final["reason"] == "finished"
        assert final["bytes"] >= sent["bytes"]
    assert ended.output["stream"]["details"]["ended_by"] == "closed"
    assert ended.output["stream"]["label"] == "the lab"
    seen = [
        one["details"]["output"]["details"]["bytes"]
        for one in ended.log
        if one["code"] == "ActionPolled" and one["details"]["state_name"] == "MonitorStream"
    ]
    assert any(seen), "progress is seen while the stream runs"
    nothing_dangles()


def test_several_slices_are_one_stream(
    pair: dict[str, Served],
    lab: Lab,
    nothing_dangles: Callable[[], None],  # noqa: ARG001
) -> None:
    target, instrument = lab.instrument(blocks=1000, seconds=5)
    flow = changed(rendered(pair, lab), '"duration_s": 5', '"duration_s": 1')
    ended = go(flow, pair, target).check()
    assert visited(ended).count("MonitorStream") >= 3
    assert result_of(ended) == json.loads(instrument.communicate(timeout=30)[0])


def test_applications_may_be_started_elsewhere_and_several_listeners_be_used(
    pair: dict[str, Served],
    lab: Lab,
    talk: Callable[[str, bytes], str],
    application: Any,
    nothing_dangles: Callable[[], None],  # noqa: ARG001
) -> None:
    flow = render("slices", producer=pair["producer"].url, consumer=pair["consumer"].url, slice_s=5)
    found: list[str] = []
    threads: list[threading.Thread] = []

    def connect(event: Mapping[str, Any]) -> None:
        if event["code"] == "ActionCompleted" and event["details"]["state_name"] == "ConnectRelays":
            for listener in listeners:
                threads.append(
                    threading.Thread(target=lambda at=listener: found.append(talk(at, b"hello" * 1000)))
                )
                threads[-1].start()
        if event["code"] == "ActionCompleted" and event["details"]["state_name"] == "StartConsumerRelay":
            listeners.extend(event["details"]["output"]["details"]["listeners"])

    listeners: list[str] = []
    ended = go(
        flow, pair, application.address, given={"num_conn": 3, "linger_s": 1}, on_event=connect
    ).check()
    for thread in threads:
        thread.join(30)
    assert len(listeners) == 3
    assert found == [hashlib.sha256(application.payload).hexdigest()] * 3
    assert application.received == [hashlib.sha256(b"hello" * 1000).hexdigest()] * 3
    assert ended.output["consumer_release"]["details"]["final"]["bytes"] >= 3 * len(application.payload)
    assert lab.processes == []


@pytest.mark.parametrize("with_analysis", [True, False])
def test_compute_functions_alone_set_up_watch_and_release_a_stream(
    with_analysis: bool,  # noqa: FBT001
    lab: Lab,
    facility: Callable[..., S2CS],
    talk: Callable[[str, bytes], str],
) -> None:
    services = {"producer": facility("aps"), "consumer": facility("alcf")}

    flow = render(
        "compute-only",
        producer=str(uuid.uuid4()),
        consumer=str(uuid.uuid4()),
        producer_functions=lab.functions_of("aps"),
        consumer_functions=lab.functions_of("alcf"),
        analysis=lab.analysis if with_analysis else None,
        poll_every_s=1,
    )
    flow = changed(changed(flow, f'"{COMPUTE}"', f'"{lab.compute.url}"'), '"Seconds": 5', '"Seconds": 1')
    target, instrument = lab.instrument()
    elsewhere: list[threading.Thread] = []

    def connect(event: Mapping[str, Any]) -> None:
        details = event["details"]
        if (
            not with_analysis
            and not elsewhere
            and details.get("state_name") == "PollReady"
            and event["code"] == "ActionCompleted"
        ):
            status = details["output"]["details"]["results"][0]["output"]["value"]
            if status["state"] == "READY":
                elsewhere.append(threading.Thread(target=talk, args=(status["listeners"][0], b"")))
                elsewhere[0].start()

    ended = go(flow, {}, target, authorizer=lambda _: None, on_event=connect).check()
    for thread in elsewhere:
        thread.join(30)
    sent = json.loads(instrument.communicate(timeout=30)[0])
    for side in ("consumer", "producer"):
        released = ended.output[f"{side}_release"]["details"]["results"][0]["output"]["value"]
        assert released["released"] is True
        assert released["end"]["reason"] == "finished"
        assert released["end"]["bytes"]["to_consumer"] >= sent["bytes"]
        assert services[side].list(ListQuery()).streams == []
    if with_analysis:
        assert result_of(ended) == sent
    assert len(json.dumps(ended.output)) < 100_000


def test_a_compute_function_that_refuses_ends_the_flow_with_its_words(
    lab: Lab, facility: Callable[..., S2CS], free_address: str
) -> None:
    services = {"producer": facility("aps"), "consumer": facility("alcf")}
    known = {"producer": lab.functions_of("aps"), "consumer": lab.functions_of("alcf")}
    known["consumer"]["request"] = lab.compute.register(lambda _: "no document at all")
    flow = render(
        "compute-only",
        producer=str(uuid.uuid4()),
        consumer=str(uuid.uuid4()),
        producer_functions=known["producer"],
        consumer_functions=known["consumer"],
    )
    flow = changed(flow, f'"{COMPUTE}"', f'"{lab.compute.url}"')
    ended = go(flow, {}, free_address, authorizer=lambda _: None)
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert ended.output["error"]["Error"] == "StepRefused"
    assert services["producer"].list(ListQuery()).streams == []


# --- faults: whatever happens, nothing dangles


def test_an_analysis_that_is_refused_fails_the_flow_and_releases(
    pair: dict[str, Served], lab: Lab, nothing_dangles: Callable[[], None]
) -> None:
    target, _ = lab.instrument()
    ended = go(rendered(pair, lab), pair, target, given={"analysis_options": {"refuse": True}})
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert ended.output["error"]["Error"] == "AnalysisFailed"
    assert (
        ended.output["analysis"]["details"]["results"][0]["output"]["error"]["message"] == "no node is free"
    )
    assert "MonitorStream" not in visited(ended)
    assert was_released(ended)
    nothing_dangles()


def test_an_analysis_that_is_killed_fails_the_flow_and_releases(
    pair: dict[str, Served], lab: Lab, nothing_dangles: Callable[[], None]
) -> None:
    target, _ = lab.instrument(blocks=10_000, seconds=30)
    flow = changed(rendered(pair, lab), '"duration_s": 5', '"duration_s": 1')
    killer: list[int] = []

    def kill(event: Mapping[str, Any]) -> None:
        output = event["details"].get("output")
        if event["code"] == "ActionPolled" and output["details"].get("bytes", 0) > 0 and not killer:
            killer.append(lab.processes[-1].pid)
            os.kill(killer[0], signal.SIGKILL)

    ended = go(flow, pair, target, on_event=kill)
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert killer
    assert was_released(ended)
    nothing_dangles()


def test_an_instrument_that_is_not_there_is_named_and_both_sides_are_released(
    pair: dict[str, Served], lab: Lab, free_address: str, nothing_dangles: Callable[[], None]
) -> None:
    ended = go(rendered(pair, lab, hello_timeout_s=2), pair, free_address)
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    caught = ended.output["error"]
    assert caught["Error"] == "ActionFailedException"
    assert caught["Cause"]["state_name"] == "ConnectRelays"
    assert "unreachable" in caught["Cause"]["details"]["description"]
    assert lab.processes == []
    assert was_released(ended)
    nothing_dangles()


def test_a_consumer_whose_service_is_down_leaves_nothing_at_the_producer(
    pair: dict[str, Served], lab: Lab, free_address: str, nothing_dangles: Callable[[], None]
) -> None:
    target, _ = lab.instrument()
    flow = changed(rendered(pair, lab), re.escape(pair["consumer"].url), f"http://{free_address}")
    ended = go(flow, pair, target)
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert ended.output["error"]["Error"] == "ActionUnableToRun"
    assert ended.output["producer_release"]["details"]["final"]["reason"] == "released"
    assert ended.output["consumer_release_error"]["Error"] == "ActionUnableToRun"
    nothing_dangles()


def test_a_start_that_is_denied_is_released_all_the_same(
    pair: dict[str, Served], lab: Lab, nothing_dangles: Callable[[], None]
) -> None:
    ended = go(rendered(pair, lab), pair, "192.0.2.1:5000")
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert ended.output["error"]["Cause"]["details"]["code"] == "denied"
    assert visited(ended)[:4] == [
        "Settings",
        "StartProducerRelay",
        "ReleaseConsumerRelay",
        "ReleaseProducerRelay",
    ]
    nothing_dangles()


def test_a_consumer_that_dies_in_mid_stream_fails_the_flow_and_its_relay_ends_by_its_lease(
    base: Path, pair: dict[str, Served], lab: Lab, nothing_dangles: Callable[[], None]
) -> None:
    target, _ = lab.instrument(blocks=20_000, seconds=60)
    with serving(base, "alcf", development=True) as second:
        mixed = {"producer": pair["producer"], "consumer": second}
        # a lease that no flow should have, so that its end can be seen
        flow = changed(rendered(mixed, lab), r'"lease_s": \d+', '"lease_s": 20')
        flow = changed(flow, '"WaitTime": 310', '"WaitTime": 12')

        def kill(event: Mapping[str, Any]) -> None:
            output = event["details"].get("output")
            if event["code"] == "ActionPolled" and output["details"].get("bytes", 0) > 0:
                second.kill()
                lab.processes[-1].kill()  # bytes would renew the lease

        ended = go(flow, mixed, target, on_event=kill)
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert ended.output["consumer_release_error"]
    assert ended.output["producer_release"]["details"]["released"] is True
    nothing_dangles()


def test_a_flow_that_is_cancelled_leaves_its_relays_to_their_lease(
    base: Path,
    pair: dict[str, Served],
    lab: Lab,
    relays_below: Callable[..., list[int]],
    nothing_dangles: Callable[[], None],
) -> None:
    """As at Globus, where nothing of a cancelled run is executed: the lease is what frees the relays."""
    target, _ = lab.instrument()
    flow = render("slices", producer=pair["producer"].url, consumer=pair["consumer"].url)
    flow = changed(flow, r'"lease_s": \d+', '"lease_s": 10')
    cancelled = threading.Event()

    def cancel(event: Mapping[str, Any]) -> None:
        if event["code"] == "ActionPolled" and event["details"]["state_name"] == "MonitorStream":
            cancelled.set()

    ended = go(flow, pair, target, on_event=cancel, cancelled=cancelled)
    assert (ended.status, ended.error) == ("ENDED", "FlowCanceled")
    assert "ReleaseConsumerRelay" not in visited(ended)
    assert len(relays_below(base)) == 2
    nothing_dangles()


def test_a_lease_that_runs_out_is_the_reason_the_flow_gives(
    pair: dict[str, Served], lab: Lab, nothing_dangles: Callable[[], None]
) -> None:
    target, _ = lab.instrument()
    flow = render("slices", producer=pair["producer"].url, consumer=pair["consumer"].url)
    flow = changed(flow, r'"lease_s": \d+', '"lease_s": 1')
    rare = Polling(first_s=4, factor=1, longest_s=4)
    ended = go(flow, pair, target, polling=rare)
    assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
    assert ended.output["error"]["Cause"]["state_name"] in ("ConnectRelays", "MonitorStream")
    assert "lease_expired" in json.dumps(ended.output["error"])
    nothing_dangles()


# --- Globus Auth


@contextlib.contextmanager
def with_globus(base: Path, globus: Globus) -> Iterator[tuple[dict[str, Served], dict[str, str]]]:
    """Two facilities with clients at Globus, and the scope of each."""
    with contextlib.ExitStack() as stack:
        pair, scopes = {}, {}
        for side, name in (("producer", "lcls"), ("consumer", "nersc")):
            client, scope = globus.add_facility()
            table = f'[globus]\nclient_id = "{client.id}"\nscope = "{scope}"\n'
            environment = {**globus.environment, "SCISTREAM_GLOBUS_CLIENT_SECRET": str(client.secret)}
            pair[side] = stack.enter_context(serving(base, name, more=table, environment=environment))
            scopes[pair[side].url] = scope
        yield pair, scopes


def test_each_facility_gets_its_own_token_and_the_stream_belongs_to_the_person(
    tmp_path: Path, lab: Lab, relays_below: Callable[..., list[int]]
) -> None:
    with Globus() as globus, with_globus(tmp_path, globus) as (pair, scopes):
        ada = globus.add_person("ada@example.org")
        tokens = {url: globus.mint(ada, scope) for url, scope in scopes.items()}
        target, instrument = lab.instrument()
        ended = go(
            rendered(pair, lab),
            pair,
            target,
            authorizer=lambda address: (
                next(tokens[url] for url in tokens if address.startswith(url))
                if any(address.startswith(url) for url in tokens)
                else None
            ),
        ).check()
        assert result_of(ended) == json.loads(instrument.communicate(timeout=30)[0])
        assert ended.output["producer_relay"]["creator_id"] == ada.urn
        assert not [token for token in tokens.values() if token in json.dumps(ended.log)]
    assert relays_below(tmp_path, patience_s=10) == []


def test_without_globus_auth_no_step_is_done_and_nothing_dangles(
    tmp_path: Path, lab: Lab, relays_below: Callable[..., list[int]]
) -> None:
    with Globus() as globus, with_globus(tmp_path, globus) as (pair, scopes):
        ada = globus.add_person("ada@example.org")
        flow = changed(rendered(pair, lab), r'"lease_s": \d+', '"lease_s": 3')
        target, _ = lab.instrument(blocks=10, seconds=0)

        def token(address: str) -> str | None:
            # a new one each time: none is remembered by the facility
            return next(
                (globus.mint(ada, scope) for url, scope in scopes.items() if address.startswith(url)), None
            )

        def fail(event: Mapping[str, Any]) -> None:
            if event["code"] == "ActionCompleted" and event["details"]["state_name"] == "StartConsumerRelay":
                globus.down()

        ended = go(flow, pair, target, authorizer=token, on_event=fail, polling=Polling(scale=0.1))
        assert (ended.status, ended.error) == ("FAILED", "StreamFailed")
        assert "Globus did not answer" in json.dumps(ended.output["error"])
        assert ended.output["consumer_release_error"]
        assert ended.output["producer_release_error"]
    assert relays_below(tmp_path, patience_s=15) == [], "the leases end what could not be released"


# --- the example


@contextlib.contextmanager
def example(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, EXAMPLE / "flow.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_example_does_what_it_says(tmp_path: Path, relays_below: Callable[..., list[int]]) -> None:
    with example(tmp_path) as process:
        said, progress = process.communicate(timeout=120)
    assert process.returncode == 0, progress
    result = json.loads(said)
    assert result["status"] == "SUCCEEDED"
    assert result["sent"] == result["received"]
    assert min(result["relay_bytes"].values()) >= result["sent"]["bytes"] > 0
    assert "MonitorStream" in progress
    assert relays_below(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_example_that_is_interrupted_leaves_nothing(
    tmp_path: Path, relays_below: Callable[..., list[int]], number: signal.Signals
) -> None:
    with example(tmp_path) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "MonitorStream" in line:
                break
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == ""
    assert psutil.wait_procs(started, timeout=10)[1] == []
    assert relays_below(tmp_path, patience_s=5) == []
    assert list(tmp_path.iterdir()) == []


def test_the_applications_of_the_example_know_nothing_of_scistream() -> None:
    for script in ("instrument.py", "analysis.py"):
        assert "import scistream" not in (EXAMPLE / script).read_text()
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        nobody.close()
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run(
                [sys.executable, EXAMPLE / "analysis.py", "127.0.0.1:1"],
                check=True,
                capture_output=True,
                timeout=60,
            )
