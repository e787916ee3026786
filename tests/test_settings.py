"""Settings come from the environment, say what is wrong with them by name, and are all in `.env.example`."""

import os
import textwrap
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from app import settings
from app.settings import Settings, SettingsInvalid, default_data_dir, default_workers, read_settings, variable

EXAMPLE = Path(__file__).parents[1] / ".env.example"

HEAD = """\
# Every setting of Fetchpool with its default. Copy this file to .env and uncomment what you change; real environment
# variables go before it. Paths are relative to the folder the service is started in, for scripts/serve the clone's.
"""


def render_example() -> str:
    """Write `.env.example`; `python -m tests.test_settings > .env.example` brings it up to date."""
    parts = [HEAD]
    for name, field in Settings.model_fields.items():
        comment = textwrap.fill(field.description or "", 118, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"{comment}\n#{variable(name)}={shown_default(name)}\n")
    return "\n".join(parts)


def shown_default(name: str) -> str:
    """The default as one would write it; nothing where it depends on the machine or is no value at all."""
    default = Settings.model_fields[name].default
    if name in ("data_dir", "workers") or default is None or default == ():
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("FETCHPOOL_") or name == "DATABASE_URL":
            monkeypatch.delenv(name)


def test_the_example_lists_every_setting_with_its_default() -> None:
    assert EXAMPLE.read_text() == render_example()


def test_the_example_uncommented_is_the_defaults(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text().splitlines()
    uncommented = [line.removeprefix("#") for line in lines if line.startswith("#") and not line.startswith("# ")]
    (tmp_path / ".env").write_text("\n".join(uncommented))
    with_example = read_settings()
    (tmp_path / ".env").unlink()
    assert with_example == read_settings()
    assert len(uncommented) == len(Settings.model_fields)


def test_every_setting_has_a_default_and_a_description() -> None:
    read_settings()
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_options_go_before_the_environment_and_it_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("FETCHPOOL_PORT=1001\nFETCHPOOL_SLOTS=7\nDATABASE_URL=postgresql://a@b/c\n")
    assert (read_settings().port, read_settings().slots) == (1001, 7)
    assert read_settings().database_url == "postgresql://a@b/c"
    monkeypatch.setenv("FETCHPOOL_PORT", "1002")
    assert read_settings(port=None).port == 1002
    assert read_settings(port=1003).port == 1003


def test_an_empty_variable_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setenv("FETCHPOOL_PORT", "")
    assert read_settings().database_url is None
    assert read_settings().port == 8000


def test_lists_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FETCHPOOL_ALLOW_NETWORKS", "127.0.0.0/8, 10.0.0.0/8,")
    monkeypatch.setenv("FETCHPOOL_DNS_SERVERS", "127.0.0.1:5353,[::1]:53,::1,[::1],9.9.9.9")
    monkeypatch.setenv("FETCHPOOL_ALLOWED_HOSTS", "fetch.example, other.example")
    read = read_settings()
    assert read.allow_networks == (IPv4Network("127.0.0.0/8"), IPv4Network("10.0.0.0/8"))
    assert read.dns_servers == ("127.0.0.1:5353", "[::1]:53", "::1", "[::1]", "9.9.9.9")
    assert read.allowed_hosts == ("fetch.example", "other.example")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FETCHPOOL_PORT", "65536"),
        ("FETCHPOOL_PORT", "http"),
        ("FETCHPOOL_WORKERS", "-1"),
        ("FETCHPOOL_ALLOW_NETWORKS", "10.0.0.1/8"),
        ("FETCHPOOL_ALLOW_NETWORKS", "everything"),
        ("FETCHPOOL_DNS_SERVERS", "1.1.1.1,resolver.example"),
        ("FETCHPOOL_DNS_SERVERS", "127.0.0.1:65536"),
        ("FETCHPOOL_DNS_SERVERS", "127.0.0.1:port"),
        ("FETCHPOOL_DNS_SERVERS", "[::1]:0"),
        ("FETCHPOOL_CA_FILE", "/nonexistent.pem"),
        ("FETCHPOOL_USER_AGENT", "two\nlines"),
        ("FETCHPOOL_API_TOKEN", "hunter2"),
        ("FETCHPOOL_API_TOKEN", "with a space in the middle"),
        ("FETCHPOOL_LOG_LEVEL", "loud"),
        ("FETCHPOOL_PGBOUNCER", "perhaps"),
        ("FETCHPOOL_TIMEOUT_S", "301"),
        ("DATABASE_URL", "mysql://root:hunter2@127.0.0.1/x"),
    ],
)
def test_a_bad_setting_is_named_and_a_secret_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsInvalid, match=name) as raised:
        read_settings()
    assert "\n" not in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_secrets_do_not_show_in_a_log() -> None:
    shown = repr(read_settings(api_token="hunter2-hunter2-hunter2", database_url="postgresql://u:hunter2@h/d"))
    assert "hunter2" not in shown


def test_a_relative_data_folder_does_not_move_with_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FETCHPOOL_DATA_DIR", "data")
    assert read_settings().data_dir == tmp_path / "data"


def test_data_lives_where_its_user_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_data_dir() == Path("/var/lib/fetchpool")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/home/someone/.local/share")
    assert default_data_dir() == Path("/home/someone/.local/share/fetchpool")


@pytest.mark.parametrize(("quota", "workers"), [("max 100000", 4), ("150000 100000", 2), ("10000 100000", 1)])
def test_a_container_with_a_quota_gets_as_many_workers_as_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, workers: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(settings, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert default_workers() == workers


def test_a_variable_that_is_no_setting_is_refused_with_the_nearest_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FETCHPOOL_TEST_ANYTHING", "1")
    read_settings()
    monkeypatch.setenv("FETCHPOOL_SLOT", "50")
    (tmp_path / ".env").write_text("FETCHPOOL_QQ=secret\nFETCHPOOL_DATABASE_URL=secret\nOTHER=1\n")
    with pytest.raises(SettingsInvalid) as refused:
        read_settings()
    assert str(refused.value) == (
        "FETCHPOOL_DATABASE_URL is not a setting: did you mean DATABASE_URL?; "
        "FETCHPOOL_QQ is not a setting: unset it; .env.example lists those there are; "
        "FETCHPOOL_SLOT is not a setting: did you mean FETCHPOOL_SLOTS?"
    )


if __name__ == "__main__":
    print(render_example(), end="")  # noqa: T201
