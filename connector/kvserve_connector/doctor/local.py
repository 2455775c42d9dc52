"""Checks that need nothing but this machine."""

import json
import resource
import ssl
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kvserve_api.credentials import CredentialFiles, Credentials, Loaded
from kvserve_api.errors import KVServeError, SpecError
from kvserve_api.wire import KVLayout
from kvserve_connector.config import PATH, ConnectorConfig
from kvserve_connector.doctor.finding import (
    Finding,
    fail,
    judge_files,
    judge_kvserve,
    judge_model,
    judge_python,
    judge_vllm,
    ok,
    warn,
)
from kvserve_connector.versions import installed, vllm_version
from kvserve_kernels.native import Simd, simd
from kvserve_strategies import Expectation, Pipeline, decode_blob, encode_blob, preset

MAX_CONFIG_BYTES = 1 << 20
_LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=64, dtype="bfloat16")
_FINGERPRINT = "sha256:" + "0" * 64


def check_versions() -> list[Finding]:
    """Look at Python, KVServe and vLLM."""
    return [
        judge_python(sys.version_info[:3]),
        judge_kvserve(installed("kvserve")),
        judge_vllm(vllm_version()),
    ]


def check_kernels() -> Finding:
    """Code a small cache there and back, and say by which kernels."""
    check = "kernels"
    try:
        level = simd()
    except SpecError as error:
        return fail(check, str(error), "Unset KVSERVE_SIMD.")
    keys = torch.linspace(-4, 4, 2 * 48 * 2 * 64).reshape(2, 48, 2, 64).to(torch.bfloat16)
    values = keys.flip(1).contiguous()
    try:
        blob = encode_blob(
            Pipeline.of(preset("lossless")),
            keys,
            values,
            model_fingerprint=_FINGERPRINT,
            layout=_LAYOUT,
            layers=range(2),
            tokens=range(48),
        )
        back = decode_blob(
            bytearray(blob),
            expect=Expectation(
                model_fingerprint=_FINGERPRINT,
                layout=_LAYOUT,
                layers=range(2),
                tokens=range(48),
                max_bytes=1 << 20,
            ),
        )
    except KVServeError as error:
        return fail(check, f"a small cache can't be coded: {error}", "Reinstall KVServe.")
    if not (torch.equal(back.keys, keys) and torch.equal(back.values, values)):
        return fail(check, f"{level.name}: coding is not lossless", "Reinstall KVServe.")
    if level is Simd.NUMBA:
        advice = "Run python -m kvserve_kernels.native where there is a C compiler."
        return warn(check, "the native ones are not built: numba does their work, slower", advice)
    if level is Simd.PORTABLE:
        return warn(check, "native, without AVX2", "Use a processor with AVX2 or AVX-512.")
    return ok(check, f"native, {level.name}")


def check_files_limit() -> Finding:
    """Look at the limit of open files."""
    return judge_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def check_model(folder: Path) -> tuple[Finding, dict[str, Any]]:
    """Read a model's ``config.json``; return what it says of the KV cache, and itself."""
    try:
        config = read_json(folder / "config.json")
    except SpecError as error:
        return fail("kv layout", str(error), "Give the model's folder."), {}
    text = config.get("text_config")
    return judge_model(text if isinstance(text, dict) else config), config


def check_credentials(config: ConnectorConfig) -> Iterator[Finding]:
    """Load the credentials, see who may read them, and hold the own certificate against the own authority."""
    files = config.credentials
    if not files:
        yield warn(
            "credentials",
            "none: everybody on the network is believed",
            "Set secret_file and certificates (docs/security.md), or keep to a trusted network.",
        )
        return
    try:
        loaded = Credentials(files, PATH, serves=False).current()
    except SpecError as error:
        yield fail("credentials", str(error), "Correct the file or the setting.")
        return
    parts = [f"{len(loaded.secrets)} secret(s)"] if loaded.secrets else []
    parts += ["TLS"] if files.tls else []
    yield ok("credentials", " and ".join(parts))
    yield from _readable_by_all(files)
    if loaded.server is not None and loaded.client is not None:
        yield _own_certificate(loaded)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        SpecError: It can't be read, is too large, or holds something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        value = json.loads(data) if len(data) <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(str(path), f"can't be read: {error}") from error
    if not isinstance(value, Mapping):
        raise SpecError(str(path), f"must hold a JSON object of at most {MAX_CONFIG_BYTES} bytes")
    return dict(value)


def _readable_by_all(files: CredentialFiles) -> Iterator[Finding]:
    for path in (files.secret_file, files.tls_key_file):
        if path is not None and path.stat().st_mode & stat.S_IROTH:
            yield warn(
                "credentials",
                f"every user of this machine may read {path}",
                "Mount it with defaultMode 0440.",
            )


def _own_certificate(loaded: Loaded) -> Finding:
    """Shake hands with ourselves, in memory."""
    assert loaded.server is not None
    assert loaded.client is not None
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    name = "peer" if loaded.client.check_hostname else None
    ends = [
        loaded.client.wrap_bio(ours, theirs, server_side=False, server_hostname=name),
        loaded.server.wrap_bio(theirs, ours, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                return fail(
                    "certificate",
                    f"other pods will refuse it: {error.reason or error}",
                    "Renew it, and have it signed by an authority in tls_ca_file.",
                )
    return ok("certificate", "signed by an authority of ours, and in time")
