"""What the members of one deployment prove themselves with: a shared secret, certificates, or both.

Everything comes from files, as Kubernetes mounts Secrets, and is read again when a file changes: new connections use
the new content, those that are open stay. A proof is an HMAC-SHA256 (RFC 2104) over what both sides said and nobody
said before, so a secret is never sent and a recorded proof is worth nothing.
"""

import hashlib
import hmac
import logging
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from kvserve_api.errors import SpecError

logger = logging.getLogger(__name__)

NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
MIN_SECRET_CHARS: Final = 32
"""Whoever connects gets a proof to try secrets on: they must not be guessable. 32 characters of base64 are 192 bits."""
MAX_SECRETS: Final = 8
MAX_FILE_BYTES: Final = 1 << 20

Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CredentialFiles:
    """Where a process finds its credentials; without any it trusts everybody.

    Attributes:
        secret_file: Secrets of at least 32 characters, one a line. The first is the one to prove with, all are
            accepted, so that a secret can be changed in two steps.
        tls_cert_file: Certificate chain of this process, PEM.
        tls_key_file: Its private key, PEM.
        tls_ca_file: Authorities whose certificates others must show, PEM.
    """

    secret_file: Path | None = None
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_ca_file: Path | None = None

    @property
    def tls(self) -> bool:
        """Tell whether connections are encrypted."""
        return self.tls_cert_file is not None or self.tls_ca_file is not None

    def __bool__(self) -> bool:
        """Tell whether anything must be proven."""
        return self.tls or self.secret_file is not None


NO_CREDENTIALS: Final = CredentialFiles()


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What the files held when they were last read.

    Attributes:
        secrets: To prove with (the first) and to accept; empty without a secret file.
        server: For connections that come in; None without a certificate.
        client: For connections that go out; None without TLS.
        certificate: SHA-256 of this process's own certificate, by which a connection knows whom it reached; empty
            without one.
        cert_pem: The certificate chain.
        key_pem: The private key.
        ca_pem: The authorities.
    """

    secrets: tuple[bytes, ...] = ()
    server: ssl.SSLContext | None = None
    client: ssl.SSLContext | None = None
    certificate: bytes = b""
    cert_pem: bytes | None = None
    key_pem: bytes | None = None
    ca_pem: bytes | None = None


class Credentials:
    """The content of credential files, as new as the files; safe from any thread.

    Args:
        files: Where they are.
        path: Where they were named, for errors.
        serves: Others connect to this process, so TLS needs a certificate of its own.
        named: Servers are asked for a certificate of a certain name, and not only of the authority.

    Raises:
        SpecError: A file is missing or can't be used; the error names the setting.
    """

    def __init__(
        self, files: CredentialFiles, path: str, *, serves: bool, named: bool = False
    ) -> None:
        self._files = files
        self._path = path
        self._named = named
        if (files.tls_cert_file is None) != (files.tls_key_file is None):
            raise SpecError(f"{path}.tls_key_file", "certificate and key go together")
        if serves and files.tls and files.tls_cert_file is None:
            raise SpecError(f"{path}.tls_cert_file", "is needed by what others connect to with TLS")
        self._lock = threading.Lock()
        self._stamp = _stamp(files)
        self._loaded = self._load()

    def current(self) -> Loaded:
        """Return what the files hold; what can't be used any more keeps its last good content, and is logged."""
        with self._lock:
            stamp = _stamp(self._files)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._loaded = self._load()
                    logger.info("credentials of %s read anew", self._path)
                except SpecError as error:
                    logger.warning("new credentials are not used, the last ones stay: %s", error)
            return self._loaded

    def _load(self) -> Loaded:
        loaded = _load(self._files, self._path)
        if self._named and loaded.client is not None:
            loaded.client.check_hostname = True
        return loaded


def proof(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    """Return what only a holder of the secret can say.

    Args:
        secret: The secret.
        purpose: Who says it, and in which protocol: what is said in one place proves nothing in another.
        parts: What was said before.
    """
    said = (purpose.encode(), *parts)
    message = b"".join(len(part).to_bytes(4, "big") + part for part in said)
    return hmac.digest(secret, message, "sha256")


def proven_by(secrets: Sequence[bytes], given: bytes, purpose: str, *parts: bytes) -> bytes | None:
    """Return the secret that a proof was made with, or None; takes as long for any proof."""
    found = None
    for secret in secrets:
        if hmac.compare_digest(given, proof(secret, purpose, *parts)):
            found = secret
    return found


def certificate_digest(der: bytes | None) -> bytes:
    """Return the identity of a certificate (RFC 5929, tls-server-end-point); empty for none."""
    return b"" if der is None else hashlib.sha256(der).digest()


def _stamp(files: CredentialFiles) -> Stamp:
    found: list[tuple[int, int, int] | None] = []
    for field in fields(files):
        path: Path | None = getattr(files, field.name)
        try:
            stat = None if path is None else path.stat()
        except OSError:
            stat = None
        found.append(None if stat is None else (stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(found)


def _load(files: CredentialFiles, path: str) -> Loaded:
    secrets = _secrets(files.secret_file, f"{path}.secret_file") if files.secret_file else ()
    if not files.tls:
        return Loaded(secrets=secrets)
    cert_pem, key_pem, ca_pem = (
        _read(getattr(files, name), f"{path}.{name}")
        for name in ("tls_cert_file", "tls_key_file", "tls_ca_file")
    )
    client = _context(files, path, ssl.PROTOCOL_TLS_CLIENT)
    server = _context(files, path, ssl.PROTOCOL_TLS_SERVER) if cert_pem is not None else None
    digest = b""
    if cert_pem is not None:
        first = cert_pem.decode("ascii", "replace").partition("-----END CERTIFICATE-----")
        digest = certificate_digest(ssl.PEM_cert_to_DER_cert("".join(first[:2]).strip()))
    return Loaded(
        secrets=secrets,
        server=server,
        client=client,
        certificate=digest,
        cert_pem=cert_pem,
        key_pem=key_pem,
        ca_pem=ca_pem,
    )


def _context(files: CredentialFiles, path: str, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    # both ends are ours
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    else:
        # who is meant is known by the authority, and by a name where one is asked for
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
    try:
        if files.tls_ca_file is not None:
            context.load_verify_locations(files.tls_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
        elif protocol == ssl.PROTOCOL_TLS_CLIENT:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}.tls_ca_file", f"can't be used: {error}") from error
    try:
        if files.tls_cert_file is not None:
            context.load_cert_chain(files.tls_cert_file, files.tls_key_file, password=_no_password)
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}.tls_cert_file", f"can't be used with its key: {error}") from error
    return context


def _no_password() -> str:
    raise ValueError("the key must not be encrypted")


def _secrets(path: Path, where: str) -> tuple[bytes, ...]:
    text = _read(path, where) or b""
    secrets = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not secrets or len(secrets) > MAX_SECRETS:
        raise SpecError(where, f"must hold 1 to {MAX_SECRETS} secrets, one a line: {path}")
    if min(map(len, secrets)) < MIN_SECRET_CHARS:
        raise SpecError(
            where,
            f"holds a secret of less than {MIN_SECRET_CHARS} characters: make one with openssl rand -base64 32",
        )
    return secrets


def _read(path: Path | None, where: str) -> bytes | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SpecError(where, f"can't be read: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise SpecError(where, f"{path} has more than {MAX_FILE_BYTES} bytes")
    return data
