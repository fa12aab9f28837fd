"""What an administrator needs for a facility behind Globus Compute: functions, the endpoint's directory, its check."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scistream_flows.actions import endpoint
from scistream_flows.actions.endpoint import check, published, published_file, register, write_configuration
from scistream_flows.config import load_facility
from scistream_flows.errors import BadRequest, ConfigError
from scistream_flows.s2cs import VERBS

yaml = pytest.importorskip("yaml", reason="not installed: it comes with globus-compute-endpoint")

IDS = {verb: f"00000000-0000-4000-8000-00000000000{number}" for number, verb in enumerate(VERBS)}
pytestmark = pytest.mark.usefixtures("state_base")


class Registry:
    """Where functions are registered; can fail after so many."""

    def __init__(self, *, fails_after: int = 100) -> None:
        self.registered: list[str] = []
        self._fails_after = fails_after

    def register_source_code(self, text: str, name: str, **about: Any) -> str:
        assert f"def {name}(document)" in text
        assert about["description"]
        if len(self.registered) == self._fails_after:
            raise ConnectionError("gone")
        self.registered.append(name)
        return f"{len(self.registered):08d}-0000-4000-8000-000000000000"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "endpoints" / "gateway"


@pytest.fixture
def configured(directory: Path) -> Path:
    """The directory of an endpoint, as it should be."""
    aps = load_facility("aps")
    aps.state_dir.mkdir(parents=True)
    published_file(aps).write_text(json.dumps(IDS))
    write_configuration(directory, facility=aps, functions=IDS)
    return directory


def problems(directory: Path) -> dict[str, str]:
    found = check(directory, facility=load_facility("aps"))
    return {one.check: one.message for one in found if one.level in ("problem", "warning")}


def test_functions_are_registered_once() -> None:
    aps, registry = load_facility("aps"), Registry()
    first = register(registry, facility=aps)
    assert list(first) == list(VERBS)
    assert registry.registered == [f"scistream_{verb}" for verb in VERBS]
    assert register(registry, facility=aps) == first == published(aps)
    assert len(registry.registered) == len(VERBS)


def test_an_interrupted_registration_goes_on_where_it_was() -> None:
    aps = load_facility("aps")
    with pytest.raises(ConnectionError):
        register(Registry(fails_after=3), facility=aps)
    kept = published(aps)
    assert list(kept) == list(VERBS[:3])
    rest = Registry()
    assert dict(register(rest, facility=aps)).items() >= kept.items()
    assert len(rest.registered) == len(VERBS) - 3


@pytest.mark.parametrize("text", ["{", "[]", '{"list": 1}'])
def test_ids_that_cannot_be_read_are_not_registered_anew(text: str) -> None:
    aps, registry = load_facility("aps"), Registry()
    aps.state_dir.mkdir(parents=True)
    published_file(aps).write_text(text)
    with pytest.raises(ConfigError, match=r"compute-functions\.json"):
        register(registry, facility=aps)
    assert registry.registered == []


def test_the_endpoint_allows_the_functions_and_nothing_else(configured: Path, state_base: Path) -> None:
    config = yaml.safe_load((configured / "config.yaml").read_text())
    assert config["allowed_functions"] == list(IDS.values())
    assert config["display_name"] == "scistream aps"
    settings = yaml.safe_load((configured / "user_config_template.yaml.j2").read_text())
    assert settings["engine"]["type"] == "ThreadPoolEngine"
    assert [one.rsplit(".", 1)[1] for one in settings["engine"]["allowed_serializers"]] == [
        "PureSourceTextInspect",
        "JSONData",
    ]
    assert settings["idle_heartbeats_soft"] == 0
    schema = json.loads((configured / "user_config_schema.json").read_text())
    assert (schema["type"], schema["additionalProperties"]) == ("object", False)
    assert not schema.get("properties")
    environment = yaml.safe_load((configured / "user_environment.yaml").read_text())
    assert environment["SCISTREAM_STATE_DIR"] == str(state_base)
    assert environment["GLOBUS_COMPUTE_USER_DIR"] == str(configured.parent)
    assert "KillMode=process" in (configured / "scistream.conf").read_text()


def test_only_its_account_may_read_or_change_it(configured: Path) -> None:
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in [configured, *configured.iterdir()]}
    assert set(modes.values()) == {0o700, 0o600}
    assert modes[configured.name] == 0o700


def test_the_real_endpoint_reads_it(configured: Path) -> None:
    utils = pytest.importorskip("globus_compute_endpoint.endpoint.config.utils")
    config = utils.get_config(configured)
    assert [str(one) for one in config.allowed_functions] == list(IDS.values())
    assert config.heartbeat_period == 30


def test_used_from_flows_every_serializer_is_taken_and_the_file_says_that_nobody_has_tried(
    directory: Path, configured: Path
) -> None:
    write_configuration(directory, facility=load_facility("aps"), functions=IDS, flows=True, replace=True)
    text = (directory / "user_config_template.yaml.j2").read_text()
    assert "allowed_serializers" not in text
    assert "NOT VERIFIED" in text
    assert yaml.safe_load(text)["engine"] == {"type": "ThreadPoolEngine", "max_workers": 4}
    assert list(problems(configured)) == ["compute-serializers"]


def test_writing_it_again_changes_nothing_and_overwrites_nothing(configured: Path) -> None:
    aps = load_facility("aps")
    (configured / "endpoint.json").write_text('{"endpoint_id": "kept"}')
    write_configuration(configured, facility=aps, functions=IDS)
    (configured / "config.yaml").write_text("display_name: mine\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is there and says something else"):
        write_configuration(configured, facility=aps, functions=IDS)
    assert (configured / "config.yaml").read_text() == "display_name: mine\n"
    write_configuration(configured, facility=aps, functions=IDS, replace=True)
    assert "allowed_functions" in (configured / "config.yaml").read_text()
    assert (configured / "endpoint.json").read_text() == '{"endpoint_id": "kept"}'
    assert not [one for one in configured.iterdir() if one.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_workers": 0}, "max_workers: 0 is not within 1 to 64"),
        ({"heartbeat_s": 4}, "heartbeat_s: 4 is not within 5 to 300"),
        ({"functions": {"list": "8a5b"}}, "no verb with a UUID"),
        ({"functions": {"paint": IDS["list"]}}, "no verb with a UUID"),
        ({"functions": {}}, "functions: none"),
        ({"display_name": "a\nallowed_functions: []"}, "does not fit on a line"),
        ({"email": "a\nb"}, "does not fit on a line"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused(directory: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        write_configuration(directory, facility=load_facility("aps"), **({"functions": IDS} | options))
    assert not directory.exists()


def test_values_cannot_break_out_of_their_place(directory: Path) -> None:
    name = "it's #1: {{ 7 * 7 }}"
    write_configuration(directory, facility=load_facility("aps"), functions=IDS, display_name=name)
    assert yaml.safe_load((directory / "config.yaml").read_text())["display_name"] == name


def test_a_facility_that_its_name_does_not_lead_to_is_refused(
    directory: Path, site: Callable[..., None], tmp_path: Path
) -> None:
    site("aps", {})
    elsewhere = tmp_path / "elsewhere.toml"
    elsewhere.write_text(Path(os.environ["SCISTREAM_CONFIG_DIR"], "aps.toml").read_text())
    with pytest.raises(ConfigError, match=r"is found in .*aps\.toml, not in .*elsewhere\.toml"):
        write_configuration(directory, facility=load_facility("aps", file=elsewhere), functions=IDS)
    write_configuration(directory, facility=load_facility("aps"), functions=IDS)
    environment = yaml.safe_load((directory / "user_environment.yaml").read_text())
    assert environment["SCISTREAM_CONFIG_DIR"] == os.environ["SCISTREAM_CONFIG_DIR"]


def test_a_good_endpoint_has_no_problems(configured: Path) -> None:
    assert problems(configured) == {}
    assert {one.level for one in check(configured, facility=load_facility("aps"))} == {"ok"}


@pytest.mark.parametrize(
    ("file", "old", "new", "found", "words"),
    [
        ("config.yaml", "allowed_functions:", "others:", "compute-functions", "runs every function"),
        ("config.yaml", IDS["list"], IDS["list"][:-1] + "f", "compute-functions", "not allow .* list"),
        (
            "config.yaml",
            "allowed_functions:",
            f"allowed_functions:\n  - {IDS['list'][:-1]}f",
            "compute-functions",
            "of others too",
        ),
        ("user_config_schema.json", "false", "true", "compute-settings", "choose settings"),
        ("user_config_schema.json", "{", "", "compute-settings", "no JSON"),
        ("user_config_template.yaml.j2", "ThreadPool", "Globus", "compute-engine", "another engine"),
        ("user_config_template.yaml.j2", "allowed_", "any_", "compute-serializers", "every serializer"),
    ],
)
def test_what_was_changed_for_the_worse_is_found(
    configured: Path, file: str, old: str, new: str, found: str, words: str
) -> None:
    import re

    path = configured / file
    path.write_text(path.read_text().replace(old, new, 1))
    assert re.search(words, problems(configured)[found])


def test_the_endpoints_of_a_facility_are_found(configured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOBUS_COMPUTE_USER_DIR", str(configured.parent))
    (configured.parent / "other").mkdir()
    (configured.parent / "other" / "config.yaml").write_text("display_name: other\n")
    assert endpoint.endpoints_of(load_facility("aps")) == [configured]
    assert endpoint.endpoints_of(load_facility("alcf")) == []
    assert endpoint.endpoint_directory("gateway") == configured


def test_files_that_others_may_write_are_a_problem(configured: Path) -> None:
    (configured / "config.yaml").chmod(0o666)
    assert "could so run programs" in problems(configured)["compute-files"]


def test_an_endpoint_that_is_not_there_is_a_problem(directory: Path) -> None:
    assert "No such file" in problems(directory)["compute-endpoint"]


def test_a_unit_that_ends_the_relays_is_a_problem(tmp_path: Path) -> None:
    assert list(endpoint._check_unit("gateway", units=tmp_path)) == []
    unit = tmp_path / "globus-compute-endpoint-gateway.service"
    unit.write_text("[Service]\nRestart=always\n")
    (bad,) = endpoint._check_unit("gateway", units=tmp_path)
    assert (bad.level, "KillMode=process" in (bad.fix or "")) == ("problem", True)
    drop_in = Path(f"{unit}.d")
    drop_in.mkdir()
    (drop_in / "scistream.conf").write_text("[Service]\nKillMode=process\n")
    (good,) = endpoint._check_unit("gateway", units=tmp_path)
    assert good.level == "ok"
