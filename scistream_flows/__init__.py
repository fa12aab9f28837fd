"""Memory-to-memory data streams between facilities.

from scistream_flows import open_stream

with open_stream("local:aps", "local:alcf", targets=["127.0.0.1:5555"]) as stream:
    print(stream.listeners)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from scistream_flows.errors import (
    BadRequest,
    CapacityExhausted,
    ConfigError,
    Conflict,
    FacilityUnreachable,
    NotFound,
    NotSupported,
    PolicyDenied,
    ProtocolMismatch,
    RelayError,
    ScistreamError,
    StreamFailed,
    StreamNotReady,
    WaitTimeout,
)

if TYPE_CHECKING:
    from scistream_flows.facility import Facility, connect_facility
    from scistream_flows.hello import say_hello
    from scistream_flows.s2cs import S2CS
    from scistream_flows.stream import Stream, StreamEnd, StreamStatus, aopen_stream, open_stream

__version__ = "0.1.0"

__all__ = [
    "S2CS",
    "BadRequest",
    "CapacityExhausted",
    "ConfigError",
    "Conflict",
    "Facility",
    "FacilityUnreachable",
    "NotFound",
    "NotSupported",
    "PolicyDenied",
    "ProtocolMismatch",
    "RelayError",
    "ScistreamError",
    "Stream",
    "StreamEnd",
    "StreamFailed",
    "StreamNotReady",
    "StreamStatus",
    "WaitTimeout",
    "__version__",
    "aopen_stream",
    "connect_facility",
    "open_stream",
    "say_hello",
]

_HOME = {
    "S2CS": "s2cs",
    "Facility": "facility",
    "connect_facility": "facility",
    "Stream": "stream",
    "StreamEnd": "stream",
    "StreamStatus": "stream",
    "aopen_stream": "stream",
    "open_stream": "stream",
    "say_hello": "hello",
}


def __getattr__(name: str) -> object:
    # loaded when asked for: whoever only catches an error does not wait for pydantic
    if name in _HOME:
        return getattr(import_module(f"scistream_flows.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
