"""Trust, and why it failed: the one TLS context of a process, and TLS errors told apart by their cause.

Deliberately without a way to trust less: verification, host names and TLS 1.2 are not settings.
"""

import ssl
from datetime import UTC, datetime
from pathlib import Path

from app.fetch.limits import Failed
from app.outcome import FailureCode

VERIFY_CODES = {
    9: (FailureCode.TLS_CERT_NOT_YET_VALID, "The server's certificate is not valid yet."),
    10: (FailureCode.TLS_CERT_EXPIRED, "The server's certificate has expired."),
    62: (FailureCode.TLS_HOSTNAME_MISMATCH, "The server's certificate is for another name."),
    64: (FailureCode.TLS_HOSTNAME_MISMATCH, "The server's certificate is for another address."),
}
"""X509_V_ERR_* of OpenSSL. All others come to `tls_untrusted`."""


def make_context(ca_file: Path | None) -> ssl.SSLContext:
    """Build the context that all connections share; building one costs 10 ms. `ca_file` adds to the usual trust."""
    context = ssl.create_default_context()
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
