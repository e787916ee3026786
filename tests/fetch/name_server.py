"""A real name server on loopback, over UDP and TCP, that says what a test's zone says and counts what it was asked."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from dnslib import AAAA, CNAME, QTYPE, RCODE, RR, A, DNSRecord

UDP_BYTES_MAX = 1_232

Answers = list[str] | list[list[str]] | str
"""Addresses, or several lists for successive queries, or `hang`, `hang-aaaa`, an RCODE's name, or `-> alias`."""


@dataclass
class NameServer:
    """Names that the zone does not list do not exist."""

    zone: Mapping[str, Answers]
    ttl_s: int = 0
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    port: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def reply(self, data: bytes, bytes_max: int) -> bytes | None:
        """Give the packet to send back, or nothing for a name that hangs."""
        request = DNSRecord.parse(data)
        name, kind = str(request.q.qname), QTYPE[request.q.qtype]
        key = name.lower().removesuffix(".")
        nth = self.asked[key, kind]
        self.asked[key, kind] += 1
        answers = self.zone.get(key, "NXDOMAIN")
        if answers == "hang" or (answers == "hang-aaaa" and kind == "AAAA"):
            return None
        reply = request.reply()
        self._fill(reply, name, kind, "8.8.8.8" if answers == "hang-aaaa" else answers, nth)
        packet: bytes = reply.pack()
        if len(packet) > bytes_max:
            cut = request.reply()
            cut.header.tc = 1
            packet = cut.pack()
        return packet

    def _fill(self, reply: Any, name: str, kind: str, answers: Answers, nth: int) -> None:
        if isinstance(answers, str) and answers.startswith("-> "):
            alias = answers.removeprefix("-> ")
            reply.add_answer(RR(name, QTYPE.CNAME, ttl=self.ttl_s, rdata=CNAME(alias)))
            self._fill(reply, alias, kind, self.zone.get(alias, []), nth)
        elif isinstance(answers, str) and answers.isupper():
            reply.header.rcode = getattr(RCODE, answers)
        else:
            for address in successive(answers, nth):
                if (":" in address) == (kind == "AAAA"):
                    # As bytes: dnslib 0.9 does not read ::ffff:127.0.0.1.
                    packed = tuple(ip_address(address).packed)
                    record = AAAA(packed) if kind == "AAAA" else A(packed)
                    reply.add_answer(RR(name, getattr(QTYPE, kind), ttl=self.ttl_s, rdata=record))


def successive(answers: Answers, nth: int) -> list[str]:
    """Pick the answers of the nth query; the last list stands for all that follow."""
    if isinstance(answers, str):
        return [answers]
    if answers and isinstance(answers[0], list):
        answers = answers[min(nth, len(answers) - 1)]
    return [str(address) for address in answers]


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: NameServer) -> None:
        self.server = server

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if (packet := self.server.reply(data, UDP_BYTES_MAX)) is not None:
            self.transport.sendto(packet, addr)


@asynccontextmanager
async def serve_names(zone: Mapping[str, Answers], *, ttl_s: int = 0) -> AsyncIterator[NameServer]:
    """Serve a zone on a free port of 127.0.0.1 until the block ends."""
    server = NameServer(zone, ttl_s)

    conversations: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = {}

    async def speak_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations[asyncio.current_task()] = writer
        try:
            while length := await reader.read(2):
                packet = server.reply(await reader.readexactly(int.from_bytes(length)), 65_535)
                if packet is not None:
                    writer.write(len(packet).to_bytes(2) + packet)
        finally:
            writer.close()
            del conversations[asyncio.current_task()]

    streams = await asyncio.start_server(speak_tcp, "127.0.0.1", 0)
    server.port = streams.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    datagrams, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(server), ("127.0.0.1", server.port))
    try:
        yield server
    finally:
        datagrams.close()
        streams.close()
        for writer in conversations.values():
            writer.close()
        while conversations:
            await asyncio.sleep(0)
