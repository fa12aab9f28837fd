"""The command `scistream-flows`, as a program: its exit codes, its stdout for programs, its stderr for people."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from serving import Served, serving
from standins.actions import Action, ActionServer, Behaviour

from scistream_flows.actions import flows as command
from scistream_flows.actions.auth import DevelopmentToken
from scistream_flows.actions.render import KINDS, VERBS, render, validate
from scistream_flows.errors import BadRequest, ConfigError
from scistream_flows.tokens import Tokens

PAIR = ("--producer", "https://aps.example.org", "--consumer", "https://alcf.example.org")
PROGRAM = "from scistream_flows.actions.flows import main; main()"
UUID = str(uuid.uuid4())

pytestmark = pytest.mark.timeout(120)


def flows(*arguments: str, given: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a program."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environment},
    )


def quick(*arguments: str) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    done = CliRunner().invoke(command.flows, arguments, obj=command.Asked(), prog_name="scistream-flows")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def flow_file(tmp_path: Path) -> Path:
    _, said, _ = quick("render", "slices", *PAIR)
    (tmp_path / "flow.json").write_text(said)
    return tmp_path / "flow.json"


# --- render and validate


def test_what_render_writes_is_what_validate_takes(tmp_path: Path) -> None:
    rendered = flows("render", "slices", *PAIR)
    assert rendered.returncode == 0
    assert rendered.stderr == ""
    document = json.loads(rendered.stdout)
    assert document.keys() == {"title", "subtitle", "description", "keywords", "definition", "input_schema"}
    (tmp_path / "flow.json").write_text(rendered.stdout)
    validated = flows("validate", str(tmp_path / "flow.json"))
    assert (validated.returncode, validated.stdout) == (0, "")
    assert "valid" in validated.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_each_definition_can_be_rendered_in_parts(kind: str, tmp_path: Path) -> None:
    arguments = ["render", kind, *PAIR]
    if kind == "compute-only":
        functions = tmp_path / "functions.json"
        functions.write_text(json.dumps({verb: str(uuid.uuid4()) for verb in VERBS}))
        arguments = ["render", kind, "--producer", UUID, "--consumer", UUID]
        arguments += ["--producer-functions", str(functions), "--consumer-functions", str(functions)]
    whole = json.loads(quick(*arguments)[1])
    assert json.loads(quick(*arguments, "--part", "definition")[1]) == whole["definition"]
    assert json.loads(quick(*arguments, "--part", "input-schema")[1]) == whole["input_schema"]
    definition = tmp_path / "definition.json"
    definition.write_text(json.dumps(whole["definition"]))
    assert quick("validate", str(definition))[0] == 0


def test_underscores_and_dashes_are_the_same() -> None:
    one = quick("render", "action_providers", *PAIR, "--lease_s", "1300", "--hello_timeout_s", "60")
    other = quick("render", "action-providers", *PAIR, "--lease-s", "1300", "--hello-timeout-s", "60")
    assert one == other
    assert one[0] == 0


def test_a_lease_that_is_too_short_is_refused_with_a_hint_and_exit_code_2() -> None:
    done = flows("render", "slices", *PAIR, "--lease-s", "60")
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert "lease_s: 60 is too short for slices" in first
    assert "Give 540 s or more" in second


def test_an_analysis_is_given_whole_or_not_at_all() -> None:
    some = ("--analysis-endpoint", UUID, "--start-analysis-function", UUID)
    with pytest.raises(BadRequest, match="an endpoint and two functions"):
        quick("render", "slices", *PAIR, *some)
    code, said, _ = quick("render", "slices", *PAIR, *some, "--collect-analysis-function", UUID)
    assert code == 0
    assert "CollectAnalysis" in json.loads(said)["definition"]["States"]


def test_a_flow_with_errors_names_them_on_stdout_and_exits_with_1(flow_file: Path) -> None:
    document = json.loads(flow_file.read_text())
    del document["definition"]["States"]["Done"]["End"]
    flow_file.write_text(json.dumps(document))
    done = flows("validate", str(flow_file))
    assert done.returncode == 1
    assert "state 'Done'" in done.stdout
    assert "not valid" in done.stderr
    said = json.loads(flows("validate", "--format", "json", str(flow_file)).stdout)
    assert said["valid"] is False
    assert said["problems"][0]["state"] == "Done"


@pytest.mark.parametrize("content", [None, "{", '{"title": "no definition"}', '{"a": 1, "a": 2}'])
def test_a_file_that_is_no_flow_is_wrong_usage(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "flow.json").write_text(content)
    done = flows("validate", str(tmp_path / "flow.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("render", "sliced"), ("--bogus",), ("run",), ("deploy",)])
def test_wrong_usage_is_exit_code_2_and_leaves_stdout_alone(arguments: tuple[str, ...]) -> None:
    done = flows(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr


def test_a_missing_extra_is_named(flow_file: Path) -> None:
    without = f"import sys; sys.modules['simpleeval'] = None; {PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", without, "validate", str(flow_file)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "simpleeval is not installed" in done.stderr
    assert "scistream-flows[flows]" in done.stderr


def test_a_run_is_only_started_here_when_local_is_said(flow_file: Path) -> None:
    with pytest.raises(BadRequest, match="run needs --local"):
        quick("run", str(flow_file))


# --- run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def pair(base: Path) -> Iterator[dict[str, Served]]:
    with serving(base, "aps", development=True) as aps, serving(base, "alcf", development=True) as alcf:
        yield {"producer": aps, "consumer": alcf}


@pytest.fixture
def own(base: Path, relays_below: Callable[..., list[int]]) -> Iterator[dict[str, str]]:
    """The environment of the facilities' owner; at the end of the test no relay is left."""
    yield {"SCISTREAM_STATE_DIR": str(base), "SCISTREAM_CONFIG_DIR": str(base / "none")}
    assert relays_below(base, patience_s=30) == []


def runnable(pair: dict[str, Served], folder: Path, *targets: str, **options: Any) -> tuple[str, str]:
    """A flow for the pair and its input, as files."""
    arguments = ["render", "slices", "--slice-s", "5"]
    arguments += [word for side, one in pair.items() for word in (f"--{side}", one.url)]
    arguments += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    code, said, complaint = quick(*arguments)
    assert code == 0, complaint
    (folder / "flow.json").write_text(said)
    (folder / "input.json").write_text(json.dumps({"targets": list(targets), "linger_s": 0}))
    return str(folder / "flow.json"), str(folder / "input.json")


def test_a_local_run_finds_the_tokens_of_its_own_facilities_and_reports(
    pair: dict[str, Served],
    own: dict[str, str],
    tmp_path: Path,
    application: Any,
    talk: Callable[[str, bytes], str],
) -> None:
    flow, given = runnable(pair, tmp_path, application.address)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PROGRAM,
            "run",
            "--local",
            flow,
            "--input",
            given,
            "--format",
            "json",
            "--label",
            "mine",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    )
    progress = follow_until(process, "✓ ConnectRelays")
    listener = (
        next(line for line in progress if "StartConsumerRelay" in line)
        .partition("listening at ")[2]
        .split()[0]
    )
    talk(listener, b"")
    said, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    document = json.loads(said)
    assert document["status"] == "SUCCEEDED"
    assert document["label"] == "mine"
    assert document["output"]["consumer_release"]["details"]["final"]["bytes"] >= len(application.payload)
    assert document["log"][0]["code"] == "FlowStarted"
    assert not [one.token for one in pair.values() if one.token in said + rest]
    assert "✓ ReleaseProducerRelay" in rest


def follow_until(process: subprocess.Popen[str], words: str) -> list[str]:
    """The lines of stderr up to the one with `words`."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"{words!r} was not said: {lines}")


def test_a_run_that_fails_says_why_in_one_line_and_exits_with_1(
    pair: dict[str, Served], own: dict[str, str], tmp_path: Path, free_address: str
) -> None:
    flow, given = runnable(pair, tmp_path, free_address, **{"hello-timeout-s": 1})
    done = flows("run", "--local", flow, "--input", given, **own)
    assert done.returncode == 1
    assert done.stdout.startswith("FAILED run ")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ConnectRelays: ")
    assert "unreachable" in last


def test_an_input_that_does_not_fit_is_exit_code_2_and_nothing_is_run(
    pair: dict[str, Served], own: dict[str, str], tmp_path: Path
) -> None:
    flow, _ = runnable(pair, tmp_path, "127.0.0.1:1")
    done = flows("run", "--local", flow, "--input", "-", given='{"targets": [], "uid": "x"}', **own)
    assert (done.returncode, done.stdout) == (2, "")
    assert "targets" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_releases_both_sides(
    pair: dict[str, Served],
    own: dict[str, str],
    tmp_path: Path,
    application: Any,
    number: signal.Signals,
) -> None:
    flow, given = runnable(pair, tmp_path, application.address)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run", "--local", flow, "--input", given, "--format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    )
    follow_until(process, "MonitorStream")
    process.send_signal(number)
    said, words = process.communicate(timeout=60)
    assert process.returncode == 130, words
    document = json.loads(said)
    assert document["status"] == "ENDED"
    assert document["released"] is True
    assert "at Globus a cancelled run leaves them to their leases" in words
    assert "Traceback" not in words


def test_a_run_that_is_interrupted_impatiently_says_that_it_leaves_something(
    base: Path,
    pair: dict[str, Served],
    own: dict[str, str],
    tmp_path: Path,
    application: Any,
    relays_below: Callable[..., list[int]],
) -> None:
    flow, given = runnable(pair, tmp_path, application.address)
    text = Path(flow).read_text().replace('"lease_s": 540', '"lease_s": 12')
    Path(flow).write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run", "--local", flow, "--input", given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    )
    follow_until(process, "MonitorStream")
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    said, words = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")
    assert "left; what is open ends by its lease" in words
    assert "Traceback" not in words
    assert relays_below(base, patience_s=40) == []


def test_a_run_may_be_left_to_its_leases_as_at_globus(
    base: Path,
    pair: dict[str, Served],
    own: dict[str, str],
    tmp_path: Path,
    application: Any,
    relays_below: Callable[..., list[int]],
) -> None:
    flow, given = runnable(pair, tmp_path, application.address)
    text = Path(flow).read_text().replace('"lease_s": 540', '"lease_s": 12')
    Path(flow).write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run", "--local", flow, "--input", given, "--on_cancel", "leave"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    )
    follow_until(process, "MonitorStream")
    process.send_signal(signal.SIGINT)
    said, words = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith("ENDED run ")
    assert "ends by its lease" in words
    assert relays_below(base), "nothing was released"


class Rude(Behaviour):
    def start(self, action: Action) -> None:
        action.display_status = "\x1b]0;mine\x07 \u202e"
        action.fail(code="rude", description="\x9b2J\nfake line")


def test_a_provider_cannot_steer_the_terminal(tmp_path: Path) -> None:
    with ActionServer(Rude()) as server:
        states = {"Ask": {"Type": "Action", "ActionUrl": server.url, "Parameters": {}, "End": True}}
        (tmp_path / "flow.json").write_text(json.dumps({"StartAt": "Ask", "States": states}))
        done = flows("run", "--local", str(tmp_path / "flow.json"))
    assert done.returncode == 1
    assert "fake line" in done.stderr
    assert not [one for one in done.stdout + done.stderr if not one.isprintable() and one != "\n"]
    assert "fake line" not in [line.strip() for line in done.stderr.splitlines()]


def test_a_flow_without_streams_is_run_and_cancelled_as_well(tmp_path: Path) -> None:
    states = {"Wait": {"Type": "Wait", "Seconds": 600, "Next": "Done"}, "Done": {"Type": "Pass", "End": True}}
    (tmp_path / "flow.json").write_text(json.dumps({"StartAt": "Wait", "States": states}))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run", "--local", str(tmp_path / "flow.json"), "--format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    follow_until(process, "Wait  600")
    process.send_signal(signal.SIGTERM)
    said, words = process.communicate(timeout=30)
    assert process.returncode == 130
    document = json.loads(said)
    assert (document["status"], document["released"]) == ("ENDED", None)
    assert "lease" not in words


@pytest.mark.parametrize("kind", KINDS)
def test_what_releases_a_cancelled_run_needs_nothing_of_the_run_but_its_id(kind: str) -> None:
    sides: dict[str, Any] = {"producer": "https://aps.example.org", "consumer": "https://alcf.example.org"}
    if kind == "compute-only":
        functions = dict.fromkeys(VERBS, UUID)
        sides = {"producer": UUID, "consumer": UUID}
        sides |= {f"{side}_functions": functions for side in ("producer", "consumer")}
    part = command._release_part(render(kind, **sides).definition, "run-1")
    assert validate(part) == []
    assert "_context" not in json.dumps(part)
    for name in ("ReleaseConsumerRelay", "ReleaseProducerRelay"):
        assert '"run-1"' in json.dumps(part["States"][name]["Parameters"])


# --- tokens


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("one-token\n")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize(
    ("address", "token"),
    [
        ("https://aps.example.org/actions/start", "one-token"),
        ("https://aps.example.org", "one-token"),
        ("https://APS.example.org:443/actions/start", "one-token"),
        ("https://aps.example.org.evil.example.com/actions/start", None),
        ("https://aps.example.org:8443/actions/start", None),
        ("https://aps.example.org@evil.example.com/actions/start", None),
        ("https://evil.example.com\\@aps.example.org/actions/start", None),
        ("https://user@aps.example.org/actions/start", None),
        (" https://aps.example.org/actions/start", None),
        ("http://aps.example.org/actions/start", None),
        ("https://alcf.example.org/actions/start", None),
    ],
)
def test_a_pinned_token_goes_only_where_it_is_pinned(
    token_file: Path, address: str, token: str | None
) -> None:
    assert Tokens([f"https://aps.example.org={token_file}"])(address) == token


def test_a_pin_with_a_path_reaches_only_below_it_and_the_longest_counts(
    token_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_text("other-token\n")
    other.chmod(0o600)
    tokens = Tokens([f"https://example.org={token_file}", f"https://example.org/scistream={other}"])
    assert tokens("https://example.org/scistream/actions/start") == "other-token"
    assert tokens("https://example.org/scistreams/actions/start") == "one-token"
    for path in ("..", "%2e%2e", ".%2E", "x%2f..%2f..", "..%5c"):  # the request would go elsewhere
        assert tokens(f"https://example.org/scistream/{path}/actions/start") is None


def test_a_token_that_others_may_read_is_refused_before_anything_is_sent(token_file: Path) -> None:
    token_file.chmod(0o644)
    with pytest.raises(ConfigError, match="not a file of this user alone"):
        Tokens([f"https://aps.example.org={token_file}"])


@pytest.mark.parametrize(
    "text", ["token", "https://=x", "ftp://a=b", "https://aps.example.org=", "https://a:b:c=x"]
)
def test_a_pin_that_is_none_is_named(text: str) -> None:
    with pytest.raises(BadRequest, match="is not URL=FILE"):
        Tokens([text])


class Impostor(http.server.BaseHTTPRequestHandler):
    """Says that it is the facility `aps`."""

    scope = "urn:scistream:scope:aps:action_all"

    def do_GET(self) -> None:
        content = json.dumps({"globus_auth_scope": self.scope}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def impostor(scope: str = Impostor.scope) -> Iterator[str]:
    handler = type("Handler", (Impostor,), {"scope": scope})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_development_token_goes_to_a_program_of_the_same_user_only(
    state_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (state_base / "aps").mkdir(mode=0o700)
    DevelopmentToken(state_base / "aps")
    said: list[str] = []
    with impostor() as url:
        assert Tokens([])(f"{url}/actions/start") == DevelopmentToken.read(state_base / "aps")
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
        assert Tokens([], tell=said.append)(f"{url}/actions/start") is None
    assert "not run by this user" in said[0]


@pytest.mark.parametrize(
    "scope", ["urn:scistream:scope:../aps:action_all", "https://auth.globus.org/scopes/x/y", "", 3]
)
def test_what_is_no_development_facility_gets_no_token(state_base: Path, scope: Any) -> None:  # noqa: ARG001
    said: list[str] = []
    with impostor(scope) as url:
        tokens = Tokens([], tell=said.append)
        assert tokens(f"{url}/actions/start") is None
        assert tokens(f"{url}/actions/connect") is None
    assert len(said) == 1
    assert "pin one in tokens.toml" in said[0]


def test_no_token_is_looked_for_beyond_this_machine_or_where_nobody_listens(free_address: str) -> None:
    said: list[str] = []
    tokens = Tokens([], tell=said.append)
    assert tokens("https://aps.example.org/actions/start") is None
    assert tokens("http://192.0.2.1:5000/actions/start") is None
    assert tokens(f"http://{free_address}/actions/start") is None
    assert tokens("http://127.0.0.1:99999/actions/start") is None
    assert said == []


# --- deploy and register


def test_deploy_refuses_what_globus_cannot_reach_before_anybody_logs_in(tmp_path: Path) -> None:
    local = [word for side in ("producer", "consumer") for word in (f"--{side}", "http://127.0.0.1:5000")]
    (tmp_path / "flow.json").write_text(quick("render", "slices", *local)[1])
    done = flows("deploy", str(tmp_path / "flow.json"), "--client-id", UUID, HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be reached from Globus" in done.stderr


def test_a_login_without_a_terminal_is_an_error_and_its_words_are_on_stderr(
    tmp_path: Path, flow_file: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        done = flows(
            "deploy",
            str(flow_file),
            "--client-id",
            UUID,
            given="",
            HOME=str(tmp_path),
            GLOBUS_SDK_SERVICE_URL_AUTH=url,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert "Log in to Globus here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*token*"))
