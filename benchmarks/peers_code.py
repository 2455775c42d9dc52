"""Drivers of peers' own code, run where this project runs: on a CPU, without installing it.

Each driver takes keys and values ``[layers, tokens, kv_heads, head_dim]`` as our codecs do, and returns what the peer
would send and what its receiver would get. Nothing of the peers' arithmetic is restated here.
"""

import importlib
import importlib.util
import io
import logging
import pickle
import sys
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from peers_fetch import fetch

Pair = tuple[torch.Tensor, torch.Tensor]
CACHEGEN_CHUNK: Final = 256
"""Tokens that LMCache stores as one object by default."""


def _on_path(name: str) -> None:
    folder = str(fetch(name))
    if folder not in sys.path:
        sys.path.append(folder)


@cache
def cachegen_modules() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """Return LMCache's CacheGen encoder, decoder and kernels, on its CPU fallback.

    The package around them wants a GPU at import, so it is replaced by what these files ask of it: a logger, a
    decorator that does nothing, and the kernels.
    """
    root = fetch("lmcache") / "lmcache"
    kernels = load(
        "cachegen_kernels", root / "v1" / "platform" / "torch_ops" / "cachegen_kernels.py"
    )
    package = types.ModuleType("lmcache")
    package.__path__ = [str(root)]
    package.device_ops = kernels  # type: ignore[attr-defined]
    package.torch_dev = types.SimpleNamespace(current_device=lambda: None)  # type: ignore[attr-defined]
    package.torch_device_type = "cpu"  # type: ignore[attr-defined]
    sys.modules["lmcache"] = package
    _stub("lmcache.logging", init_logger=logging.getLogger)
    _stub("lmcache.utils", _lmcache_nvtx_annotate=lambda function: function)
    _stub("lmcache.v1.config", LMCacheEngineConfig=object)
    _stub("lmcache.v1.metadata", LMCacheMetadata=object)
    serde = "lmcache.storage_backend.serde"
    return (
        importlib.import_module(f"{serde}.cachegen_encoder"),
        importlib.import_module(f"{serde}.cachegen_decoder"),
        kernels,
    )


def _stub(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def load(name: str, path: Path) -> types.ModuleType:
    """Return one file of a package as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def cachegen_bins(layers: int) -> Pair:
    """Return the bins of keys and values in each layer, as LMCache's default for models of 10 layers or more."""
    keys, values = torch.full((layers,), 16.0), torch.full((layers,), 16.0)
    keys[:10] = 32
    values[:2] = 32
    return keys, values


def cachegen_encode(keys: torch.Tensor, values: torch.Tensor) -> list[bytes]:
    """Return the objects that LMCache would store: pickles of codes, lengths, tables and scales, one for each chunk."""
    encoder, _, _ = cachegen_modules()
    key_bins, value_bins = cachegen_bins(keys.shape[0])
    out = []
    for start in range(0, keys.shape[1], CACHEGEN_CHUNK):
        part = slice(start, start + CACHEGEN_CHUNK)
        joined = torch.stack([keys[:, part], values[:, part]], dim=1)
        made = encoder.encode_function(joined, None, key_bins, value_bins, joined.shape[2])
        with io.BytesIO() as file:
            pickle.dump(made, file)
            out.append(file.getvalue())
    return out


def cachegen_decode(objects: list[bytes], dtype: torch.dtype) -> Pair:
    """Undo `cachegen_encode`, as LMCache's deserialiser does."""
    _, decoder, _ = cachegen_modules()
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for data in objects:
        made = pickle.loads(data)
        layers, tokens, _ = made.max_tensors_key.shape
        buffer = torch.zeros(
            (tokens, 2 * layers * made.num_heads * made.head_size), dtype=torch.uint8
        )
        codes = decoder.decode_function_gpu(made.cdf, made.data_chunks, layers, tokens, buffer)
        scales = (made.max_tensors_key, made.max_tensors_value)
        shape = (layers, tokens, made.num_heads, made.head_size)
        for out, code, bins, scale in zip(
            (keys, values), codes, cachegen_bins(layers), scales, strict=True
        ):
            out.append(decoder.do_dequantize(code, bins, scale).reshape(shape).to(dtype))
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


@cache
def _polar_serde(bits: int) -> tuple[Any, Any]:
    _on_path("tqai")
    _on_path("lmcache-turbo-quant-serde")
    module = importlib.import_module("lmcache_turbo_quant_serde")
    return module.TurboQuantSerializer(bits=bits), module.TurboQuantDeserializer()


def polar_encode(keys: torch.Tensor, values: torch.Tensor, bits: int) -> list[bytes]:
    """Return what lmcache-turbo-quant-serde sends for keys and for values."""
    serializer, _ = _polar_serde(bits)
    return [serializer.to_bytes(keys), serializer.to_bytes(values)]


def polar_decode(objects: list[bytes], bits: int) -> Pair:
    """Undo `polar_encode`."""
    _, deserializer = _polar_serde(bits)
    keys, values = (deserializer.from_bytes(data) for data in objects)
    return keys, values


def polar_quantizer(head_dim: int, bits: int) -> Any:
    """Return the quantiser inside lmcache-turbo-quant-serde, to compare it without its rotation."""
    _on_path("tqai")
    backend = importlib.import_module("tqai.backend").get_backend("torch", "cpu")
    quantizer = importlib.import_module("tqai.quantizer").PolarQuantizer
    return quantizer(head_dim=head_dim, bits=bits, ops=backend)


@dataclass(frozen=True, slots=True)
class Lattice:
    """What kakeyalattice does to keys and values; it has no byte format, so its own count of bits stands for it.

    Attributes:
        keys: As its receiver would get them.
        values: The same.
        nbytes: By its own account.
    """

    keys: torch.Tensor
    values: torch.Tensor
    nbytes: int


def lattice_round_trip(keys: torch.Tensor, values: torch.Tensor, q_range: int) -> Lattice:
    """Encode and decode with kakeyalattice's E8 codec."""
    _on_path("kakeyalattice")
    codec = importlib.import_module("kakeyalattice").V15KakeyaZamirE8GPU(
        D=keys.shape[-1], q_range=q_range, device="cpu"
    )
    rows = 2 * keys.numel() // keys.shape[-1]
    made = [codec.roundtrip(x.float()).to(x.dtype) for x in (keys, values)]
    return Lattice(made[0], made[1], rows * int(codec.bits_per_token_per_head) // 8)


def byte_planes_encode(keys: torch.Tensor, values: torch.Tensor, level: int = 1) -> list[bytes]:
    """Return keys and values losslessly: all high bytes, then all low bytes, each by zstd."""
    _on_path("zstandard")
    compressor = importlib.import_module("zstandard").ZstdCompressor(level=level)
    planes = (_bytes(x)[:, i] for x in (keys, values) for i in range(x.element_size()))
    return [compressor.compress(np.ascontiguousarray(plane)) for plane in planes]


def byte_planes_decode(objects: list[bytes], like: torch.Tensor) -> Pair:
    """Undo `byte_planes_encode`, to the shape and dtype of ``like``."""
    _on_path("zstandard")
    decompressor = importlib.import_module("zstandard").ZstdDecompressor()
    planes = [np.frombuffer(decompressor.decompress(data), np.uint8) for data in objects]
    size = like.element_size()
    keys, values = (
        torch.from_numpy(np.stack(planes[at : at + size], axis=1).reshape(-1).copy())
        .view(like.dtype)
        .reshape(like.shape)
        for at in (0, size)
    )
    return keys, values


def _bytes(x: torch.Tensor) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = x.contiguous().view(torch.uint8).numpy()
    return data.reshape(-1, x.element_size())


def ans_encode(levels: NDArray[np.int32], probabilities: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Return constriction's ANS words of symbols.

    Args:
        levels: ``[channels, tokens]``, 0 to symbols - 1.
        probabilities: ``[channels, symbols]`` float64, each row a distribution without zeros.
    """
    coder, models = _ans(probabilities)
    # a stack: the last channel goes in first, so that the decoder reads them in order
    for row, model in zip(levels[::-1], models[::-1], strict=True):
        coder.encode_reverse(row, model)
    words: NDArray[np.uint32] = coder.get_compressed()
    return words


def ans_decode(
    words: NDArray[np.uint32], probabilities: NDArray[np.float64], tokens: int
) -> NDArray[np.int32]:
    """Undo `ans_encode`."""
    coder, models = _ans(probabilities, words)
    return np.stack([coder.decode(model, tokens) for model in models])


def _ans(
    probabilities: NDArray[np.float64], words: NDArray[np.uint32] | None = None
) -> tuple[Any, list[Any]]:
    _on_path("constriction")
    stream = importlib.import_module("constriction").stream
    categorical = stream.model.Categorical
    models = [categorical(row, perfect=False) for row in probabilities]
    return stream.stack.AnsCoder(*(() if words is None else (words,))), models
