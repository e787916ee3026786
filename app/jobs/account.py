"""Whom the embedded PostgreSQL runs as, and what of the disk that user reaches and owns. Starts no server."""

import os
import pwd
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM_USER = "fetchpool"
"""Whom PostgreSQL runs as when the service runs as root: PostgreSQL refuses to be root."""


class EmbeddedUnusable(Exception):
    """The embedded PostgreSQL cannot run; the message is one line that tells the operator what to do."""


@dataclass(frozen=True, slots=True)
class Account:
    """The operating system's user that PostgreSQL runs as; `service` is the one the service itself runs as."""

    name: str
    uid: int
    gid: int
    service: str

    @property
    def is_other(self) -> bool:
        """Whether PostgreSQL runs as somebody else than the service."""
        return self.uid != os.geteuid()

    @property
    def run_as(self) -> dict[str, Any]:
        """What `subprocess` takes to run a program as this user."""
        if not self.is_other:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def find_account() -> Account:
    """Return the service's own user, or the system user if it is root, made if missing. Raises `EmbeddedUnusable`."""
    uid = os.geteuid()
    try:
        service = pwd.getpwuid(uid).pw_name
    except KeyError:
        raise EmbeddedUnusable(
            f"The embedded PostgreSQL needs a user with a name, and uid {uid} has none: "
            "run as another user, or set DATABASE_URL."
        ) from None
    entry = pwd.getpwuid(uid) if uid else _ensure_system_user()
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, service)


def check_reachable(data_dir: Path, account: Account) -> None:
    """Raise `EmbeddedUnusable` if that user may not enter `data_dir` or a folder above it."""
    for folder in (*reversed(data_dir.parents), data_dir):
        if folder.is_dir() and not _may_enter(folder, account):
            raise EmbeddedUnusable(
                f"The system user {account.name}, as which PostgreSQL runs, may not enter {folder}: set "
                "FETCHPOOL_DATA_DIR to a folder that it can reach, such as /var/lib/fetchpool."
            )


def check_owner(folder: Path, account: Account) -> None:
    """Raise `EmbeddedUnusable` if `folder` is not that user's."""
    owner = folder.lstat().st_uid
    if owner != account.uid:
        raise EmbeddedUnusable(
            f"{folder} belongs to uid {owner}, not to {account.name} as which PostgreSQL runs: run as its owner, or "
            "set FETCHPOOL_DATA_DIR to another folder."
        )


def give_folder(folder: Path, account: Account) -> None:
    """Make `folder`, which nobody but that user enters."""
    folder.mkdir(0o700)
    os.chown(folder, account.uid, account.gid)


def _ensure_system_user() -> pwd.struct_passwd:
    with suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    home_and_shell = ["--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"]
    try:
        subprocess.run(
            ["useradd", "--system", *home_and_shell, SYSTEM_USER],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            check=True,
            capture_output=True,
        )
        return pwd.getpwnam(SYSTEM_USER)
    except (OSError, subprocess.CalledProcessError, KeyError):
        raise EmbeddedUnusable(
            f"PostgreSQL does not run as root, and the system user {SYSTEM_USER} could not be made: make it "
            f"(useradd --system {SYSTEM_USER}), run as an ordinary user, or set DATABASE_URL."
        ) from None


def _may_enter(folder: Path, account: Account) -> bool:
    # asked of the system itself, as that user: mode bits alone do not know about ACLs
    command = ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, cwd="/", **account.run_as).returncode == 0
