"""What the documentation shows, works as it stands there: every command and every program on every page is run.

A page has a stage: what has to be there for its commands, and what stands in for names that only a real facility has.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pytest
import yaml
from benchmarks import machine
from benchmarks.results import Results
from conftest import Application, certificate_for_loopback, connect_and_exchange
from serving import LOCAL, TOML, serving

from scistream_flows.actions.render import render
from scistream_flows.config import load_facility, tomllib
from scistream_flows.models import ListQuery, Request
from scistream_flows.s2cs import S2CS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BIN = Path(sys.executable).parent
KINDS = {"sh", "python", "toml", "json", "yaml", "ini", "text"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# Commands that need what only the Globus cloud has. Here it is seen that they exist with these options; the test
# that runs them, with a stand-in, is named.
AT_GLOBUS = {
    "scistream-flows deploy flow.json --client-id UUID": "test_deploy.py",
    "s2cs init aps --compute aps": "test_endpoint.py",
}


# Pages that are played as a whole, by a test of their own.
PLAYED_BY = {"command-line.md": "test_command_line_guide.py"}


@dataclass
class Stage:
    """What a page needs to be played.

    Attributes:
        stands_for: What is written on the page, and what it is here.
        environment: Variables of its commands.
        before: Called with each command before it is typed; what is typed instead.
        lasting: Commands that go on until Ctrl-C, and what they say when they work.
        said: What each command or program has printed.
    """

    stands_for: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[str], str] = str
    lasting: dict[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)


Scene: TypeAlias = Callable[[Path], contextlib.AbstractContextManager[Stage]]
STAGES: dict[str, Scene] = {}


def stage(page: str) -> Callable[[Callable[[Path], Iterator[Stage]]], Scene]:
    """Name a function as the stage of a page. After the page it may look at what was said."""

    def register(function: Callable[[Path], Iterator[Stage]]) -> Scene:
        STAGES[page] = contextlib.contextmanager(function)
        return STAGES[page]

    return register


DETECTOR = """
import zmq
with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
    print(socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
    while True:
        socket.send(bytes(range(256)))
"""


@contextlib.contextmanager
def detector() -> Iterator[str]:
    """A program that listens, as a detector does: it pushes small frames over ZeroMQ. Its address."""
    with subprocess.Popen([sys.executable, "-c", DETECTOR], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@contextlib.contextmanager
def analysis(facility: str) -> Iterator[list[str]]:
    """Whoever connects to each stream that is ready at a facility, as its users do, and reads it to its end."""
    ending = threading.Event()
    digests: list[str] = []

    def read() -> None:
        seen: set[str] = set()
        with S2CS(load_facility(facility)) as service:
            while not ending.wait(0.1):
                for stream in service.list(ListQuery()).streams:
                    if stream.role == "CONS" and stream.state == "READY" and stream.uid not in seen:
                        seen.add(stream.uid)
                        digests.append(connect_and_exchange(stream.listeners[0], b""))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield digests
    finally:
        ending.set()
        thread.join(30)


@stage("notebook.md")
def a_kernel(_: Path) -> Iterator[Stage]:
    with detector() as address:
        yield Stage({"10.0.0.5:5555": address})


@stage("user-guide.md")
def two_facilities(folder: Path) -> Iterator[Stage]:
    with (
        detector() as address,
        serving(folder, "aps", development=True, port=0) as aps,
        serving(folder, "alcf", development=True, port=0) as alcf,
    ):
        yield Stage(
            {
                "10.0.0.5:5555": address,
                "10.1.0.0/16": "127.0.0.0/8",
                "https://scistream.aps.example.org": aps.url.removeprefix("http://"),
                "https://scistream.alcf.example.org": alcf.url.removeprefix("http://"),
            }
        )


@stage("compute.md")
def an_endpoint(_: Path) -> Iterator[Stage]:
    with detector() as address:  # test_example_microscope.py has a real endpoint
        yield Stage({"10.0.0.5:5555": address, "compute:ENDPOINT_UUID": "local:aps"})


@stage("parsl.md")
def a_cluster(folder: Path) -> Iterator[Stage]:
    with detector() as address, serving(folder, "alcf", development=True, port=0) as alcf:
        played = Stage(
            {
                "10.0.0.5:5555": address,
                "compute:ENDPOINT_UUID": "local:alcf",
                "https://scistream.alcf.example.org": alcf.url.removeprefix("http://"),
                "10.1.0.0/16": "127.0.0.0/8",
                "10.1.0.1": "127.0.0.9",
            }
        )
        yield played
        assert [one.split() for one in played.said.values()] == [["32640.0"], ["256"], ["256"]]


@stage("administration.md")
def an_administrator(folder: Path) -> Iterator[Stage]:
    configuration = folder.parent / "administrator"
    opened = contextlib.ExitStack()

    def before(command: str) -> str:
        if command.startswith("s2cs init"):  # each of them is where one may begin
            shutil.rmtree(configuration, ignore_errors=True)
        elif command == "s2cs doctor":  # what was written has been edited meanwhile
            shutil.rmtree(configuration)
            configuration.mkdir()
            (configuration / "aps.toml").write_text(
                TOML.format(name="aps", gateway=LOCAL.replace('"local"', '"dtn1"'))
            )
        elif command == "s2cs list":  # somebody works with it
            config = load_facility("aps", file=configuration / "aps.toml")
            service = opened.enter_context(S2CS(config))
            service.request(Request(uid="scan-7", role="PROD", targets=[address]))
        return f"{command} --port 0" if command in ("s2cs", "s2cs --type Haproxy") else command

    chain, key = certificate_for_loopback(folder.parent)
    with opened, detector() as address:
        yield Stage(
            {
                "UID": "scan-7",
                "192.0.2.5 --port 443": "127.0.0.1 --port 0",
                "/etc/scistream/metrics-token": str(folder.parent / "metrics-token"),
                "chain.pem": str(chain),
                "key.pem": str(key),
            },
            environment={"SCISTREAM_CONFIG_DIR": str(configuration)},
            before=before,
            lasting={"s2cs audit --since 1h --follow": "scan-7", "s2cs --": "serving at"},
        )


@contextlib.contextmanager
def two_services(folder: Path) -> Iterator[Stage]:
    """Two facilities that serve, an instrument, and somebody who waits for its data."""
    instrument = Application(random.Random(1).randbytes(100_000))  # noqa: S311 - no secret
    with (
        contextlib.closing(instrument),
        serving(folder, "aps", development=True, port=0) as aps,
        serving(folder, "alcf", development=True, port=0) as alcf,
        analysis("alcf") as digests,
    ):
        yield Stage(
            {
                "10.0.0.5:5555": instrument.address,
                "https://aps.example.org": aps.url,
                "https://alcf.example.org": alcf.url,
            }
        )
        assert digests == [hashlib.sha256(instrument.payload).hexdigest()]


@stage("flows.md")
def the_flow(folder: Path) -> Iterator[Stage]:
    with two_services(folder) as played:
        yield played


@stage("flow-runner.md")
def the_runner(folder: Path) -> Iterator[Stage]:
    with two_services(folder) as played:
        producer, consumer = (played.stands_for[f"https://{name}.example.org"] for name in ("aps", "alcf"))
        flow = render("slices", producer=producer, consumer=consumer)
        (folder.parent / "definition.json").write_text(json.dumps(flow.definition))
        yield played


@stage("performance.md")
def a_run_that_was(folder: Path) -> Iterator[Stage]:
    """The benchmark takes minutes and has tests of its own; the report is written for real, into a copy."""
    here = folder.parent
    (here / "build" / "bench").mkdir(parents=True)
    results = Results(
        began="2026-01-01T00:00:00+00:00",
        seconds=0,
        full=False,
        groups=(),
        machine=machine.look(),
        runs=(),
    )
    (here / "build" / "bench" / "results.json").write_text(results.model_dump_json())
    shutil.copy(ROOT / "docs" / "performance.md", here)

    def before(command: str) -> str:
        if command.startswith("make"):
            return f"{command} --directory {ROOT} --dry-run"
        return f"{command} --document performance.md"

    stands_for = {"PYTHONPATH=tests .venv/bin/python": f"PYTHONPATH={ROOT / 'tests'} {sys.executable}"}
    yield Stage(stands_for, before=before)
    assert "| kernel | Linux" in (here / "performance.md").read_text()


def blocks(page: Path) -> list[tuple[str, str]]:
    """Kind and text of each block of a page."""
    found = re.findall(r"^ *```([^\n]*)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(kind, text) for kind, text in found if not kind.startswith("{")]  # those are for Sphinx


def commands(text: str) -> list[str]:
    """The commands of a block, without what is said about them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    assert {kind for kind, _ in blocks(page)} <= KINDS, "a block of another kind, or of none"
    without = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^(?![-*\d ])[^\n]*\n\n    \S", without, re.MULTILINE), "a block without fences"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_data_can_be_read(page: Path) -> None:
    for kind, text in blocks(page):
        if kind == "toml":
            tomllib.loads(text)
        elif kind == "json":
            json.loads(text)
        elif kind == "yaml":
            assert isinstance(yaml.safe_load(text), dict)
        elif kind == "ini":
            unit = configparser.ConfigParser(interpolation=None)
            unit.optionxform = str  # type: ignore[assignment, method-assign]  # as systemd has them
            unit.read_string(text)
            program, *words = unit["Service"]["ExecStart"].split()
            known_options([Path(program).name], words)


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("own_temporary")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_tells_people_to_type_works(page: Path, state_base: Path, tmp_path: Path) -> None:
    played = [(kind, text) for kind, text in blocks(page) if kind in ("sh", "python")]
    if page.name in PLAYED_BY:
        assert (ROOT / "tests" / PLAYED_BY[page.name]).exists()
        return
    if not played:
        return
    with STAGES[page.name](state_base) as stage:
        for kind, text in played:
            for written, here in stage.stands_for.items():
                text = text.replace(written, here)  # noqa: PLW2901
            if kind == "python":
                (tmp_path / "program.py").write_text(text)
                stage.said[text] = typed("python program.py", tmp_path, stage)
                continue
            for command in commands(text):
                if command in AT_GLOBUS:
                    known(command)
                elif command.startswith("pip install"):
                    assert_extras_exist(command)
                else:
                    stage.said[command] = typed(stage.before(command), tmp_path, stage)


def typed(command: str, folder: Path, stage: Stage) -> str:
    """What a command prints that is typed in a shell, in an environment where the package is installed."""
    words = next((words for begin, words in stage.lasting.items() if command.startswith(begin)), None)
    good = (0, 130) if words is not None else (0,)
    with subprocess.Popen(
        ["bash", "-ec", command],
        cwd=folder,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | stage.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        giving_up = threading.Timer(60, os.killpg, (shell.pid, signal.SIGKILL))
        giving_up.start()
        try:
            assert shell.stdout is not None
            said = ""
            for line in shell.stdout:
                said += line
                if words is not None and words in line:
                    os.killpg(shell.pid, signal.SIGINT)
                    words = None
            code = shell.wait()
        finally:
            giving_up.cancel()
    assert code in good, f"$ {command}\n{said}"
    assert words is None, f"$ {command}\n{said}"
    return said


def known(command: str) -> None:
    """Whether a command that cannot be run here exists with these options, and has a test of its own."""
    assert (ROOT / "tests" / AT_GLOBUS[command]).exists()
    program, verb, *words = command.split()
    known_options([program, verb], words)


def known_options(program: Sequence[str], words: Sequence[str]) -> None:
    """Whether a command has the options that it is given."""
    help_ = subprocess.run(
        [BIN / program[0], *program[1:], "--help"], capture_output=True, text=True, timeout=60
    ).stdout
    assert [one for one in words if one.startswith("--") and one not in help_] == []


def assert_extras_exist(command: str) -> None:
    """Whether the extras that `pip install` names are those of this distribution."""
    (names,) = re.findall(r"scistream-flows\[([\w,]+)\]", command)
    assert set(names.split(",")) <= set(EXTRAS)


@pytest.mark.timeout(300)
def test_the_documentation_is_made_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="not installed: the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "open_stream" in (tmp_path / "html" / "api.html").read_text()
