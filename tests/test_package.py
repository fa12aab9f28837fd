"""The distribution: wheel, sdist and editable install each carry the static relay and leak no other import name."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PT_DYNAMIC, PT_INTERP, DT_NEEDED = 2, 3, 1

pytestmark = [pytest.mark.package, pytest.mark.timeout(600)]

PROBE = """
import importlib.util, json, pathlib, subprocess
import importlib.resources, scistream_flows, scistream_flows.actions
from scistream_flows.relay import find_s2ds
found = str(find_s2ds())
print(json.dumps({
    "leaked": [name for name in ("actions", "relay") if importlib.util.find_spec(name)],
    "actions": scistream_flows.actions.__file__,
    "definitions": sorted(
        one.name for one in importlib.resources.files("scistream_flows.actions").joinpath("definitions").iterdir()
    ),
    "page": sorted(
        one.name for one in importlib.resources.files("scistream_flows.actions").joinpath("pages").iterdir()
    ),
    "s2ds": found,
    "version": json.loads(subprocess.run([found, "version", "--format", "json"], stdout=-1, check=True).stdout),
}))
"""

SOME_UUID = "6c2b5f0e-0000-4000-8000-000000000001"


def run(*command: str | Path, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=550)


class Workshop:
    """A copy of the source, and an environment in which it builds without touching the checkout.

    The copy of relay/target spares compiling the relay's dependencies again, and keeps the checkout's own s2ds,
    which other tests run, from being replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        skip = shutil.ignore_patterns(
            ".git", ".venv", "build", "dist", "target", "*.egg-info", "__pycache__", ".*_cache"
        )
        shutil.copytree(ROOT, self.source, ignore=skip)
        self.env = {
            name: text
            for name, text in os.environ.items()
            if name not in ("S2DS", "PYTHONPATH", "VIRTUAL_ENV")
        }
        self.env["CARGO_TARGET_DIR"] = str(folder / "target")
        self.env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        self.env["SCISTREAM_STATE_DIR"] = str(folder / "state")
        self.env["SCISTREAM_CONFIG_DIR"] = str(folder / "config")
        if (ROOT / "relay/target/release").is_dir():
            shutil.copytree(ROOT / "relay/target/release", folder / "target/release", symlinks=True)

    def sdist(self) -> Path:
        done = run(
            sys.executable, "-m", "build", "--sdist", "--outdir", self.folder, cwd=self.source, env=self.env
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (archive,) = self.folder.glob("scistream_flows-*.tar.gz")
        return archive

    def wheel(self, source: Path) -> subprocess.CompletedProcess[str]:
        """Build a wheel from a source tree; it lands in `source`/dist."""
        return run(
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", source / "dist", source,
            cwd=self.folder, env=self.env,
        )  # fmt: skip

    def install(self, *what: str | Path) -> Path:
        """Install into a fresh virtual environment; answer its bin folder."""
        place = self.folder / f"venv-{len(list(self.folder.glob('venv-*')))}"
        venv.create(place, with_pip=True)
        done = run(place / "bin/python", "-m", "pip", "install", *what, cwd=self.folder, env=self.env)
        assert done.returncode == 0, done.stdout + done.stderr
        return place / "bin"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("package")
    yield Workshop(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def unpacked_sdist(workshop: Workshop) -> Path:
    with tarfile.open(workshop.sdist()) as archive:
        archive.extractall(workshop.folder / "unpacked", filter="data")
    (tree,) = (workshop.folder / "unpacked").iterdir()
    return tree


def program_headers(image: bytes) -> dict[int, bytes]:
    """The segments of a 64-bit little-endian ELF file, by type."""
    assert image[:6] == b"\x7fELF\x02\x01"
    start, size, count = struct.unpack_from("<32xQ14xHH", image)
    segments = {}
    for at in range(start, start + size * count, size):
        kind, offset, length = struct.unpack_from("<I4xQ16xQ", image, at)
        segments[kind] = image[offset : offset + length]
    return segments


def assert_is_static(binary: Path) -> None:
    segments = program_headers(binary.read_bytes())
    assert PT_INTERP not in segments, f"{binary} asks for a dynamic loader"
    needed = [tag for tag, _ in struct.iter_unpack("<qQ", segments.get(PT_DYNAMIC, b"")) if tag == DT_NEEDED]
    assert not needed, f"{binary} needs shared libraries"


def assert_is_whole(binaries: Path, workshop: Workshop, *, actions_in: Path) -> None:
    """What every kind of install must give, seen from a folder that has nothing to do with the project."""
    neutral = workshop.folder / "neutral"
    neutral.mkdir(exist_ok=True)
    done = run(binaries / "python", "-c", PROBE, cwd=neutral, env=workshop.env)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["leaked"] == []
    assert Path(seen["actions"]).is_relative_to(actions_in)
    assert Path(seen["s2ds"]) == binaries / "s2ds"
    assert seen["version"] == {"name": "s2ds", "version": "0.1.0", "protocol": 1}
    assert os.access(binaries / "s2ds", os.X_OK)
    assert_is_static(binaries / "s2ds")
    assert {"slices.json", "action-providers.json", "compute-only.json"} <= set(seen["definitions"])
    assert {"operator.html", "operator.css", "operator.js", "icon.svg"} <= set(seen["page"])
    # the commands are there without any extra, and say which one they lack
    for command in (
        *(["s2cs", "--version"], ["s2cs", "init", "--help"], ["scistream-flows", "--version"]),
        *(["s2uc", "--version"], ["s2uc", "prod-req", "--mock"], ["appctrl", "--version"]),
    ):
        done = run(binaries / command[0], *command[1:], cwd=neutral, env=workshop.env)
        assert done.returncode == 0, done.stderr
    for command, extra in (
        (["s2cs", "--facility", "aps", "--port", "0"], "server"),
        (["scistream-flows", "validate", "flow.json"], "flows"),
        (["s2uc", "plot", "any"], "plot"),
        (["appctrl", "subscribe"], "appctrl"),
        (["s2uc", "login", "--client-id", SOME_UUID, "--scope", SOME_UUID], "login"),
    ):
        done = run(binaries / command[0], *command[1:], cwd=neutral, env=workshop.env)
        assert done.returncode == 1, done.stderr
        assert f"pip install 'scistream-flows[{extra}]'" in done.stderr


def test_a_wheel_built_from_the_checkout_is_whole(workshop: Workshop) -> None:
    done = workshop.wheel(workshop.source)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (workshop.source / "dist").glob("*.whl")
    assert wheel.name.startswith("scistream_flows-0.1.0-cp310-abi3-linux_")
    binaries = workshop.install(wheel)
    assert_is_whole(binaries, workshop, actions_in=binaries.parent / "lib")


def test_a_wheel_built_from_the_sdist_is_whole(workshop: Workshop, unpacked_sdist: Path) -> None:
    done = workshop.wheel(unpacked_sdist)
    assert done.returncode == 0, done.stdout + done.stderr
    binaries = workshop.install(*(unpacked_sdist / "dist").glob("*.whl"))
    assert_is_whole(binaries, workshop, actions_in=binaries.parent / "lib")


def test_an_editable_install_is_whole_and_live(workshop: Workshop) -> None:
    binaries = workshop.install("--editable", workshop.source)
    assert_is_whole(binaries, workshop, actions_in=workshop.source / "actions")
    (workshop.source / "actions/added_later.py").write_text("ANSWER = 42\n")
    ask = "from scistream_flows.actions import added_later; print(added_later.ANSWER)"
    done = run(binaries / "python", "-c", ask, cwd=workshop.folder, env=workshop.env)
    assert done.stdout == "42\n", done.stderr


def test_an_sdist_without_the_relay_does_not_build(workshop: Workshop, unpacked_sdist: Path) -> None:
    tree = workshop.folder / "without-relay"
    shutil.copytree(unpacked_sdist, tree, ignore=shutil.ignore_patterns("relay", "dist", "build"))
    done = workshop.wheel(tree)
    assert done.returncode != 0
    assert "relay/Cargo.toml" in done.stdout + done.stderr
    assert not list(tree.glob("dist/*.whl"))


def test_the_sdist_carries_no_build_products(unpacked_sdist: Path) -> None:
    names = {str(path.relative_to(unpacked_sdist)) for path in unpacked_sdist.rglob("*")}
    assert {"relay/Cargo.lock", "relay/Cargo.toml", "LICENSE"} <= names
    assert not [name for name in names if name.startswith("relay/target")]
