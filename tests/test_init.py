"""`s2cs init` and the file it writes: every key, valid as it is, and valid when any example of it is taken up."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from scistream_flows.actions.administration import _folder
from scistream_flows.actions.template import Place, template
from scistream_flows.config import GatewayConfig, GlobusConfig, Policy, Quota, _File, load_facility
from scistream_flows.errors import ConfigError

Run: TypeAlias = Callable[..., "subprocess.CompletedProcess[str]"]

KEY = re.compile(r"#?([a-z0-9_]+) = (.+)")
TABLE = re.compile(r"#?\[\[?([a-z.]+)\]\]?")
EXAMPLE = re.compile(r"#[a-z0-9_]+ = .+|#\[.+\]")
GATEWAYS = (
    [Place("gw1")],
    [Place("gw1", "gw1.example.org")],
    [Place("a"), Place("b", "dtn2"), Place("c", "dtn3"), Place("d")],
    [Place("a", "dtn1"), Place("b")],
)


def load(text: str, folder: Path) -> Any:
    file = folder / "facility.toml"
    file.write_text(text)
    return load_facility("aps", file=file, environment={})


def taken_up(line: str) -> str:
    """An example without its comment sign; any other line as it is."""
    return line[1:] if EXAMPLE.fullmatch(line) else line


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each table with its lines, commented or not."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if TABLE.fullmatch(line):
            yield name, lines
            name, lines = line.lstrip("#").strip("[]"), []
        else:
            lines.append(line)
    yield name, lines


def models_in(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every table that a configuration file may have, by the name of its header."""
    for name, field in model.model_fields.items():
        for one in parts(field.annotation):
            if isinstance(one, type) and issubclass(one, BaseModel):
                yield prefix + name, one
                yield from models_in(one, f"{prefix}{name}.")


def parts(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType, list, Annotated):
        for one in get_args(annotation):
            yield from parts(one)
    else:
        yield annotation


@pytest.fixture
def s2cs(tmp_path: Path) -> Run:
    """A function that runs the command in an environment that has no facility."""

    def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("SCISTREAM_", "XDG_"))
        }
        clean |= {"HOME": str(tmp_path / "home"), "SCISTREAM_STATE_DIR": str(tmp_path / "state")}
        program = "from scistream_flows.actions.administration import main; main()"
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
            env=clean | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


# --- the file


@pytest.mark.parametrize("gateways", GATEWAYS)
def test_as_it_is_written_it_listens_on_loopback_only_and_allows_nothing(
    gateways: Sequence[Place], tmp_path: Path
) -> None:
    facility = load(template("aps", gateways), tmp_path)
    assert [(one.name, one.host) for one in facility.gateways] == list(gateways)
    for one in facility.gateways:
        assert {str(address) for address in one.own_addresses()} == {"127.0.0.1"}
    assert facility.policy == Policy()
    assert facility.globus is None


@pytest.mark.parametrize("gateways", GATEWAYS)
def test_every_example_is_valid_when_its_comment_sign_is_taken_away(
    gateways: Sequence[Place], tmp_path: Path
) -> None:
    text = template("aps", gateways)
    everything = load("\n".join(map(taken_up, text.splitlines())), tmp_path)
    assert everything.policy.quota
    assert everything.globus is not None
    assert "ssh" in {one.kind for one in everything.gateways}
    assert not [line for line in text.splitlines() if re.match(r"#\S", line) and not EXAMPLE.fullmatch(line)]


def test_every_key_is_valid_on_its_own(tmp_path: Path) -> None:
    text = template("aps", [Place("gw1"), Place("gw2", "dtn2")])
    lines = text.splitlines()
    tried = 0
    table_is_example = False
    for number, line in enumerate(lines):
        if TABLE.fullmatch(line):
            table_is_example = line.startswith("#")
        elif EXAMPLE.fullmatch(line) and not table_is_example:
            load("\n".join([*lines[:number], line[1:], *lines[number + 1 :]]), tmp_path)
            tried += 1
    assert tried > 20


def test_an_example_table_is_valid_on_its_own(tmp_path: Path) -> None:
    text = template("aps", [Place("gw1")])
    for header in ("#[[gateway]]", "#[[policy.quota]]", "#[globus]"):
        before, table = text.split(f"{header}\n")
        following = re.search(r"\n#?\[", table)
        end = following.start() if following else len(table)
        taken = "\n".join(map(taken_up, table[:end].splitlines()))
        load(f"{before}{header[1:]}\n{taken}\n{table[end:]}", tmp_path)


@pytest.mark.parametrize("gateways", GATEWAYS)
def test_every_key_of_the_configuration_is_in_it(gateways: Sequence[Place]) -> None:
    shown: dict[str, set[str]] = {}
    for table, lines in blocks(template("aps", gateways)):
        keys = {match[1] for line in lines if (match := KEY.fullmatch(line))}
        shown[table] = shown.get(table, set()) | keys
    known = dict(models_in(_File))
    assert {GatewayConfig, Policy, Quota, GlobusConfig} <= set(known.values())
    for table, model in known.items():
        fields = {name for name in model.model_fields if f"{table}.{name}" not in known}
        assert shown[table] == fields, table


def test_the_default_that_a_comment_says_is_the_one_that_counts() -> None:
    models = dict(models_in(_File))
    compared = 0
    for table, lines in blocks(template("aps", [Place("gw1")])):
        if table not in models or models[table] is Quota:  # a quota has no defaults of its own
            continue
        comment = ""
        for line in lines:
            key = KEY.fullmatch(line)
            if line.startswith("# "):
                comment += line[1:]
            elif key and table == "gateway" and key[1] in ("name", "kind") and not comment:
                continue  # the head of an example
            elif key and not (table == "gateway" and key[1] in ("wan_bind", "lan_bind") and not comment):
                compared += says_the_default(comment, models[table], key[1])
            if not line.startswith("#") or key:
                comment = ""
    assert compared > 15


def says_the_default(comment: str, model: type[BaseModel], key: str) -> bool:
    """Whether a default with a value of its own was compared."""
    field = model.model_fields[key]
    required = field.default is PydanticUndefined or key == "host"  # `host` is, in an ssh gateway
    if required:
        assert "Required." in comment, key
        return False
    said = re.search(r"Default: (.+?)[.]?$", comment)
    assert said, f"{key}: {comment}"
    if isinstance(field.default, int | list) and field.default:
        assert said[1].startswith(json.dumps(field.default)), key
    return isinstance(field.default, int | list)


# --- the command


def test_it_is_found_by_itself_and_can_be_read_by_everybody(s2cs: Run, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    done = s2cs("init", "aps", SCISTREAM_CONFIG_DIR=str(folder))
    assert (done.returncode, done.stdout) == (0, f"{folder / 'facility.toml'}\n")
    assert "s2cs doctor\n" in done.stderr
    assert stat.S_IMODE((folder / "facility.toml").stat().st_mode) == 0o644
    assert [one.name for one in folder.iterdir()] == ["facility.toml"]
    listed = s2cs("gateway", "list", "--format", "json", SCISTREAM_CONFIG_DIR=str(folder))
    assert json.loads(listed.stdout)["facility"] == "aps", listed.stderr
    assert [one["name"] for one in json.loads(listed.stdout)["gateways"]] == ["gw1"]


def test_gateways_can_be_named(s2cs: Run, tmp_path: Path) -> None:
    done = s2cs("init", "aps", "--gateway", "a", "--gateway", "b=dtn2.example.org", "--directory", tmp_path)
    assert done.returncode == 0, done.stderr
    facility = load_facility("aps", file=tmp_path / "facility.toml", environment={})
    assert [(one.name, one.kind, one.host) for one in facility.gateways] == [
        ("a", "local", None),
        ("b", "ssh", "dtn2.example.org"),
    ]
    assert f"s2cs doctor --config {tmp_path / 'facility.toml'}\n" in done.stderr


def test_a_file_that_is_there_is_replaced_only_by_force_and_then_kept(s2cs: Run, tmp_path: Path) -> None:
    file = tmp_path / "facility.toml"
    for mine in ('[facility]\nname = "aps"\n', "not TOML", ""):
        file.write_text(mine)
        refused = s2cs("init", "aps", "--directory", tmp_path)
        assert (refused.returncode, refused.stdout, file.read_text()) == (2, "", mine)
        assert f"{file} is there already" in refused.stderr
        forced = s2cs("init", "aps", "--directory", tmp_path, "--force", "--format", "json")
        assert json.loads(forced.stdout) == {
            "protocol": 1,
            "facility": "aps",
            "file": str(file),
            "replaced": f"{file}.old",
        }
        assert Path(f"{file}.old").read_text() == mine
        assert load_facility("aps", file=file, environment={}).gateways
        assert sorted(one.name for one in tmp_path.iterdir()) == ["facility.toml", "facility.toml.old"]


def test_a_second_facility_gets_a_file_of_its_own_name(s2cs: Run, tmp_path: Path) -> None:
    folder = {"SCISTREAM_CONFIG_DIR": str(tmp_path)}
    s2cs("init", "aps", **folder)
    done = s2cs("init", "alcf", **folder)
    assert done.stdout == f"{tmp_path / 'alcf.toml'}\n"
    assert "s2cs doctor --facility alcf\n" in done.stderr
    assert s2cs("init", "alcf", **folder).returncode == 2
    assert load_facility("alcf", environment=folder).file == tmp_path / "alcf.toml"
    assert load_facility("aps", environment=folder).file == tmp_path / "facility.toml"


@pytest.mark.parametrize(
    "arguments",
    [
        ("a/b",),
        ("",),
        ("x" * 65,),
        ("aps", "--gateway", "a b"),
        ("aps", "--gateway", "a=b@c"),
        ("aps", "--gateway", "a=b\x1b[31m"),
        ("aps", "--gateway", "a=\x7f"),
        ("aps", "--gateway", 'a="'),
        ("aps", "--gateway", "a", "--gateway", "a=b"),
    ],
    ids=" ".join,
)
def test_names_that_cannot_be_are_refused_before_anything_is_written(
    s2cs: Run, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = s2cs("init", "--directory", tmp_path / "conf", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("s2cs: ")
    assert not (tmp_path / "conf").exists()


def test_a_directory_that_cannot_be_written_is_said_in_one_line(s2cs: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = s2cs("init", "aps", "--directory", tmp_path / "file" / "below")
    assert done.returncode == ConfigError.exit_code
    assert re.fullmatch(r"s2cs: .*Not a directory\n  Give a directory .*\n", done.stderr)


def test_without_a_directory_it_goes_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SCISTREAM_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert _folder() == Path("/home/me/.config/scistream")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg")
    assert _folder() == Path("/xdg/scistream")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert _folder() == Path("/etc/scistream")
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", "/conf")
    assert _folder() == Path("/conf")
