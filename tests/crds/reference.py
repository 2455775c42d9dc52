"""Writes ``docs/policy-reference.md`` from the CRD: ``python tests/crds/reference.py``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CRD = ROOT / "crds/kvservepolicies.yaml"
PAGE = ROOT / "docs/policy-reference.md"
HEAD = """\
# KVServePolicy v1alpha1

Every field, as `kubectl explain kvp --recursive` has it. An example is in
[examples/01-chat/policy.yaml](../examples/01-chat/policy.yaml); what conditions and reasons mean is in
[operations](operations.md). This page is made from `crds/kvservepolicies.yaml` by `python tests/crds/reference.py`.
"""

Schema = Mapping[str, Any]


def schema() -> Schema:
    """Return the schema of the only version."""
    document = yaml.safe_load(CRD.read_text())
    found: Schema = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def fields(value: Schema, path: str = "") -> Iterator[tuple[str, Schema, bool]]:
    """Yield path, schema and whether it is required of every field below a schema."""
    items = value.get("items")
    if items is not None:
        yield from fields(items, f"{path}[]")
    extra = value.get("additionalProperties")
    if extra is not None:
        yield f"{path}.*", extra, False
    for name, child in value.get("properties", {}).items():
        below = f"{path}.{name}" if path else name
        yield below, child, name in value.get("required", [])
        yield from fields(child, below)


def render() -> str:
    """Return the page."""
    parts = [HEAD]
    for section, title in (("spec", "Spec"), ("status", "Status")):
        top = schema()["properties"][section]
        parts.append(f"\n## {title}\n\n{top['description']}\n")
        parts.append("\n| field | type | meaning |\n| --- | --- | --- |\n")
        parts += [_row(*field, section=section) for field in fields(top)]
        rules = [rule["message"] for rule in _rules(top)]
        if rules:
            parts.append("\nRules:\n\n" + "".join(f"- {rule}\n" for rule in rules))
    return "".join(parts)


def _row(path: str, value: Schema, required: bool, *, section: str) -> str:
    facts = [value.get("type", "integer or string")]
    if "enum" in value:
        facts = [", ".join(f"`{choice}`" for choice in value["enum"])]
    elif "minimum" in value or "maximum" in value:
        facts.append(f"{value.get('minimum', '…')} – {value.get('maximum', '…')}")
    elif value.get("maxItems"):
        facts.append(f"at most {value['maxItems']}")
    if "default" in value and not isinstance(value["default"], dict):
        facts.append(
            f"default `{str(value['default']).lower() if isinstance(value['default'], bool) else value['default']}`"
        )
    if required and section == "spec":
        facts.append("required")
    return f"| `{path}` | {'; '.join(facts)} | {value['description']} |\n"


def _rules(value: Schema) -> Iterator[Mapping[str, Any]]:
    yield from value.get("x-kubernetes-validations", [])
    for child in value.get("properties", {}).values():
        yield from _rules(child)
    if "items" in value:
        yield from _rules(value["items"])


if __name__ == "__main__":
    PAGE.write_text(render())
