"""Every knob of the service: its unit, bounds and default. All have one.

Read from `FETCHPOOL_*` environment variables (and `DATABASE_URL`) or `.env`, by `main` and `cli` only; nothing below
them reads a setting that was not handed to it.
"""

import difflib
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import AliasChoices, Field, FilePath, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, NoDecode, SettingsConfigDict

Network = IPv4Network | IPv6Network


_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_PREFIX = "FETCHPOOL_"
_PREFIX_OF_TESTS = "FETCHPOOL_TEST_"


class SettingsInvalid(Exception):
    """A setting is wrong; the message is one line that names its variable."""


def read_settings(**given: Any) -> "Settings":
    """Read the settings; `given` (by field name, `None` for not given) goes before the environment.

    Raises `SettingsInvalid`, whose message never shows the value: it may be a secret.
    """
    try:
        if unknown := list(_unknown_variables()):
            raise SettingsInvalid("; ".join(unknown))
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise SettingsInvalid("; ".join(_explain(wrong["loc"], wrong["msg"]) for wrong in error.errors())) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"The file .env cannot be read: {error}") from None


def variable(field_name: str) -> str:
    """Name the environment variable of a field."""
    return "DATABASE_URL" if field_name == "database_url" else f"{_PREFIX}{field_name.upper()}"


def _explain(location: tuple[int | str, ...], message: str) -> str:
    reason = message.removeprefix("Value error, ")
    return f"{variable(str(location[0]).lower())} is not usable: {reason}" if location else reason


def _unknown_variables() -> Iterator[str]:
    """Name the variables that look like settings and are none: nearly always slips, which would go unnoticed."""
    known = {name.removeprefix(_PREFIX): name for name in map(variable, Settings.model_fields)}
    sources = EnvSettingsSource(Settings), DotEnvSettingsSource(Settings)
    for name in sorted({name.upper() for source in sources for name in source.env_vars}):
        if not name.startswith(_PREFIX) or name.startswith(_PREFIX_OF_TESTS) or name in known.values():
            continue
        alike = difflib.get_close_matches(name.removeprefix(_PREFIX), known, n=1)
        remedy = f"did you mean {known[alike[0]]}?" if alike else "unset it; .env.example lists those there are"
        yield f"{name} is not a setting: {remedy}"


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def default_workers() -> int:
    """One for each core this process may use, as its affinity and its container's quota allow."""
    core_count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or "max": no quota
        quota, period = _CPU_QUOTA.read_text().split()
        core_count = min(core_count, math.ceil(int(quota) / int(period)))
    return max(1, core_count)


def default_data_dir() -> Path:
    """Where data lives unless told otherwise: the user's data folder, `/var/lib/fetchpool` as root."""
    if os.geteuid() == 0:
        return Path("/var/lib/fetchpool")
    return platformdirs.user_data_path("fetchpool")


class Settings(BaseSettings):
    """The settings of one installation; every process of it must be given the same ones."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    # The store
    database_url: str | None = Field(
        default=None,
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        repr=False,
        description="PostgreSQL 15 or newer, postgresql://user:password@host:port/name. Unset: an embedded PostgreSQL.",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Folder of the embedded PostgreSQL. Default: the user's data folder; of root, /var/lib/fetchpool.",
    )
    pgbouncer: bool = Field(
        default=False,
        description="DATABASE_URL leads to PgBouncer in transaction mode; hints do not get through it.",
    )

    # The API
    host: str = Field(default="127.0.0.1", description="Address the API listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port the API listens on; 0 takes a free one.")
    api_token: str | None = Field(
        default=None,
        min_length=16,
        pattern=r"^[\x21-\x7e]+$",
        repr=False,
        description="Bearer token that clients must send. Required to listen beyond loopback.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Host names, comma separated, by which clients may address the API besides localhost."
    )
    request_bytes_max: int = Field(
        default=64 * 2**20, ge=2**10, le=2**30, description="Largest request body the API reads, in bytes."
    )
    batch_jobs_max: int = Field(default=100_000, ge=1, le=100_000, description="Most jobs in one JSON batch.")

    # The pool
    workers: int = Field(
        default_factory=default_workers,
        ge=0,
        le=256,
        description="Worker processes that `serve` starts; 0 for an API alone. Default: one for each core.",
    )
    slots: int = Field(default=200, ge=1, le=10_000, description="Fetches one worker runs at once.")
    host_concurrency: int = Field(
        default=8, ge=1, le=10_000, description="Fetches to one host at once, over all workers."
    )
    host_delay_s: float = Field(
        default=0.0, ge=0.0, le=3600.0, description="Seconds between the starts of two fetches to one host."
    )
    lease_s: float = Field(
        default=30.0,
        ge=1.0,
        le=600.0,
        description="Seconds a worker holds a host; renewed at a third.",
    )
    drain_grace_s: float = Field(
        default=20.0, ge=0.0, le=600.0, description="Seconds that running fetches get to finish at shutdown."
    )

    # The fetch
    user_agent: str = Field(
        default="Fetchpool/0.1 (self-hosted fetch service; the operator sets FETCHPOOL_USER_AGENT to a contact)",
        min_length=1,
        max_length=256,
        pattern=r"^[\x20-\x7e]+$",
        description="User-Agent of every fetch: name the product and a contact.",
    )
    allow_networks: Annotated[tuple[Network, ...], NoDecode] = Field(
        default=(),
        description="Non-public networks, comma separated CIDR, that fetches may reach, with their ports and names.",
    )
    dns_servers: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Name servers, comma separated address or address:port. Default: the system's."
    )
    ca_file: FilePath | None = Field(
        default=None, description="PEM file of certificate authorities trusted besides the usual."
    )
    timeout_s: float = Field(
        default=30.0, ge=0.1, le=3600.0, description="Total seconds of one attempt unless the batch says otherwise."
    )
    timeout_s_max: float = Field(
        default=300.0, ge=0.1, le=3600.0, description="Most total seconds of one attempt that a batch may ask for."
    )
    connect_timeout_s: float = Field(
        default=10.0,
        ge=0.1,
        le=3600.0,
        description="Seconds for TCP and TLS to stand; never more than nine tenths of timeout_s.",
    )
    read_timeout_s: float = Field(
        default=20.0, ge=0.1, le=3600.0, description="Seconds of silence before and within a response."
    )
    dns_timeout_s: float = Field(default=5.0, ge=0.1, le=60.0, description="Seconds for one name to resolve.")
    wire_bytes_max: int = Field(default=16 * 2**20, ge=1, le=2**30, description="Largest body on the wire, in bytes.")
    body_bytes_max: int = Field(default=16 * 2**20, ge=1, le=2**30, description="Largest decoded body, in bytes.")
    header_bytes_max: int = Field(
        default=128 * 2**10, ge=2**10, le=2**20, description="Largest header block of a response, in bytes."
    )
    header_count_max: int = Field(default=256, ge=1, le=10_000, description="Most header fields of a response.")
    redirects_max: int = Field(default=10, ge=0, le=50, description="Most redirects followed.")
    informational_max: int = Field(default=16, ge=0, le=1000, description="Most 1xx responses before the final one.")
    encodings_max: int = Field(default=3, ge=0, le=10, description="Most content codings of one response.")
    decoders: int = Field(default=2, ge=1, le=1000, description="Large bodies a worker unpacks or packs at once.")

    # The log
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least serious log lines shown: debug, info, warning or error."
    )

    @field_validator("allowed_hosts", "dns_servers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _parts(value) if isinstance(value, str) else value

    @field_validator("allow_networks", mode="before")
    @classmethod
    def _networks(cls, value: object) -> object:
        return tuple(ip_network(part) for part in _parts(value)) if isinstance(value, str) else value

    @field_validator("dns_servers")
    @classmethod
    def _servers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for server in value:
            split = re.fullmatch(r"(?:\[(.+)\]|([^:]+))(?::([0-9]+))?", server)  # an IPv6 address alone is not split
            address, port = (split[1] or split[2], split[3]) if split else (server, None)
            ip_address(address)
            if port is not None and not 1 <= int(port) <= 65_535:
                raise ValueError("a port is a number from 1 to 65535")
        return value

    @field_validator("database_url")
    @classmethod
    def _postgresql(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("postgresql://", "postgres://")):
            raise ValueError("it must begin with postgresql://")
        return value

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="after")
    def _timeouts(self) -> Self:
        if self.timeout_s > self.timeout_s_max:
            raise ValueError("FETCHPOOL_TIMEOUT_S must not be above FETCHPOOL_TIMEOUT_S_MAX")
        return self
