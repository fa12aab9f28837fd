"""An action provider as its caller sees it: requests that are tried again, and what may come back.

A provider is somebody else's server. It gets no token but its own, and cannot make us follow it elsewhere, wait
for ever, or fill our memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Final

import requests

from scistream_flows.errors import BadRequest, Unauthenticated
from scistream_flows.web import ANSWER_TIMEOUT_S, Authorizer, NoAnswer, Reply, ask, token_for, without

from .expressions import Json, StateError, not_too_deep, parse_json

TRIES: Final = 5
FIRST_RETRY_S: Final = 0.2
LONGEST_RETRY_S: Final = 5.0


def in_words(cause: Json) -> str:
    """A cause as one line: of an action's document, what its provider said."""
    if isinstance(cause, dict):
        details = cause.get("details")
        for one in (details, cause):
            if isinstance(one, dict):
                for key in ("description", "message", "detail"):
                    if isinstance(one.get(key), str):
                        return str(one[key])
    return cause if isinstance(cause, str) else json.dumps(cause)


class Answer:
    """What an action provider answered.

    Attributes:
        status: The HTTP status.
        document: The body, if it was JSON; else its beginning below `description`.
        pause_s: The pause that the provider asks for before another try, seconds; 0 if it does not.
        elsewhere: Where it redirects to, None if it does not.
    """

    def __init__(self, reply: Reply, token: str | None) -> None:
        self.status = reply.status
        self.pause_s = reply.pause_s
        self.elsewhere = without(token, reply.elsewhere)
        text = reply.content.decode(errors="replace")
        try:
            self.document: Json = without(token, not_too_deep(parse_json(text)))
        except (ValueError, RecursionError):
            self.document = without(token, {"description": f"HTTP {self.status}: {text[:200]}"})


class Provider:
    """One action provider, as one Action state uses it.

    Attributes:
        url: Its address.
        owes_an_answer: Whether the last request may have arrived and had no answer that says what came of it.
    """

    def __init__(
        self,
        url: str,
        *,
        session: requests.Session,
        authorizer: Authorizer,
        pause: Callable[[float], None],
        scale: float,
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._authorizer = authorizer
        self._pause = pause
        self._scale = scale
        self.owes_an_answer = False

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Json = None,
        tries: int = TRIES,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        even_if_cancelled: bool = False,
    ) -> Answer:
        """Ask until there is an answer that is not 429 or 5xx, `tries` times at most.

        Args:
            method: GET or POST.
            path: What comes after the provider's address.
            body: JSON.
            tries: How often.
            answer_timeout_s: For how long each try waits for the answer.
            even_if_cancelled: Whether to go on in a cancelled run.

        Raises:
            NoAnswer: There was none.
            StateError: There is no token, or none that may be sent to this address; or it redirects.
        """
        pause_s, words = FIRST_RETRY_S, ""
        self.owes_an_answer = False
        for attempt in range(tries):
            if attempt:
                (time.sleep if even_if_cancelled else self._pause)(pause_s * self._scale)
                pause_s = min(pause_s * 2, LONGEST_RETRY_S)
            owed_before = self.owes_an_answer
            try:
                answer = self._once(method, path, body, answer_timeout_s)
            except NoAnswer as error:
                words, self.owes_an_answer = str(error), owed_before or error.may_have_arrived
                continue
            self.owes_an_answer = answer.status >= 500 or (owed_before and answer.status == 429)
            if answer.elsewhere is not None:
                raise StateError(
                    "ActionUnableToRun",
                    f"{self.url}{path} redirects to {answer.elsewhere}: name that address",
                )
            if answer.status != 429 and answer.status < 500:
                return answer
            words = f"HTTP {answer.status}: {in_words(answer.document)}"
            pause_s = max(pause_s, min(answer.pause_s, LONGEST_RETRY_S))
        raise NoAnswer(f"{method} {self.url}{path}: {words}", may_have_arrived=self.owes_an_answer)

    def _once(self, method: str, path: str, body: Json, answer_timeout_s: float) -> Answer:
        try:
            token = token_for(self.url, self._authorizer)
        except Unauthenticated as error:
            raise StateError("NoTokenException", error.message) from None
        except BadRequest as error:
            raise StateError("ActionUnableToRun", error.message) from None
        self.owes_an_answer = True
        url = self.url + path
        reply = ask(self._session, method, url, token=token, body=body, answer_timeout_s=answer_timeout_s)
        return Answer(reply, token)


def action_of(answer: Answer, provider: Provider, error: str) -> dict[str, Json]:
    """The status document of an action, as far as it must be right."""
    document = answer.document
    if (
        not isinstance(document, dict)
        or not isinstance(document.get("action_id"), str)
        or not document["action_id"].strip("./")  # it becomes part of an address
        or not document["action_id"].isprintable()
        or document.get("status") not in ("ACTIVE", "INACTIVE", "SUCCEEDED", "FAILED")
    ):
        raise StateError(
            error,
            f"{provider.url} does not answer as an action provider: {in_words(document)[:200]}",
        )
    return document


def status_of(answer: Answer) -> str:
    """The status that an answer gives an action, `unknown` if it gives none."""
    return str(answer.document.get("status")) if isinstance(answer.document, dict) else "unknown"


def is_over(answer: Answer) -> bool:
    """Whether an answer says that an action has ended."""
    return answer.status == 200 and status_of(answer) in ("SUCCEEDED", "FAILED")
