"""The action provider interface over HTTP: the routes of one action. What they do is in `lifecycle`."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, StringConstraints

from scistream_flows.config import FacilityConfig

from .admission import Admission, Authorization
from .auth import admit
from .documents import ActionLog, ActionRequest, ActionStatus, Description, ErrorDocument
from .lifecycle import Lifecycle
from .operations import Operation
from .records import MAX_LOG_ENTRIES

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorDocument, "description": words}
    for status, words in {
        400: "Not JSON, or not a request",
        401: "No valid token",
        403: "Not allowed",
        404: "No such thing for this caller",
        409: "It is in another state, or the name is taken",
        408: "The body took too long",
        413: "The body is too large",
        422: "A field is wrong",
        429: "The caller asks too often; `Retry-After` says when to ask again",
        500: "The facility has made a mistake",
        501: "Not supported",
        502: "Globus Auth, or a relay, did not answer",
        503: "Nothing free at the moment",
        504: "A gateway did not answer in time",
    }.items()
}
_STATES: Final = ("active", "inactive", "succeeded", "failed")


def _some_of(*words: str) -> str:
    one = f"({'|'.join(words)})"
    return f"^{one}(,{one})*$"


class Wanted(BaseModel):
    """Which actions to list, with commas: `roles` of the caller, and the `status` of the action."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: Annotated[str, StringConstraints(pattern=_some_of("creator_id", "monitor_by", "manage_by"))] = (
        "creator_id"
    )
    status: Annotated[str, StringConstraints(pattern=_some_of(*_STATES, *map(str.upper, _STATES)))] = "active"

    @property
    def roles_named(self) -> set[str]:
        """The roles."""
        return set(self.roles.split(","))

    @property
    def states_named(self) -> list[str]:
        """The states, as actions have them."""
        return sorted({one.upper() for one in self.status.split(",")})


def routes(
    operation: Operation[Any], *, lifecycle: Lifecycle, admission: Admission, facility: FacilityConfig
) -> APIRouter:
    """The routes of an action, version 1.0 of the interface and the names that 1.1 has for them."""
    name = operation.name
    router = APIRouter(prefix=f"/actions/{name}", tags=[f"action {name}"], responses=ERRORS)
    description = describe(operation, lifecycle=lifecycle, facility=facility)

    def introspect(response: Response, authorization: Authorization) -> Description:
        """What this action is, and what it takes."""
        if "public" not in lifecycle.auth.config.visible_to:
            admit(lifecycle.auth, authorization, lifecycle.auth.config.visible_to)
        response.headers["Access-Control-Allow-Origin"] = "*"
        return description

    def preflight() -> Response:
        """Whether a page of elsewhere may read the description: it may."""
        return Response(
            status_code=204,
            headers={
                "Access-Control-Allow-Origin": "*",
                "Access-Control-Allow-Methods": "GET, OPTIONS",
                "Access-Control-Allow-Headers": "Authorization",
                "Access-Control-Max-Age": "86400",
            },
        )

    def run(request: ActionRequest[Any], response: Response, authorization: Authorization) -> ActionStatus:
        """Begin the action; the same request again answers the same action, with 200."""
        record, new = lifecycle.run(operation, request, authorization)
        response.status_code = 202 if new else 200
        return ActionStatus.of(record)

    # the input differs from action to action: validation and OpenAPI take the model from here
    run.__annotations__["request"] = ActionRequest[operation.input]  # type: ignore[name-defined]

    def status(action_id: str, authorization: Authorization) -> ActionStatus:
        """How far the action is, as of now."""
        return ActionStatus.of(lifecycle.status(operation, action_id, authorization))

    def cancel(action_id: str, authorization: Authorization) -> ActionStatus:
        """End the action; one that has ended stays as it is."""
        return ActionStatus.of(lifecycle.cancel(operation, action_id, authorization))

    def release(action_id: str, authorization: Authorization) -> ActionStatus:
        """Forget an action that has ended, and answer it a last time."""
        return ActionStatus.of(lifecycle.release(operation, action_id, authorization))

    def log(
        action_id: str,
        authorization: Authorization,
        limit: Annotated[int, Query(ge=1, le=MAX_LOG_ENTRIES)] = MAX_LOG_ENTRIES,
    ) -> ActionLog:
        """What happened to the action, the latest first."""
        return ActionLog.of(lifecycle.log(operation, action_id, authorization), limit)

    def enumerate_actions(
        wanted: Annotated[Wanted, Query()], authorization: Authorization
    ) -> list[ActionStatus]:
        """The caller's actions, the latest first, as they were when last looked at."""
        found = lifecycle.enumerate(
            operation, authorization, roles=wanted.roles_named, statuses=wanted.states_named
        )
        return [ActionStatus.of(record) for record in found]

    begun_before: dict[int | str, dict[str, Any]] = {
        200: {"model": ActionStatus, "description": "Begun before"}
    }
    open_to_all = {preflight, *([introspect] if "public" in lifecycle.auth.config.visible_to else [])}
    for endpoint, success, paths in (
        (introspect, 200, ("GET /", "GET ")),
        (preflight, 204, ("OPTIONS /", "OPTIONS ")),
        (run, 202, ("POST /run", "POST /actions")),
        (enumerate_actions, 200, ("GET /actions",)),
        (status, 200, ("GET /{action_id}/status", "GET /actions/{action_id}")),
        (cancel, 200, ("POST /{action_id}/cancel", "POST /actions/{action_id}/cancel")),
        (release, 200, ("POST /{action_id}/release", "DELETE /actions/{action_id}")),
        (log, 200, ("GET /{action_id}/log", "GET /actions/{action_id}/log")),
    ):
        for place in paths:
            method, _, path = place.partition(" ")
            router.add_api_route(
                path,
                endpoint,
                methods=[method],
                status_code=success,
                operation_id=f"{name}_{endpoint.__name__}",
                response_model_exclude_none=True,
                responses=begun_before if endpoint is run else None,
                dependencies=[] if endpoint in open_to_all else admission.dependencies(),
                include_in_schema=place == paths[0],
            )
    return router


def describe(operation: Operation[Any], *, lifecycle: Lifecycle, facility: FacilityConfig) -> Description:
    """What the action provider of an operation says of itself."""
    config = lifecycle.auth.config
    return Description(
        globus_auth_scope=config.scope,
        title=operation.title,
        subtitle=f"Facility {facility.name}",
        description=" ".join((operation.input.__doc__ or "").split()),
        keywords=["SciStream", "streaming", "memory-to-memory", operation.name],
        admin_contact=f"the administrators of facility {facility.name}",
        administered_by=list(config.administered_by),
        visible_to=list(config.visible_to),
        runnable_by=list(config.runnable_by if operation.opens else ("all_authenticated_users",)),
        synchronous=False,  # each may be ACTIVE for a while, where a gateway is slow
        input_schema=operation.input.model_json_schema(),
    )
