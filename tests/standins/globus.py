"""A stand-in for Globus Auth and Globus Groups: not Globus, but real HTTP that the real globus_sdk speaks with.

In a thread of a test (`with Globus() as globus`), or as a process of its own (`python tests/standins/globus.py`).
A program that has `Globus.environment` in its environment talks to it instead of to the service. What it keeps of
the service: four grants, PKCE, one token per resource server, introspection by the token's own resource server only,
consent to dependent scopes, refresh and revocation, signed id tokens, linked identities, memberships with a status,
and the registration of a client with its scopes and secret. What it leaves out: passwords (a login is `login_as`),
policies, sessions that end, rate limits, most of what can be read back about clients and scopes.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import re
import secrets
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal, NamedTuple, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

AUTH: Final = "auth.globus.org"
GROUPS: Final = "groups.api.globus.org"
GROUPS_SCOPE: Final = f"urn:globus:auth:scope:{GROUPS}:view_my_groups_and_memberships"
GROUPS_SCOPE_ID: Final = "73320ffe-4cb4-4b25-a0a3-83d53d59ce4f"
MANAGE_SCOPE: Final = f"urn:globus:auth:scope:{AUTH}:manage_projects"
ISSUER: Final = "https://auth.globus.org"
TWO_DAYS_S: Final = 172_800
CODE_S: Final = 600

INTROSPECT: Final = "POST /v2/oauth2/token/introspect"
TOKEN: Final = "POST /v2/oauth2/token"
MY_GROUPS: Final = "GET /v2/groups/my_groups"

Outage = Literal["refused", "503", "silent", "nonsense"]


@dataclass(eq=False)
class Person:
    """An identity: of a person, or of a client. `groups` maps ids to the status of the membership."""

    id: str
    username: str
    groups: dict[str, str] = field(default_factory=dict)
    linked: list[Person] = field(default_factory=list)

    @property
    def urn(self) -> str:
        return f"urn:globus:auth:identity:{self.id}"


class Client(NamedTuple):
    """An application. `secret` is None for a native one."""

    id: str
    secret: str | None


@dataclass
class Token:
    """An access token; `consents` are the dependent scopes that the person has agreed to."""

    person: Person
    scopes: tuple[str, ...]
    resource_server: str
    client_id: str
    consents: frozenset[str]
    issued_at_s: float
    expires_at_s: float

    @property
    def active(self) -> bool:
        return time.time() < self.expires_at_s


@dataclass(frozen=True)
class Code:
    """An authorization code that waits to be exchanged."""

    person: Person
    client_id: str
    redirect_uri: str
    scopes: tuple[str, ...]
    challenge: str
    nonce: str
    offline: bool
    expires_at_s: float


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    origin: str
    query: Mapping[str, str]
    form: Mapping[str, str]
    authorization: str
    document: Any = None

    @property
    def bearer(self) -> str:
        return self.authorization.removeprefix("Bearer ") if self.authorization.startswith("Bearer ") else ""


class Answer(NamedTuple):
    """What is sent back: a document, or a redirection."""

    status: int
    document: Any
    location: str = ""


class Refused(Exception):
    """The answer is no."""

    def __init__(self, status: int, error: str, **more: Any) -> None:
        super().__init__(error)
        self.answer = Answer(status, {"error": error, "error_description": error.replace("_", " "), **more})


Route: TypeAlias = Callable[[Asked], Answer]


class Globus:
    """The stand-in, listening on loopback at a port of the kernel's choice.

    Attributes:
        url: Where it is, with a slash at the end.
        login_as: Who logs in, and consents, where a browser is sent to log in; None refuses.
        calls: How often each was asked for, by `METHOD /path`, those refused included.
    """

    def __init__(self) -> None:
        self.login_as: Person | None = None
        self.calls: Counter[str] = Counter()
        self._clients: dict[str, Client] = {}
        self._people: dict[str, Person] = {}
        self._scopes = {
            **dict.fromkeys(("openid", "profile", "email"), AUTH),
            **{f"urn:globus:auth:scope:{AUTH}:view_{what}": AUTH for what in ("identities", "identity_set")},
            **{f"urn:globus:auth:scope:{GROUPS}:{what}": GROUPS for what in ("all",)},
            GROUPS_SCOPE: GROUPS,
            MANAGE_SCOPE: AUTH,
        }
        self._projects: dict[str, dict[str, Any]] = {}
        self._project_of: dict[str, str] = {}
        self._dependents: dict[str, frozenset[str]] = {}
        self._tokens: dict[str, Token] = {}
        self._refresh: dict[str, Token] = {}
        self._codes: dict[str, Code] = {}
        self._outage: Outage | None = None
        self._speak = threading.Event()
        self._mutex = threading.RLock()
        self._routes: dict[str, Route] = {
            TOKEN: self._token,
            INTROSPECT: self._introspect,
            "POST /v2/oauth2/token/revoke": self._revoke,
            "GET /v2/oauth2/authorize": self._authorize,
            "GET /v2/web/auth-code": lambda asked: Answer(200, {"code": asked.query.get("code")}),
            "GET /v2/oauth2/userinfo": self._userinfo,
            "GET /.well-known/openid-configuration": self._openid_configuration,
            "GET /jwk.json": self._jwk,
            "GET /v2/api/identities": self._identities,
            MY_GROUPS: self._my_groups,
            "GET /v2/api/projects": self._list_projects,
            "POST /v2/api/projects": self._create_project,
            "POST /v2/api/clients": self._create_client,
            "POST /standin/mint": self._mint,
        }
        self._routes_of_one: dict[tuple[str, str, str], Callable[[Asked, str], Answer]] = {
            ("DELETE", "projects", ""): self._delete_project,
            ("DELETE", "clients", ""): self._delete_client,
            ("POST", "clients", "scopes"): self._create_scope,
            ("POST", "clients", "credentials"): self._create_credential,
        }
        self._port = 0
        self._listen()
        self.url = f"http://127.0.0.1:{self._port}/"

    def __enter__(self) -> Globus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """What makes globus_sdk of another program speak with this one."""
        return {"GLOBUS_SDK_SERVICE_URL_AUTH": self.url, "GLOBUS_SDK_SERVICE_URL_GROUPS": self.url}

    def close(self) -> None:
        """Stop listening; waits for the requests that run."""
        self._hang_up()

    # --- who there is

    def add_client(
        self, *, client_id: str | None = None, scopes: Iterable[str] = (), dependents: Iterable[str] = ()
    ) -> Client:
        """Register an application with a secret, which is the resource server of `scopes`."""
        client = Client(client_id or str(uuid.uuid4()), secrets.token_urlsafe(24))
        with self._mutex:
            self._clients[client.id] = client
            self._people[client.id] = Person(client.id, f"{client.id}@clients.{AUTH}")
            self._scopes.update(dict.fromkeys(scopes, client.id))
            self._dependents[client.id] = frozenset(dependents)
        return client

    def add_facility(self, *, groups: bool = True) -> tuple[Client, str]:
        """Register a client with its scope `action_all`, as a facility has them: the client, and the scope."""
        client_id = str(uuid.uuid4())
        scope = f"https://{AUTH}/scopes/{client_id}/action_all"
        dependents = [GROUPS_SCOPE] if groups else []
        return self.add_client(client_id=client_id, scopes=[scope], dependents=dependents), scope

    def add_native_app(self, *, client_id: str | None = None) -> Client:
        """Register an application that can keep no secret."""
        client = Client(client_id or str(uuid.uuid4()), None)
        with self._mutex:
            self._clients[client.id] = client
        return client

    def add_person(
        self, username: str, *, groups: Iterable[str] = (), linked: Iterable[Person] = ()
    ) -> Person:
        """A person who is an active member of `groups` (ids); `linked` identities are linked both ways."""
        person = Person(str(uuid.uuid4()), username, dict.fromkeys(groups, "active"))
        with self._mutex:
            self._people[person.id] = person
            for other in linked:
                person.linked.append(other)
                other.linked.append(person)
        return person

    def person(self, username_or_id: str) -> Person:
        """Who has this name or id."""
        with self._mutex:
            return next(one for one in self._people.values() if username_or_id in (one.username, one.id))

    # --- tokens, without a login

    def mint(
        self,
        person: Person,
        scope: str,
        *,
        lifetime_s: float = TWO_DAYS_S,
        client_id: str = "6c2b5f0e-0000-4000-8000-000000000001",
        consents: Iterable[str] | None = None,
    ) -> str:
        """An access token of `person` for `scope` (of one resource server).

        Args:
            person: Whose it is.
            scope: One, or several separated by blanks.
            lifetime_s: A negative one has expired.
            client_id: The application that the person has given it to.
            consents: Dependent scopes agreed to; by default all that the resource server depends on.
        """
        with self._mutex:
            scopes = tuple(scope.split())
            (server,) = {self._scopes[one] for one in scopes}
            agreed = self._dependents.get(server, frozenset()) if consents is None else frozenset(consents)
            now_s = time.time()
            text = secrets.token_urlsafe(32)
            self._tokens[text] = Token(person, scopes, server, client_id, agreed, now_s, now_s + lifetime_s)
        return text

    def revoke(self, token: str) -> None:
        """Take back an access token, or a refresh token."""
        with self._mutex:
            self._tokens.pop(token, None)
            self._refresh.pop(token, None)

    # --- outages

    def down(self, how: Outage = "refused") -> None:
        """From now on: refuse connections, answer 503, accept and say `silent`, or answer 200 with `nonsense`."""
        with self._mutex:
            self._outage = how
            self._speak.clear()
        if how == "refused":
            self._hang_up()

    def up(self) -> None:
        """Answer again, at the same port."""
        with self._mutex:
            was, self._outage = self._outage, None
            self._speak.set()
        if was == "refused":
            self._listen()

    def _listen(self) -> None:
        self._server = _Server(("127.0.0.1", self._port), functools.partial(_Handler, self))
        self._port = self._server.server_address[1]
        self._speak.set()
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="globus-stand-in"
        )
        self._thread.start()

    def _hang_up(self) -> None:
        self._speak.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def answer(self, method: str, path: str, asked: Asked) -> Answer | None:
        """The answer to a request; None is none at all."""
        with self._mutex:
            self.calls[f"{method} {path}"] += 1
            outage = self._outage
        if outage == "503":
            return Answer(503, {"error": "service_unavailable"})
        if outage == "nonsense":
            return Answer(200, ["<html>captive portal</html>"])
        if outage == "silent":
            self._speak.wait(60)
            return None
        route = self._routes.get(f"{method} {path}") or self._route_of_one(method, path)
        if route is None:
            return Answer(404, {"error": "not_found"})
        try:
            with self._mutex:
                return route(asked)
        except Refused as no:
            return no.answer
        except KeyError as missing:
            return Answer(400, {"error": "invalid_request", "error_description": str(missing)})

    def _route_of_one(self, method: str, path: str) -> Route | None:
        """The route of `/v2/api/KIND/ID` or `/v2/api/KIND/ID/WHAT`."""
        found = re.fullmatch(r"/v2/api/([a-z]+)/([0-9a-f-]{36})(?:/([a-z]+))?", path)
        route = self._routes_of_one.get((method, found[1], found[3] or "")) if found else None
        return functools.partial(_with_id, route, found[2]) if found and route else None

    # --- Globus Auth

    def _client_of(self, asked: Asked) -> Client:
        client_id, secret = asked.form.get("client_id", ""), asked.form.get("client_secret")
        if asked.authorization.startswith("Basic "):
            client_id, _, secret = base64.b64decode(asked.authorization[6:]).decode().partition(":")
        client = self._clients.get(client_id)
        if client is None or client.secret != secret:
            raise Refused(401, "invalid_client")
        return client

    def _token(self, asked: Asked) -> Answer:
        client = self._client_of(asked)
        grants: dict[str, Callable[[Client, Asked], Answer]] = {
            "client_credentials": self._client_credentials,
            "authorization_code": self._authorization_code,
            "refresh_token": self._refreshed,
            "urn:globus:auth:grant_type:dependent_token": self._dependent,
        }
        grant = grants.get(asked.form["grant_type"])
        if grant is None:
            raise Refused(400, "unsupported_grant_type")
        return grant(client, asked)

    def _client_credentials(self, client: Client, asked: Asked) -> Answer:
        if client.secret is None:
            raise Refused(400, "unauthorized_client")
        scopes = self._known(asked.form.get("scope", ""))
        return _one_document(self._grant(self._people[client.id], scopes, client.id))

    def _authorization_code(self, client: Client, asked: Asked) -> Answer:
        code = self._codes.pop(asked.form["code"], None)
        if code is None or code.expires_at_s < time.time() or code.client_id != client.id:
            raise Refused(400, "invalid_grant")
        if code.redirect_uri != asked.form.get("redirect_uri"):
            raise Refused(400, "invalid_grant")
        if code.challenge and code.challenge != _s256(asked.form.get("code_verifier", "")):
            raise Refused(400, "invalid_grant")
        documents = self._grant(code.person, code.scopes, client.id, refresh=code.offline)
        more = {}
        if "openid" in code.scopes:
            access = next(one for one in documents if one["resource_server"] == AUTH)["access_token"]
            more["id_token"] = self._id_token(code, access)
        return _one_document(documents, **more)

    def _refreshed(self, client: Client, asked: Asked) -> Answer:
        token = self._refresh.get(asked.form["refresh_token"])
        if token is None or token.client_id != client.id:
            raise Refused(400, "invalid_grant")
        documents = self._grant(token.person, token.scopes, client.id)
        return _one_document(documents, refresh_token=asked.form["refresh_token"])

    def _dependent(self, client: Client, asked: Asked) -> Answer:
        token = self._active(asked.form["token"])
        if token is None or token.resource_server != client.id:
            raise Refused(400, "invalid_grant")
        possible = self._dependents[client.id]
        scopes = self._known(asked.form.get("scope", "")) or tuple(sorted(possible))
        if missing := set(scopes) - (possible & token.consents):
            raise Refused(403, "dependent_consent_required", unapproved_scopes=sorted(missing))
        offline = asked.form.get("access_type") == "offline"
        return Answer(200, self._grant(token.person, scopes, client.id, refresh=offline))

    def _grant(
        self, person: Person, scopes: Iterable[str], client_id: str, *, refresh: bool = False
    ) -> list[dict[str, Any]]:
        """One token for each resource server."""
        by_server: dict[str, list[str]] = {}
        for scope in scopes:
            by_server.setdefault(self._scopes[scope], []).append(scope)
        documents = []
        for server, together in by_server.items():
            text = self.mint(person, " ".join(together), client_id=client_id)
            document: dict[str, Any] = {
                "access_token": text,
                "scope": " ".join(together),
                "expires_in": TWO_DAYS_S,
                "token_type": "Bearer",
                "resource_server": server,
            }
            if refresh:
                document["refresh_token"] = secrets.token_urlsafe(24)
                self._refresh[document["refresh_token"]] = self._tokens[text]
            documents.append(document)
        return documents

    def _known(self, text: str) -> tuple[str, ...]:
        scopes = top_level(text)
        if unknown := [one for one in scopes if one not in self._scopes]:
            raise Refused(400, "unknown_scope_error", unknown_scopes=unknown)
        return scopes

    def _active(self, text: str | None) -> Token | None:
        token = self._tokens.get(text or "")
        return token if token is not None and token.active else None

    def _introspect(self, asked: Asked) -> Answer:
        client = self._client_of(asked)
        token = self._active(asked.form["token"])
        if client.secret is None or token is None or token.resource_server != client.id:
            return Answer(200, {"active": False})
        person = token.person
        document: dict[str, Any] = {
            "active": True,
            "token_type": "Bearer",
            "scope": " ".join(token.scopes),
            "client_id": token.client_id,
            "sub": person.id,
            "username": person.username,
            "name": person.username,
            "email": person.username,
            "exp": int(token.expires_at_s),
            "iat": int(token.issued_at_s),
            "nbf": int(token.issued_at_s),
            "aud": [token.resource_server, token.client_id],
            "iss": ISSUER,
            "dependent_tokens_cache_id": hashlib.sha256(asked.form["token"].encode()).hexdigest(),
        }
        included = asked.form.get("include", "").split(",")
        identities = [person, *person.linked]
        if "identity_set" in included:
            document["identity_set"] = [one.id for one in identities]
        if "identity_set_detail" in included:
            document["identity_set_detail"] = [_about(one) for one in identities]
        if "session_info" in included:
            seen = {person.id: {"auth_time": int(token.issued_at_s), "acr": None, "idp": None}}
            document["session_info"] = {"session_id": str(uuid.uuid4()), "authentications": seen}
        return Answer(200, document)

    def _revoke(self, asked: Asked) -> Answer:
        self._client_of(asked)
        self.revoke(asked.form["token"])
        return Answer(200, {"active": False})

    def _authorize(self, asked: Asked) -> Answer:
        query = asked.query
        client = self._clients.get(query["client_id"])
        if client is None:
            raise Refused(400, "invalid_client")
        if client.secret is None and query.get("code_challenge_method") != "S256":
            raise Refused(400, "invalid_request", error_description="a native app needs PKCE")
        sent_back = {"state": query["state"]} if "state" in query else {}
        if self.login_as is None:
            sent_back["error"] = "access_denied"
        else:
            sent_back["code"] = secrets.token_urlsafe(16)
            self._codes[sent_back["code"]] = Code(
                person=self.login_as,
                client_id=client.id,
                redirect_uri=query["redirect_uri"],
                scopes=self._known(query["scope"]),
                challenge=query.get("code_challenge", ""),
                nonce=query.get("nonce", ""),
                offline=query.get("access_type") == "offline",
                expires_at_s=time.time() + CODE_S,
            )
        return Answer(302, {}, query["redirect_uri"] + "?" + urlencode(sent_back))

    def _userinfo(self, asked: Asked) -> Answer:
        token = self._active(asked.bearer)
        if token is None or "openid" not in token.scopes:
            raise Refused(401, "unauthorized")
        person = token.person
        about = {"sub": person.id, "preferred_username": person.username, "name": person.username}
        linked = [{"sub": one.id, "username": one.username} for one in (person, *person.linked)]
        return Answer(200, {**about, "email": person.username, "identity_set": linked})

    def _openid_configuration(self, asked: Asked) -> Answer:
        document = {
            "issuer": ISSUER,
            "authorization_endpoint": f"{asked.origin}/v2/oauth2/authorize",
            "token_endpoint": f"{asked.origin}/v2/oauth2/token",
            "userinfo_endpoint": f"{asked.origin}/v2/oauth2/userinfo",
            "revocation_endpoint": f"{asked.origin}/v2/oauth2/token/revoke",
            "introspection_endpoint": f"{asked.origin}/v2/oauth2/token/introspect",
            "jwks_uri": f"{asked.origin}/jwk.json",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS512"],
        }
        return Answer(200, document)

    @functools.cached_property
    def _key(self) -> rsa.RSAPrivateKey:
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def _jwk(self, _: Asked) -> Answer:
        key = jwt.algorithms.RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return Answer(200, {"keys": [{**key, "alg": "RS512", "use": "sig", "kid": "stand-in"}]})

    def _id_token(self, code: Code, access_token: str) -> str:
        digest = hashlib.sha512(access_token.encode()).digest()
        now_s = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": code.person.id,
            "aud": code.client_id,
            "iat": now_s,
            "exp": now_s + TWO_DAYS_S,
            "at_hash": base64.urlsafe_b64encode(digest[:32]).rstrip(b"=").decode(),
            "preferred_username": code.person.username,
            **({"nonce": code.nonce} if code.nonce else {}),
        }
        return jwt.encode(claims, self._key, algorithm="RS512", headers={"kid": "stand-in"})

    def _identities(self, asked: Asked) -> Answer:
        token = self._active(asked.bearer)
        if token is None or token.resource_server != AUTH:
            self._client_of(asked)
        ids = asked.query.get("ids", "").split(",")
        names = asked.query.get("usernames", "").split(",")
        found = [one for one in self._people.values() if one.id in ids or one.username in names]
        return Answer(200, {"identities": [_about(one) for one in found]})

    # --- Globus Auth: registration

    def _owner(self, asked: Asked) -> Person:
        token = self._active(asked.bearer)
        if token is None:
            raise Refused(401, "unauthorized")
        if MANAGE_SCOPE not in token.scopes:
            raise Refused(403, "forbidden")
        return token.person

    def _own_project(self, asked: Asked, project_id: str) -> dict[str, Any]:
        project = self._projects.get(project_id)
        if project is None or self._owner(asked).id not in project["admin_ids"]:
            raise Refused(403, "forbidden")
        return project

    def _own_client(self, asked: Asked, client_id: str) -> Client:
        self._own_project(asked, self._project_of.get(client_id, ""))
        return self._clients[client_id]

    def _list_projects(self, asked: Asked) -> Answer:
        owner = self._owner(asked)
        return Answer(
            200, {"projects": [one for one in self._projects.values() if owner.id in one["admin_ids"]]}
        )

    def _create_project(self, asked: Asked) -> Answer:
        owner, wanted = self._owner(asked), asked.document["project"]
        if not wanted.get("admin_ids"):
            raise Refused(422, "an_administrator_is_needed")
        if wanted["admin_ids"] != [owner.id]:
            raise Refused(403, "forbidden")
        name = wanted["display_name"]
        project = {**wanted, "id": str(uuid.uuid4()), "project_name": name, "admin_group_ids": None}
        self._projects[project["id"]] = project
        return Answer(200, {"project": project})

    def _delete_project(self, asked: Asked, project_id: str) -> Answer:
        project = self._own_project(asked, project_id)
        if project_id in self._project_of.values():
            raise Refused(409, "the_project_has_clients")
        del self._projects[project_id]
        return Answer(200, {"project": project})

    def _create_client(self, asked: Asked) -> Answer:
        wanted = asked.document["client"]
        self._own_project(asked, wanted["project"])
        native = wanted.get("public_client") or wanted.get("client_type") == "public_installed_client"
        # the secret of a new client is not known to anybody: credentials are made next
        client = self.add_native_app() if native else self.add_client()
        self._project_of[client.id] = wanted["project"]
        return Answer(200, {"client": {**wanted, "id": client.id, "scopes": [], "fqdns": []}})

    def _delete_client(self, asked: Asked, client_id: str) -> Answer:
        client = self._own_client(asked, client_id)
        del self._clients[client_id], self._project_of[client_id]
        self._scopes = {scope: server for scope, server in self._scopes.items() if server != client_id}
        return Answer(200, {"client": {"id": client.id}})

    def _create_scope(self, asked: Asked, client_id: str) -> Answer:
        client, wanted = self._own_client(asked, client_id), asked.document["scope"]
        text = f"https://{AUTH}/scopes/{client.id}/{wanted['scope_suffix']}"
        if text in self._scopes:
            raise Refused(409, "the_scope_exists")
        dependents = {one["scope"] for one in wanted.get("dependent_scopes", [])}
        if dependents - {GROUPS_SCOPE_ID}:
            raise Refused(422, "unknown_scope_error")
        self._scopes[text] = client.id
        if dependents:
            self._dependents[client.id] = frozenset([GROUPS_SCOPE])
        scope = {**wanted, "id": str(uuid.uuid4()), "scope_string": text, "client": client.id}
        return Answer(200, {"scope": scope})

    def _create_credential(self, asked: Asked, client_id: str) -> Answer:
        client, wanted = self._own_client(asked, client_id), asked.document["credential"]
        if client.secret is None:
            raise Refused(422, "a_native_app_has_no_secret")
        self._clients[client_id] = Client(client_id, secrets.token_urlsafe(24))
        made = {"id": str(uuid.uuid4()), "client": client_id, "secret": self._clients[client_id].secret}
        return Answer(200, {"credential": {**wanted, **made}})

    # --- Globus Groups

    def _my_groups(self, asked: Asked) -> Answer:
        token = self._active(asked.bearer)
        if token is None or token.resource_server != GROUPS:
            raise Refused(401, "unauthorized")
        wanted = asked.query.get("statuses", "active").split(",")
        memberships: dict[str, list[dict[str, str]]] = {}
        for one in (token.person, *token.person.linked):
            for group, status in one.groups.items():
                membership = {"group_id": group, "identity_id": one.id, "username": one.username}
                memberships.setdefault(group, []).append({**membership, "role": "member", "status": status})
        return Answer(
            200,
            [
                {"id": group, "name": group, "group_type": "regular", "my_memberships": mine}
                for group, mine in memberships.items()
                if any(one["status"] in wanted for one in mine)
            ],
        )

    # --- for a process of its own, which no test can reach into

    def _mint(self, asked: Asked) -> Answer:
        lifetime_s = float(asked.form.get("lifetime_s", TWO_DAYS_S))
        person = self.person(asked.form["username"])
        return Answer(200, {"access_token": self.mint(person, asked.form["scope"], lifetime_s=lifetime_s)})


class _Server(ThreadingHTTPServer):
    # requests that run are waited for when the server is closed
    daemon_threads = False
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0: no connection is kept, so that an outage is one for everybody at once
    timeout = 10

    def __init__(self, globus: Globus, *arguments: Any) -> None:
        self._globus = globus
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def do_DELETE(self) -> None:
        self._do()

    def log_message(self, *_: object) -> None:
        """Say nothing: requests have tokens in them."""

    def _do(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        is_json = self.headers.get_content_type() == "application/json"
        asked = Asked(
            origin=f"http://{self.headers.get('Host', '')}",
            query=dict(parse_qsl(parts.query)),
            form=dict(parse_qsl(body)) if not is_json else {},
            authorization=self.headers.get("Authorization", ""),
            document=json.loads(body) if is_json and body else None,
        )
        answer = self._globus.answer(self.command, parts.path, asked)
        if answer is None:
            return
        content = json.dumps(answer.document).encode()
        with contextlib.suppress(OSError):  # whoever asked has gone
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if answer.location:
                self.send_header("Location", answer.location)
            self.end_headers()
            self.wfile.write(content)


def top_level(text: str) -> tuple[str, ...]:
    """The scopes of a scope string, without the dependent ones in brackets: `a b[c *d]` is `a`, `b`."""
    depth, kept = 0, ""
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth == 0 and character != "]":
            kept += character
    return tuple(one.removeprefix("*") for one in kept.split())


def _with_id(route: Callable[[Asked, str], Answer], one: str, asked: Asked) -> Answer:
    return route(asked, one)


def _about(person: Person) -> dict[str, Any]:
    about = {"id": person.id, "username": person.username, "name": person.username, "email": person.username}
    return {**about, "status": "used", "identity_provider": None, "organization": None}


def _one_document(documents: list[dict[str, Any]], **more: Any) -> Answer:
    if not documents:
        raise Refused(400, "invalid_scope")
    return Answer(200, {**documents[0], "other_tokens": documents[1:], **more})


def _s256(verifier: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


def main() -> None:
    """Run as a process of its own, until the end of standard input. Says where, and who there is, on one line."""
    with Globus() as globus:
        client, scope = globus.add_facility()
        people = [globus.add_person(f"{name}@example.org") for name in ("ada", "grace")]
        globus.login_as = people[0]
        about = {
            "url": globus.url,
            "environment": globus.environment,
            "client_id": client.id,
            "client_secret": client.secret,
            "scope": scope,
            "people": {one.username: one.id for one in people},
        }
        print(json.dumps(about), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
