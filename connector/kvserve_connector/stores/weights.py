"""Which weights an engine serves: KV that outlives it must not be taken for that of others."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvserve_api.errors import SpecError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES: Final = 64
SAMPLE_BYTES: Final = 4096


def weights_of(vllm_config: "VllmConfig") -> str:
    """Return a name of an engine's weights: a digest of its model's files and of how they are used.

    Of each file its size and samples that are spread over it are read, not all of it: another checkpoint differs nearly
    everywhere.

    Raises:
        SpecError: The model's files are not on this machine.
    """
    model = vllm_config.model_config
    files = weight_files(model.model, model.revision)
    if not files:
        raise SpecError(
            "kv_connector_extra_config.store.weights",
            f"is needed: {model.model!r} has no weight files here that could be told from others'",
        )
    use = {
        "config": _plain(model.hf_config.to_dict()),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
    }
    return digest_of(files, use)


def weight_files(model: str, revision: str | None) -> list[Path]:
    """Return the weight files of a model: a folder, a file, or a repository in the Hugging Face cache."""
    place = Path(model)
    if place.is_file():
        return [place]
    if not place.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            place = Path(snapshot_download(model, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, OSError, ValueError):
            return []
    return sorted(path for path in place.iterdir() if path.suffix in SUFFIXES)


def digest_of(files: Iterable[Path], use: Mapping[str, Any]) -> str:
    """Return a digest of samples of files, whatever they are called, and of how they are used."""
    state = hashlib.blake2b(json.dumps(use, sort_keys=True, default=str).encode(), digest_size=16)
    for path in files:
        size = path.stat().st_size
        state.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                state.update(file.read(SAMPLE_BYTES))
    return state.hexdigest()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a model's configuration where it came from, and what wrote it."""
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in ("transformers_version", "name_or_path")
    }
