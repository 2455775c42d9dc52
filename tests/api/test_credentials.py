"""Credential files: what is read, what is refused, and what happens when they change."""

import os
import ssl
from pathlib import Path

import pytest

from kvserve_api.credentials import (
    CredentialFiles,
    Credentials,
    certificate_digest,
    proof,
    proven_by,
)
from kvserve_api.errors import SpecError
from members import Members

OLD, NEW = b"o" * 32, b"n" * 32


def test_a_proof_holds_for_what_was_said_and_nothing_else() -> None:
    """Another secret, purpose, order or boundary of the parts makes another proof."""
    mine = proof(OLD, "a", b"12", b"3")
    assert len(mine) == 32
    assert proven_by((NEW, OLD), mine, "a", b"12", b"3") == OLD
    assert proven_by((NEW,), mine, "a", b"12", b"3") is None
    assert proven_by((OLD,), mine, "b", b"12", b"3") is None
    assert proven_by((OLD,), mine, "a", b"1", b"23") is None
    assert proven_by((OLD,), b"", "a", b"12", b"3") is None
    assert proven_by((), mine, "a", b"12", b"3") is None


def test_secrets_are_lines(tmp_path: Path) -> None:
    """Each line is a secret, the first the one to prove with; blank lines and spaces at the ends are nothing."""
    path = tmp_path / "secret"
    path.write_bytes(OLD + b" \r\n\n" + NEW + b"\n")
    found = Credentials(CredentialFiles(secret_file=path), "x", serves=True).current()
    assert found.secrets == (OLD, NEW)
    assert found.server is found.client is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(b"short\n", "less than 32", id="guessable"),
        pytest.param(OLD + b"\nshort", "less than 32", id="second is guessable"),
        pytest.param(b"\n \n", "1 to 8", id="empty"),
        pytest.param((OLD + b"\n") * 9, "1 to 8", id="too many"),
        pytest.param(b"x" * ((1 << 20) + 1), "more than", id="too large"),
        pytest.param(None, "can't be read", id="missing"),
    ],
)
def test_bad_secret_files_are_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """A secret file that can't be used ends the start with an error that names the setting."""
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=problem) as caught:
        Credentials(CredentialFiles(secret_file=path), "here", serves=False)
    assert caught.value.field == "here.secret_file"


def test_certificates_are_loaded(tmp_path: Path) -> None:
    """Both directions speak TLS 1.3 only and ask for certificates; the digest is that of the own certificate."""
    found = Credentials(Members(tmp_path).with_tls(), "x", serves=True).current()
    assert found.server is not None
    assert found.client is not None
    for context in (found.server, found.client):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
    der = ssl.PEM_cert_to_DER_cert((tmp_path / "pod.crt").read_text())
    assert found.certificate == certificate_digest(der)


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    """A certificate without key, a server without certificate, and files that are no PEM are errors by name."""
    files = Members(tmp_path).with_tls()
    cert, ca = files.tls_cert_file, files.tls_ca_file
    for made, serves, field in (
        (CredentialFiles(tls_cert_file=cert), False, "tls_key_file"),
        (CredentialFiles(tls_ca_file=ca), True, "tls_cert_file"),
        (CredentialFiles(tls_ca_file=tmp_path / "pod.key"), False, "tls_ca_file"),
        (CredentialFiles(tls_cert_file=cert, tls_key_file=ca), True, "tls_cert_file"),
    ):
        with pytest.raises(SpecError) as caught:
            Credentials(made, "here", serves=serves)
        assert caught.value.field == f"here.{field}"
    assert Credentials(CredentialFiles(tls_ca_file=ca), "x", serves=False).current().client


def test_changed_files_are_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """New content is in force at the next look; content that can't be used leaves the last good one in force."""
    members = Members(tmp_path)
    credentials = Credentials(members.with_tls(secret=True), "x", serves=True)
    first = credentials.current()
    assert credentials.current() is first

    (tmp_path / "secret").write_bytes(b"broken")
    assert credentials.current() is first
    assert "less than 32" in caplog.text

    # as a mounted Secret changes: another file under the same name
    (tmp_path / "next").write_bytes(NEW)
    os.replace(tmp_path / "next", tmp_path / "secret")
    members.issue("pod")
    second = credentials.current()
    assert second.secrets == (NEW,)
    assert second.certificate != first.certificate
