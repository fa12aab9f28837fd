"""A stand-in for the web service of Globus Compute: not Globus, but what its real SDK and real endpoint speak with.

`ComputeCloud` serves the routes that these two call, over HTTP, and moves tasks and results through `Broker`.
`Endpoint` runs the real `globus-compute-endpoint` on a directory that a test has configured. Both find the service
by `ComputeCloud.environment`: it is their proxy, so that any free port does.

What it keeps of the service: registered functions, endpoints and user endpoints, allow lists, task groups, results
over AMQP and over REST, the wait for a user endpoint that starts. What it leaves out: people (everybody is Ada),
consents, policies, groups, limits of the rate, and word of tasks whose endpoint is gone. Nothing that passes here has
been tried against the service.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import psutil
from globus_compute_common import messagepack
from globus_compute_common.messagepack.message_types import EPStatusReport, Result, Task
from pika import BasicProperties  # type: ignore[import-untyped]

from .broker import Broker

PERSON: Final = "11111111-2222-4333-8444-555555555555"
USERNAME: Final = "ada@example.org"
IDENTITY: Final = {
    "sub": PERSON,
    "username": USERNAME,
    "name": "Ada",
    "email": USERNAME,
    "organization": "none",
}
LARGEST_TASK_BYTES: Final = 10 * 1024 * 1024
_PREFIX: Final = "results_"


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        # globus_sdk reads `message`, the service writes `reason`
        self.document = {"code": code, "message": reason, "reason": reason, "http_status_code": status}


@dataclass
class Function:
    name: str
    code: str
    description: str | None = None


@dataclass
class Known:
    """What is known of an endpoint, or of a user endpoint."""

    settings: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    heard_at_s: float = 0.0

    @property
    def online(self) -> bool:
        period_s = self.said.get("heartbeat_period") or 0.1
        return not self.error and time.monotonic() - self.heard_at_s < 2 * period_s

    @property
    def error(self) -> str:
        return str(self.said.get("error") or "")


@dataclass
class Submitted:
    group: str
    user_endpoint: str
    function: str
    status: str = "waiting-for-ep"
    outcome: dict[str, Any] = field(default_factory=dict)


class ComputeCloud:
    """The service while the `with` block runs.

    Attributes:
        deliveries: How often each task is delivered; more than once is what an endpoint that was killed may see.
        checks_allow_list: Whether the service refuses what an endpoint does not allow, before the endpoint can.
        start_s: Seconds that a submission waits for a user endpoint; 0 accepts the task at once.
        refusals: What the next submissions are answered with, in place of a task.
        asked: The route of every request, oldest first.
    """

    def __init__(self) -> None:
        self.deliveries = 1
        self.checks_allow_list = True
        self.start_s = 30.0
        self.refusals: list[Refused] = []
        self.asked: list[str] = []
        self.functions: dict[str, Function] = {}
        self.endpoints: dict[str, Known] = {}
        self.tasks: dict[str, Submitted] = {}
        self._groups: dict[str, list[str]] = {}
        self._user_endpoints: dict[str, str] = {}
        self._lock = threading.RLock()
        self._broker = Broker()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="compute cloud")

    def __enter__(self) -> ComputeCloud:
        self._broker.__enter__()
        for queue, heard in (("results", self._on_result), ("heartbeats", self._on_heartbeat)):
            self._broker.declare(queue, exchange=queue, kind="topic", pattern="#")
            self._broker.listen(queue, heard)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()
        self._broker.__exit__()

    @property
    def environment(self) -> dict[str, str]:
        """What makes the SDK and the endpoint speak with this service, as an application of its own."""
        proxy = f"http://127.0.0.1:{self._server.server_port}"
        return {
            "HTTP_PROXY": proxy,
            "http_proxy": proxy,
            "NO_PROXY": "",
            "no_proxy": "",
            "GLOBUS_SDK_ENVIRONMENT": "local",
            "GLOBUS_SDK_SERVICE_URL_AUTH": "http://localhost:5000/",
            "GLOBUS_COMPUTE_CLIENT_ID": "99999999-2222-4333-8444-555555555555",
            "GLOBUS_COMPUTE_CLIENT_SECRET": "not-a-secret",
        }

    def user_endpoint(self, endpoint_id: str) -> Known | None:
        """What is known of the user endpoint of an endpoint, if one was started."""
        found = [
            self.endpoints[one] for key, one in self._user_endpoints.items() if key.startswith(endpoint_id)
        ]
        return found[-1] if found else None

    def answer(self, method: str, path: str, document: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(f"{method} {path}")
        for pattern, route in _ROUTES.items():
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                with self._lock if route is not ComputeCloud._submit else contextlib.nullcontext():
                    answer: dict[str, Any] = route(self, document, *match.groups())
                return answer
        raise Refused(404, "NOT_FOUND", f"the stand-in has no {method} {path}")

    # --- Globus Auth, as far as an application of its own needs it

    def _token(self, document: Mapping[str, Any]) -> dict[str, Any]:
        scopes = str(document.get("scope", "")).split()
        servers: dict[str, list[str]] = {}
        for scope in scopes:
            servers.setdefault("funcx_service" if "/scopes/" in scope else "auth.globus.org", []).append(
                scope
            )
        tokens = [
            {
                "access_token": f"token-for-{server}",
                "scope": " ".join(those),
                "expires_in": 172_800,
                "token_type": "Bearer",
                "resource_server": server,
                "refresh_token": None,
            }
            for server, those in servers.items()
        ]
        return {**tokens[0], "other_tokens": tokens[1:]}

    def _whoami(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {**IDENTITY, "preferred_username": USERNAME, "identity_set": [IDENTITY]}

    # --- functions and endpoints

    def _version(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"api": "1.50.0", "min_sdk_version": "2.0.0", "min_ep_version": "2.0.0"}

    def _register_function(self, document: Mapping[str, Any]) -> dict[str, Any]:
        function_id, name, code = str(uuid.uuid4()), document["function_name"], document["function_code"]
        if document.get("serialized") is False:  # source text; the service wraps it
            text = f"st\n{name}:{code}"
            code = f"{len(text)}\n{text}"
        self.functions[function_id] = Function(name, code, document.get("description"))
        return {"function_uuid": function_id}

    def _function(self, _: Mapping[str, Any], function_id: str) -> dict[str, Any]:
        function = self._known_function(function_id)
        return {
            "function_uuid": function_id,
            "function_name": function.name,
            "function_code": function.code,
            "description": function.description,
        }

    def _register_endpoint(self, document: Mapping[str, Any], endpoint_id: str = "") -> dict[str, Any]:
        endpoint_id = endpoint_id or str(uuid.uuid4())
        self.endpoints.setdefault(endpoint_id, Known()).settings.update(document)
        return {
            "endpoint_id": endpoint_id,
            "command_queue_info": self._inbox("commands", endpoint_id),
            "result_queue_info": self._outbox("results", endpoint_id),
            "heartbeat_queue_info": self._outbox("heartbeats", endpoint_id),
        }

    def _allowed(self, _: Mapping[str, Any], endpoint_id: str) -> dict[str, Any]:
        allowed = self._known_endpoint(endpoint_id).settings.get("allowed_functions")
        return {
            "endpoint_id": endpoint_id,
            "restricted": allowed is not None,
            "functions": [str(one) for one in allowed or []],
        }

    def _status(self, _: Mapping[str, Any], endpoint_id: str) -> dict[str, Any]:
        known = self._known_endpoint(endpoint_id)
        return {"status": "online" if known.online else "offline", "details": known.said}

    def _known_endpoint(self, endpoint_id: str) -> Known:
        if endpoint_id not in self.endpoints:
            raise Refused(404, "ENDPOINT_NOT_FOUND", f"Endpoint {endpoint_id} could not be resolved")
        return self.endpoints[endpoint_id]

    def _known_function(self, function_id: str) -> Function:
        if function_id not in self.functions:
            raise Refused(404, "FUNCTION_NOT_FOUND", f"Function {function_id} could not be resolved")
        return self.functions[function_id]

    # --- tasks

    def _submit(self, document: Mapping[str, Any], endpoint_id: str) -> dict[str, Any]:
        if self.refusals:
            raise self.refusals.pop(0)
        endpoint = self._known_endpoint(endpoint_id)
        allowed = endpoint.settings.get("allowed_functions")
        group = str(document.get("task_group_id") or uuid.uuid4())
        if document.get("create_queue"):
            self._broker.declare(_PREFIX + group)
        user_endpoint = self._started(endpoint_id, document)
        submitted: dict[str, list[str]] = {}
        for function_id, payloads in document["tasks"].items():
            function = self._known_function(function_id)
            if self.checks_allow_list and allowed is not None and function_id not in map(str, allowed):
                raise Refused(
                    403, "FUNCTION_NOT_PERMITTED", f"Function {function_id} not permitted on {endpoint_id}"
                )
            for payload in payloads:
                if len(payload) > LARGEST_TASK_BYTES:
                    raise Refused(413, "TASK_PAYLOAD_TOO_LARGE", f"Task payload {len(payload)} is too large")
                task_id = str(uuid.uuid4())
                with self._lock:
                    self.tasks[task_id] = Submitted(group, user_endpoint, function_id)
                    self._groups.setdefault(group, []).append(task_id)
                submitted.setdefault(function_id, []).append(task_id)
                headers = {
                    "function_uuid": function_id,
                    "task_uuid": task_id,
                    "resource_specification": json.dumps(document.get("resource_specification")),
                }
                if document.get("result_serializers"):
                    headers["result_serializers"] = document["result_serializers"]
                task = messagepack.pack(Task(task_id=uuid.UUID(task_id), task_buffer=function.code + payload))
                for _ in range(self.deliveries):
                    self._broker.publish(f"{user_endpoint}.tasks", task, BasicProperties(headers=headers))
        return {
            "tasks": submitted,
            "task_group_id": group,
            "request_id": str(uuid.uuid4()),
            "endpoint_id": endpoint_id,
        }

    def _started(self, endpoint_id: str, document: Mapping[str, Any]) -> str:
        """The user endpoint for these settings, started if it does not run."""
        settings = document.get("user_endpoint_config") or {}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        with self._lock:
            one = self._user_endpoints.setdefault(f"{endpoint_id} {key}", str(uuid.uuid4()))
            known = self.endpoints.setdefault(one, Known())
            known.said.pop("error", None)
        command = {
            "command": "cmd_start_endpoint",
            "args": [],
            "globus_username": USERNAME,
            "globus_effective_identity": PERSON,
            "globus_identity_set": [IDENTITY],
            "kwargs": {
                "name": f"uep.{endpoint_id}.{one}",
                "user_opts": settings,
                "user_runtime": document.get("user_runtime") or {},
                "amqp_creds": {
                    "endpoint_id": one,
                    "task_queue_info": self._inbox("tasks", one),
                    "result_queue_info": self._outbox("results", one),
                    "heartbeat_queue_info": self._outbox("heartbeats", one),
                },
            },
        }
        self._broker.publish(
            f"{endpoint_id}.commands",
            json.dumps(command).encode(),
            BasicProperties(
                content_type="application/json", content_encoding="utf-8", timestamp=int(time.time())
            ),
        )
        deadline = time.monotonic() + self.start_s
        while self.start_s and not known.online and not known.error and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.start_s and known.error:
            raise Refused(422, "SEMANTICALLY_INVALID", f"Request payload failed validation: {known.error}")
        return one

    def _on_result(self, body: bytes) -> None:
        message = messagepack.unpack(body)
        if isinstance(message, EPStatusReport):  # a user endpoint that could not start
            self._on_heartbeat(body)
            return
        assert isinstance(message, Result)
        task = self.tasks.get(str(message.task_id))
        if task is None:
            return
        task.status = "failed" if message.is_error else "success"
        task.outcome = {
            "exception" if message.is_error else "result": message.data,
            "completion_t": str(time.time()),
        }
        self._broker.publish(_PREFIX + task.group, body, BasicProperties(timestamp=int(time.time())))

    def _on_heartbeat(self, body: bytes) -> None:
        message = messagepack.unpack(body)
        assert isinstance(message, EPStatusReport)
        known = self.endpoints.setdefault(str(message.endpoint_id), Known())
        known.said, known.heard_at_s = dict(message.global_state), time.monotonic()

    def _inbox(self, kind: str, endpoint_id: str) -> dict[str, Any]:
        queue = f"{endpoint_id}.{kind}"
        self._broker.declare(queue, exchange=kind)
        return {"connection_url": self._broker.url, "exchange": kind, "queue": queue}

    def _outbox(self, kind: str, endpoint_id: str) -> dict[str, Any]:
        publish = {
            "exchange": kind,
            "routing_key": f"{endpoint_id}.{kind}",
            "mandatory": True,
            "properties": {"delivery_mode": 2},
        }
        return {
            "connection_url": self._broker.url,
            "exchange": kind,
            "queue": kind,
            "queue_publish_kwargs": publish,
        }

    def _results_from(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"queue_prefix": _PREFIX, "connection_url": self._broker.url}

    def _task(self, _: Mapping[str, Any], task_id: str) -> dict[str, Any]:
        if task_id not in self.tasks:
            raise Refused(404, "TASK_NOT_FOUND", f"Task {task_id} could not be resolved")
        task = self.tasks[task_id]
        return {"task_id": task_id, "status": task.status, **task.outcome}


_ID: Final = "([0-9a-f-]{36})"
_ROUTES: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "POST /v2/oauth2/token": ComputeCloud._token,
    "GET /v2/oauth2/userinfo": ComputeCloud._whoami,
    "GET /v2/version": ComputeCloud._version,
    "POST /v3/functions": ComputeCloud._register_function,
    f"GET /v2/functions/{_ID}": ComputeCloud._function,
    "POST /v3/endpoints": ComputeCloud._register_endpoint,
    f"PUT /v3/endpoints/{_ID}": ComputeCloud._register_endpoint,
    f"POST /v3/endpoints/{_ID}/submit": ComputeCloud._submit,
    f"GET /v3/endpoints/{_ID}/allowed_functions": ComputeCloud._allowed,
    f"GET /v2/endpoints/{_ID}/status": ComputeCloud._status,
    "GET /v2/get_amqp_result_connection_url": ComputeCloud._results_from,
    f"GET /v2/tasks/{_ID}": ComputeCloud._task,
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, cloud: ComputeCloud, *rest: Any) -> None:
        self._cloud = cloud
        super().__init__(*rest)

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        is_json = self.headers.get_content_type() == "application/json"
        document = dict(json.loads(body)) if is_json and body else dict(parse_qsl(body))
        path = re.sub("//+", "/", urlsplit(self.path).path)  # of an absolute URI: this is a proxy
        try:
            status, answer = 200, self._cloud.answer(self.command, path, document)
        except Refused as wrong:
            status, answer = wrong.status, wrong.document
        content = json.dumps(answer, default=str).encode()
        with contextlib.suppress(OSError):  # whoever asked has gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = _do  # noqa: N815 - the names that http.server calls

    def log_message(self, *_: object) -> None:
        """Say nothing: requests have tokens in them."""


class Endpoint:
    """The real `globus-compute-endpoint` on a configured directory, while the `with` block runs.

    Args:
        directory: `…/NAME` with its configuration; everything it writes goes beside or below it.
        cloud: The service.
        environment: What the endpoint's process has besides.
    """

    def __init__(self, directory: Path, cloud: ComputeCloud, environment: Mapping[str, str] = {}) -> None:
        self.directory = directory
        self._cloud = cloud
        here = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("GLOBUS_", "SCISTREAM_")) and not name.lower().endswith("_proxy")
        }
        self.environment = {
            **here,
            **cloud.environment,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GLOBUS_COMPUTE_USER_DIR": str(directory.parent),
            "HOME": str(directory.parent),
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper: threading.Thread | None = None
        self._seen: set[psutil.Process] = set()
        self._said = directory.parent / f"{directory.name}.out"

    def __enter__(self) -> Endpoint:
        with self._said.open("wb") as out:
            self._process = subprocess.Popen(
                ["globus-compute-endpoint", "start", self.directory.name, "--no-color"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # `stop` waits until it is gone, and a child that nobody reaps is not
        self._reaper = threading.Thread(target=self._process.wait, name=f"reap {self.directory.name}")
        self._reaper.start()
        deadline = time.monotonic() + 60
        while not self._online():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError(f"the endpoint did not come up: {self._said.read_text()}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.user_processes()  # they are known by their parent, as long as it lives
        self.stop()
        left = self.user_processes()
        if self._process is not None and self._running:
            left.append(self._process.pid)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._reaper is not None:
            self._reaper.join(30)
        deadline = time.monotonic() + 10
        while self.user_processes():
            assert time.monotonic() < deadline, "a user endpoint was left running"
            time.sleep(0.02)

    @property
    def id(self) -> str:
        """Its UUID, as the service gave it."""
        return str(json.loads((self.directory / "endpoint.json").read_text())["endpoint_id"])

    @property
    def log(self) -> str:
        """What it and its user endpoints have said."""
        logs = [self._said, *sorted(self.directory.parent.glob("*/*.log"))]
        return "\n".join(f"== {one}\n{one.read_text(errors='replace')}" for one in logs)

    def stop(self) -> None:
        """`globus-compute-endpoint stop`, if it runs."""
        if self._running:
            subprocess.run(
                ["globus-compute-endpoint", "stop", self.directory.name],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=60,
            )

    def user_processes(self) -> list[int]:
        """The pids of its user endpoints that run."""
        if self._running:
            assert self._process is not None
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen.update(psutil.Process(self._process.pid).children())
        return sorted(
            one.pid for one in self._seen if one.is_running() and one.status() != psutil.STATUS_ZOMBIE
        )

    @property
    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _online(self) -> bool:
        try:
            return self._cloud.endpoints[self.id].online
        except (OSError, KeyError, ValueError):
            return False
