"""Makes the samples of peers' own code that tests compare presets with: ``python benchmarks/peers_golden.py``.

For peers that are no package (KIVI, SplitZip), and vLLM's caches, whose kernels need a GPU or minutes in Triton's
interpreter. One file of each is fetched from its repository at a pinned commit and checked against a pinned digest, or
given by ``--file NAME=PATH``; vLLM is the installed one. Their functions run on a CPU, Triton's kernels in its
interpreter, on the small tensors that the samples hold too. Nothing of theirs is kept but what they computed.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import types
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# Triton reads it when a kernel is defined
os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from safetensors.torch import save_file

from peers_code import load

FOLDER: Final = Path(__file__).parents[1] / "tests" / "strategies" / "peer-samples"
TOKENS: Final = 64
HEAD_DIM: Final = 64
Sample = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file of a repository.

    Attributes:
        url: Where it is.
        sha256: What it is.
        licence: Under which.
    """

    url: str
    sha256: str
    licence: str


_RAW: Final = "https://raw.githubusercontent.com"
SOURCES: Final = {
    "kivi": Source(
        url=f"{_RAW}/jy-yuan/KIVI/876b4d2d08e3b1d5f70d0969c299d8c7c42ddfb6/quant/new_pack.py",
        sha256="3678af0e34a0ba18e5d80a4128acf11d4070667c800a15540a16d07253a4f75e",
        licence="MIT",
    ),
    "splitzip": Source(
        url=f"{_RAW}/Intelligent-Microsystems-Lab/SplitZip/a22be39e2815fd07c101c892d45c0bed4e5d95ae/codec_gpu.py",
        sha256="e28fe3263e8906b26d59789cbc5bccf14edc8391b0dae986aafaf34adb2d392c",
        licence="MIT",
    ),
}


def rows() -> torch.Tensor:
    """Return ``[TOKENS, 1, HEAD_DIM]`` bfloat16: channels with means, an outlying first token, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, 1, HEAD_DIM, generator=generator)
    x += 4 * torch.randn(1, 1, HEAD_DIM, generator=generator)
    x *= torch.rand(TOKENS, 1, 1, generator=generator) + 0.05
    x[0] *= 8
    x[1] = 0
    return x.bfloat16()


def kivi(path: Path) -> Sample:
    """Return KIVI's codes, scales and least values of the rows as keys and as values."""
    module = load("kivi_new_pack", path)
    # it divides by zero where all values of a group are equal, so there is no token of zeros
    x = rows()
    x[1] = x[2]
    sample: Sample = {"native": x}
    # [batch, heads, tokens, dim]; of the packed codes, tokens of keys and channels of values are in one word
    whole = x.float().permute(1, 0, 2)[None].contiguous()
    for bits in (2, 4):
        for kind, dim in (("k", 2), ("v", 3)):
            packed, scale, least = getattr(module, f"quant_and_pack_{kind}cache")(whole, 64, bits)
            codes = module.unpack_tensor(packed, bits, dim)
            sample[f"{kind}{bits}.codes"] = codes[0, 0].to(torch.uint8).contiguous()
            sample[f"{kind}{bits}.scales"] = scale[0, 0].contiguous()
            sample[f"{kind}{bits}.least"] = least[0, 0].contiguous()
    return sample


def splitzip(path: Path) -> Sample:
    """Return SplitZip's code book, codes and escapes of bfloat16 values, its book calibrated on them."""
    module = load("splitzip_codec", path)
    # of so many sizes that there are more exponents than its book holds
    x = rows() * 2.0 ** (torch.arange(TOKENS) % 13 - 6)[:, None, None]
    codec = module.ChunkLocalSplitZipGPU(device="cpu")
    codec.calibrate(x)
    made = codec.encode(x)
    assert torch.equal(codec.decode(made).view(torch.int16), x.reshape(-1).view(torch.int16))
    return {
        "native": x,
        "book": codec.dec_lut,
        "codes": made.pk,
        "rest": made.sm,
        "positions": (made.chunk_id * made.chunk_size + made.local_pos.int()).int(),
        "escapes": made.esc_val,
    }


def vllm() -> Sample:
    """Return what vLLM's caches with a scale for each token and head hold of keys, and what attention reads there."""
    # on a CPU vLLM puts a placeholder in Triton's place, which defines no kernels
    triton_utils: Any = types.ModuleType("vllm.triton_utils")
    triton_utils.triton, triton_utils.tl, triton_utils.HAS_TRITON = triton, tl, True
    triton_utils.LOG2E, triton_utils.LOGE2, triton_utils.tldevice = 1.0, 1.0, None
    sys.modules["vllm.triton_utils"] = triton_utils
    from vllm.v1.attention.ops import int4_per_token_head as int4
    from vllm.v1.attention.ops import triton_reshape_and_cache_flash as flash
    from vllm.v1.kv_cache_interface import KVQuantMode

    x = rows()
    sample: Sample = {"native": x}
    slots = torch.arange(TOKENS)
    for name, dtype, mode in (
        ("int8", torch.int8, KVQuantMode.INT8_PER_TOKEN_HEAD),
        ("fp8", torch.float8_e4m3fn, KVQuantMode.FP8_PER_TOKEN_HEAD),
    ):
        codes = torch.zeros((2, 1, TOKENS, 1, HEAD_DIM), dtype=dtype)
        scales = torch.zeros((2, 1, TOKENS, 1))
        flash.triton_reshape_and_cache_flash_per_token_head_quant(
            x, x, *codes, *scales, slots, kv_quant_mode=mode
        )
        sample[f"{name}.scales"] = scales[0, 0].clone()
        # the interpreter loses what carries into the exponent of an fp8 number: its codes are not what a GPU writes
        if dtype == torch.int8:
            sample[f"{name}.codes"] = codes[0, 0].clone()
    packed = torch.zeros((2, 1, TOKENS, 1, HEAD_DIM // 2), dtype=torch.uint8)
    scales = torch.zeros((2, 1, TOKENS, 1))
    int4.reshape_and_cache_int4(
        x, x, *packed, slots, k_scale_cache=scales[0], v_scale_cache=scales[1]
    )
    sample["int4.turned"] = int4.single_rht(x.float()).bfloat16()
    sample["int4.codes"], sample["int4.scales"] = packed[0, 0].clone(), scales[0, 0].clone()
    return sample


def fetched(name: str, given: dict[str, Path], folder: Path) -> Path:
    """Return a peer's file, checked.

    Raises:
        ValueError: It is another file.
    """
    source = SOURCES[name]
    path = given.get(name)
    if path is None:
        path = folder / f"{name}.py"
        with urllib.request.urlopen(source.url, timeout=60) as answer:
            path.write_bytes(answer.read())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path} has sha256 {found}, expected {source.sha256}")
    return path


def main() -> None:
    """Write the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", action="append", default=[], metavar="NAME=PATH")
    arguments = parser.parse_args()
    given = {name: Path(path) for name, _, path in (each.partition("=") for each in arguments.file)}
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in (("kivi", kivi), ("splitzip", splitzip)):
            source = SOURCES[name]
            about = {"of": source.url, "sha256": source.sha256, "licence": source.licence}
            path = fetched(name, given, Path(scratch))
            save_file(make(path), FOLDER / f"{name}.safetensors", metadata=about)
    sample = vllm()
    import vllm as package

    about = {"of": f"vllm {package.__version__}", "licence": "Apache-2.0"}
    save_file(sample, FOLDER / "vllm.safetensors", metadata=about)
    for file in sorted(FOLDER.glob("*.safetensors")):
        print(f"{file.name:24s} {file.stat().st_size:7,d} bytes")


if __name__ == "__main__":
    main()
