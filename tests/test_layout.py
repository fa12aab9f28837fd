"""The folders are the architecture: imports point one way, along the life of a stream."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scistream_flows"
# A module imports only those before it.
LIFE = (
    "errors",
    "models",
    "config",
    "policy",
    "allowance",
    "registry",
    "relay",
    "haproxy",
    "ssh",
    "gateway",
    "route",
    "side",
    "s2cs",
    "doorway",
    "functions",
    "compute",
    "tokens",
    "web",
    "rest",
    "hello",
    "facility",
    "stream",
    "cli",
    "parsl",
    "notebook",
    "diagnosis",
    "doctor",
)

# The package of the commands, in this order.
CLI = (
    "console",
    "listing",
    "answer",
    "pin",
    "ledger",
    "login",
    "place",
    "session",
    "live",
    "options",
    "account",
    "request",
    "view",
    "hold",
    "s2uc",
    "appctrl",
)

# The same for what is installed as scistream_flows.actions.
ACTIONS = (
    "auth",
    "records",
    "documents",
    "operations",
    "lifecycle",
    "admission",
    "answers",
    "provider",
    "rest",
    "metrics",
    "page",
    "service",
    "endpoint",
    "settings",
    "template",
    "administration",
    "expressions",
    "choices",
    "language",
    "client",
    "runner",
    "render",
    "deploy",
    "flows",
)


def imported(path: Path, *, below: str = "scistream_flows") -> set[str]:
    """The modules of a package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        else:
            continue
        found |= {
            name.removeprefix(f"{below}.").split(".")[0] for name in names if name.startswith(f"{below}.")
        }
    return found


def test_every_module_has_its_place_in_the_life_of_a_stream() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*LIFE, "__init__"} - {"cli"}
    assert {path.stem for path in (PACKAGE / "cli").glob("*.py")} == {*CLI, "__init__"}


def test_a_module_imports_only_those_before_it() -> None:
    for place, name in enumerate(LIFE):
        files = [PACKAGE / f"{name}.py"] if name != "cli" else (PACKAGE / "cli").glob("*.py")
        for file in files:
            later = (imported(file) & set(LIFE)) - set(LIFE[:place]) - {name}
            assert not later, f"{file.stem} imports {', '.join(sorted(later))}, which come later"


def test_a_module_of_the_commands_imports_only_siblings_before_it() -> None:
    for place, name in enumerate(CLI):
        found = imported(PACKAGE / "cli" / f"{name}.py", below="scistream_flows.cli")
        later = found - set(CLI[:place])
        assert not later, f"{name} imports {', '.join(sorted(later))}, which come later"


def test_every_module_of_the_actions_has_its_place_too() -> None:
    assert {path.stem for path in (ROOT / "actions").glob("*.py")} == {*ACTIONS, "__init__"}


def test_a_module_of_the_actions_imports_only_siblings_before_it() -> None:
    for place, name in enumerate(ACTIONS):
        nodes = list(ast.walk(ast.parse((ROOT / "actions" / f"{name}.py").read_text())))
        siblings = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1]
        found = {node.module for node in siblings if node.module}
        found |= {one.name for node in siblings if not node.module for one in node.names}
        later = found - set(ACTIONS[:place])
        assert not later, f"{name} imports {', '.join(sorted(later))}, which come later"


def test_nothing_in_the_package_imports_the_actions() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "actions" not in imported(path), path.name


def test_unsafe_code_is_in_one_small_crate() -> None:
    assert 'unsafe_code = "forbid"' in (ROOT / "relay" / "Cargo.toml").read_text()
    assert len((ROOT / "relay" / "sys" / "src" / "lib.rs").read_text().splitlines()) < 200
