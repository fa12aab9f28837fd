"""A virtual machine with a stock Debian kernel and one program: what the kernel that runs the tests cannot show.

The packages are Debian's own, fetched by apt and unpacked, never installed. No network, no disk: a few files in memory;
the program's words come over the serial line.
"""

import lzma
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu-system-x86_64"
# In software, so that it is the same everywhere.
MACHINE = (
    "-accel tcg -cpu max -m 1024 -smp 2 -nodefaults -no-user-config -display none -serial stdio -no-reboot"
)
# A kernel's TLS and what it can encrypt with, as far as a release has it as modules.
MODULES = (
    *("tls", "gcm", "ctr", "ghash_generic", "aesni_intel"),
    *("chacha20poly1305", "chacha", "chacha_generic", "chacha_x86_64", "poly1305_generic", "poly1305_x86_64"),
)
INIT = """#!/busybox sh
/busybox mkdir -p /proc /sys /dev /tmp
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sys /sys
/busybox mount -t devtmpfs dev /dev
/busybox ifconfig lo 127.0.0.1 up
for module in $(/busybox cat /modules/order); do /busybox insmod /modules/$module; done
$PROGRAM
echo "ended with $?"
/busybox reboot -f
"""


class Unavailable(Exception):
    """What a virtual machine needs is not to be had here; says what."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, and what goes with it into the memory of its machine."""

    version: tuple[int, int]
    image: Path
    modules: dict[str, Path]
    busybox: Path


def kernel(store: Path, *, suite: str | None = None) -> Kernel:
    """Fetches the newest kernel of this Debian release, or of another `suite` of the same archive.

    Args:
        store: Where packages stay from one run to the next.
        suite: Such as `trixie-backports`.
    """
    if not shutil.which(QEMU):
        raise Unavailable(f"{QEMU} is not there (Debian: qemu-system-x86)")
    if not shutil.which("apt-get") or os.uname().machine != "x86_64":
        raise Unavailable("the kernel is Debian's for x86_64, and is fetched by apt-get")
    place = store / (suite or "own")
    tree = place / "tree"
    if not (place / "complete").exists():
        shutil.rmtree(place, ignore_errors=True)
        tree.mkdir(parents=True)
        options = _other_suite(place, suite) if suite else []
        _run(["apt-get", *options, "--quiet", "download", *_kernel_packages(options)], cwd=place)
        _run(["apt-get", "--quiet", "download", "busybox-static"], cwd=place)
        for package in place.glob("*.deb"):
            _run(["dpkg-deb", "--extract", str(package), str(tree)], cwd=place)
            package.unlink()
        (place / "complete").touch()
    files = [file for file in tree.rglob("*") if file.is_file()]
    image = next(file for file in files if file.name.startswith("vmlinuz"))
    modules = {
        re.sub(r"\.ko.*", "", file.name).replace("-", "_"): file for file in files if ".ko" in file.name
    }
    version = re.search(r"/modules/(\d+)\.(\d+)", str(modules["tls"]))
    assert version
    busybox = next(file for file in files if file.match("bin/busybox"))
    return Kernel((int(version[1]), int(version[2])), image, modules, busybox)


def run(
    kernel: Kernel, program: str, *, files: Iterable[Path], environment: dict[str, str], timeout_s: float
) -> tuple[int | None, str]:
    """Boots and runs `program` (a command line), `files` in the root directory; its exit code, and what was said."""
    where = kernel.image.parent / f"{os.getpid()}.initramfs"
    where.write_bytes(_initramfs(kernel, program, files))
    given = " ".join(f"{name}={value}" for name, value in environment.items())
    append = f"console=ttyS0 panic=-1 quiet {given}"
    try:
        machine = subprocess.run(
            [QEMU, *MACHINE.split(), "-kernel", kernel.image, "-initrd", where, "-append", append],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
        said = machine.stdout
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"") + f"\nnot finished after {timeout_s} s".encode()
    finally:
        where.unlink()
    text = said.decode(errors="replace").replace("\r", "")
    ended = re.search(r"^ended with (\d+)$", text, re.MULTILINE)
    return (int(ended[1]) if ended else None), text


def _run(command: list[str], *, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _other_suite(place: Path, suite: str) -> list[str]:
    """Options for apt that know `suite` of the archive that this machine uses, and nothing else."""
    targets = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], cwd=place)
    archive = next((uri for uri in targets.split() if uri.rstrip("/").endswith("/debian")), None)
    if not archive:
        raise Unavailable("this is no Debian: apt knows no archive of it")
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    signed = f"[signed-by={keyring}] " if keyring.exists() else ""
    (place / "sources.list").write_text(f"deb {signed}{archive} {suite} main\n")
    for folder in ("lists/partial", "cache/archives/partial"):
        (place / folder).mkdir(parents=True)
    settings = {
        "Dir::Etc::sourcelist": place / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": place / "lists",
        "Dir::Cache": place / "cache",
        "APT::Sandbox::User": "",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _run(["apt-get", *options, "--quiet", "update"], cwd=place)
    return options


def _kernel_packages(options: list[str]) -> list[str]:
    """The kernel for virtual machines has few drivers and is small. Newer releases have its parts in packages."""
    found, new = set[str](), ["linux-image-cloud-amd64"]
    while new:
        found.update(new)
        text = _run(["apt-cache", *options, "depends", "--important", *new], cwd=Path("/"))
        parts = re.findall(r"Depends: (linux-(?:image|binary|modules)-[\w.+-]+)", text)
        new = [part for part in dict.fromkeys(parts) if part not in found]
    return sorted(found)


def _initramfs(kernel: Kernel, program: str, files: Iterable[Path]) -> bytes:
    """An archive in the cpio format `newc`, which is what kernels unpack."""
    archive = [_entry("modules", b"", stat.S_IFDIR | 0o755)]
    order: list[str] = []
    for name in MODULES:
        _with_needs(kernel, name, order)
    archive += [_entry(f"modules/{name}.ko", _module(kernel, name)) for name in order]
    archive.append(_entry("modules/order", " ".join(f"{name}.ko" for name in order).encode()))
    archive.append(_entry("busybox", kernel.busybox.read_bytes()))
    archive.append(_entry("init", INIT.replace("$PROGRAM", program).encode()))
    archive += [_entry(file.name, file.read_bytes()) for file in files]
    archive.append(_entry("TRAILER!!!", b"", 0))
    return b"".join(archive)


def _entry(name: str, content: bytes, mode: int = stat.S_IFREG | 0o755) -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(text: bytes) -> bytes:
    return text + bytes(-len(text) % 4)


def _module(kernel: Kernel, name: str) -> bytes:
    file = kernel.modules[name]
    return lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()


def _with_needs(kernel: Kernel, name: str, order: list[str]) -> None:
    """Adds a module after those that it needs. One that a release does not have is built in, or has another name."""
    if name in order or name not in kernel.modules:
        return
    needs = re.search(rb"\0depends=([\w,-]*)\0", _module(kernel, name))
    for need in (needs[1].decode().replace("-", "_") if needs else "").split(","):
        _with_needs(kernel, need, order)
    order.append(name)
