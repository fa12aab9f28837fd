"""Who comes in by HTTP, and how often: asked before anything else about a request of a known caller."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from math import ceil
from typing import Annotated, Any, Final

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from starlette.requests import HTTPConnection

from scistream_flows.allowance import Allowance
from scistream_flows.errors import PolicyDenied, RateLimited, ScistreamError, Unauthenticated
from scistream_flows.models import ip_of
from scistream_flows.s2cs import S2CS

from .auth import Authenticator, admit, names_group
from .lifecycle import identify

REFUSED_PER_MIN: Final = 20
REFUSED_AT_ONCE: Final = 60
"""Tokens and tickets that are none, from one address, in this process: each has to be looked up."""

bearer = HTTPBearer(auto_error=False, description="A token of Globus Auth for this facility's scope")


def authorization(request: Request) -> str | None:
    """The header that proves who calls, as it came: all of it is judged in one place."""
    return request.headers.get("Authorization")


Authorization = Annotated[str | None, Depends(authorization)]


class Admission:
    """Knows callers, counts their requests, and bounds what strangers can have looked up.

    Args:
        service: The facility.
        auth: Proves who calls.
    """

    def __init__(self, service: S2CS, *, auth: Authenticator) -> None:
        self.auth = auth
        self._service = service
        self._refused = Allowance(per_min=REFUSED_PER_MIN, burst=REFUSED_AT_ONCE)
        quotas = service.config.policy.quota
        self._groups = names_group(urn for quota in quotas if _paces(quota) for urn in quota.users)

    def known(self, authorization: Authorization, http: HTTPConnection) -> None:
        """Whether a caller is known, and may ask again already.

        Raises:
            Unauthenticated, PolicyDenied, AuthUnavailable: As `Authenticator.identify`.
            RateLimited: The caller asks too often; or somebody at its address tries tokens that are none.
        """
        # what is known of a token costs nothing: nobody's token stops working because of his neighbours
        remembered = self.auth.remembers(authorization)
        if not remembered:
            self.admit_stranger(http)
        try:
            identity = identify(self.auth, authorization, groups=self._groups)
        except ScistreamError as wrong:
            if isinstance(wrong, Unauthenticated) and not remembered:
                self.count_stranger(http)
            if isinstance(wrong, Unauthenticated | PolicyDenied):
                self._service.refused(None, wrong)
            raise
        self._service.pace(identity.urns)

    def among(self, authorization: str | None, principals: Collection[str]) -> None:
        """Whether a caller is among `principals`.

        Raises:
            Unauthenticated, PolicyDenied, AuthUnavailable: As `auth.admit`.
        """
        try:
            admit(self.auth, authorization, principals)
        except PolicyDenied as wrong:
            self._service.refused(self.auth.identify(authorization).urns, wrong)
            raise

    def admit_stranger(self, http: HTTPConnection) -> None:
        """Whether what somebody brings from there is looked up.

        Raises:
            RateLimited: Too much was none lately.
        """
        wait_s = self._refused.wait_s(_source(http))
        if wait_s:
            limited = RateLimited(
                "too many tokens or tickets that are none came from this address",
                which=_source(http),
                hint=f"Try again in {ceil(wait_s)} s, with one that counts",
                retry_after_s=ceil(wait_s),
            )
            self._service.refused(None, limited)
            raise limited

    def count_stranger(self, http: HTTPConnection) -> None:
        """What somebody brought from there was none."""
        self._refused.take(_source(http))

    def dependencies(self) -> list[Any]:
        """The dependencies of a route for known callers: who has no token is told so before anything else."""
        return [Depends(bearer), Depends(self.known)]


def _paces(quota: Any) -> bool:
    return quota.max_requests_per_min_per_caller is not None or quota.request_burst_per_caller is not None


def _source(http: HTTPConnection) -> str:
    """Where a request comes from: an IPv4 address, or a network of IPv6, of which one customer has all addresses."""
    ip = ip_of(http.client.host) if http.client else None
    return str(ipaddress.ip_network((ip, 64), strict=False) if ip is not None and ip.version == 6 else ip)
