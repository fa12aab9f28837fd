"""The life of an action: run, status, cancel, release, log, enumerate; the same for each of the five.

No answer waits for a gateway: a step is done by a worker thread, and whoever asked is answered after
`ANSWER_WITHIN_S` at the latest. What a killed process has left undone, the next look at the action does again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextvars import copy_context
from datetime import datetime, timedelta, timezone
from typing import Any, Final, Literal, TypeAlias

from pydantic import BaseModel

from scistream_flows.config import FacilityConfig
from scistream_flows.errors import (
    BadRequest,
    Busy,
    Conflict,
    GatewayUnreachable,
    NotFound,
    PolicyDenied,
    RegistryError,
    ScistreamError,
)
from scistream_flows.s2cs import S2CS

from .auth import Authenticator, Identity, admit, may, names_group
from .documents import DEFAULT_RELEASE_AFTER, MAXIMUM_DEADLINE, ActionRequest
from .operations import Call, Operation
from .records import LONGEST_LISTING, Asked, LogEntry, Outcome, Record, Records

log = logging.getLogger(__name__)

ANSWER_WITHIN_S: Final = 0.8
"""So long an answer waits for the step it is about, seconds."""

WORKERS: Final = 32

_DEADLINE: Final = ("deadline", "the deadline has passed")

Access: TypeAlias = Literal["monitor_by", "manage_by"]

# What passes by itself: an action that waits anyway goes on waiting, and the lease is the bound.
_PASSING = (Busy, GatewayUnreachable, RegistryError)


class Lifecycle:
    """The actions of one facility in this process; others may serve the same records.

    Args:
        service: The facility.
        auth: Proves who calls.
        records: What is known of the actions.
    """

    def __init__(self, service: S2CS, *, auth: Authenticator, records: Records) -> None:
        self._service = service
        self.auth = auth
        self._records = records
        self._mutex = threading.Lock()
        self._under_way: dict[int, Future[None]] = {}
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="action")

    def close(self) -> None:
        """Begin nothing more, wait for what is under way (S2CS bounds it), and close everything. Relays live on."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._records.close()
        self.auth.close()
        self._service.close()

    # --- the operations of the interface

    def run(
        self, operation: Operation[Any], request: ActionRequest[Any], authorization: str | None
    ) -> tuple[Record, bool]:
        """Begin an action, or answer the one that the same request has begun; and whether it is new.

        Raises:
            Unauthenticated, PolicyDenied, AuthUnavailable: As `auth.admit`.
            BadRequest: The deadline cannot be met.
            Conflict: The request_id was used for something else.
            CapacityExhausted: The caller has too many actions running.
        """
        identity = self._runner(operation, request.body, authorization)
        known = self._records.knows(operation.name, identity.urn, request.request_id)
        deadline_at = _deadline(request.deadline, repeated=known)
        record, new = self._records.add(
            operation.name,
            request.request_id,
            Asked(
                body=request.body.model_dump(mode="json", by_alias=True, exclude_unset=True),
                caller=identity.urns,
                label=request.label,
                monitor_by=sorted(set(request.monitor_by or ())),
                manage_by=sorted(set(request.manage_by or ())),
                deadline_at=None if request.deadline is None else deadline_at,
            ),
            deadline_at=deadline_at,
            keep_s=(
                DEFAULT_RELEASE_AFTER if request.release_after is None else request.release_after
            ).total_seconds(),
        )
        return self._looked_at(operation, record), new

    def status(self, operation: Operation[Any], action_id: str, authorization: str | None) -> Record:
        """The action as it is now.

        Raises:
            NotFound, PolicyDenied: There is none, or it is somebody else's.
        """
        return self._looked_at(operation, self._find(operation, action_id, authorization, "monitor_by"))

    def cancel(self, operation: Operation[Any], action_id: str, authorization: str | None) -> Record:
        """End the action, and undo what it has done so far; one that is final stays as it is."""
        record = self._find(operation, action_id, authorization, "manage_by")
        if record.final:
            return record
        self._give_up(operation, record, "cancelled", "the action was cancelled")
        return self._records.find(operation.name, action_id) or record

    def release(self, operation: Operation[Any], action_id: str, authorization: str | None) -> Record:
        """Forget an action that is final; answers it a last time.

        Raises:
            Conflict: It is still running.
        """
        record = self._find(operation, action_id, authorization, "manage_by")
        record = self._looked_at(operation, record)
        if not record.final:
            raise Conflict(
                f"action {action_id} is still running", which=action_id, hint="Cancel it first, or wait"
            )
        self._records.remove(record)
        return record

    def log(self, operation: Operation[Any], action_id: str, authorization: str | None) -> list[LogEntry]:
        """What happened to the action, the latest first."""
        return self._records.log(self._find(operation, action_id, authorization, "monitor_by"))

    def enumerate(
        self,
        operation: Operation[Any],
        authorization: str | None,
        *,
        roles: Collection[str],
        statuses: Sequence[str],
    ) -> list[Record]:
        """The caller's actions, the latest first, as they were when last looked at; 1,000 at most."""
        identity = identify(self.auth, authorization, groups=set(roles) != {"creator_id"})
        found: list[Record] = []
        for record in self._records.of_provider(operation.name, statuses):
            named = [urn for role in roles for urn in _principals(record)[role]]
            if may(identity, named) and len(found) < LONGEST_LISTING:
                found.append(record)
        return found

    # --- who may

    def _runner(self, operation: Operation[Any], body: BaseModel, authorization: str | None) -> Identity:
        # Who opens a stream must be allowed to; the others act on streams, and each stream has its own rights.
        rule = self.auth.config.runnable_by if operation.opens else ("all_authenticated_users",)
        try:
            admit(self.auth, authorization, rule)
        except PolicyDenied as wrong:
            self._service.refused(self.auth.identify(authorization).urns, wrong)
            raise
        uid = getattr(body, "stream_id", None) or getattr(body, "uid", None)
        return identify(
            self.auth,
            authorization,
            groups=self._service.names_groups(uid),
            withheld=may_withhold_groups(self._service.config, opens=operation.opens),
        )

    def _find(
        self, operation: Operation[Any], action_id: str, authorization: str | None, access: Access
    ) -> Record:
        identity = self.auth.identify(authorization)
        record = self._records.find(operation.name, action_id)
        if record is None:
            raise NotFound(
                f"there is no action {action_id} at {operation.name}",
                which=action_id,
                hint="It may have been released, or belong to another provider",
            )
        allowed = [record.creator_id, *record.asked.manage_by, *self.auth.config.administered_by]
        if access == "monitor_by":
            allowed += record.asked.monitor_by
        if not may(identity, allowed) and names_group(allowed):
            identity = self.auth.identify(authorization, groups=True)
        if not may(identity, allowed):
            raise PolicyDenied(
                f"action {action_id} does not name this caller in {access}",
                which=action_id,
                hint=f"Ask its creator to name you in {access}",
            )
        return record

    # --- steps

    def _looked_at(self, operation: Operation[Any], record: Record) -> Record:
        """The action after a step, or as it was if the step takes longer."""
        if record.final:
            return record
        if record.overdue:
            self._give_up(operation, record, *_DEADLINE)
        else:
            with self._mutex:
                step = self._under_way.get(record.number)
                if step is None:
                    step = self._workers.submit(copy_context().run, self._step, operation, record)
                    self._under_way[record.number] = step
                    step.add_done_callback(lambda _: self._under_way.pop(record.number, None))
            wait_for([step], timeout=ANSWER_WITHIN_S)
            if step.done():
                step.result()  # raises what kept it from being written down
        return self._records.find(operation.name, record.action_id) or record

    def _step(self, operation: Operation[Any], record: Record) -> None:
        with self._records.working_on(record) as mine:
            if not mine:  # another process is at it
                return
            now = self._records.find(operation.name, record.action_id)
            if now is None or now.final:
                return
            call = self._call(operation, now)
            outcome = self._outcome(operation, call, now)
            late = now.overdue
            written = self._records.advance(now, _given_up(now, *_DEADLINE) if late else outcome)
            if late or not written:  # not written: cancelled in the meantime
                self._undo(operation, call)

    def _outcome(self, operation: Operation[Any], call: Call[Any], record: Record) -> Outcome:
        try:
            return operation.step(call)
        except _PASSING as wrong:
            if not operation.patient:
                return _failure(wrong)
            log.warning("action %s (%s): %s", record.action_id, operation.name, wrong)
            return Outcome(
                status="ACTIVE",
                display_status="the facility's gateway does not answer"
                if isinstance(wrong, GatewayUnreachable)
                else f"waiting: {wrong.message}",
                details={**record.details, "warning": str(wrong)},
                memory=call.memory,
            )
        except ScistreamError as wrong:
            return _failure(wrong)
        except Exception:
            log.exception("action %s (%s)", record.action_id, operation.name)
            return _failure(ScistreamError("the facility has made a mistake; its log says which"))

    def _give_up(self, operation: Operation[Any], record: Record, code: str, words: str) -> None:
        if self._records.advance(record, _given_up(record, code, words)):
            undoing = self._workers.submit(
                copy_context().run, self._undo, operation, self._call(operation, record)
            )
            wait_for([undoing], timeout=ANSWER_WITHIN_S)

    def _undo(self, operation: Operation[Any], call: Call[Any]) -> None:
        try:
            operation.withdraw(call)
        except ScistreamError as wrong:
            log.warning("%s could not be undone, the lease ends it: %s", operation.name, wrong)
        except Exception:
            log.exception("%s could not be undone, the lease ends it", operation.name)

    def _call(self, operation: Operation[Any], record: Record) -> Call[Any]:
        return Call(
            service=self._service,
            input=operation.input.model_validate(dict(record.asked.body)),
            caller=record.asked.caller,
            managers=record.asked.manage_by,
            monitors=record.asked.monitor_by,
            elapsed_s=time.time() - record.began_at,
            memory=record.memory,
        )


def may_withhold_groups(facility: FacilityConfig, *, opens: bool) -> bool:
    """Whether a caller may keep its groups secret: not where it opens a stream, and a quota names a group."""
    return not (opens and names_group(urn for quota in facility.policy.quota for urn in quota.users))


def identify(
    auth: Authenticator, authorization: str | None, *, groups: bool, withheld: bool = True
) -> Identity:
    """Who calls, with its groups where they are wanted.

    Args:
        auth: Proves it.
        authorization: The header.
        groups: Whether they are wanted.
        withheld: Whether one whose groups may not be seen is judged without them, rather than refused.

    Raises:
        Unauthenticated, PolicyDenied, AuthUnavailable: As `Authenticator.identify`.
    """
    if groups:
        try:
            return auth.identify(authorization, groups=True)
        except PolicyDenied:
            if not withheld:
                raise
    return auth.identify(authorization)


def _principals(record: Record) -> dict[str, Sequence[str]]:
    return {
        "creator_id": (record.creator_id,),
        "monitor_by": record.asked.monitor_by,
        "manage_by": record.asked.manage_by,
    }


def _deadline(given: datetime | None, *, repeated: bool) -> float:
    """The deadline, seconds since the epoch; by default the latest there can be. A repeated one may be past."""
    now = datetime.now(timezone.utc)
    latest = now + MAXIMUM_DEADLINE
    if given is None:
        return latest.timestamp()
    if given <= now and not repeated:
        raise BadRequest(f"deadline: {given.isoformat()} is past", which="deadline", hint="Give a later one")
    if given > latest + timedelta(seconds=1):
        raise BadRequest(
            f"deadline: {given.isoformat()} is beyond the maximum of {MAXIMUM_DEADLINE.days} days",
            which="deadline",
            hint="Give an earlier one, or none",
        )
    return given.timestamp()


def _given_up(record: Record, code: str, words: str) -> Outcome:
    details = {**record.details, "code": code, "description": words}
    return Outcome(status="FAILED", display_status=code, details=details)


def _failure(wrong: ScistreamError) -> Outcome:
    details: dict[str, Any] = {"code": wrong.code, "description": wrong.message}
    details |= {name: value for name in ("which", "hint") if (value := getattr(wrong, name))}
    if reason := wrong.details.get("reason"):
        details["reason"] = reason
    return Outcome(status="FAILED", display_status=f"failed: {wrong.message}", details=details)
