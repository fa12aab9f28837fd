"""A stand-in for an action provider: not one of ours, but real HTTP that the runner speaks with.

Its actions do what a test says, and its answers can be made to fail on the way. Like a good provider it starts one
action for each request_id; unlike ours it keeps everything in memory and knows no rights.
"""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal, TypeAlias

CREATOR: Final = "urn:globus:auth:identity:11111111-1111-4111-8111-111111111111"

Failure: TypeAlias = Literal["hang up", "lose the answer"]


class Refused(Exception):
    """What a provider answers instead of an action."""

    def __init__(self, status: int, document: Any) -> None:
        super().__init__(status, document)
        self.status = status
        self.document = document


@dataclass
class Action:
    """One action. Behaviours change `status` and `details`."""

    action_id: str
    request: Mapping[str, Any]
    status: str = "ACTIVE"
    details: Any = field(default_factory=dict)
    display_status: str | None = None
    polls: int = 0

    @property
    def body(self) -> Any:
        return self.request["body"]

    @property
    def over(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED")

    def succeed(self, **details: Any) -> None:
        self.status, self.details = "SUCCEEDED", details

    def fail(self, **details: Any) -> None:
        self.status, self.details = "FAILED", details

    def document(self) -> dict[str, Any]:
        shown = {
            key: self.request[key] for key in ("label", "manage_by", "monitor_by") if key in self.request
        }
        if self.display_status is not None:
            shown["display_status"] = self.display_status
        return {
            "action_id": self.action_id,
            "status": self.status,
            "creator_id": CREATOR,
            "details": self.details,
            **shown,
        }


class Behaviour:
    """What the actions of a provider do: at once, at each poll (`polls` counts from 1), and when cancelled."""

    def start(self, action: Action) -> None:
        action.succeed(echo=action.body)

    def poll(self, action: Action) -> None:
        pass

    def cancel(self, action: Action) -> None:
        action.fail(code="Cancelled", description="cancelled")


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass(frozen=True)
class Reply:
    """An answer in place of the provider's own."""

    status: int
    document: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None


class ActionServer:
    """A provider, listening while the `with` block runs; its address ends in `prefix`."""

    def __init__(self, behaviour: Behaviour | None = None, *, prefix: str = "") -> None:
        self.behaviour = behaviour or Behaviour()
        self.actions: dict[str, Action] = {}
        self.asked: list[Asked] = []
        self.next: deque[Reply | Failure | Callable[[], None]] = deque()
        """What becomes of the next requests: one entry each. A function is called before the provider answers."""
        self.changed = threading.Condition()
        self._by_request: dict[str, Action] = {}
        self._server = _Server(("127.0.0.1", 0), lambda *arguments: _Handler(self, *arguments))
        self._prefix = prefix
        self.url = "http://{}:{}".format(*self._server.server_address) + prefix
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> ActionServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def active(self) -> list[Action]:
        return [one for one in self.actions.values() if not one.over]

    def requests(self, method: str, ending: str) -> list[Asked]:
        return [one for one in self.asked if one.method == method and one.path.endswith(ending)]

    def wait_for(self, condition: Callable[[], object], *, patience_s: float = 10) -> None:
        """Wait until something holds that requests bring about."""
        with self.changed:
            assert self.changed.wait_for(condition, patience_s), "it never came to that"

    def answer(self, asked: Asked) -> Reply:
        with self.changed:
            self.changed.notify_all()
            try:
                return Reply(*self._answer(asked))
            except Refused as refused:
                return Reply(refused.status, refused.document)

    def _answer(self, asked: Asked) -> tuple[int, Any]:
        parts = [one for one in asked.path.removeprefix(self._prefix).split("/") if one]
        if asked.method == "POST" and parts == ["run"]:
            return self._run(asked.body)
        if len(parts) != 2 or parts[0] not in self.actions:
            raise Refused(404, {"code": "NotFound", "description": f"there is no {asked.path}"})
        action, what = self.actions[parts[0]], parts[1]
        if asked.method == "GET" and what == "status":
            action.polls += 1
            if not action.over:
                self.behaviour.poll(action)
        elif asked.method == "POST" and what == "cancel":
            if not action.over:
                self.behaviour.cancel(action)
        else:
            raise Refused(405, {"code": "NotAllowed", "description": asked.path})
        return 200, action.document()

    def _run(self, request: Any) -> tuple[int, Any]:
        known = self._by_request.get(request["request_id"])
        if known is not None:
            return 200, known.document()
        action = Action(action_id=str(uuid.uuid4()), request=request)
        self.behaviour.start(action)
        self.actions[action.action_id] = self._by_request[request["request_id"]] = action
        return 202, action.document()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *arguments: Any) -> None:
        """Who hangs up before the end is told nothing; what is wrong with a behaviour is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*arguments)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: ActionServer, *arguments: Any) -> None:
        self._provider = server
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def log_message(self, *_: object) -> None:
        pass

    def _do(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content) if content else None
        asked = Asked(self.command, self.path, dict(self.headers), body)
        with self._provider.changed:
            self._provider.asked.append(asked)
            self._provider.changed.notify_all()
        planned = self._provider.next.popleft() if self._provider.next else None
        if planned == "hang up":
            self.close_connection = True
            return
        if callable(planned):
            planned()
        reply = planned if isinstance(planned, Reply) else self._provider.answer(asked)
        if planned == "lose the answer":
            self.close_connection = True
            return
        payload = (json.dumps(reply.document) if reply.text is None else reply.text).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)
