"""The verbs of a facility as functions, for Globus Compute and every other executor.

One JSON document in, one out: `{"protocol", "ok": true, "value", "worker"}` or `{"protocol", "ok": false, "error",
"worker"}`; nothing is raised. Each may be run twice, and its answer may be lost: the verbs are idempotent, and what a
lost `request` has opened ends by its lease. The relays that they start detach from the worker, and outlive it.

They run as the account of the worker, with the facility's configuration on that machine. Where it names a socket, they
only ask the service there, which knows the account and holds everything else; otherwise they act by themselves, and the
account owns what it opens.
"""

from __future__ import annotations

import json
import logging
import platform
import threading
import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from scistream_flows import __version__
from scistream_flows.config import FacilityConfig, load_facility
from scistream_flows.doorway import DEADLINE_S, ask
from scistream_flows.errors import PROTOCOL, BadRequest, ScistreamError
from scistream_flows.s2cs import S2CS, VERBS

log = logging.getLogger(__name__)

READY_S: Final = 1.0
"""So long `update` waits for READY here, seconds: asking again from afar takes half a second or more."""

FIRST_LOOK_S: Final = 0.02
LONGEST_LOOK_S: Final = 0.25
"""Between two looks of it, growing from the one to the other: at a shared service each counts as a call."""

# Registered once with Globus Compute and then allow-listed by its id, so it must not change: all that may is imported.
_LOADER: Final = '''\
def scistream_{verb}(document):
    """scistream-flows: {verb} at facility {facility}"""
    try:
        from scistream_flows.functions import answer
    except ImportError as missing:
        import platform
        error = {{
            "code": "missing-extra",
            "message": "scistream-flows is not installed where this function runs: " + str(missing),
            "hint": "Install it into the Python environment of the endpoint's workers",
        }}
        worker = {{"python": platform.python_version(), "host": platform.node()}}
        return {{"protocol": 1, "ok": False, "error": error, "worker": worker}}
    return answer({verb!r}, document, facility={facility!r})
'''


def source(verb: str, *, facility: str) -> str:
    """The source text of the function to register for a verb: the same for every version of this package.

    Args:
        verb: One of `VERBS`.
        facility: The facility's name, where the function will run.

    Raises:
        BadRequest: There is no such verb.
        ConfigError: `facility` cannot be the name of a facility.
    """
    _known(verb)
    return _LOADER.format(verb=verb, facility=load_facility(facility, environment={}).name)


def answer(verb: str, document: Mapping[str, Any], *, facility: str) -> dict[str, Any]:
    """What the facility of this machine answers to one verb, JSON types in and out.

    Args:
        verb: One of `VERBS`.
        document: The verb's document.
        facility: The facility's name.

    Returns:
        The answer of `S2CS.answer`, and who gave it: `worker: {python, host, version}`. When an `update` has introduced
        the relays of CONS, it is the status once READY, or after READY_S at the latest.
    """
    said: dict[str, Any]
    try:
        _known(verb)
        # as it would come over a wire: what is no JSON is refused here too, where executors would pickle it
        text = _text(document)
        config = load_facility(facility)
        said = _asked(config, verb, text)
        if verb == "update" and said["ok"] and document.get("peers"):
            said = _until_ready(config, document, said)
    except ScistreamError as wrong:
        said = {"protocol": PROTOCOL, "ok": False, "error": wrong.to_document()}
    except Exception as wrong:
        log.exception("verb %s at facility %s", verb, facility)
        unforeseen = ScistreamError(
            f"{type(wrong).__name__}: {wrong}", which=verb, hint="See the worker's log"
        )
        said = {"protocol": PROTOCOL, "ok": False, "error": unforeseen.to_document()}
    return said | {"worker": _worker()}


def call(question: Mapping[str, Any]) -> dict[str, Any]:
    """`answer` with one argument, the form that every executor takes: `{"verb", "facility", "document"}`."""
    return answer(question["verb"], question["document"], facility=question["facility"])


def _asked(config: FacilityConfig, verb: str, text: str, *, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    if config.service.socket is not None:
        return ask(config.service.socket, verb, json.loads(text), deadline_s=deadline_s)
    return _service(config).answer(verb, text)


def _until_ready(config: FacilityConfig, document: Mapping[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """The answer of an `update`, with the status of a little later when that is READY, or over."""
    query = json.dumps(
        {name: document[name] for name in ("protocol", "uid", "role", "owner") if name in document}
    )
    deadline, pause_s = time.monotonic() + READY_S, FIRST_LOOK_S
    while said["value"]["state"] == "LISTENING" and (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(pause_s, left_s))
        pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)
        try:
            seen = _asked(config, "status", query, deadline_s=max(left_s, FIRST_LOOK_S))
        except ScistreamError:  # the update was done, whatever has become of the service
            break
        if not seen["ok"]:
            break
        said = seen
    return said


class _Held(NamedTuple):
    written: object
    service: S2CS


# A worker lives long, and a connection to a gateway is worth keeping. A facility is read again when its file changes.
_services: dict[str, _Held] = {}
_reading = threading.Lock()


def _service(config: FacilityConfig) -> S2CS:
    with _reading:
        held = _services.get(config.name)
        if held is None or held.written != config:
            if held is not None:
                held.service.close()  # whoever is just using it opens again what it needs
            held = _services[config.name] = _Held(config, S2CS(config))
        return held.service


def _known(verb: str) -> None:
    if verb not in VERBS:
        raise BadRequest(f"there is no verb {verb!r}", which=verb, hint=f"Use one of {', '.join(VERBS)}")


def _text(document: Mapping[str, Any]) -> str:
    try:
        return json.dumps(document)
    except (TypeError, ValueError) as wrong:
        raise BadRequest(f"the document is not JSON: {wrong}", which="document") from None


def _worker() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "host": platform.node(),
        "version": __version__,
    }
