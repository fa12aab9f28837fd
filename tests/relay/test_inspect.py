"""The facts about a node: right where they can be compared, and nothing is changed by asking."""

import errno
import json
import os
import resource
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from .apps import Applications
from .gateway import Gateway, RefusedError, is_running

FACTS = {
    *(
        "protocol",
        "version",
        "host",
        "uid",
        "user",
        "kernel",
        "architecture",
        "at_ns",
        "took_s",
        "ktls",
        "pipe",
    ),
    *("page_bytes", "own_addresses", "addresses", "directories", "descriptors", "settings", "logind", "cpus"),
    *("cpus_allowed", "numa_nodes", "memory_bytes", "memory_available_bytes"),
}
TCP_ULP = 31
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def inspect(gateway: Gateway, **request: Any) -> dict[str, Any]:
    return gateway.verb("inspect", document={"protocol": 1, **request})


def test_the_facts_are_those_of_this_machine(gateway: Gateway) -> None:
    before = time.time_ns()
    facts = inspect(gateway)
    assert before <= facts["at_ns"] <= time.time_ns()
    assert set(facts) == FACTS
    assert (facts["protocol"], facts["uid"], facts["host"]) == (1, os.geteuid(), socket.gethostname())
    assert (facts["kernel"], facts["architecture"]) == (os.uname().release, os.uname().machine)
    assert facts["page_bytes"] == os.sysconf("SC_PAGE_SIZE")
    assert facts["cpus"] == len(os.sched_getaffinity(0))
    assert facts["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    assert facts["descriptors"] == {"soft": soft, "hard": hard}
    for name, value in facts["settings"].items():
        path = Path("/proc/sys") / name.replace(".", "/")
        if name == "fs.file-nr":  # it changes with every file
            continue
        assert value == (path.read_text().strip() if path.exists() else None), name


def test_kernel_tls_is_what_a_socket_of_ours_gets(gateway: Gateway) -> None:
    name = None
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        try:
            one.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        except OSError as wrong:
            name = errno.errorcode[wrong.errno or 0]
    told = inspect(gateway)["ktls"]
    assert (told["available"], told["errno"]) == (name is None, name)
    assert (told["new_keys"] is None) == (name is not None)


def test_an_address_is_told_with_its_interface_or_why_it_cannot_be_bound(gateway: Gateway) -> None:
    here, elsewhere, anywhere = inspect(gateway, addresses=["127.0.0.1", "192.0.2.77", "0.0.0.0"])[
        "addresses"
    ]
    assert (here["errno"], here["interface"]["name"], here["ports"]) == (None, "lo", None)
    assert here["interface"]["mtu"] == int(Path("/sys/class/net/lo/mtu").read_text())
    assert (elsewhere["errno"], elsewhere["interface"]) == ("EADDRNOTAVAIL", None)
    assert (anywhere["errno"], anywhere["interface"]) == (None, None)


def test_taken_ports_are_counted_and_the_first_are_named(gateway: Gateway, apps: Applications) -> None:
    port = min(apps.listen().getsockname()[1], 65_000)
    taken = sorted({apps.listen(port=0).getsockname()[1] for _ in range(3)} | {port})
    inside = [one for one in taken if port <= one <= port + 200]
    (address,) = inspect(gateway, addresses=["127.0.0.1"], first_port=port, last_port=port + 200)["addresses"]
    ports = address["ports"]
    named = [one["port"] for one in ports["refused"]]
    assert ports["checked"] == 201
    assert ports["free"] <= 201 - len(inside)
    assert set(named) >= set(inside) or len(named) == 8
    assert {one["errno"] for one in ports["refused"]} == {"EADDRINUSE"}


def test_a_wide_range_is_tried_evenly_in_bounded_work(gateway: Gateway) -> None:
    (address,) = inspect(gateway, addresses=["127.0.0.1"], first_port=1024, last_port=65_535)["addresses"]
    assert 3000 <= address["ports"]["checked"] <= 4096
    assert len(address["ports"]["refused"]) <= 8


def test_asking_changes_nothing_for_relays_that_listen_or_start(gateway: Gateway, apps: Applications) -> None:
    relay = gateway.start(gateway.config("CONS", "tls"))
    port = relay.address()[1]
    (address,) = inspect(gateway, addresses=["127.0.0.1"], first_port=port, last_port=port)["addresses"]
    assert address["ports"] == {
        "checked": 1,
        "free": 0,
        "refused": [{"port": port, "errno": "EADDRINUSE"}],
    }
    assert is_running(relay.pid)
    apps.knock(relay.address())


def test_the_runtime_directory_is_looked_at_and_not_made(gateway: Gateway, tmp_path: Path) -> None:
    missing = tmp_path / "not" / "there"
    done = gateway.call(
        "inspect", text=json.dumps({"protocol": 1, "directories": [str(tmp_path)]}), directory=missing
    )
    first, second = json.loads(done.stdout)["directories"]
    assert (first["path"], first["errno"], first["mode"]) == (str(missing), "ENOENT", None)
    assert (second["errno"], second["uid"]) == (None, os.geteuid())
    assert second["mode"] == tmp_path.stat().st_mode & 0o7777
    assert first["file_system"] == second["file_system"]
    assert not (tmp_path / "not").exists()


@ROOT_ONLY
@pytest.mark.parametrize(("option", "fact"), [("noexec", "noexec"), ("ro", "read_only")])
def test_how_a_file_system_is_mounted_is_told(
    gateway: Gateway, tmp_path: Path, option: str, fact: str
) -> None:
    """In a mount namespace of its own, which goes with its process."""
    request = json.dumps({"protocol": 1, "directories": [str(tmp_path)]})
    script = 'mount -t tmpfs -o "$1",size=128k none "$2" && exec "$3" inspect --runtime-dir /run/nowhere'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", option, str(tmp_path), str(gateway.binary)],
        input=request,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if done.returncode != 0:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    about = json.loads(done.stdout)["directories"][1]
    assert about["file_system"] == {"type": "tmpfs", "mounted_at": str(tmp_path)}
    assert about["free_bytes"] <= 128 << 10
    assert {name: about[name] for name in ("noexec", "read_only")} == {
        "noexec": False,
        "read_only": False,
    } | {fact: True}


@ROOT_ONLY
def test_what_logind_does_at_logout_is_read_from_its_files(gateway: Gateway, tmp_path: Path) -> None:
    """The main file names the default in a comment; of two files that set a value, the later name wins."""
    parts = tmp_path / "logind.conf.d"
    parts.mkdir()
    (tmp_path / "logind.conf").write_text("[Login]\n#KillUserProcesses=no\n#KillExcludeUsers=root\n")

    def logind() -> dict[str, Any]:
        script = 'mount --bind "$1" /etc/systemd && exec "$2" inspect --runtime-dir /run/nowhere'
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), str(gateway.binary)],
            input='{"protocol": 1}',
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode != 0:
            pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
        facts: dict[str, Any] = json.loads(done.stdout)["logind"]
        return facts

    if not Path("/etc/systemd").is_dir():
        pytest.skip("no systemd here")
    assert logind()["kill_user_processes"] == "no"
    (parts / "50-site.conf").write_text("[Login]\nKillUserProcesses = yes\n")
    assert logind()["kill_user_processes"] == "yes"
    assert logind()["kill_exclude_users"] == "root"
    (parts / "90-later.conf").write_text("[Login]\nKillUserProcesses=no\nKillExcludeUsers=root dtn\n")
    assert logind()["kill_user_processes"] == "no"
    assert logind()["kill_exclude_users"] == "root dtn"


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        ({"protocol": 2}, "protocol", "protocol 2 was asked"),
        ({}, "bad-request", "protocol"),
        ({"protocol": 1, "colour": "red"}, "bad-request", "unknown field `colour`"),
        ({"protocol": 1, "addresses": ["localhost"]}, "bad-request", "invalid IP address"),
        ({"protocol": 1, "addresses": ["127.0.0.1"] * 17}, "bad-request", "at most 16"),
        ({"protocol": 1, "first_port": 9, "last_port": 8}, "bad-request", "first_port <= last_port"),
        ({"protocol": 1, "first_port": 0, "last_port": 8}, "bad-request", "first_port <= last_port"),
    ],
)
def test_a_wrong_request_is_refused_in_words(
    gateway: Gateway, request_: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(RefusedError) as refusal:
        gateway.verb("inspect", document=request_)
    assert (refusal.value.exit, refusal.value.code) == (1, code)
    assert said in refusal.value.message


def test_what_cannot_be_tried_is_an_errno_and_no_failure(gateway: Gateway) -> None:
    """Descriptors are those of who asks."""
    done = subprocess.run(
        ["prlimit", "--nofile=4:4", str(gateway.binary), "inspect", "--runtime-dir", str(gateway.directory)],
        input='{"protocol": 1, "addresses": ["127.0.0.1"]}',
        capture_output=True,
        text=True,
        timeout=30,
    )
    facts = json.loads(done.stdout)
    assert facts["descriptors"] == {"soft": 4, "hard": 4}
    assert facts["pipe"]["errno"] == "EMFILE"
    assert facts["pipe"]["granted_bytes"] is None
