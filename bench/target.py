"""What is fetched: nginx with 10 KiB pages on many loopback addresses, or a server that takes 50 to 200 ms to answer.

Every URL has a page of its own, so that nothing is saved by storing equal bodies once.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from latency_server import DELAYS_S
from programs import ROOT, Broken, clean_environment, free_ports, started, tail, wait_for_port

PAGE_BYTES = 10 * 2**10
PIECE_BYTES = 2_500
"""nginx takes no longer text in one piece of its configuration than 4 KiB."""

HOSTS = 49
LISTENING_MAX = 256

CONFIGURATION = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    server_tokens off;
    keepalive_requests 100000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    default_type "text/html; charset=utf-8";
{servers}
}}
"""

SERVER = """\
    server {{
{listens}
{more}
        add_header Last-Modified "Tue, 04 Mar 2025 10:11:12 GMT";
        add_header ETag "W/2800-195608d2a00";
        add_header Accept-Ranges "bytes";
{pieces}
        location / {{ return 200 "<!doctype html><title>$request_uri</title>\\n{names}"; }}
    }}
"""


@dataclass(frozen=True)
class Site:
    """Where the pages are; `ca_file` makes clients trust it."""

    hosts: tuple[str, ...]
    ports: dict[str, int]
    ca_file: Path | None = None

    def origins(self, *, kind: str = "http") -> list[str]:
        """What the URLs of each host begin with."""
        return [f"{kind.partition('-')[0]}://{host}:{self.ports[kind]}" for host in self.hosts]

    def urls(self, count: int, *, kind: str = "http", series: str = "0") -> list[str]:
        """So many URLs, over all hosts in turn; another series is of other pages."""
        origins = self.origins(kind=kind)
        return [f"{origins[n % len(origins)]}/{series}/{n}.html" for n in range(count)]


@contextmanager
def nginx(folder: Path, *, hosts: Sequence[str] | None = None, tls: bool = False) -> Iterator[Site]:
    """Serve pages on every host: `http`, and with `tls` also `https` and `https-fresh`, one request a connection.

    `hosts` are loopback addresses; when they are too many to listen on each, one socket takes all of 127.0.0.0/8.
    """
    names = tuple(hosts or loopback_hosts(HOSTS))
    kinds = ["http", "https", "https-fresh"] if tls else ["http"]
    ports = dict(zip(kinds, free_ports(len(kinds)), strict=True))
    ca_file = _issue_certificate(folder, names) if tls else None
    configuration = folder / "nginx.conf"
    listening = names if len(names) <= LISTENING_MAX else ("0.0.0.0",)
    configuration.write_text(_configuration(folder, listening, ports))
    log = folder / "nginx.out"
    command = ["nginx", "-p", folder, "-c", configuration, "-e", folder / "nginx.log"]
    with started(command, environment=clean_environment(), log=log) as process:
        wait_for_port(process, names[0], ports["http"], log)
        yield Site(names, ports, ca_file)


@contextmanager
def latency_server(folder: Path) -> Iterator[Site]:
    """Serve pages on one host, each after its own 50 to 200 ms."""
    log = folder / "latency.log"
    command = [sys.executable, ROOT / "bench/latency_server.py"]
    with started(command, environment=clean_environment(), log=log) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise Broken(f"The latency server did not start:\n{tail(log)}")
        yield Site(("127.0.0.1",), {"http": int(line)})


def least_s(count: int, in_flight: int) -> float:
    """What `count` pages of the latency server take when nothing but the server takes time."""
    free_at = [0.0] * in_flight
    for number in range(count):
        first = min(range(in_flight), key=free_at.__getitem__)
        free_at[first] += DELAYS_S[number % len(DELAYS_S)]
    return max(free_at)


def loopback_hosts(count: int) -> list[str]:
    """So many loopback addresses, from 127.0.0.2 on."""
    return [f"127.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(2, count + 2)]


def _configuration(folder: Path, hosts: Sequence[str], ports: dict[str, int]) -> str:
    pieces = _page_pieces()
    servers = "".join(
        SERVER.format(
            listens="\n".join(
                f"        listen {host}:{port}{' ssl' if kind != 'http' else ''} backlog=2048;" for host in hosts
            ),
            more=_tls_lines(folder, kind),
            pieces="\n".join(f'        set $piece{n} "{piece}";' for n, piece in enumerate(pieces)),
            names="".join(f"$piece{n}" for n in range(len(pieces))),
        )
        for kind, port in ports.items()
    )
    return CONFIGURATION.format(folder=folder, servers=servers)


def _tls_lines(folder: Path, kind: str) -> str:
    if kind == "http":
        return ""
    lines = [
        f"ssl_certificate {folder}/server.pem;",
        f"ssl_certificate_key {folder}/server.key;",
        "ssl_protocols TLSv1.2 TLSv1.3;",
        f"ssl_session_cache shared:{kind}:10m;",
    ]
    if kind == "https-fresh":
        lines.append("keepalive_timeout 0;")
    return "\n".join(f"        {line}" for line in lines)


def _page_pieces() -> list[str]:
    """A page's text, much like HTML: gzip makes 38 % of it. None of it means anything to nginx."""
    chance = random.Random("pages")
    words = ["".join(chance.choices("abcdefghiklmnoprstuvwy", k=chance.randint(2, 9))) for _ in range(400)]
    text = ""
    while len(text) < PAGE_BYTES:
        said = " ".join(chance.choices(words, k=chance.randint(8, 40)))
        text += f"<p class='{chance.choice(words)}'><a href='/{chance.choice(words)}'>{said}</a></p>\n"
    return [text[start : min(start + PIECE_BYTES, PAGE_BYTES)] for start in range(0, PAGE_BYTES, PIECE_BYTES)]


def _issue_certificate(folder: Path, hosts: Sequence[str]) -> Path:
    authority = trustme.CA()
    certificate = authority.issue_cert(*hosts)
    certificate.private_key_pem.write_to_path(str(folder / "server.key"))
    for number, part in enumerate(certificate.cert_chain_pems):
        part.write_to_path(str(folder / "server.pem"), append=number > 0)
    ca_file = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    return ca_file
