"""Keys and certificates of parties: made, read, and told apart by their fingerprints.

Every party signs its own certificate, and the parties exchange them by hand, like SSH keys: what is trusted is a
list of exact certificates and no authority. Names in them mean nothing; the fingerprint is the identity.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl
import warnings
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aero.errors import AeroError

DAYS = 365
"""How long a certificate is good for, unless asked otherwise."""


@dataclass(frozen=True)
class Certificate:
    """A party's public certificate. pem: as it is handed to the others; ends: when it expires, in UTC."""

    path: Path
    pem: str
    fingerprint: str
    starts: datetime.datetime
    ends: datetime.datetime

    def check(self, now: datetime.datetime) -> None:
        """Raise AeroError if the certificate is not good at ``now``."""
        if now >= self.ends:
            raise AeroError(
                f"The certificate {self.path} expired on {self.ends:%Y-%m-%d}; make a new one and exchange it."
            )
        if now < self.starts:
            raise AeroError(f"The certificate {self.path} is not valid before {self.starts:%Y-%m-%d}; check the clock.")


def make(
    name: str, certificate: Path, key: Path, *, days: int = DAYS, now: datetime.datetime | None = None
) -> Certificate:
    """Write a new P-256 key (readable by its owner alone) and its self-signed certificate.

    Raises AeroError if either file exists: a key is never overwritten.
    """
    for path in (certificate, key):
        if path.exists():
            raise AeroError(f"{path} exists and is not overwritten; choose another folder, or remove it first.")
    start = (now or datetime.datetime.now(datetime.timezone.utc)) - datetime.timedelta(minutes=5)
    private = ec.generate_private_key(ec.SECP256R1())
    # Names must differ: among trusted certificates of one name the TLS library takes the first, and refuses the others.
    identifier = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, identifier.digest.hex()),
        ]
    )
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
        .add_extension(identifier, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .sign(private, hashes.SHA256())
    )
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    handle = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(secret)
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    return load(certificate)


def load(path: Path) -> Certificate:
    """Read one certificate. Raises AeroError if the file holds none."""
    try:
        data = path.read_bytes()
    except OSError:
        raise AeroError(f"There is no certificate {path}; ask that party for its file.") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's remarks on odd but readable certificates
            parsed = x509.load_pem_x509_certificate(data)
        pem = parsed.public_bytes(serialization.Encoding.PEM).decode()
        starts, ends = parsed.not_valid_before_utc, parsed.not_valid_after_utc
    except (ValueError, TypeError, OverflowError):
        raise AeroError(f"{path} holds no readable certificate; ask that party for its file again.") from None
    return Certificate(path, pem, fingerprint(ssl.PEM_cert_to_DER_cert(pem)), starts, ends)


def load_folder(folder: Path) -> list[Certificate]:
    """All certificates ``*.crt`` in a folder, in order of their names; none where there is no folder."""
    return [load(path) for path in sorted(folder.glob("*.crt"))]


def fingerprint(der: bytes) -> str:
    """SHA-256 of a certificate's DER bytes, in hexadecimal."""
    return hashlib.sha256(der).hexdigest()


def check_key(path: Path) -> None:
    """Raise AeroError if the key is missing or others on this machine may read it."""
    try:
        mode = path.stat().st_mode
    except OSError:
        raise AeroError(f"There is no key {path}; make one with aero party init.") from None
    if mode & 0o077:
        raise AeroError(f"Others on this machine may read the key {path}; run chmod 600 on it.")
