"""The tasks that a policy asks a workload class's profiles to answer: what, on which items, with which budget."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from kvserve_api.fields import Fields
from kvserve_api.profile_set import NAME_PATTERN
from kvserve_api.quality import BASIS_POINTS

MAX_TASKS: Final = 4
"""Tasks of one workload class: each costs a run minutes."""
MAX_ITEMS: Final = 10_000
DEFAULT_ITEMS: Final = 64
Z2_MILLIONTHS: Final = 2_705_543
"""The square of the 95 % quantile of a normal distribution, in millionths."""
PATH_PATTERN: Final = re.compile(r"[^./][^/]*(/[^./][^/]*)*")
CLAIM: Final = "pvc:"
BUILT_IN: Final = "built-in:"
CONFIG_MAP: Final = "configmap"


class BuiltIn(StrEnum):
    """Tasks whose items come with the profiler, by the policy's names for them."""

    LAST_WORD = "LastWord"
    RETRIEVAL = "Retrieval"

    @property
    def id(self) -> str:
        """The profiler's name of it."""
        return {"LastWord": "last-word", "Retrieval": "retrieval"}[self.value]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskCheck:
    """A task that the profiles of a workload class must not answer much worse than the exact cache.

    Attributes:
        name: Unique in its class; a DNS label.
        built_in: The task built into the profiler; None for items of one's own.
        config_map: ConfigMap that holds the items, or empty.
        key: Their key in it.
        claim: PersistentVolumeClaim that holds the items, or empty.
        path: Their file in it.
        items: Most items to answer.
        max_loss_bp: Share of the answers that may be lost, in basis points of the items.
    """

    name: str
    built_in: BuiltIn | None = None
    config_map: str = ""
    key: str = ""
    claim: str = ""
    path: str = ""
    items: int = DEFAULT_ITEMS
    max_loss_bp: int

    @property
    def source(self) -> str:
        """Where the items are, in words that change when it does; those of a ConfigMap are told by their digest."""
        if self.built_in is not None:
            return f"{BUILT_IN}{self.built_in.id}"
        return f"{CLAIM}{self.claim}/{self.path}" if self.claim else CONFIG_MAP

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read a task."""
        given = [key for key in ("builtIn", "configMapRef", "pvc") if fields.has(key)]
        if len(given) != 1:
            told = " and ".join(given) or "none"
            raise fields.fail(
                "builtIn", f"or configMapRef or pvc must say where the items are, got {told}"
            )
        built_in, config_map, key, claim, path = None, "", "", "", ""
        if fields.has("builtIn"):
            built_in = BuiltIn(fields.string("builtIn", choices=list(BuiltIn)))
        elif fields.has("configMapRef"):
            reference = fields.child("configMapRef")
            config_map = reference.string("name", min_length=1, max_length=253)
            key = reference.string("key", "items.jsonl", min_length=1, max_length=253)
            reference.done()
        else:
            volume = fields.child("pvc")
            claim = volume.string("claimName", min_length=1, max_length=253)
            path = volume.string("path", min_length=1, max_length=1024)
            if not PATH_PATTERN.fullmatch(path):
                raise volume.fail(
                    "path", f"must be a path inside the claim without hidden files, got {path!r}"
                )
            volume.done()
        task = cls(
            name=_name(fields),
            built_in=built_in,
            config_map=config_map,
            key=key,
            claim=claim,
            path=path,
            items=fields.integer("maxItems", DEFAULT_ITEMS, minimum=1, maximum=MAX_ITEMS),
            max_loss_bp=fields.integer("maxLossBasisPoints", minimum=0, maximum=BASIS_POINTS),
        )
        fields.ignore("builtIn", "configMapRef", "pvc")
        least = least_limit_bp(task.items)
        if 0 < task.max_loss_bp < least:
            raise fields.fail(
                "maxLossBasisPoints",
                f"can't be shown with so few items: with {task.items} and none lost the upper limit is {least}; "
                f"raise maxItems, or this to {least}",
            )
        fields.done()
        return task


def least_limit_bp(items: int) -> int:
    """Return the upper confidence limit of the share lost if of so many items none is, in basis points, rounded up.

    That of Tango's score interval at 95 %, z² / (items + z²) (Statistics in Medicine 17, 1998). A smaller budget is
    kept by lossless profiles only.
    """
    return -(-BASIS_POINTS * Z2_MILLIONTHS // (1_000_000 * items + Z2_MILLIONTHS))


def read_tasks(fields: Fields, inherited: tuple[TaskCheck, ...]) -> tuple[TaskCheck, ...]:
    """Read the tasks of a section ``quality``; without any, those of the policy."""
    if not fields.has("tasks"):
        fields.ignore("tasks")
        return inherited
    tasks = tuple(TaskCheck.read(item) for item in fields.children("tasks", max_items=MAX_TASKS))
    if len({task.name for task in tasks}) < len(tasks):
        raise fields.fail("tasks", "must have unique names")
    return tasks


def _name(fields: Fields) -> str:
    name = fields.string("name", max_length=63)
    if not NAME_PATTERN.fullmatch(name):
        raise fields.fail("name", f"must be a DNS label, got {name!r}")
    return name
