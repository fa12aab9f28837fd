"""The documents of the action provider interface, version 1.0: request, status, description, log.

Written from the published description of the interface. No answer has a null: the published schemas have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, Final, Generic, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from .records import ActionState, LogEntry, Record

I = TypeVar("I", bound=BaseModel)  # noqa: E741 - the input of an action

MAXIMUM_DEADLINE: Final = timedelta(days=30)
DEFAULT_RELEASE_AFTER: Final = timedelta(days=30)
LONGEST_RELEASE_AFTER: Final = timedelta(days=366)

_UUID = "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("give a text in ISO 8601")
    return value


def _with_zone(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=timezone.utc)


def _not_longer(value: timedelta) -> timedelta:
    if not timedelta() <= value <= LONGEST_RELEASE_AFTER:
        raise ValueError(f"between P0D and P{LONGEST_RELEASE_AFTER.days}D")
    return value


Principal: TypeAlias = Annotated[
    str,
    StringConstraints(
        pattern=rf"^urn:(globus:(auth:identity|groups:id):{_UUID}|scistream:unix:[!-~]{{1,200}})$"
    ),
]
Principals: TypeAlias = Annotated[list[Principal], Field(max_length=256)]
Moment: TypeAlias = Annotated[datetime, BeforeValidator(_text), AfterValidator(_with_zone)]
Duration: TypeAlias = Annotated[timedelta, BeforeValidator(_text), AfterValidator(_not_longer)]
Label: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class ActionRequest(BaseModel, Generic[I]):
    """What `run` takes.

    Attributes:
        request_id: The caller's name for this request. Repeated, it answers the same action; with different content
            it is refused.
        body: The input of the action.
        label: A name for people.
        monitor_by: Who else may see the action, and the stream that it opens.
        manage_by: Who else may also cancel and release them.
        deadline: When the action has failed if it has not ended, at most 30 days ahead.
        release_after: How long its record is kept after its end.
        allowed_clients: Not supported: to be left out or empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    body: I
    label: Label | None = None
    monitor_by: Principals | None = None
    manage_by: Principals | None = None
    deadline: Moment | None = None
    release_after: Duration | None = None
    allowed_clients: Annotated[list[str], Field(max_length=0)] | None = None


class ActionStatus(BaseModel):
    """The status document of an action."""

    action_id: str
    status: ActionState
    creator_id: str
    details: Mapping[str, Any]
    display_status: Label
    start_time: datetime
    release_after: timedelta
    completion_time: datetime | None = None
    label: Label | None = None
    monitor_by: Principals = []
    manage_by: Principals = []

    @classmethod
    def of(cls, record: Record) -> ActionStatus:
        """The public part of a record."""
        return cls(
            action_id=record.action_id,
            status=record.status,
            creator_id=record.creator_id,
            details=record.details,
            display_status=record.display_status,
            start_time=_moment(record.began_at),
            completion_time=None if record.completed_at is None else _moment(record.completed_at),
            release_after=timedelta(seconds=record.keep_s),
            label=record.asked.label,
            monitor_by=list(record.asked.monitor_by),
            manage_by=list(record.asked.manage_by),
        )


class Description(BaseModel):
    """What an action provider says of itself."""

    types: list[Literal["Action"]] = ["Action"]
    api_version: Literal["1.0"] = "1.0"
    globus_auth_scope: str
    title: str
    subtitle: str
    description: str
    keywords: list[str]
    admin_contact: str
    administered_by: list[str]
    visible_to: list[str]
    runnable_by: list[str]
    synchronous: bool
    log_supported: Literal[True] = True
    maximum_deadline: timedelta = MAXIMUM_DEADLINE
    input_schema: Mapping[str, Any]


class ActionLogEntry(BaseModel):
    """One thing that happened to an action."""

    code: str
    description: str
    time: datetime


class ActionLog(BaseModel):
    """What happened to an action, the latest first; all on one page."""

    entries: list[ActionLogEntry]
    limit: int
    has_next_page: Literal[False] = False

    @classmethod
    def of(cls, entries: list[LogEntry], limit: int) -> ActionLog:
        """The document of a record's log."""
        return cls(
            limit=limit,
            entries=[
                ActionLogEntry(code=one.code, description=one.description, time=_moment(one.at))
                for one in entries[:limit]
            ],
        )


class ErrorDocument(BaseModel):
    """What went wrong, to which thing, and what to do."""

    protocol: Literal[1] = 1
    code: str
    message: str
    which: str = ""
    hint: str = ""
    details: Mapping[str, Any] = {}


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, tz=timezone.utc)
