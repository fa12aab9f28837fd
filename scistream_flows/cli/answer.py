"""How the requests of `s2uc` answer: lines that the scripts written for SciStream 1.x can read, or one JSON document.

`default`: data on stdout, words on stderr. `legacy-1.2`: everything on stdout, in the words of SciStream 1.2, for
scripts that look for these. `json`: one document. No token is ever printed: where SciStream 1.x had it stands `-`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from scistream_flows.cli.console import plain, put, put_document, say
from scistream_flows.models import Role

Form: TypeAlias = Literal["default", "legacy-1.2", "json"]
FORMS: tuple[Form, ...] = ("default", "legacy-1.2", "json")


class Answer:
    """The answer to one request, as it comes about.

    Args:
        form: How it looks.
        uid: The stream.
        address: Of the facility.
        role: The side.
    """

    def __init__(self, form: Form, *, uid: str, address: str, role: Role) -> None:
        self.form = form
        self._uid = uid
        self._address = address
        self._role = role

    def opened(self) -> None:
        """The side stands; its name comes before any other words."""
        if self.form == "json":
            return
        put("uid; s2cs; access_token; role")
        put(f"{self._uid} {self._address} - {self._role}")
        if self.form == "legacy-1.2":
            # what SciStream 1.2 called a token that it did not have; scripts find the uid by this word
            put(f"{self._uid} {self._address} INVALID_TOKEN {self._role}")
            put("sending client request message")
            put("started client request")

    def said(self, legacy: str, words: str = "") -> None:
        """Words of SciStream 1.2, and what we say instead."""
        if self.form == "legacy-1.2":
            put(legacy)
        elif words:
            say(plain(words))

    def note(self, words: str) -> None:
        """Words for people."""
        if self.form != "json":
            say(plain(words))

    def listeners(
        self,
        listeners: Sequence[str],
        *,
        onwards: Sequence[str],
        lines: Mapping[str, Sequence[str]],
        more: Mapping[str, Any],
    ) -> None:
        """Where the side listens.

        Args:
            listeners: Its addresses.
            onwards: Where it leads: targets of PROD, listeners of PROD.
            lines: Lines of their own, from their name.
            more: What only the JSON document has.
        """
        if self.form == "json":
            put_document(
                {
                    "uid": self._uid,
                    "s2cs": self._address,
                    "role": self._role,
                    "listeners": list(listeners),
                    "prod_listeners": list(onwards),
                    **more,
                }
            )
            return
        for one in listeners:
            put(f'listeners: "{one}"')
        for one in onwards:
            put(f'prod_listeners: "{plain(one)}"')
        put(f"Listeners: {list(listeners)!r}")
        for name, words in lines.items():
            for one in words:
                put(f"{name}: {one}")
