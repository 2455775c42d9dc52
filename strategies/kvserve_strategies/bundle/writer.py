"""Writing a bundle as a folder: whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvserve_api.errors import ArtifactError
from kvserve_strategies.bundle.basis import named
from kvserve_strategies.bundle.cache import CacheFolder
from kvserve_strategies.bundle.contents import Contents
from kvserve_strategies.bundle.files import (
    CORE,
    BasisEntry,
    FileEntry,
    basis_file,
    basis_forms,
    core_forms,
)
from kvserve_strategies.bundle.manifest import MANIFEST, Manifest
from kvserve_strategies.bundle.tensors import pack, sha256


def write_bundle(folder: Path, contents: Contents) -> str:
    """Write a bundle and return its digest; the same contents give the same digest.

    Args:
        folder: Where to; it must be empty or not exist. It appears in one step.
        contents: What to write.

    Raises:
        ArtifactError: The contents contradict themselves, or the folder is in use or can't be written.
    """
    require_free(folder)
    contents.check()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ArtifactError("out", f"can't write {folder}: {error.strerror}") from error
    try:
        document = _write_files(part, contents).canonical()
        # what could not be read back must not be written; this also checks the parts against each other
        digest = Manifest.parse(document).digest
        write_file(part / MANIFEST, document)
        part.chmod(0o755)
        part.replace(folder)
    except OSError as error:
        raise ArtifactError("out", f"can't write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return digest


def require_free(folder: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        ArtifactError: It is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError("out", f"{folder} is not an empty folder: give a new one")


def verified_files(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file of a bundle but the manifest, each checked.

    Raises:
        ArtifactError: One is missing or damaged.
    """
    for name, entry in sorted(manifest.files.items()):
        if not CacheFolder(folder).holds(name, entry):
            raise ArtifactError(name, f"in {folder} is missing or damaged: calibrate anew")
        yield name, folder / name


def _write_files(folder: Path, contents: Contents) -> Manifest:
    layout = contents.layout
    files = {}
    data = pack(CORE, contents.core(), core_forms(layout, contents.metrics))
    files[CORE] = _add(folder / CORE, data)
    bases = {}
    for key, basis in sorted(contents.bases.items()):
        if len(basis.groups) != (count := len(key.blocks(layout))):
            raise ArtifactError(str(key), f"must have {count} groups, has {len(basis.groups)}")
        entry = BasisEntry(
            basis.scale,
            tuple(len(group.rows) for group in basis.groups),
            basis.importance[0].size if basis.importance else 0,
        )
        name = basis_file(key)
        data = pack(name, named(basis), basis_forms(key, layout, entry))
        files[name] = _add(folder / name, data)
        bases[key] = entry
    return Manifest(
        model_fingerprint=contents.model_fingerprint,
        layout=layout,
        ropes=contents.ropes,
        metrics=tuple(sorted(contents.metrics)),
        bases=bases,
        files=files,
        provenance=contents.provenance,
    )


def _add(path: Path, data: bytes) -> FileEntry:
    write_file(path, data)
    return FileEntry(sha256(data), len(data))


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
