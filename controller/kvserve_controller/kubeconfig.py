"""Where the API server is and how to prove who we are: in a pod, or from a kubeconfig file."""

import base64
import binascii
import os
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import yaml

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MAX_FILE_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How to reach an API server.

    Attributes:
        url: Like ``https://10.0.0.1:443``.
        tls: Trust and client certificate; None for plain HTTP.
        token: A bearer token; empty without one.
        token_file: A file with a token that is renewed; read for each request. None without one.
    """

    url: str
    tls: ssl.SSLContext | None
    token: str = ""
    token_file: Path | None = None

    def headers(self) -> dict[str, str]:
        """Return the headers that authenticate a request."""
        token = self.token_file.read_text().strip() if self.token_file else self.token
        return {"Authorization": f"Bearer {token}"} if token else {}

    @classmethod
    def find(cls) -> Self:
        """Return the access that ``KUBECONFIG`` names, else a pod's own, else that of ``~/.kube/config``.

        Raises:
            SpecError: There is none, or the file can't be used.
        """
        named = os.environ.get("KUBECONFIG")
        if named:
            return cls.from_file(Path(named))
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            return cls.in_cluster()
        default = Path.home() / ".kube" / "config"
        if not default.exists():
            raise SpecError("KUBECONFIG", "must name a kubeconfig file, or run in a Kubernetes pod")
        return cls.from_file(default)

    @classmethod
    def in_cluster(cls, folder: Path = SERVICE_ACCOUNT) -> Self:
        """Return the access of a pod's service account.

        Raises:
            SpecError: The pod has no token.
        """
        host = os.environ["KUBERNETES_SERVICE_HOST"]
        host = f"[{host}]" if ":" in host else host
        try:
            tls = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        except OSError as error:
            raise SpecError(str(folder), "must hold ca.crt and token: mount the token") from error
        return cls(
            url=f"https://{host}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}",
            tls=tls,
            token_file=folder / "token",
        )

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Return the access of a kubeconfig's current context.

        Raises:
            SpecError: The file can't be read, or asks for a log-in that is not supported.
        """
        try:
            document = yaml.safe_load(path.read_bytes()[:MAX_FILE_BYTES])
        except (OSError, yaml.YAMLError) as error:
            raise SpecError("KUBECONFIG", f"can't be read: {error}") from error
        fields = Fields(document, "kubeconfig")
        context = _named(fields, "contexts", "context", fields.string("current-context"))
        cluster = _named(fields, "clusters", "cluster", context.string("cluster"))
        user = _named(fields, "users", "user", context.string("user"))
        if user.has("exec") or user.has("auth-provider"):
            raise user.fail("exec", "is not supported: use a certificate or a token")
        url = cluster.string("server")
        token_file = user.string("tokenFile", None)
        return cls(
            url=url.rstrip("/"),
            tls=_tls(cluster, user, path.parent) if url.startswith("https:") else None,
            token=user.string("token", "", max_length=1 << 16),
            token_file=path.parent / token_file if token_file else None,
        )


def _named(fields: Fields, plural: str, singular: str, name: str) -> Fields:
    for item in fields.children(plural):
        if item.string("name") == name:
            return item.child(singular)
    raise fields.fail(plural, f"must hold {name!r}")


def _tls(cluster: Fields, user: Fields, folder: Path) -> ssl.SSLContext:
    if cluster.has("insecure-skip-tls-verify") and cluster.boolean("insecure-skip-tls-verify"):
        raise cluster.fail("insecure-skip-tls-verify", "is not supported: name the CA")
    authority = _data(cluster, "certificate-authority", folder)
    try:
        context = ssl.create_default_context(cadata=authority.decode() if authority else None)
        certificate, key = (
            _data(user, name, folder) for name in ("client-certificate", "client-key")
        )
        if certificate and key:
            # Python loads a client certificate from files only; these are gone at once
            with tempfile.TemporaryDirectory() as private:
                paths = Path(private, "certificate"), Path(private, "key")
                paths[0].write_bytes(certificate)
                paths[1].write_bytes(key)
                context.load_cert_chain(*paths)
    except (OSError, ValueError) as error:
        raise SpecError("kubeconfig", f"has an unusable certificate: {error}") from error
    return context


def _data(fields: Fields, name: str, folder: Path) -> bytes:
    """Return what ``<name>-data`` holds or the file ``<name>`` does; empty without either."""
    inline: Any = fields.string(f"{name}-data", "", max_length=1 << 20)
    try:
        if inline:
            return base64.b64decode(inline, validate=True)
        file = fields.string(name, "")
        return (folder / file).read_bytes() if file else b""
    except (binascii.Error, OSError) as error:
        raise fields.fail(name, f"can't be read: {error}") from error
