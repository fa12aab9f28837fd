"""What this user has opened with `s2uc`, so that the other side, and the end, find it by the stream's name alone.

One file for each stream, 0600, in the user's directory. It holds addresses and public keys, and no secret; but whoever
could write it could name a relay of his own, so nobody else may.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from scistream_flows.config import config_folders
from scistream_flows.errors import PROTOCOL, ConfigError
from scistream_flows.models import DAY_S, Offer, Role, Uid


class Place(BaseModel):
    """A facility as the user named it.

    Attributes:
        address: What `--s2cs` said.
        scope: The scope that was asked for, None for the one of the login.
        server_cert: The file of the certificate that its service is verified with, None for the system's.
    """

    model_config = ConfigDict(frozen=True)

    address: str
    scope: str | None = None
    server_cert: str | None = None


class Entry(BaseModel):
    """One side: where it was opened, and what was offered there."""

    model_config = ConfigDict(frozen=True)

    place: Place
    offer: Offer


class Record(BaseModel):
    """The sides of one stream that this user has opened."""

    model_config = ConfigDict(frozen=True)

    protocol: int = PROTOCOL
    uid: Uid
    sides: Mapping[Role, Entry] = {}


def user_directory(environment: Mapping[str, str] | None = None) -> Path:
    """The directory of `s2uc`, below the user's configuration: for this user alone. It is made if it is not there.

    Raises:
        ConfigError: When it belongs to somebody else, or others may look into it.
    """
    folder = config_folders(os.environ if environment is None else environment)[0] / "s2uc"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o077:
        raise ConfigError(
            f"{folder} is not a directory of this user alone",
            which=str(folder),
            hint=f"chown it to this user; chmod 700 {folder}",
            file=str(folder),
        )
    return folder


class Ledger:
    """The records of one user."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = (folder or user_directory()) / "streams"
        self._folder.mkdir(mode=0o700, exist_ok=True)

    @property
    def folder(self) -> Path:
        """Where they are, a file for each."""
        return self._folder

    def find(self, uid: str) -> Record | None:
        """What is known of a stream.

        Raises:
            ConfigError: When its file cannot be read.
        """
        return self._read(self._file(uid))

    def all(self) -> list[Record]:
        """Every stream that is known, the one that was opened last at the end."""
        found = []
        for file in self._folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # another command forgets it just now
                found.append((file.stat().st_mtime_ns, file))
        return [one for one in (self._read(file) for _, file in sorted(found)) if one is not None]

    def keep(self, uid: str, role: Role, entry: Entry) -> None:
        """Remember a side that was opened."""
        with self._changing():
            known = self.find(uid) or Record(uid=uid)
            self._write(known.model_copy(update={"sides": {**known.sides, role: entry}}))

    def forget(self, uid: str, role: Role) -> None:
        """Forget a side that was released."""
        with self._changing():
            known = self.find(uid)
            if known is None:
                return
            left = {one: entry for one, entry in known.sides.items() if one != role}
            if left:
                self._write(known.model_copy(update={"sides": left}))
            else:
                self._file(uid).unlink(missing_ok=True)

    def forget_old(self, place: Place, there: Collection[tuple[str, Role]]) -> None:
        """Forget the sides at a place that are not among those `there`, and were opened longer ago than a day.

        Until then the facility tells how a stream has ended, and this is how it is found.
        """
        for record in self.all():
            with contextlib.suppress(FileNotFoundError):  # another command has forgotten it
                if time.time() - self._file(record.uid).stat().st_mtime > DAY_S:
                    for role, side in record.sides.items():
                        if side.place == place and (record.uid, role) not in there:
                            self.forget(record.uid, role)

    def _file(self, uid: str) -> Path:
        # a uid is never a path
        return self._folder / f"{hashlib.sha256(uid.encode()).hexdigest()[:32]}.json"

    def _read(self, file: Path) -> Record | None:
        try:
            return Record.model_validate_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ValidationError):
            raise ConfigError(
                f"{file} cannot be read as what s2uc has kept of a stream",
                which=str(file),
                hint="Remove it; the stream goes on, and its facility lists it",
                file=str(file),
            ) from None

    def _write(self, record: Record) -> None:
        file = self._file(record.uid)
        new = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as out:
            out.write(record.model_dump_json())
        new.replace(file)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Two commands that change the records wait for each other."""
        lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
