"""The commented `facility.toml` that `s2cs init` writes: every key, what it means, its default, an example.

What it says is kept in line with `scistream_flows.config` by tests/test_init.py: each key is there, each default is
the one that counts, and each example is valid when its `#` is taken away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scistream_flows.config import tomllib
from scistream_flows.errors import ConfigError


class Place(NamedTuple):
    """A gateway to write down: on this machine, or on `host`, reached over SSH."""

    name: str
    host: str | None = None


class Written(NamedTuple):
    """The file that was written, and where the one is that it replaced."""

    file: Path
    replaced: Path | None = None


def write(text: str, *, facility: str, folder: Path, replace: bool = False) -> Written:
    """Write the configuration of `facility` into `folder`, 0644: whole, or not at all.

    It is `facility.toml`, or `FACILITY.toml` where that is there, or `facility.toml` is another facility's.

    Args:
        text: The file.
        facility: Its name.
        folder: Made when it is not there.
        replace: Whether it may take the place of a file, which is kept beside it as `….old`.

    Raises:
        ConfigError: When there is one and it may not be replaced, or it cannot be written.
    """
    file = _file_of(facility, folder)
    old = file.with_name(f"{file.name}.old")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=".facility-", dir=folder)
        new = Path(name)
        try:
            with os.fdopen(number, "w", encoding="utf-8") as output:
                output.write(text)
                os.fchmod(number, 0o644)
            if replace and file.exists():
                shutil.copy2(file, old)
                new.replace(file)
                return Written(file, old)
            os.link(new, file)  # unlike a rename it never replaces
        finally:
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
    except FileExistsError:
        raise ConfigError(
            f"{file} is there already",
            which=str(file),
            hint="Edit it; --force replaces it, and keeps the old one beside it",
            file=str(file),
        ) from None
    except OSError as wrong:
        raise ConfigError(
            f"{wrong.filename or folder}: {wrong.strerror}",
            which=str(folder),
            hint="Give a directory in which you may write with --directory",
            file=str(file),
        ) from None
    return Written(file)


def _file_of(facility: str, folder: Path) -> Path:
    own, shared = folder / f"{facility}.toml", folder / "facility.toml"
    if own.exists():
        return own
    try:
        named = tomllib.loads(shared.read_text(encoding="utf-8"))["facility"]["name"]
    except (OSError, ValueError, LookupError, TypeError):
        return shared
    return shared if named == facility else own


def template(facility: str, gateways: Sequence[Place]) -> str:
    """The file, as TOML: it can be loaded as it is, listens on loopback only, and lets nobody connect anywhere.

    Args:
        facility: Its name.
        gateways: At least one; names distinct.
    """
    first, *others = gateways
    explained = first.host is not None
    parts = [_HEAD.format(facility=facility), _live(first), "" if explained else _KIND, _GATEWAY]
    if explained:
        parts.append(_SSH)
    for gateway in others:
        parts.append("\n" + _live(gateway) + _BINDS)
        if gateway.host and not explained:
            parts.append(_SSH)
            explained = True
    if not explained:
        parts.append(_SSH_EXAMPLE + _SSH)
    return "".join([*parts, _POLICY, _QUOTA, _SERVICE.format(facility=facility), _GLOBUS])


def _live(gateway: Place) -> str:
    lines = ["[[gateway]]", f'name = "{gateway.name}"']
    if gateway.host is not None:
        lines += ['kind = "ssh"', f'host = "{gateway.host}"']
    return "\n".join(lines) + "\n"


_HEAD = """\
# A SciStream facility: its gateway nodes, and what it allows.
#
# A line such as `#key = value` is an example: take its "#" away and change the value. Whatever stays out has the
# default that its comment says. An unknown key is an error. After each change:  s2cs doctor
#
# No secret belongs in this file. Two kinds of environment variables win over it: SCISTREAM_PORT_RANGE for all gateways,
# and SCISTREAM_POLICY_KEY for a key of the policy, such as SCISTREAM_POLICY_MAX_NUM_CONN=16.

[facility]
# The name of this facility: letters, digits, "_", "-" and ".", 64 at most. Required.
name = "{facility}"
# What carries the data of its streams: "s2ds", our relay, or "haproxy", a HAProxy that is installed on this machine.
# That one protects and proves nothing: it needs "none" in modes, and gateways of kind "local". Default: "s2ds".
#data_server = "s2ds"

# --- Gateways: the nodes on which relays run, a [[gateway]] table for each. Its name is seen in offers and messages.
# Required.

"""

_BINDS = """\
wan_bind = "127.0.0.1"
lan_bind = "127.0.0.1"
"""

_KIND = """
# How it is reached: "local" is this machine, "ssh" another one (see below). Default: "local".
#kind = "local"
"""

_GATEWAY = """
# Addresses are numeric, one or a list of one IPv4 and one IPv6 address: ["192.0.2.10", "2001:db8::10"].
#
# The address at which relays accept connections of the other facility; it is bound exactly. Loopback, until you write
# the address of the interface that the other facility reaches, such as "192.0.2.10". Required.
wan_bind = "127.0.0.1"

# The address at which relays accept applications of this facility, such as "10.1.0.10". Required.
lan_bind = "127.0.0.1"

# wan_bind as the other facility sees it, where an address translation is between. Default: wan_bind.
#wan_advertise = "203.0.113.10"

# The address from which relays dial the other facility. Default: wan_bind.
#wan_source = "192.0.2.11"

# lan_bind as applications see it. Default: lan_bind.
#lan_advertise = "10.1.0.11"

# The address from which relays connect to applications that listen. Default: the kernel chooses.
#lan_source = "10.1.0.10"

# Ports for listeners, both ends included: what the firewall lets through. Default: "0", the kernel chooses.
#port_range = "5100-5200"

# What the reserved rates of its streams may add up to, Mbit/s per direction. Default: 0, not counted.
#capacity_mbits_per_s = 100000

# What the concurrent connections of its streams may add up to, each stream counted as num_conn times max_connections.
# Default: 0, not counted.
#connection_budget = 4096

# Pipe memory of the user who runs the relays, MiB (sysctl fs.pipe-user-pages-soft). Beyond it connections copy, so that
# a gateway with room is preferred. 0 is not counted. Default: 64.
#pipe_budget_mib = 256
"""

_SSH_EXAMPLE = """
# A gateway on another machine. It needs sh and one directory that the user may write; no Python, no root. Its host key
# has to be known before: nothing is ever added to known_hosts by itself.
#[[gateway]]
#name = "gw-ssh"
#kind = "ssh"
#wan_bind = "192.0.2.20"
#lan_bind = "10.1.0.20"

# Its host name, or its alias in ~/.ssh/config. Required.
#host = "gw2.example.org"
"""

_SSH = """
# The port of its SSH server. Default: that of ~/.ssh/config, else 22.
#port = 22

# The user there. Default: that of ~/.ssh/config, else the one who runs this.
#user = "scistream"

# The private key, without a passphrase. Default: those of ~/.ssh/config, the agent, and ~/.ssh/id_*.
#identity_file = "~/.ssh/id_ed25519_scistream"

# Host keys, in addition to those of the user and of the system. Default: none in addition.
#known_hosts = "/etc/scistream/known_hosts"

# The directory there for the relay's binary, its sockets and its logs.
# Default: $XDG_CACHE_HOME/scistream, else ~/.cache/scistream.
#directory = "/var/tmp/scistream"

# A relay binary that is installed there. Default: the one here is copied, and verified with every connection.
#s2ds = "/usr/local/bin/s2ds"

# Seconds for connecting, attempts and jumps included. Default: 10.
#connect_timeout_s = 10
"""

_POLICY = """
# --- What the facility allows. A list that is left out allows nothing.

[policy]
# Who may open streams. URNs of identities, groups and Unix accounts; or "all_authenticated_users", which is everybody
# whom the service knows. Default: the Unix user that runs the service, and nobody else.
#users = ["urn:globus:groups:id:00000000-0000-4000-8000-000000000001", "urn:scistream:unix:1000@gw1.example.org"]

# Who may see and end the streams of everybody through the service. Default: nobody; whoever holds the state directory
# can do it with `s2cs list` and `s2cs release`.
#administrators = ["urn:globus:auth:identity:00000000-0000-4000-8000-000000000002"]

# Where streams may lead inside this facility: NETWORK, NETWORK:PORT or NETWORK:FIRST-LAST, an IPv6 network in brackets.
# Loopback, link-local, multicast and the gateways' own addresses are allowed only by an entry that lies within them:
# "0.0.0.0/0" opens none of these. Default: nowhere.
#targets = ["10.1.0.0/16:5000-5999", "[2001:db8:1::/48]:5000-5999"]

# Where this facility may dial: the gateways of other facilities, written as targets are. In mode "none" also where
# connections may come from. Default: nowhere.
#peers = ["198.51.100.0/24:5100-5200"]

# Which networks may be allowed to connect at the LAN side; a stream that names none gets loopback, if it is here. No
# ports. Default: none.
#consumers = ["10.1.0.0/16"]

# Protection of the WAN: "tls" proves both relays and encrypts, "auth" proves them and sends clear text, "none" only
# looks at addresses. Default: ["tls", "auth"].
#modes = ["tls"]

# The longest lease: so long a relay may live on when nobody renews it, seconds. Default: 3600.
#longest_lease_s = 600

# The longest life of a stream, seconds. Default: 604800, a week.
#longest_lifetime_s = 86400

# The longest wait for an application or a batch job to say where it is, seconds. Default: 86400, a day.
#longest_hello_timeout_s = 86400

# Open streams of one owner at this facility; a stream between two gateways of it counts twice. Default: 100.
#max_streams_per_owner = 20

# What the reserved rates of one owner may add up to, Mbit/s per direction. 0 is no limit. Default: 0.
#max_reserved_mbits_per_s_per_owner = 40000

# Listeners of one stream. Default: 64.
#max_num_conn = 16

# Concurrent connections of one listener. Default: 256.
#max_connections = 64

# How often one caller may ask the service, per minute; 0 is no limit. Default: 3000, so that a flow may look at each of
# a hundred streams every two seconds.
#max_requests_per_min_per_caller = 600

# How many requests of one caller may come at once, before that counts. Default: 1000.
#request_burst_per_caller = 200
"""

_QUOTA = """
# Other limits for some users, in place of those above. The first table with a URN of the caller counts. It may have
# modes, every longest_... and max_..., and request_burst_per_caller; what it leaves out is as above. Default: no such
# table.
#[[policy.quota]]
#users = ["urn:globus:groups:id:00000000-0000-4000-8000-000000000003"]
#modes = ["tls", "auth", "none"]
#longest_lease_s = 3600
#longest_lifetime_s = 2592000
#longest_hello_timeout_s = 172800
#max_streams_per_owner = 500
#max_reserved_mbits_per_s_per_owner = 200000
#max_num_conn = 128
#max_connections = 256
#max_requests_per_min_per_caller = 30000
#request_burst_per_caller = 10000
"""

_SERVICE = """
# --- Where the service of this facility, `s2cs`, is reached.
#[service]
# The address at which clients and jobs reach it. Default: none is told.
#url = "https://gateway.example.org:5000"

# A Unix socket at which it serves the accounts of this machine: who calls, the kernel says. The functions of a Globus
# Compute endpoint of many users ask there. Nobody but the service may write in its directory. Default: none.
#socket = "/run/scistream/{facility}.sock"

# From a Unix account to the Globus identity that owns what the account opens at the socket. Default: any account owns
# it itself, as urn:scistream:unix:UID@HOST.
#accounts = {{ beamline7 = "urn:globus:auth:identity:00000000-0000-4000-8000-000000000002" }}

# A file that only its owner may read, with a bearer token that opens /metrics, for Prometheus, and nothing else.
# Default: only administrators read these.
#metrics_token_file = "/etc/scistream/metrics-token"
"""

_GLOBUS = """
# --- Globus: who calls, when this facility is served (`s2cs` without a subcommand) to others than its own user. Without
# this table the service is for development: loopback, and one token in a file that only its user can read.
#[globus]
# The client of this facility at Globus Auth. Required.
#client_id = "00000000-0000-4000-8000-000000000004"

# A file with the client's secret that only its owner may read.
# Default: the environment variable SCISTREAM_GLOBUS_CLIENT_SECRET has it.
#client_secret_file = "/etc/scistream/client-secret"

# The scope that a token must have. Default: the scope `action_all` of the client.
#scope = "https://auth.globus.org/scopes/00000000-0000-4000-8000-000000000004/action_all"

# Who may read the description of the actions: URNs, "public" or "all_authenticated_users". Default: ["public"].
#visible_to = ["all_authenticated_users"]

# Who may run the actions: URNs or "all_authenticated_users". Default: those who may open streams.
#runnable_by = ["urn:globus:groups:id:00000000-0000-4000-8000-000000000001"]

# Who may see and end the actions of everybody: URNs. Default: the policy's administrators.
#administered_by = ["urn:globus:auth:identity:00000000-0000-4000-8000-000000000002"]
"""
