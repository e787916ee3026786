"""Trust, and why it failed: the one TLS context of a process, and TLS errors told apart by their cause.

Deliberately without a way to trust less: verification, host names and TLS 1.2 are not settings.
"""

import ssl
import time
from datetime import UTC, datetime
from pathlib import Path

from app.fetch.limits import Failed
from app.outcome import FailureCode

SESSION_S = 300.0
SESSIONS_MAX = 1_000

VERIFY_CODES = {
    9: (FailureCode.TLS_CERT_NOT_YET_VALID, "The server's certificate is not valid yet."),
    10: (FailureCode.TLS_CERT_EXPIRED, "The server's certificate has expired."),
    62: (FailureCode.TLS_HOSTNAME_MISMATCH, "The server's certificate is for another name."),
    64: (FailureCode.TLS_HOSTNAME_MISMATCH, "The server's certificate is for another address."),
}
"""X509_V_ERR_* of OpenSSL. All others come to `tls_untrusted`."""


class Context(ssl.SSLContext):
    """The context that all connections share. Resumes the session a server gave lately, which saves both a half.

    No event loop hands a session on, so it is put in where one asks for the connection. A session is kept under the
    name its certificate was verified for, and for a short while only: resuming one verifies nothing anew.
    """

    def __init__(self, _protocol: int) -> None:
        self._sessions: dict[str, tuple[float, ssl.SSLSession]] = {}

    def keep_session(self, connection: ssl.SSLObject) -> None:
        """Keep what the name's next connection may resume; call after an answer, as TLS 1.3 tickets come late."""
        session, hostname = connection.session, connection.server_hostname
        if session is None or hostname is None or connection.session_reused:
            return  # what one handshake verified must not live on by being resumed
        self._sessions.pop(hostname, None)
        self._sessions[hostname] = time.monotonic(), session
        if len(self._sessions) > SESSIONS_MAX:
            del self._sessions[next(iter(self._sessions))]

    def forget_session(self, hostname: str) -> bool:
        """Forget it, as after a handshake that failed; say whether there was one."""
        return self._sessions.pop(hostname, None) is not None

    def wrap_bio(  # type: ignore[override]  # event loops give what this takes
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> ssl.SSLObject:
        """Make a connection that resumes the name's session, if there is one."""
        kept_at, session = self._sessions.get(server_hostname or "", (0.0, None))
        if session is not None and time.monotonic() > kept_at + SESSION_S:
            session = None
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)


def make_context(ca_file: Path | None) -> Context:
    """Build the context that all connections share; building one costs 10 ms. `ca_file` adds to the usual trust."""
    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # On from Python 3.13: refuses chains that browsers accept, and would make the outcome depend on the interpreter.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    return context


def explain(error: ssl.SSLError) -> Failed:
    """Tell a TLS error by its cause."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Failed(*VERIFY_CODES.get(error.verify_code, _UNTRUSTED))
    return Failed(FailureCode.TLS_HANDSHAKE_FAILED, f"TLS failed: {error.reason or 'no reason given'}.")


def expires_at(connection: ssl.SSLObject) -> str | None:
    """Say when the peer's certificate expires, as an ISO 8601 time in UTC."""
    not_after = (connection.getpeercert() or {}).get("notAfter")
    if not isinstance(not_after, str):
        return None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(not_after), UTC).isoformat()


_UNTRUSTED = (FailureCode.TLS_UNTRUSTED, "The server's certificate is not signed by a trusted authority.")
