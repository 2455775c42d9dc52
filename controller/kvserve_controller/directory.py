"""Policies and Pareto sets from two directories, for running without Kubernetes.

Policies are the KVServePolicy documents of ``*.yaml``, ``*.yml`` and ``*.json`` files; documents of other kinds beside
them are left alone. The set of policy NAME is ``NAME.json``, or else the only set of the policy's model.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from kvserve_api.errors import ArtifactError, PolicyError, SpecError
from kvserve_api.policy import KIND, Policy
from kvserve_api.profile_set import MAX_BYTES, ParetoSet
from kvserve_controller.source import Entry, Publish, Snapshot

POLL_S: Final = 0.5
POLICY_SUFFIXES: Final = (".yaml", ".yml", ".json")
MAX_POLICY_BYTES: Final = 1 << 20
MAX_FILES: Final = 4096

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _File:
    """What was read of one file, and the stamp it had then."""

    stamp: tuple[int, int, int]
    policies: list[Policy] = field(default_factory=list)
    pareto: ParetoSet | None = None
    problem: SpecError | None = None


class DirectorySource:
    """Two directories, looked at twice a second.

    A file that can't be read keeps what it held before, and is reported.
    """

    def __init__(self, policies: Path, profiles: Path, *, poll_s: float = POLL_S) -> None:
        """Make a source.

        Args:
            policies: Directory of policies.
            profiles: Directory of Pareto sets.
            poll_s: Seconds between two looks.
        """
        self._policies_dir = policies
        self._profiles_dir = profiles
        self._poll_s = poll_s
        self._policies: dict[Path, _File] = {}
        self._profiles: dict[Path, _File] = {}
        self._alive_s = time.monotonic()

    @property
    def alive_s(self) -> float:
        """When it last looked, on the monotonic clock, in seconds."""
        return self._alive_s

    async def run(self, publish: Publish) -> None:
        """Publish all that is there, then again after each change, until cancelled."""
        published: Snapshot | None = None
        while True:
            try:
                snapshot = await asyncio.to_thread(self.read)
            except OSError as error:
                log.warning("directory not readable", extra={"why": str(error)})
            else:
                if snapshot != published:
                    publish(snapshot)
                    published = snapshot
            self._alive_s = time.monotonic()
            await asyncio.sleep(self._poll_s)

    def read(self) -> Snapshot:
        """Look at both directories once.

        Raises:
            OSError: One of them can't be listed.
        """
        self._policies = _refresh(
            self._policies_dir, POLICY_SUFFIXES, self._policies, _read_policies
        )
        self._profiles = _refresh(self._profiles_dir, (".json",), self._profiles, _read_set)
        entries: dict[str, Entry] = {}
        for path, file in self._policies.items():
            for policy in file.policies:
                if policy.key in entries:
                    log.warning("policy defined twice", extra={"policy": policy.key, "file": path})
                    continue
                pareto, problem = self._set_of(policy)
                entries[policy.key] = Entry(
                    policy=policy,
                    pareto=pareto,
                    problem=file.problem or problem,
                    generation=policy.generation,
                )
        return entries

    def _set_of(self, policy: Policy) -> tuple[ParetoSet | None, SpecError | None]:
        for path, file in self._profiles.items():
            if path.stem == policy.name:
                return file.pareto, file.problem
        found = [
            (path.name, file.pareto)
            for path, file in self._profiles.items()
            if file.pareto is not None and file.pareto.model.name == policy.model.name
        ]
        if len(found) > 1:
            names = ", ".join(name for name, _ in found)
            return None, ArtifactError(
                "profiles",
                f"hold several sets of {policy.model.name} ({names}): name one {policy.name}.json",
            )
        return (found[0][1] if found else None), None


def _refresh(
    directory: Path, suffixes: tuple[str, ...], known: dict[Path, _File], read: Any
) -> dict[Path, _File]:
    """Read the files of a directory that are new or changed, in the order of their names."""
    files: dict[Path, _File] = {}
    paths = sorted(path for path in directory.iterdir() if path.suffix in suffixes)
    for path in paths[:MAX_FILES]:
        try:
            stat = path.stat()
        except OSError:
            continue  # gone since it was listed
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        old = known.get(path)
        if old is not None and old.stamp == stamp:
            files[path] = old
            continue
        new = _File(stamp)
        try:
            read(path, new)
        except SpecError as error:
            new.problem = type(error)(f"{path.name}: {error.field}", error.problem)
        except OSError as error:
            new.problem = SpecError(path.name, str(error))
        if new.problem is not None:
            if old is not None:
                new.policies, new.pareto = old.policies, old.pareto
            log.warning("file not usable", extra={"why": str(new.problem)})
        files[path] = new
    return files


def _read_bounded(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise SpecError("document", f"has more than {limit} bytes")
    return data


def _read_policies(path: Path, file: _File) -> None:
    try:
        documents = list(_documents(_read_bounded(path, MAX_POLICY_BYTES)))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyError("document", f"is not YAML: {' '.join(str(error).split())}") from error
    file.policies = [Policy.from_object(document) for document in documents]


def _documents(data: bytes) -> Iterator[Any]:
    """Yield the KVServePolicy objects among the documents of a YAML or JSON file."""
    for document in yaml.safe_load_all(data):
        items = document.get("items", [document]) if isinstance(document, dict) else [document]
        for item in items if isinstance(items, list) else [items]:
            if isinstance(item, dict) and item.get("kind") == KIND:
                yield item


def _read_set(path: Path, file: _File) -> None:
    file.pareto = ParetoSet.parse(_read_bounded(path, MAX_BYTES))
