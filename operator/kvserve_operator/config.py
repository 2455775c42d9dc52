"""The operator's configuration file: what profiling Jobs are made of.

The chart mounts it; policies cannot change it, so that who may create a policy cannot choose what runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

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
class ArtifactsConfig:
    """Where profiling Jobs put calibration bundles.

    Attributes:
        url: Of the store; empty for none.
        volume: The volume behind a ``file://`` URL, as a pod has it but for its name; empty if the Job's own
            extra volumes hold the folder, or for a store that is no folder.
        secret: Name of a Secret in the policies' namespaces whose keys become variables of the Job; empty for none.
    """

    url: str = ""
    volume: Mapping[str, Any] = field(default_factory=dict)
    secret: str = ""

    @property
    def folder(self) -> str:
        """Where the volume is mounted; empty without one."""
        return urlsplit(self.url).path if self.volume else ""

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read the section ``artifacts``.

        Raises:
            SpecError: A key is unknown, of the wrong type, or does not go with the others.
        """
        config = cls(
            url=fields.string("url", "", max_length=2048),
            volume=fields.mapping("volume", {}),
            secret=fields.string("secret", "", max_length=253),
        )
        parts = urlsplit(config.url)
        if config.url and not parts.scheme:
            raise fields.fail(
                "url", f"must have a scheme like file:// or s3://, got {config.url!r}"
            )
        if parts.scheme == "file" and (parts.netloc or len(parts.path.strip("/")) == 0):
            raise fields.fail("url", f"must be file:///FOLDER, got {config.url!r}")
        if config.volume and parts.scheme != "file":
            raise fields.fail("volume", "belongs to a URL file:///FOLDER")
        if config.secret and not config.url:
            raise fields.fail("secret", "belongs to a URL")
        fields.done()
        return config


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
        artifacts: Where it puts calibration bundles.
    """

    image: str
    image_pull_policy: str = "IfNotPresent"
    command: tuple[str, ...] = DEFAULT_COMMAND
    extra_volumes: tuple[Mapping[str, Any], ...] = ()
    extra_volume_mounts: tuple[Mapping[str, Any], ...] = ()
    extra_env: tuple[Mapping[str, Any], ...] = ()
    resources: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_RESOURCES))
    passed_env: Mapping[str, str] = field(default_factory=dict)
    artifacts: ArtifactsConfig = field(default_factory=ArtifactsConfig)

    @classmethod
    def read(cls, fields: Fields, environ: Mapping[str, str], artifacts: ArtifactsConfig) -> Self:
        """Read the section ``profiler``.

        Args:
            fields: The section.
            environ: The operator's own variables.
            artifacts: The section ``artifacts``.

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
            artifacts=artifacts,
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
    artifacts = ArtifactsConfig.read(fields.child("artifacts", {}))
    config = ProfilerConfig.read(fields.child("profiler"), environ, artifacts)
    fields.done()
    return config
