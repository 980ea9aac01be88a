"""Compile the kernels' launches for sm_80 and sm_90 without a GPU: shared memory, registers, spills, tensor cores.

    python scripts/kernels/aot.py [--only NAME[:CALL] ...] [--arch 90 ...] [--jobs 2] [--strict] [--json FILE] [--list]

Every operator's calls in `tests/kernels/aot_calls/NAME.py` are made on CPU tensors with launches recorded instead of
made, and each distinct launch is compiled as the GPU's driver would get it. Prints a table; exit code 1 when a kernel
has more shared memory than a block may have, spills more than is let pass, or has no tensor-core instruction for a
product of 16-bit numbers.

Registers and spills are those of the installed Triton's assembler; other versions give others. With an unpacked wheel
of one in front on PYTHONPATH, and a TRITON_CACHE_DIR of its own, that one compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import resource
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # kernels are compiled here, and Triton reads this when it is imported
    os.environ["TRITON_INTERPRET"] = "0"

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
CALLS = ROOT / "tests" / "kernels" / "aot_calls"
SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one block may have (163 KB on A100, 227 KB on H100)."""
SPILLS = 64
"""Bytes of register spills (stores and loads together) from which a kernel is refused; below, it is let pass."""
LET_PASS = {
    (name, int(arch)): most
    for arch, kernels in json.loads(Path(__file__).with_name("aot_spills.json").read_text()).items()
    for name, most in kernels.items()
}
"""Operator and kernel, architecture -> most bytes of spills that are let pass, whatever the call.

On sm_90, window_linear's kernels at head dim 64 were measured faster on an H100 than variants without spills (more
warps, fewer registers; what the output spills is of carries), and its others are built alike. Of gated_linear,
gated_delta and generalized_delta it is a debt: with decays per dimension the variants without spills were wrong on an
H100; float32 was not tuned, which is where the window, taylor_linear and conjugate spill; stretches do with heads of
128 alone. Each is the largest of what Triton 3.6 and 3.9 give (the window: 3.9) and a tenth more, to go down alone.
"""
NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of one launch."""

    module: str
    call: str
    """The first call that makes this launch."""
    kernel: str
    arch: int
    warps: int
    stages: int
    shared: int = 0
    """Bytes a block."""
    registers: int = 0
    """A thread."""
    spills: int = 0
    """Bytes, stores and loads together."""
    dots: int = 0
    """wgmma (sm_90) or mma instructions in the PTX."""
    has_dots: bool = False
    """Whether the kernel multiplies matrices that tensor cores take: 16-bit ones, or float32 as tf32."""
    seconds: float = 0.0
    """Of the processor, to compile it; near zero for what was compiled before."""
    error: str = ""
    """Why it does not compile."""
    operator: str = ""
    """That the kernel belongs to."""

    def problems(self, strict: bool = False) -> list[str]:
        """Every rule that is broken; `strict` lets no spill pass."""
        found = [f"does not compile: {self.error}"] if self.error else []
        if self.shared > SHARED[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, over {SHARED[self.arch]}")
        let_pass = LET_PASS.get((f"{self.operator}.{self.kernel}", self.arch), SPILLS - 1)
        if self.spills > (0 if strict else let_pass):
            found.append(f"{self.spills} bytes of spills")
        if self.has_dots and not self.dots:
            found.append("matrix products, but no tensor-core instruction")
        return [f"{self.module}, '{self.call}': {self.kernel} sm_{self.arch}: {problem}" for problem in found]


@dataclass(frozen=True)
class Job:
    """One distinct launch to compile, and where it came from."""

    module: str
    call: str
    launch: Any


def compile_launch(job: Job, arch: int) -> Compiled:
    """Compile one launch for `arch`, with the specialization that its arguments would get at run time.

    Raises:
        RuntimeError: the assembler said nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from linearize.kernels.launch import registers

    launch, began = job.launch, _processor_seconds()
    target, options = GPUTarget("cuda", arch, 32), registers(arch) | launch.options

    def compiled() -> tuple[Any, str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = triton.compile(
                ASTSource(launch.kernel, *specialized(launch)), target=target, options=options
            )
        return made, said.getvalue()

    triton.knobs.nvidia.dump_ptxas_log = True
    made, log = compiled()
    # Triton keeps binaries but not what ptxas said of them, so that is kept beside them.
    known = Path(triton.knobs.cache.dir) / "aot" / f"{made.metadata.hash}.json"
    if not log and not known.is_file():
        triton.knobs.compilation.always_compile = True
        try:
            made, log = compiled()
        finally:
            triton.knobs.compilation.always_compile = False
    if log:
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(resources(log)), encoding="utf-8")
    registers, spills = json.loads(known.read_text(encoding="utf-8"))
    return Compiled(
        job.module,
        job.call,
        kernel_name(launch),
        arch,
        made.metadata.num_warps,
        made.metadata.num_stages,
        made.metadata.shared,
        registers,
        spills,
        len(re.findall(r"wgmma\.mma_async|\bmma\.sync", made.asm["ptx"])),
        takes_tensor_cores(made.asm["ttir"]),
        round(_processor_seconds() - began, 1),
        operator=operator_name(launch),
    )


def _processor_seconds() -> float:
    """Of this process and of the assemblers that it has started."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def operator_name(launch: Any) -> str:
    """Of the folder that the function is in."""
    return str(launch.kernel.fn.__module__.rpartition(".")[0].rpartition(".")[2])


def kernel_name(launch: Any) -> str:
    """Of the function that is launched."""
    return str(launch.kernel.fn.__name__).strip("_")


def specialized(launch: Any) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes of a launch, as the JIT would choose them; tensors are 16-byte aligned."""
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
    return signature, constants, attributes


def resources(log: str) -> tuple[int, int]:
    """Registers a thread and bytes of spills, from what ptxas -v says."""
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        raise RuntimeError(f"ptxas said nothing about registers: {log[:500]}")
    return max(registers), sum(int(x) for x in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def takes_tensor_cores(ttir: str) -> bool:
    """Whether a kernel's intermediate form has products of 16-bit numbers, or of float32 rounded to tf32."""
    dots = [line for line in ttir.splitlines() if re.search(r"\btt\.dot\b", line)]
    return any(re.search(r"x(?:bf|f)16[,>]|inputPrecision = tf32", line) for line in dots)


def record(module: str, wanted: Sequence[str] = (), folder: Path = CALLS) -> list[Job]:
    """Distinct launches of a module's calls.

    Args:
        module: name of a file in the folder.
        wanted: names of its calls; all without.

    Raises:
        SystemExit: no such call.
    """
    from linearize.kernels import dispatch
    from linearize.kernels import launch as launches

    found = importlib.util.spec_from_file_location(f"aot_calls_{module}", folder / f"{module}.py")
    assert found is not None and found.loader is not None
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    if missing := sorted(set(wanted) - set(loaded.CALLS)):
        raise SystemExit(f"{module} has no call {missing}; it has {list(loaded.CALLS)}")
    jobs: dict[Any, Job] = {}
    for name, call in loaded.CALLS.items():
        if wanted and name not in wanted:
            continue
        with dispatch.kernels("triton"), launches.record() as made:
            call()
        for launch in made:
            # only dtypes matter from here on, and the tensors of all calls together take gigabytes
            for key, value in launch.arguments.items():
                if isinstance(value, torch.Tensor):
                    launch.arguments[key] = value.new_empty(0)
            jobs.setdefault(identity(launch), Job(module, name, launch))
    return list(jobs.values())


def identity(launch: Any) -> Any:
    """The same for launches that compile to the same binary."""
    signature, constants, attributes = specialized(launch)
    parts = (signature, constants, attributes, launch.options)
    return (
        launch.kernel.fn.__module__,
        launch.kernel.fn.__qualname__,
        *(repr(sorted(part.items())) for part in parts),
    )


TITLES = ("kernel", "arch", "warps", "stages", "shared", "regs", "spills", "mma", "s")
HEADER = "{:32} {:>4} {:>5} {:>6} {:>7} {:>4} {:>6} {:>4} {:>5}  call".format(*TITLES)


def line(row: Compiled) -> str:
    """Of the table, with the call that makes the launch."""
    return (
        f"{row.kernel:32} {row.arch:4} {row.warps:5} {row.stages:6} {row.shared:7} {row.registers:4} {row.spills:6} "
        f"{row.dots:4} {row.seconds:5}  {row.module}: {row.call}"
    )


def compile_all(jobs: Sequence[Job], archs: Sequence[int], processes: int) -> Iterator[Compiled]:
    """Compile every launch for every architecture, in that many processes, and give the results in order."""
    JOBS[:] = jobs
    tasks = [(index, arch) for arch in archs for index in range(len(jobs))]
    if processes == 1:
        yield from map(_compile, tasks)
        return
    # Forked, because recorded launches cannot be sent: the children find them in their copy of this process.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(_compile, tasks, chunksize=1)


JOBS: list[Job] = []
"""What the forked processes compile."""


def _compile(task: tuple[int, int]) -> Compiled:
    index, arch = task
    job = JOBS[index]
    try:
        return compile_launch(job, arch)
    except Exception as error:  # whatever Triton or the assembler raises is this kernel's result
        options = job.launch.options
        warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
        said = f"{type(error).__name__}: {error}"
        return Compiled(job.module, job.call, kernel_name(job.launch), arch, warps, stages, error=said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, compile, print; 1 when something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME[:CALL]", help="operators, or calls of them")
    parser.add_argument("--arch", nargs="+", type=int, default=[90, 80], choices=sorted(SHARED), metavar="N")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--strict", action="store_true", help="let no spill pass")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--list", action="store_true", help="only print what would be compiled")
    parser.add_argument("--calls", type=Path, default=CALLS, metavar="DIR", help="folder of the calls")
    options = parser.parse_args(arguments)
    names = sorted(path.stem for path in options.calls.glob("*.py") if path.stem != "__init__")
    wanted: dict[str, list[str]] = {}
    for item in options.only or names:
        name, _, call = item.partition(":")
        if name not in names:
            parser.error(f"--only {name}: one of {', '.join(names)}")
        wanted.setdefault(name, []).extend([call] if call else [])
    torch.set_num_threads(1)  # before anything is forked
    jobs = [job for name, calls in wanted.items() for job in record(name, calls, options.calls)]
    if options.list:
        for job in jobs:
            print(f"{job.module}: {job.call}: {operator_name(job.launch)}.{kernel_name(job.launch)}")
        return 0
    rows: list[Compiled] = []
    print(HEADER)
    for row in compile_all(jobs, options.arch, options.jobs):
        rows.append(row)
        print(line(row), flush=True)
    problems = [problem for row in rows for problem in row.problems(options.strict)]
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    print("\n".join(problems) or f"{len(rows)} kernels, no problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.exit(main())
