"""The operator's configuration file: what profiling Jobs are made of.

The chart mounts it; policies cannot change it, so that who may create a policy cannot choose what runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import yaml

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields

DEFAULT_COMMAND: Final = ("python", "-m", "kvserve_profiler", "job")
DEFAULT_RESOURCES: Final[Mapping[str, Any]] = {
    "requests": {"cpu": "1", "memory": "2Gi"},
    "limits": {"memory": "8Gi"},
}
_MAX_BYTES: Final = 256 * 1024
_OWN_VARIABLES: Final = ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilerConfig:
    """What the container of a profiling Job is.

    Attributes:
        image: Its image; part of what identifies a run.
        image_pull_policy: ``Always``, ``IfNotPresent`` or ``Never``.
        command: Its command.
        extra_volumes: Volumes of the pod, as Kubernetes has them, besides its own.
        extra_volume_mounts: Mounts of the container besides its own.
        extra_env: Variables of the container besides its own.
        resources: Its resource requirements where a policy gives none.
        passed_env: Variables of the operator that the container gets too.
    """

    image: str
    image_pull_policy: str = "IfNotPresent"
    command: tuple[str, ...] = DEFAULT_COMMAND
    extra_volumes: tuple[Mapping[str, Any], ...] = ()
    extra_volume_mounts: tuple[Mapping[str, Any], ...] = ()
    extra_env: tuple[Mapping[str, Any], ...] = ()
    resources: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_RESOURCES))
    passed_env: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, fields: Fields, environ: Mapping[str, str]) -> Self:
        """Read the section ``profiler``.

        Args:
            fields: The section.
            environ: The operator's own variables.

        Raises:
            SpecError: A key is missing, unknown or of the wrong type.
        """
        command = fields.items("command", list(DEFAULT_COMMAND), max_items=64)
        if not command or not all(isinstance(word, str) for word in command):
            raise fields.fail("command", "must be a list of strings, and not empty")
        config = cls(
            image=fields.string("image", max_length=1024),
            image_pull_policy=fields.string(
                "imagePullPolicy", "IfNotPresent", choices=["Always", "IfNotPresent", "Never"]
            ),
            command=tuple(command),
            extra_volumes=_named(fields, "extraVolumes"),
            extra_volume_mounts=_named(fields, "extraVolumeMounts"),
            extra_env=_named(fields, "extraEnv"),
            resources=fields.mapping("resources", {}) or dict(DEFAULT_RESOURCES),
            passed_env={n: v for n, v in environ.items() if _passed_on(n)},
        )
        if not config.image:
            raise fields.fail("image", "must not be empty")
        fields.done()
        return config


def _named(fields: Fields, key: str) -> tuple[Mapping[str, Any], ...]:
    entries = [child.mapping_of() for child in fields.children(key, [], max_items=64)]
    if not all(isinstance(entry.get("name"), str) for entry in entries):
        raise fields.fail(key, "must be a list of objects that have a name")
    return tuple(entries)


def _passed_on(name: str) -> bool:
    # where telemetry goes is the same for both; what names its source is not
    return name.startswith("OTEL_") and name not in _OWN_VARIABLES


def load(path: Path, environ: Mapping[str, str]) -> ProfilerConfig:
    """Read the configuration file.

    Args:
        path: The file.
        environ: The operator's own variables; those of OpenTelemetry are passed on to Jobs.

    Raises:
        SpecError: It can't be read, is not YAML, or a key is missing, unknown or of the wrong type.
    """
    try:
        text = path.read_bytes()
        if len(text) > _MAX_BYTES:
            raise SpecError(str(path), f"has more than {_MAX_BYTES} bytes")
        value = yaml.safe_load(text)
    except OSError as error:
        raise SpecError(str(path), f"can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(str(path), f"is not YAML: {error}") from error
    fields = Fields(value)
    config = ProfilerConfig.read(fields.child("profiler"), environ)
    fields.done()
    return config
