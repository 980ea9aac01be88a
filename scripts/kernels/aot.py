"""Compile Triton launches for sm_80 and sm_90 without a GPU: shared memory, registers, spills, matrix instructions.

    python scripts/kernels/aot.py [--only NAME] [--arch 90] [--strict]

Every operator's calls in `tests/kernels/aot_calls.py` are made with launches recorded instead of run, and each distinct
launch is compiled as the GPU would compile it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one block may have (163 KB on A100, 227 KB on H100)."""
SPILLS = 64
"""Bytes of register spills that are let pass."""
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
}


@dataclass
class Compiled:
    """What the assembler says of one launch."""

    name: str
    arch: int
    warps: int
    stages: int
    shared: int
    registers: int
    spills: int
    dots: int
    """wgmma (sm_90) or mma instructions in the PTX."""

    def problems(self) -> list[str]:
        found = []
        if self.shared > SHARED[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, over {SHARED[self.arch]}")
        if self.spills >= SPILLS:
            found.append(f"{self.spills} bytes of spills, {SPILLS} or more")
        return [f"{self.name} sm_{self.arch}: {problem}" for problem in found]


def compile_launch(launch: Any, arch: int) -> Compiled:
    """Compile one `launch.Launch` for `arch`, with the specialization that the arguments would get at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[(index,)] = "constexpr", 1
                continue
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    registers, spills = resources(made.asm["ptx"], arch)
    name = re.sub(r"^_+", "", kernel.fn.__name__)
    dots = len(re.findall(r"wgmma\.mma_async|\bmma\.sync", made.asm["ptx"]))
    options = launch.options
    return Compiled(
        name,
        arch,
        options.get("num_warps", 4),
        options.get("num_stages", 3),
        made.metadata.shared,
        registers,
        spills,
        dots,
    )


def resources(ptx: str, arch: int) -> tuple[int, int]:
    """Registers a thread and bytes of spills (stores and loads) as ptxas counts them."""
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = next(x for x in (folder / "ptxas-blackwell", folder / "ptxas") if x.exists())
    target = "sm_90a" if arch == 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={target}", str(file), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas failed: {done.stderr[:2000]}")
    registers = max(int(x) for x in re.findall(r"Used (\d+) registers", done.stderr))
    spills = sum(int(x) for x in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr))
    return registers, spills


def distinct(launches: list[Any]) -> list[Any]:
    """Launches that compile to different binaries."""
    seen, kept = set(), []
    for launch in launches:
        key = (
            launch.kernel.fn.__qualname__,
            tuple(
                (n, x.dtype if isinstance(x, torch.Tensor) else (x % 16 == 0, x == 1) if _plain(launch, n, x) else x)
                for n, x in sorted(launch.arguments.items())
            ),
            tuple(sorted(launch.options.items())),
        )
        if key not in seen:
            seen.add(key)
            kept.append(launch)
    return kept


def _plain(launch: Any, name: str, value: Any) -> bool:
    fixed = {p.name for p in launch.kernel.params if p.is_constexpr}
    return name not in fixed and isinstance(value, int)


def table(rows: list[Compiled]) -> str:
    """One line a kernel."""
    lines = [f"{'kernel':44} {'arch':>4} {'warps':>5} {'stages':>6} {'shared':>7} {'regs':>5} {'spills':>6} {'mma':>5}"]
    lines += [
        f"{r.name:44} {r.arch:4} {r.warps:5} {r.stages:6} {r.shared:7} {r.registers:5} {r.spills:6} {r.dots:5}"
        for r in rows
    ]
    return "\n".join(lines)
