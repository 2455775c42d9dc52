#!/usr/bin/env python3
"""What `helm test` runs in the controller's image: is the API served, is the controller ready, does gRPC answer?"""

import json
import os
import ssl
import sys
import time
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TLS = Path("/etc/kvserve/tls")
FILES = ("ca.crt", "tls.key", "tls.crt")
API = "kvserve.io/v1alpha1"
TIMEOUT_S = 60.0


def check_api() -> str:
    """Ask the API server whether it serves policies with a status."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    request = urllib.request.Request(f"https://{host}:{port}/apis/{API}")
    request.add_header("Authorization", f"Bearer {(ACCOUNT / 'token').read_text().strip()}")
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=10, context=trust) as response:
        names = {resource["name"] for resource in json.load(response)["resources"]}
    missing = {"kvservepolicies", "kvservepolicies/status"} - names
    if missing:
        raise RuntimeError(f"{API} does not serve {', '.join(sorted(missing))}")
    return f"{API} is served"


def check_ready(host: str) -> str:
    """Ask the controller whether it has read policies and Pareto sets."""
    with urllib.request.urlopen(f"http://{host}:8081/readyz", timeout=10) as response:
        response.read()
    return "the controller is ready"


def check_grpc(host: str) -> str:
    """Open a gRPC channel as a serving pod does, by TLS if the controller's certificate is mounted here."""
    import grpc

    address = f"{host}:7443"
    if TLS.is_dir():
        authority, key, certificate = ((TLS / name).read_bytes() for name in FILES)
        trust = grpc.ssl_channel_credentials(authority, key, certificate)
        opened = grpc.secure_channel(address, trust)
    else:
        opened = grpc.insecure_channel(address)
    with opened as channel:
        grpc.channel_ready_future(channel).result(timeout=10)
    return "the controller's gRPC port answers"


def main() -> None:
    """Run the checks, each until it passes or the time is over."""
    host = sys.argv[1]
    deadline_s = time.monotonic() + TIMEOUT_S
    for check in (check_api, lambda: check_ready(host), lambda: check_grpc(host)):
        while True:
            try:
                print(f"ok: {check()}", flush=True)
                break
            except Exception as error:
                if time.monotonic() > deadline_s:
                    raise SystemExit(f"failed: {error!r}") from error
                time.sleep(2)


main()
