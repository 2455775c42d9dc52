"""Images written by Python."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

from testcluster.images import HOST_IMAGE, Image, host_image, write_archive


def _read(path: Path) -> dict[str, bytes]:
    """Return the files of a tar."""
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m) for m in archive.getmembers()}
        return {name: file.read() for name, file in files.items() if file is not None}


def test_archive_is_consistent(tmp_path: Path) -> None:
    """Manifest, configuration and layer name each other by their digests."""
    path = tmp_path / "image.tar"
    write_archive(host_image(), path)
    files = _read(path)
    (manifest,) = json.loads(files["manifest.json"])
    assert manifest["RepoTags"] == [HOST_IMAGE]
    config = files[manifest["Config"]]
    assert manifest["Config"] == f"{hashlib.sha256(config).hexdigest()}.json"
    (layer,) = manifest["Layers"]
    digest = hashlib.sha256(files[layer]).hexdigest()
    assert json.loads(config)["rootfs"]["diff_ids"] == [f"sha256:{digest}"]


def test_archive_is_the_same_every_time(tmp_path: Path) -> None:
    """An image has the same bytes whenever it is written."""
    for name in ("a", "b"):
        write_archive(host_image(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_layer_holds_what_the_image_says(tmp_path: Path) -> None:
    """Folders, links, files and programs have their kind, content and mode."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    image = Image(
        name="x/y:1",
        folders=["tmp", "etc"],
        files={"etc/motd": b"hello"},
        programs={"run": program},
        links={"bin": "usr/bin"},
    )
    write_archive(image, tmp_path / "image.tar")
    layer = io.BytesIO(_read(tmp_path / "image.tar")["layer.tar"])
    with tarfile.open(fileobj=layer) as archive:
        members = {m.name: m for m in archive.getmembers()}
        motd = archive.extractfile("etc/motd")
        assert motd is not None
        assert motd.read() == b"hello"
    assert {name: oct(m.mode) for name, m in members.items() if not m.issym()} == {
        "tmp": "0o1777",
        "etc": "0o755",
        "etc/motd": "0o644",
        "run": "0o755",
    }
    assert members["bin"].linkname == "usr/bin"
