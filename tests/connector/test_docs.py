"""The pages about the connector name what there is."""

import re
from dataclasses import fields
from functools import cache
from pathlib import Path

from kvserve_api.credentials import CredentialFiles

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


@cache
def functions(file: str) -> frozenset[str]:
    """Return the functions of a test module."""
    text = (HERE / file).read_text()
    return frozenset(re.findall(r"^(?:async )?def (\w+)", text, re.MULTILINE))


def test_every_test_of_the_fault_table_exists() -> None:
    """Each fault names a test, and each test that is named is there."""
    rows = [
        line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if ".py" in line
    ]
    assert len(rows) > 30
    missing = []
    for row in rows:
        named = re.findall(r"`([a-z_/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, function in named:
            if function and function not in functions(file):
                missing.append(f"{file}::{function}")
    assert missing == []


def test_every_credential_setting_is_documented() -> None:
    """The settings table and the page on security name each credential setting."""
    text = (ROOT / "docs" / "connector.md").read_text()
    security = (ROOT / "docs" / "security.md").read_text()
    for name in (*(f.name for f in fields(CredentialFiles)), "tls_server_name", "peers"):
        assert f"`{name}`" in text, name
        assert f"`{name}`" in security, name
