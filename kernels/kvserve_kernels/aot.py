"""Compiling GPU kernels where there is no GPU, and counting what the compiler made of them.

Triton's own assembler and disassembler make machine code for a target and read it back. Counted are registers, bytes of
spills, and instructions a value: those outside loops once, those of a loop as often as it runs.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES: Final = (80, 90, 100)
_TOOLS: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# shorter loops wait for something, and run once where it is there
_LEAST_LOOP: Final = 10

PIPES: Final = ("integer", "multiply", "float", "special", "memory")
"""Where instructions run; the rest (uniform ones, branches, tensor cores) only takes issue slots."""
_PIPE_OF: Final = {
    "integer": "IADD3 LOP3 SHF ISETP SEL LEA PRMT SGXT VIADD VIADDMNMX IMNMX VIMNMX VIMNMX3 MOV IABS PLOP3 FMNMX FSETP "
    "FSEL BMSK CS2R LOP VABSDIFF FMNMX3 IADD P2R R2P",
    "multiply": "IMAD IDP",
    "float": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HFMA2 HADD2 HMUL2",
    "special": "POPC REDUX MUFU F2I I2F I2FP F2FP F2F FLO FRND BREV VOTE",
    "memory": "LDG STG LDS STS SHFL LDSM STSM ATOMG ATOMS RED LDGSTS LDL STL LDC MATCH REDG",
}
_PIPE: Final = {name: pipe for pipe, names in _PIPE_OF.items() for name in names.split()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One kernel with the types, constants and sizes that it is counted at.

    Attributes:
        name: Unique; ``operation.kernel``.
        kernel: The kernel, from ``triton.jit``.
        types: Type of each argument that is not a constant; pointers as ``*i16``.
        constants: The constants.
        warps: Warps a program.
        stages: Software pipeline stages.
        unaligned: Arguments that are not a multiple of 16.
        values: Native values that one program stands for.
        trips: How often each loop runs, in the order of the code; nested loops count apart.
        marker: For a single loop: an opcode and how many of it one iteration has, by which unrolling shows.
        nbytes: Bytes of main memory read and written a value.
        lines: Cache lines that gathers touch a value, expected for slots drawn evenly.
        tensor: Operations of tensor cores a value, and in which type: (4096.0, "int8").
        per: What a value is: of the cache ("value") or of the entropy coder ("level").
        counted: Whether instructions a value are of interest; else only registers and spills are.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    unaligned: frozenset[str] = frozenset()
    values: float = 1.0
    trips: tuple[float, ...] = ()
    marker: tuple[str, int] | None = None
    nbytes: float = 0.0
    lines: float = 0.0
    tensor: tuple[float, str] | None = None
    per: str = "value"
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted; instructions are of a thread, a value."""

    registers: int
    spilled_nbytes: int
    instructions: float
    pipes: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, figures rounded to hundredths."""
        return {
            "registers": self.registers,
            "spilled_nbytes": self.spilled_nbytes,
            "instructions": round(self.instructions, 2),
            **{pipe: round(self.pipes.get(pipe, 0.0), 2) for pipe in PIPES},
        }


def machine_code(case: Case, architecture: int) -> bytes:
    """Compile a kernel for compute capability 8.0 (80), 9.0 (90) or 10.0 (100); return the cubin."""
    index = {name: i for i, name in enumerate(case.kernel.arg_names)}
    aligned = {
        (index[name],): [["tt.divisibility", 16]]
        for name, kind in case.types.items()
        if name not in case.unaligned and not kind.startswith("fp")
    }
    source = ASTSource(
        case.kernel,
        signature={**case.types, **dict.fromkeys(case.constants, "constexpr")},
        constexprs={(index[name],): value for name, value in case.constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    code: bytes = compiled.asm["cubin"]
    return code


@cache
def disassemble(case: Case, architecture: int) -> tuple[str, str]:
    """Compile a kernel; return its instructions as text, and what it uses of a multiprocessor."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code(case, architecture))
        file.flush()
        return _run("nvdisasm", "-c", "-ndf", file.name), _run("cuobjdump", "-res-usage", file.name)


def count(case: Case, architecture: int) -> Counts:
    """Compile a kernel and count.

    Raises:
        ValueError: The code has other loops than the case says.
    """
    listing, usage = disassemble(case, architecture)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"{case.name}: no resource usage in {usage!r}")
    registers, stack, local = (int(number) for number in found.groups())
    if not case.counted:
        return Counts(registers, stack + local, 0.0, {})
    code, loops = _parse(listing)
    trips = list(case.trips)
    if case.marker is not None:
        opcode, each = case.marker
        unrolled = [code[start:stop].count(opcode) / each for start, stop in loops]
        # the loop that is unrolled most does the work, others what is left of it
        main = unrolled.index(max(unrolled))
        trips = [trips[0] / n if i == main else 0.0 for i, n in enumerate(unrolled)]
    if len(loops) != len(trips):
        sizes = [stop - start for start, stop in loops]
        raise ValueError(f"{case.name}: loops of {sizes} instructions, {len(trips)} expected")
    runs = [1.0] * len(code)
    for (start, stop), times in zip(loops, trips, strict=True):
        runs[start:stop] = [times] * (stop - start)
    totals: defaultdict[str, float] = defaultdict(float)
    for opcode, times in zip(code, runs, strict=True):
        if opcode != "NOP":
            totals["all"] += times
            totals[_PIPE.get(opcode, "other")] += times
    threads = case.warps * 32
    pipes = {pipe: totals[pipe] * threads / case.values for pipe in PIPES}
    return Counts(registers, stack + local, totals["all"] * threads / case.values, pipes)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _parse(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return opcodes up to the end of the kernel, and the loops among them, by start; nested ones after their outer."""
    code: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in listing.splitlines():
        label = re.match(r"(\.L_x_\d+):", line.strip())
        if label:
            labels[label[1]] = len(code)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9]+)\S*(.*?);", line)
        if instruction is None:
            continue
        predicate, opcode, rest = instruction.groups()
        to = re.search(r"\.L_x_\d+", rest)
        if opcode == "BRA" and to:
            jumps.append((len(code), to[0]))
        code.append(opcode)
        # what follows the end are slow paths that are called, and waits
        if opcode == "EXIT" and predicate is None:
            break
    ends: dict[int, int] = {}
    for at, target in jumps:
        start = labels.get(target, len(code))
        if start <= at and at + 1 - start >= _LEAST_LOOP:
            ends[start] = max(ends.get(start, 0), at + 1)
    return code, sorted(ends.items())
