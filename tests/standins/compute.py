"""A stand-in for the action provider of Globus Compute, version 3: flows with Compute steps run without Globus.

Functions are Python callables that were registered here, endpoints are threads of this process. What it keeps of the
service: the form of the input, one result per task in `details.result` and `details.results`, values that must survive
JSON, the failure of an action of which one task failed. What it leaves out: tokens, queues, containers, limits, and
the end of a function that is cancelled while it runs.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import jsonschema

from .actions import Action, ActionServer, Behaviour, Refused

_UUID: Final = {"type": "string", "pattern": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"}
INPUT: Final = {
    "type": "object",
    "required": ["endpoint_id", "tasks"],
    "additionalProperties": False,
    "properties": {
        "endpoint_id": _UUID,
        "task_group_id": _UUID,
        "create_queue": {"type": "boolean"},
        "user_endpoint_config": {"type": "object"},
        "resource_specification": {"type": "object"},
        "tasks": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["function_id"],
                "additionalProperties": False,
                "properties": {
                    "function_id": _UUID,
                    "args": {"type": "array"},
                    "kwargs": {"type": "object"},
                },
            },
        },
    },
}


class Compute(Behaviour):
    """An action provider while the `with` block runs; `url` is what a definition has in place of the service's.

    Args:
        endpoints: The ids of the endpoints there are; None for every id.
    """

    def __init__(self, endpoints: Collection[str] | None = None) -> None:
        self.server = ActionServer(self, prefix="/v3")
        self.url = self.server.url
        self._endpoints = endpoints
        self._functions: dict[str, Callable[..., Any]] = {}
        self._tasks: dict[str, list[tuple[str, Future[Any]]]] = {}
        self._workers = ThreadPoolExecutor(8, thread_name_prefix="compute")

    def __enter__(self) -> Compute:
        self.server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__()
        self._workers.shutdown(cancel_futures=True)

    def register(self, function: Callable[..., Any]) -> str:
        """The id of a function."""
        function_id = str(uuid.uuid4())
        self._functions[function_id] = function
        return function_id

    def start(self, action: Action) -> None:
        body = action.body
        mistakes = [one.message for one in jsonschema.Draft202012Validator(INPUT).iter_errors(body)]
        if mistakes:
            raise Refused(422, {"code": "RequestValidationError", "description": "; ".join(mistakes)})
        if self._endpoints is not None and body["endpoint_id"] not in self._endpoints:
            raise Refused(
                404, {"code": "NotFound", "description": f"there is no endpoint {body['endpoint_id']}"}
            )
        unknown = [one["function_id"] for one in body["tasks"] if one["function_id"] not in self._functions]
        if unknown:
            raise Refused(404, {"code": "NotFound", "description": f"there is no function {unknown[0]}"})
        self._tasks[action.action_id] = [(str(uuid.uuid4()), self._submit(one)) for one in body["tasks"]]

    def _submit(self, task: dict[str, Any]) -> Future[Any]:
        function = self._functions[task["function_id"]]
        return self._workers.submit(function, *task.get("args", ()), **task.get("kwargs", {}))

    def poll(self, action: Action) -> None:
        tasks = self._tasks[action.action_id]
        if not all(future.done() for _, future in tasks):
            return
        error = next((error for _, future in tasks if (error := future.exception()) is not None), None)
        if error is not None:
            action.fail(code="TaskFailed", description=f"{type(error).__name__}: {error}")
            return
        results = [json.loads(json.dumps(future.result())) for _, future in tasks]
        task_ids = [task_id for task_id, _ in tasks]
        action.succeed(
            result=results,
            results=[
                {"task_id": one, "output": result} for one, result in zip(task_ids, results, strict=True)
            ],
        )

    def cancel(self, action: Action) -> None:
        for _, future in self._tasks[action.action_id]:
            future.cancel()
        super().cancel(action)
