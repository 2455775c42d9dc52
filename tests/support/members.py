"""Credentials of a deployment for tests: an authority, certificates and secrets, as files."""

import datetime
from dataclasses import dataclass, field
from pathlib import Path

from kvserve_api.credentials import CredentialFiles
from testcluster.pki import Authority

NAME = "kvserve-transfer"


@dataclass
class Members:
    """One deployment's credentials.

    Attributes:
        folder: Where the files are.
        secret: Its shared secret.
    """

    folder: Path
    secret: str = "s" * 40
    _authority: Authority = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._authority = Authority(self.folder, "ca")
        self.issue("pod")
        (self.folder / "secret").write_text(f"{self.secret}\n")

    def issue(self, name: str, *, valid_s: float = 3600, host: str = NAME) -> None:
        """Write a certificate and key of this name, anew if they were there."""
        self._authority.issue(
            name,
            name,
            hosts=(host, "127.0.0.1"),
            lifetime=datetime.timedelta(seconds=valid_s),
        )

    def with_secret(self, *secrets: str) -> CredentialFiles:
        """Return files with a secret only: this deployment's, or others."""
        path = self.folder / ("secret" if not secrets else f"secret-{'-'.join(secrets)[:60]}")
        if secrets:
            path.write_text("\n".join(secrets))
        return CredentialFiles(secret_file=path)

    def with_tls(self, name: str = "pod", *, secret: bool = False) -> CredentialFiles:
        """Return files of who has a certificate, and perhaps the secret."""
        return CredentialFiles(
            secret_file=self.folder / "secret" if secret else None,
            tls_cert_file=self.folder / f"{name}.crt",
            tls_key_file=self.folder / f"{name}.key",
            tls_ca_file=self.folder / "ca.crt",
        )

    @property
    def authority_only(self) -> CredentialFiles:
        """Files of who has no certificate of its own."""
        return CredentialFiles(tls_ca_file=self.folder / "ca.crt")
