"""Runs normal pods of ours on the skeleton image, with this machine's Python and clone inside.

No image of gigabytes has to be built: the pod sees the host's ``/usr``, the Python installation,
the virtual environment and the clone, read-only and at their own paths. For tests and the demo only.
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testcluster.errors import ClusterError
from testcluster.images import HOST_IMAGE
from testcluster.paths import CLONE_DIR

Json = dict[str, Any]

_SYSTEM = ("/usr", "/etc/ssl", "/etc/alternatives")

# the entry points of our images
_COMMANDS = {
    "operator": ("kvserve", "operator"),
    "controller": ("kvserve", "controller"),
    "profiler": ("python", "-m", "kvserve_profiler", "job"),
}


def host_folders(
    venv: Path = Path(sys.prefix), clone: Path = CLONE_DIR, extra: Sequence[Path] = ()
) -> list[Path]:
    """Return the folders a pod needs to run our code, without any that lies in another.

    Args:
        venv: The virtual environment.
        clone: The repository, into which the environment's editable install points.
        extra: More folders, such as one with a model.
    """
    # the interpreter may be reached through links, like a version manager's alias
    interpreter = (venv / "bin" / "python").resolve()
    home = Path(_pyvenv_home(venv) or str(interpreter.parent)).parent
    wanted = [*map(Path, _SYSTEM), home, interpreter.parent.parent, venv, clone, *extra]
    found: list[Path] = []
    for folder in sorted(dict.fromkeys(wanted), key=lambda f: len(f.parts)):
        if not folder.is_dir():
            raise ClusterError(f"{folder} is to be mounted in pods but is no folder")
        if not any(folder.is_relative_to(outer) for outer in found):
            found.append(folder)
    return found


def host_volumes(
    venv: Path = Path(sys.prefix), clone: Path = CLONE_DIR, extra: Sequence[Path] = ()
) -> tuple[list[Json], list[Json]]:
    """Return ``volumes`` and ``volumeMounts`` for ``host_folders``, all read-only."""
    volumes: list[Json] = []
    mounts: list[Json] = []
    for number, folder in enumerate(host_folders(venv, clone, extra)):
        name = f"host-{number}"
        volumes.append({"name": name, "hostPath": {"path": str(folder), "type": "Directory"}})
        mounts.append({"name": name, "mountPath": str(folder), "readOnly": True})
    return volumes, mounts


def host_env(venv: Path = Path(sys.prefix)) -> list[Json]:
    """Return the variables that an image of ours would set."""
    return [
        {"name": "PATH", "value": f"{venv}/bin:/usr/local/bin:/usr/bin:/bin"},
        {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"},
    ]


def hostify(
    pod_spec: Json,
    *,
    venv: Path = Path(sys.prefix),
    clone: Path = CLONE_DIR,
    extra: Sequence[Path] = (),
) -> Json:
    """Return a pod's spec with all containers of our images on the skeleton image.

    Containers of other images stay as they are. A container's own variables win.

    Args:
        pod_spec: ``spec`` of a Pod or of a pod template; it is not changed.
        venv: As for ``host_folders``.
        clone: As for ``host_folders``.
        extra: As for ``host_folders``.

    Raises:
        ClusterError: A container of ours names no command; the skeleton has no entry point.
    """
    spec = copy.deepcopy(pod_spec)
    volumes, mounts = host_volumes(venv, clone, extra)
    ours = [
        container
        for container in [*spec.get("initContainers", []), *spec["containers"]]
        if "kvserve" in container["image"]
    ]
    for container in ours:
        if not container.get("command"):
            raise ClusterError(
                f"containers[{container['name']}].command: is needed on the skeleton image"
            )
        container["image"] = HOST_IMAGE
        container["imagePullPolicy"] = "Never"
        container["volumeMounts"] = [*container.get("volumeMounts", []), *mounts]
        own = container.get("env", [])
        names = {variable["name"] for variable in own}
        container["env"] = [*(v for v in host_env(venv) if v["name"] not in names), *own]
    if ours:
        spec["volumes"] = [*spec.get("volumes", []), *volumes]
    return spec


def chart_values(
    *,
    venv: Path = Path(sys.prefix),
    clone: Path = CLONE_DIR,
    extra: Sequence[Path] = (),
    commands: Mapping[str, Sequence[str]] | None = None,
) -> Json:
    """Return values of our Helm chart that run its parts on the skeleton image.

    Args:
        venv: As for ``host_folders``.
        clone: As for ``host_folders``.
        extra: As for ``host_folders``.
        commands: Command of each of operator, controller and profiler, in place of the images'
            entry points; by default the same from the environment.
    """
    repository, tag = HOST_IMAGE.rsplit(":", 1)
    volumes, mounts = host_volumes(venv, clone, extra)
    default = {part: [f"{venv}/bin/{words[0]}", *words[1:]] for part, words in _COMMANDS.items()}
    return {
        part: {
            "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
            "command": list(command),
            "extraVolumes": volumes,
            "extraVolumeMounts": mounts,
            "extraEnv": host_env(venv),
        }
        for part, command in {**default, **(commands or {})}.items()
    }


def _pyvenv_home(venv: Path) -> str | None:
    """Return the folder of the interpreter that an environment was made from."""
    try:
        lines = (venv / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return None
    pairs = (line.partition("=") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == "home"), None)
