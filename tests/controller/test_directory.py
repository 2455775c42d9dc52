"""Policies and Pareto sets from two directories."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvserve_api.errors import ArtifactError
from kvserve_controller.directory import MAX_POLICY_BYTES, DirectorySource
from kvserve_controller.source import Snapshot
from podclient import until
from samples import INT4, RAW, pareto, policy_object


class Folders:
    """Two directories and their source."""

    def __init__(self, folder: Path) -> None:
        self.policies, self.profiles = folder / "policies", folder / "profiles"
        self.policies.mkdir()
        self.profiles.mkdir()
        self.source = DirectorySource(self.policies, self.profiles, poll_s=0.02)

    def policy(self, name: str = "chat", file: str = "", **spec: Any) -> None:
        """Write a policy."""
        path = self.policies / (file or f"{name}.yaml")
        path.write_text(yaml.safe_dump(policy_object(name, **spec)))

    def set(self, name: str = "chat", **arguments: Any) -> None:
        """Write a Pareto set."""
        (self.profiles / f"{name}.json").write_bytes(pareto(**arguments).canonical())


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Return two empty directories."""
    return Folders(tmp_path)


def test_set_by_name_then_by_model(folders: Folders) -> None:
    """A policy's set is the file of its name, or else the only set of its model."""
    folders.policy("chat")
    folders.policy("code")
    folders.set("chat")
    folders.set("other", model="other/model")
    found = folders.source.read()
    assert found["default/chat"].pareto == pareto()
    assert found["default/code"].pareto == pareto()
    (folders.profiles / "code.json").write_bytes(pareto(INT4, RAW).canonical())
    assert folders.source.read()["default/code"].pareto == pareto(INT4, RAW)


def test_ambiguous_set_is_a_problem(folders: Folders) -> None:
    """Two sets of a policy's model, none of its name: which one is not guessed."""
    folders.policy("code")
    folders.set("a")
    folders.set("b")
    problem = folders.source.read()["default/code"].problem
    assert isinstance(problem, ArtifactError)
    assert "a.json, b.json" in str(problem)
    assert "name one code.json" in str(problem)


def test_other_documents_are_left_alone(folders: Folders) -> None:
    """Manifests of other kinds beside a policy don't matter, in one file or in lists."""
    documents = [
        {"kind": "Deployment", "spec": {}},
        {"kind": "List", "items": [policy_object("listed"), {"kind": "Pod"}]},
        None,
        policy_object("plain"),
    ]
    (folders.policies / "all.yml").write_text(yaml.safe_dump_all(documents))
    (folders.policies / "notes.txt").write_text("no policy")
    assert sorted(folders.source.read()) == ["default/listed", "default/plain"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{unclosed: [", id="not-yaml"),
        pytest.param("kind: KVServePolicy", id="incomplete"),
        pytest.param("x: !!python/object/apply:os.abort []", id="code"),
        pytest.param("#" * (MAX_POLICY_BYTES + 1), id="too-large"),
        pytest.param("[" * 50_000, id="deep"),
        pytest.param("\x00\x01", id="binary"),
    ],
)
def test_bad_policy_file_keeps_the_last_good(folders: Folders, text: str) -> None:
    """A policy file that becomes unusable keeps its policy in force, with the problem, until mended."""
    folders.policy()
    before = folders.source.read()["default/chat"]
    (folders.policies / "chat.yaml").write_text(text)
    broken = folders.source.read()["default/chat"]
    assert broken.policy == before.policy
    assert broken.problem is not None
    assert broken.problem.field.startswith("chat.yaml: ")
    folders.policy(quality={"maxLossBasisPoints": 1})
    mended = folders.source.read()["default/chat"]
    assert mended.problem is None
    assert mended.policy != before.policy


def test_bad_set_keeps_the_last_good(folders: Folders) -> None:
    """A Pareto set that becomes unusable stays in force as it was, with the problem."""
    folders.policy()
    folders.set()
    folders.source.read()
    (folders.profiles / "chat.json").write_bytes(pareto().canonical()[:-20])
    broken = folders.source.read()["default/chat"]
    assert broken.pareto == pareto()
    assert isinstance(broken.problem, ArtifactError)


def test_removed_files_are_gone(folders: Folders) -> None:
    """A deleted policy file is a deleted policy."""
    folders.policy()
    assert list(folders.source.read()) == ["default/chat"]
    (folders.policies / "chat.yaml").unlink()
    assert folders.source.read() == {}


def test_name_is_no_path(folders: Folders) -> None:
    """A policy can't reach a file outside the directory by its name."""
    (folders.profiles.parent / "secret.json").write_bytes(pareto().canonical())
    folders.policy("../secret", file="x.yaml")
    assert folders.source.read()["default/../secret"].pareto is None


async def test_publishes_changes_only(folders: Folders) -> None:
    """What is there is published once, and again only after a change; a vanished directory changes nothing."""
    folders.policy()
    published: list[Snapshot] = []
    running = asyncio.create_task(folders.source.run(published.append))
    await until(lambda: published)
    await asyncio.sleep(0.2)
    assert len(published) == 1
    folders.set()
    await until(lambda: len(published) == 2)
    assert published[1]["default/chat"].pareto == pareto()
    folders.policies.rename(folders.policies.with_name("moved"))
    alive_s = folders.source.alive_s
    await until(lambda: folders.source.alive_s > alive_s)
    assert len(published) == 2
    running.cancel()
