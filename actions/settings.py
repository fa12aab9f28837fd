"""What every subcommand of `s2cs` takes, and the facility that is meant by it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.core import ParameterSource

from scistream_flows.cli.console import show_debugging
from scistream_flows.config import FacilityConfig, config_folders, load_facility, tomllib
from scistream_flows.errors import ConfigError

if TYPE_CHECKING:
    from scistream_flows.s2cs import S2CS

C = TypeVar("C", bound=Callable[..., Any])


@dataclass
class Settings:
    """What every subcommand takes, before or after its name."""

    facility: str | None = None
    config: Path | None = None
    format: Literal["text", "json"] = "text"
    debug: bool = False

    @property
    def json(self) -> bool:
        """Whether stdout is for a program."""
        return self.format == "json"

    def quiet(self) -> None:
        """Do not repeat in a log what the command says itself, such as which gateway does not answer."""
        if not self.debug:
            logging.getLogger("scistream_flows").setLevel(logging.ERROR)

    def load(self, *, port_range: str | None = None, otherwise: str | None = None) -> FacilityConfig:
        """The facility that is meant: `--config`, `--facility`, `$SCISTREAM_FACILITY`, or the only one configured.

        Args:
            port_range: Before what its file says.
            otherwise: The name when none is given and none is configured.

        Raises:
            ConfigError: When it is not clear which, or its configuration is wrong.
        """
        if self.config is not None:
            return load_facility(
                self.facility or _name_in(self.config), file=self.config, port_range=port_range
            )
        name = self.facility or os.environ.get("SCISTREAM_FACILITY") or _the_only_one(otherwise)
        return load_facility(name, port_range=port_range)

    @contextmanager
    def service(self) -> Iterator[S2CS]:
        """The service of the facility that is meant, in this process.

        Raises:
            ConfigError: When there is no such facility here, neither configured nor used before.
        """
        from scistream_flows.s2cs import S2CS

        config = self.load()
        if config.file is None and not config.state_dir.exists():
            raise ConfigError(
                f"there is no facility {config.name!r} here: no configuration, and no state in {config.state_dir}",
                which=config.name,
                hint=f"Configured: {', '.join(configured_facilities()) or 'none'}",
            )
        self.quiet()
        with S2CS(config) as service:
            yield service


def configured_facilities() -> Mapping[str, Path]:
    """The facilities that have a configuration file, by name.

    Raises:
        ConfigError: When a file cannot be read, so that the name in it is not known.
    """
    found: dict[str, Path] = {}
    for folder in config_folders(os.environ):
        # one that bears the name of its facility wins, as in load_facility
        for file in sorted(folder.glob("*.toml"), key=lambda one: (one.stem == "facility", one.name)):
            with _readable(file):
                table = tomllib.loads(file.read_text(encoding="utf-8")).get("facility")
                if isinstance(table, dict) and isinstance(table.get("name"), str):
                    found.setdefault(table["name"], file)
    return found


def _name_in(file: Path) -> str:
    with _readable(file):
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("facility")
        if isinstance(table, dict) and isinstance(table.get("name"), str):
            return str(table["name"])
    raise ConfigError(
        f"{file}: facility.name: Field required",
        which=str(file),
        hint="Name the facility there, below [facility], or give the file of one with --config",
        file=str(file),
        key="facility.name",
    )


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as wrong:
        raise ConfigError(
            f"{file}: {wrong.strerror}",
            which=str(file),
            hint="Give the configuration of a facility, one that you may read",
            file=str(file),
        ) from None
    except ValueError as wrong:
        raise ConfigError(
            f"{file} is not TOML: {wrong}",
            which=str(file),
            hint="Correct it at that place, or name another file with --config",
            file=str(file),
        ) from None


def _the_only_one(otherwise: str | None) -> str:
    names = list(configured_facilities())
    if len(names) == 1:
        return names[0]
    if names:
        raise ConfigError(
            f"{len(names)} facilities are configured here: {', '.join(names)}",
            hint="Say which with --facility NAME or SCISTREAM_FACILITY",
        )
    if otherwise is not None:
        return otherwise
    raise ConfigError(
        "no facility is configured here",
        hint="Configure one with `s2cs init NAME`, or name a development facility with --facility NAME",
    )


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    settings = context.ensure_object(Settings)
    if parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
        setattr(settings, parameter.name, value)
        if parameter.name == "debug":
            show_debugging()


def common(command: C) -> C:
    """The options that every subcommand takes, before or after its name: kept in `Settings`."""
    kept: dict[str, Any] = {"expose_value": False, "callback": _remember}
    for option in (
        click.option("--debug", is_flag=True, help="Show the log, and the traceback of an error.", **kept),
        click.option(
            "--format", type=click.Choice(["text", "json"]), help="json: one document on stdout.", **kept
        ),
        click.option(
            "--config", type=click.Path(path_type=Path), metavar="FILE", help="Its configuration.", **kept
        ),
        click.option(
            "--facility", metavar="NAME", help="Which facility; by default the only one configured.", **kept
        ),
    ):
        command = option(command)
    return command


with_settings = click.make_pass_decorator(Settings, ensure=True)
