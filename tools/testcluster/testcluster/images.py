"""Container images without a registry or a container tool: docker-archive tars by Python."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PAUSE_IMAGE = "kvserve.test/pause:1"
COREDNS_IMAGE = "kvserve.test/coredns:1"
HOST_IMAGE = "kvserve.test/host:1"

_CREATED = "2026-01-01T00:00:00Z"

# what an image of ours brings beyond /usr: a name for the user that pods run as, which
# Python's getpass asks for, and how to look up host names
_ETC = {
    "etc/passwd": b"root:x:0:0:root:/root:/usr/sbin/nologin\n"
    b"kvserve:x:1000:1000:kvserve:/tmp:/usr/sbin/nologin\n",
    "etc/group": b"root:x:0:\nkvserve:x:1000:\n",
    "etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\n",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A one-layer image; paths inside are relative to its root.

    Attributes:
        name: Repository and tag.
        folders: Empty folders, mode 755, and 1777 for ``tmp``.
        files: Path to content, mode 644.
        programs: Path to a file of this machine, mode 755.
        links: Path to a link's target.
        entrypoint: What runs where a container names no command.
        env: Environment.
    """

    name: str
    folders: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    programs: Mapping[str, Path] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    entrypoint: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def write_archive(image: Image, path: Path) -> None:
    """Write an image as docker-archive, the same bytes for the same image every time."""
    layer = _layer(image)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": _CREATED,
            "config": {
                "Entrypoint": list(image.entrypoint) or None,
                "Env": [f"{name}={value}" for name, value in image.env.items()],
            },
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"],
            },
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps(
        [{"Config": config_name, "RepoTags": [image.name], "Layers": ["layer.tar"]}]
    ).encode()
    with tarfile.open(path, "w") as archive:
        for name, content in (
            (config_name, config),
            ("manifest.json", manifest),
            ("layer.tar", layer),
        ):
            _add_file(archive, name, content, 0o644)


def cluster_images(bin_dir: Path) -> tuple[Image, ...]:
    """Return the images that every node needs."""
    return (
        Image(name=PAUSE_IMAGE, programs={"pause": bin_dir / "pause"}, entrypoint=["/pause"]),
        Image(
            name=COREDNS_IMAGE,
            programs={"coredns": bin_dir / "coredns"},
            entrypoint=["/coredns"],
        ),
        host_image(),
    )


def host_image() -> Image:
    """Return the skeleton on which a pod mounts the host's ``/usr`` and becomes a Debian.

    With merged ``/usr`` these links and a read-only mount are a whole userland.
    """
    return Image(
        name=HOST_IMAGE,
        folders=["usr", "etc", "tmp", "var", "run", "proc", "sys", "dev"],
        files=_ETC,
        links={"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"},
        env={"HOME": "/tmp", "PATH": "/usr/local/bin:/usr/bin:/bin"},
    )


def _layer(image: Image) -> bytes:
    """Return the image's only layer, an uncompressed tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for name in image.folders:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            info.mode = 0o1777 if name == "tmp" else 0o755
            layer.addfile(info)
        for name, target in image.links.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.SYMTYPE
            info.linkname = target
            layer.addfile(info)
        for name, content in image.files.items():
            _add_file(layer, name, content, 0o644)
        for name, source in image.programs.items():
            _add_file(layer, name, source.read_bytes(), 0o755)
    return buffer.getvalue()


def _add_file(archive: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    """Add one file with root as owner and no time."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = mode
    archive.addfile(info, io.BytesIO(content))
