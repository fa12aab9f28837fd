"""The one tree of errors: each says what happened, to which thing, and what to do.

Errors cross process borders (Globus Compute, HTTP, process pools), so every one can be pickled and has a document
form; both keep the type, the words and the details.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

PROTOCOL: Final = 1
"""The number every document carries, the relay's included."""


class ScistreamError(Exception):
    """The root of every error of this package.

    Args:
        message: What happened, in one sentence without a final stop.
        which: The thing it happened to: a uid, a file, a gateway.
        hint: What the reader can do about it.
        details: Values a program may want, JSON types only.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, which: str = "", hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.which = which
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.which, self.hint, self.details)

    def to_document(self) -> dict[str, Any]:
        """The error as a JSON document: `protocol, code, message, which, hint, details`."""
        return {
            "protocol": PROTOCOL,
            "code": self.code,
            "message": self.message,
            "which": self.which,
            "hint": self.hint,
            "details": self.details,
        }


class BadRequest(ScistreamError):
    """A document or an argument is not what the verb takes. Nothing was done."""

    code = "bad-request"
    exit_code = 2
    http_status = 422


class NotSupported(ScistreamError):
    """The thing asked for is described, but not part of this version."""

    code = "not-supported"
    exit_code = 2
    http_status = 501


class ConfigError(ScistreamError):
    """A configuration file, an environment variable or a state directory is wrong; `file` and `key` say where."""

    code = "config"
    exit_code = 2

    @property
    def file(self) -> str:
        """The file, or the environment variable."""
        return str(self.details.get("file", ""))

    @property
    def key(self) -> str:
        """The key in dotted form, such as `gateway.0.port_range`."""
        return str(self.details.get("key", ""))


class MissingExtra(ScistreamError):
    """An optional part is not installed; the hint names the extra."""

    code = "missing-extra"
    http_status = 501


class ProtocolMismatch(ScistreamError):
    """The two ends speak different protocols; both numbers are named."""

    code = "protocol"
    http_status = 400

    @property
    def ours(self) -> int:
        """The protocol of this package."""
        return int(self.details.get("ours", PROTOCOL))

    @property
    def theirs(self) -> int | None:
        """The protocol of the document or program, None when it named none."""
        theirs = self.details.get("theirs")
        return theirs if isinstance(theirs, int) else None


class PolicyDenied(ScistreamError):
    """The facility's policy, or the rights on the stream, do not allow it."""

    code = "denied"
    http_status = 403


class Unauthenticated(ScistreamError):
    """Who calls is not proven: no token, or one that is expired, revoked, or not for this facility."""

    code = "unauthenticated"
    http_status = 401

    @property
    def challenge(self) -> str:
        """The value of the header `WWW-Authenticate` that belongs to the answer."""
        return str(self.details.get("challenge", "Bearer"))


class AuthUnavailable(ScistreamError):
    """Whoever proves who calls did not answer, so the call was neither admitted nor refused."""

    code = "auth-unavailable"
    http_status = 502


class NotFound(ScistreamError):
    """No such stream for this caller. A stream of somebody else gets the very same answer."""

    code = "not-found"
    http_status = 404


class Conflict(ScistreamError):
    """The name is taken by a different request of the same owner; `details["fields"]` names what differs."""

    code = "conflict"
    http_status = 409


class Busy(ScistreamError):
    """Another process works on the same stream and did not finish within the deadline."""

    code = "busy"
    http_status = 503


class RateLimited(ScistreamError):
    """The caller asks more often than the facility's policy allows. Nothing was done; `retry_after_s` says when to."""

    code = "rate-limited"
    http_status = 429

    @property
    def retry_after_s(self) -> float:
        """How long to wait before the next request, seconds; whoever says nonsense is asked again after one."""
        wait_s = self.details.get("retry_after_s")
        return float(wait_s) if isinstance(wait_s, int | float) and 0 < wait_s < 1e6 else 1.0


class CapacityExhausted(ScistreamError):
    """Nothing free at the moment that could carry the request; the message says what is free."""

    code = "capacity"
    http_status = 503


class PortsExhausted(CapacityExhausted):
    """The gateway's port range has no room for the listeners."""

    code = "ports"


class RegistryError(ScistreamError):
    """The facility's state on disk could not be read or written."""

    code = "registry"


class RelayError(ScistreamError):
    """A relay did not start or did not answer; `errno` is the system's name of the cause, where there is one."""

    code = "relay"
    http_status = 502

    @property
    def errno(self) -> str | None:
        """The errno name, such as `EADDRINUSE`."""
        errno = self.details.get("errno")
        return errno if isinstance(errno, str) else None


class RelayLost(RelayError):
    """The relay is gone without a word: killed, or its gateway was restarted."""

    code = "relay-lost"


class GatewayUnreachable(RelayError):
    """A gateway did not run a command, or not within its deadline: what it did is unknown."""

    code = "gateway-unreachable"
    http_status = 504


class HostKeyRejected(GatewayUnreachable):
    """The host of a gateway could not prove to be the one that is known. Nothing was sent to it.

    `details`: `host`, the `file` of host keys, the `fingerprint` that was offered, and the `command` that adds it.
    """

    code = "host-key"
    http_status = 502


class FacilityUnreachable(ScistreamError):
    """A facility did not answer: what it did is unknown."""

    code = "facility-unreachable"
    http_status = 504


class StreamNotReady(ScistreamError):
    """A stream did not become ready; `leg` says where, `reason` why. Nothing of it is left."""

    code = "not-ready"
    http_status = 504

    @property
    def leg(self) -> str:
        """`producer-lan`, `wan` or `consumer-lan`."""
        return str(self.details.get("leg", ""))

    @property
    def reason(self) -> str:
        """The last thing the relays said, such as `unreachable` or `refused`."""
        return str(self.details.get("reason", ""))


class StreamFailed(ScistreamError):
    """A stream ended otherwise than in order; `reason` is one of the typed reasons."""

    code = "failed"
    http_status = 502

    @property
    def reason(self) -> str:
        """The typed reason, such as `relay_lost` or `aborted_by_producer`."""
        return str(self.details.get("reason", ""))


class WaitTimeout(ScistreamError, TimeoutError):
    """What was waited for did not come within the time given."""

    code = "timeout"
    http_status = 504


def error_from_document(document: dict[str, Any]) -> ScistreamError:
    """The error of which `document` is the form. An unknown code gives the root class, with the words kept."""
    code = str(document.get("code", ScistreamError.code))
    details = document.get("details")
    return _rebuild(
        _class_of(code),
        str(document.get("message", code)),
        str(document.get("which", "")),
        str(document.get("hint", "")),
        dict(details) if isinstance(details, dict) else {},
    )


def error_classes() -> list[type[ScistreamError]]:
    """Every error class of this package, the root first."""
    found: list[type[ScistreamError]] = []
    waiting: list[type[ScistreamError]] = [ScistreamError]
    while waiting:
        cls = waiting.pop(0)
        found.append(cls)
        waiting.extend(cls.__subclasses__())
    return found


def _class_of(code: str) -> type[ScistreamError]:
    return next((cls for cls in error_classes() if cls.code == code), ScistreamError)


def _rebuild(
    cls: type[ScistreamError], message: str, which: str, hint: str, details: dict[str, Any]
) -> ScistreamError:
    # details may hold the keys "which" or "hint" when they come from elsewhere: set, never passed as keywords
    error = cls(message, which=which, hint=hint)
    error.details = details
    return error
