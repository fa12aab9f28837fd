"""Options of `make chaos`, the seed, the records of scenarios, and the fixtures of the test network."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from network.conftest import account_of, facilities, gateways_each, network, rights, services
from relay.conftest import apps, binary, gateway, mode, nobodys_gateway, tap

from .report import Record, table, write
from .scene import Scene, Stage

__all__ = [
    "account_of",
    "apps",
    "binary",
    "facilities",
    "gateway",
    "gateways_each",
    "mode",
    "network",
    "nobodys_gateway",
    "rights",
    "services",
    "tap",
]

HERE = Path(__file__).parent
CELLS_WHEN_QUICK = 4  # of each matrix here, chosen by the seed
CELLS_OF_OTHERS = 1  # of each test elsewhere that is about faults
RECORDS = pytest.StashKey[dict[str, Record]]()
SEED = pytest.StashKey[int]()
BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos", "faults on purpose (make chaos)")
    group.addoption("--seed", type=int, help="repeat a run: the seed that it printed at its start")
    group.addoption("--quick", action="store_true", help="a few cells of each matrix: minutes")
    group.addoption("--only", action="append", default=[], metavar="NAME", help="scenarios named so")
    group.addoption(
        "--soak", type=float, default=0.0, metavar="SECONDS", help="run only the soak, for so long"
    )
    group.addoption("--results", type=Path, metavar="FILE", help="write what was seen into this file")


def option(config: pytest.Config, name: str, otherwise: Any = None) -> Any:
    """An option; `otherwise` in a run of all tests, which does not know them."""
    value = config.getoption(name, otherwise)
    return otherwise if value is None else value


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = {}
    config.stash[BEGAN] = time.monotonic()
    config.pluginmanager.register(Recorder())


def seed_of(config: pytest.Config) -> int:
    """The seed of this run."""
    if SEED not in config.stash:
        config.stash[SEED] = option(config, "--seed", secrets.randbelow(1_000_000))
    return config.stash[SEED]


def pytest_report_header(config: pytest.Config) -> str:
    return f"chaos: seed {seed_of(config)} (repeat it by --seed {seed_of(config)})"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only: list[str] = option(config, "--only", [])
    kept = [one for one in items if not only or any(name in one.nodeid for name in only)]
    soaks = bool(option(config, "--soak", 0.0))
    if soaks or option(config, "--results"):
        kept = [one for one in kept if soaks == (one.get_closest_marker("soak") is not None)]
    if option(config, "--quick", otherwise=False):
        kept = _sample(kept, random.Random(seed_of(config)))  # noqa: S311 - a choice, no secret
    dropped = [one for one in items if one not in set(kept)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _sample(items: list[pytest.Item], chance: random.Random) -> list[pytest.Item]:
    tests: dict[str, list[pytest.Item]] = {}
    for one in items:
        tests.setdefault(one.nodeid.partition("[")[0], []).append(one)
    chosen: set[pytest.Item] = set()
    for cells in tests.values():
        count = CELLS_WHEN_QUICK if HERE in cells[0].path.parents else CELLS_OF_OTHERS
        chosen.update(chance.sample(cells, min(count, len(cells))))
    return [one for one in items if one in chosen]


def _said(item: pytest.Item) -> str:
    """What must hold in a scenario: its own words, else its name."""
    words = getattr(getattr(item, "function", None), "__doc__", None)
    name = item.name.partition("[")[0].removeprefix("test_").replace("_", " ")
    return " ".join(words.split()) if words else name


def _record(item: pytest.Item) -> Record:
    records = item.config.stash[RECORDS]
    return records.setdefault(item.nodeid, Record(scenario=item.name, holds=_said(item)))


class Recorder:
    """Writes down how scenarios end; a conftest's own hook would hear only of those beside it."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self,
        item: pytest.Item,
        call: pytest.CallInfo[None],
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if HERE in item.path.parents or option(item.config, "--results"):
            record = _record(item)
            record.took_s = round(record.took_s + call.duration, 3)
            if report.outcome != "passed" or not record.outcome:
                record.outcome = report.outcome
            if report.failed:
                report.sections.append(("chaos", f"repeat it by --seed {seed_of(item.config)}"))
        return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    records = list(config.stash[RECORDS].values())
    results: Path | None = option(config, "--results")
    if not records or results is None:
        return
    if option(config, "--soak", 0.0):
        results = results.with_name("soak.json")
    took_s = time.monotonic() - config.stash[BEGAN]
    quick = option(config, "--quick", otherwise=False)
    write(records, results, seed=seed_of(config), quick=quick, took_s=took_s)
    terminalreporter.section(f"chaos: seed {seed_of(config)}")
    for line in table({"scenarios": [one.document() for one in records]}):
        terminalreporter.line(line)
    terminalreporter.line(f"written to {results}")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """What this scenario sees."""
    return _record(request.node)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """The choices of this scenario: the same for the same seed."""
    return random.Random(f"{seed_of(request.config)} {request.node.name}")  # noqa: S311 - no secret


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, binary: Path) -> Iterator[Stage]:
    """The services that scenarios share."""
    stage = Stage(lambda: Scene(tmp_path_factory.mktemp("stage"), binary))
    yield stage
    stage.close()


@pytest.fixture
def scene(stage: Stage, record: Record) -> Iterator[Scene]:
    """Two facilities, a bystander's stream between them, and whatever a scenario starts: each in its own process."""
    with stage.scene() as scene:
        yield scene
        if record.outcome == "failed":  # nothing is known of what is there
            stage.close()
