"""A certificate authority of the tests' own, and servers with everything that can be wrong with a certificate."""

import ssl
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Authority:
    """An authority and the file that makes clients trust it."""

    ca: trustme.CA
    file: Path

    def serving(self, *names: str, starts_in_days: int = -1, ends_in_days: int = 30) -> ssl.SSLContext:
        """Make a server's context with a certificate for these names."""
        now = datetime.now(UTC)
        certificate = self.ca.issue_cert(
            *names, not_before=now + timedelta(days=starts_in_days), not_after=now + timedelta(days=ends_in_days)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        return context

    def serving_many(self, name: str, *, count: int) -> ssl.SSLContext:
        """... and for that many more names."""
        return self.serving(name, *(f"n{number}.example" for number in range(count)))

    def serving_tls_1_0(self, name: str) -> ssl.SSLContext:
        """... that speaks TLS 1.0 only."""
        context = self.serving(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
        context.set_ciphers("ALL:@SECLEVEL=0")
        return context

    def serving_self_signed(self, name: str) -> ssl.SSLContext:
        """... with a certificate that vouches for itself: an authority's own."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        alone = trustme.CA()
        with alone.private_key_pem.tempfile() as key, alone.cert_pem.tempfile() as certificate:
            context.load_cert_chain(certificate, key)
        return context

    def stranger(self) -> "Authority":
        """Make another authority, which nobody trusts."""
        return Authority(trustme.CA(), self.file)


def make_authority(folder: Path) -> Authority:
    """Make an authority and write its certificate into the folder."""
    ca = trustme.CA()
    file = folder / "ca.pem"
    ca.cert_pem.write_to_path(str(file))
    return Authority(ca, file)
