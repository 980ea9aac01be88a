"""The emulator of compiled kernels: what its instructions do, what it refuses, and the faults that it finds.

Real kernels run on it by their own tests, against the definitions in float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "kernels"))

from emulate.block import run  # noqa: E402
from emulate.faults import UnknownInstruction  # noqa: E402
from emulate.memory import GlobalMemory  # noqa: E402
from emulate.program import parse  # noqa: E402

REGISTERS = "\n".join(
    f".reg .{kind} %{name}<40>;" for kind, name in (("pred", "p"), ("b16", "rs"), ("b32", "r"), ("b64", "rd"))
)
PLACE = "mov.u32 %r0, %tid.x; ld.param.b64 %rd0, [k_param_0]; mad.wide.u32 %rd1, %r0, 4, %rd0;"
"""%r0 is the thread's number, %rd1 the place of its 32 bits in the tensor."""
SHARED = "shl.b32 %r1, %r0, 2; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2;"
"""%r1 is the thread's place in shared memory."""
BARRIER = "bar.sync 0;"


def emulate(
    code: str, numbers: np.ndarray, threads: int = 32, blocks: int = 1
) -> tuple[np.ndarray, list[str]]:
    """What a kernel makes of a tensor of 32-bit numbers, and the faults that are found."""
    body = f"{REGISTERS}\n{PLACE}\n{SHARED}\n{code}\nret;"
    program = parse(f".visible .entry k(\n.param .u64 .ptr .global .align 1 k_param_0\n)\n{{\n{body}\n}}\n")
    begin, held = 256, numbers.view(np.uint8)
    contents, valid = np.zeros(begin + held.size + 256, np.uint8), np.zeros(begin + held.size + 256, bool)
    contents[begin : begin + held.size], valid[begin : begin + held.size] = held, True
    memory = GlobalMemory(contents, valid)
    arguments = {"k_param_0": np.uint64(begin)}
    faults = run(program, threads, arguments, (blocks, 1, 1), memory, shared=8 * threads)
    return memory.contents[begin : begin + held.size].view(numbers.dtype), faults.lines()


NUMBERS = np.random.default_rng(0).standard_normal(32).astype(np.float32)
LOAD, STORE = "ld.global.b32 %r3, [%rd1];", "st.global.b32 [%rd1], %r4;"
EACH = {
    "fma": ("fma.rn.f32 %r4, %r3, %r3, 0f40400000;", NUMBERS, NUMBERS.astype(np.float64) ** 2 + 3),
    "ex2": ("ex2.approx.ftz.f32 %r4, %r3;", NUMBERS, 2 ** NUMBERS.astype(np.float64)),
    "max": ("max.f32 %r4, %r3, 0f00000000;", NUMBERS, np.maximum(NUMBERS, 0)),
    "bfloat16": (
        "cvt.rn.bf16x2.f32 %r5, %r3, 0f3F800000; mov.b32 {%rs1, %rs2}, %r5; cvt.f32.bf16 %r4, %rs2;",
        NUMBERS,
        np.ldexp(np.rint(np.ldexp(np.frexp(NUMBERS)[0], 8)), np.frexp(NUMBERS)[1] - 8),
    ),
    "to_whole": (
        "cvt.rzi.s32.f32 %r5, %r3; cvt.rn.f32.s32 %r4, %r5;",
        4 * NUMBERS,
        np.trunc(4 * NUMBERS),
    ),
    "chosen": (
        "setp.lt.f32 %p1, %r3, 0f00000000; selp.f32 %r4, 0f3F800000, %r3, %p1;",
        NUMBERS,
        np.where(NUMBERS < 0, 1, NUMBERS),
    ),
    "guarded": (
        "mov.b32 %r4, %r3; setp.ge.u32 %p1, %r0, 16; @%p1 neg.f32 %r4, %r3;",
        NUMBERS,
        np.where(np.arange(32) < 16, NUMBERS, -NUMBERS),
    ),
    "exchanged": ("shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;", NUMBERS, NUMBERS[np.arange(32) ^ 1]),
    "shifted": (
        "cvt.rzi.s32.f32 %r5, %r3; shr.s32 %r6, %r5, 1; xor.b32 %r7, %r6, 5; cvt.rn.f32.s32 %r4, %r7;",
        64 * NUMBERS,
        (np.trunc(64 * NUMBERS).astype(np.int32) >> 1) ^ 5,
    ),
    "floor": ("cvt.rmi.ftz.f32.f32 %r4, %r3;", 4 * NUMBERS, np.floor(4 * NUMBERS)),
    "bits": (
        "popc.b32 %r5, %r0; cvt.rn.f32.u32 %r4, %r5;",
        NUMBERS,
        [number.bit_count() for number in range(32)],
    ),
    "branches": (
        "mov.b32 %r4, %r3; mov.b32 %r5, %r0; $again: setp.lt.u32 %p1, %r5, 3; @%p1 bra $done; "
        "add.f32 %r4, %r4, %r3; sub.s32 %r5, %r5, 3; bra.uni $again; $done: add.f32 %r4, %r4, 0f3F800000;",
        NUMBERS,
        NUMBERS.astype(np.float64) * (1 + np.arange(32) // 3) + 1,
    ),
}


@pytest.mark.parametrize("name", EACH)
def test_instructions(name):
    code, numbers, expected = EACH[name]
    found, faults = emulate(LOAD + code + STORE, numbers)
    assert not faults
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_matrix_product():
    """The first factor is the identity, so that the second comes out where PTX lays the result."""
    row, quarter = np.arange(32) // 4, np.arange(32) % 4
    one = np.array([0x3F80, 0x3F800000], np.uint32)
    identity = np.where(row // 2 == quarter, one[row % 2], 0).astype(np.uint32)
    second = np.arange(64, dtype=np.float32).reshape(8, 8)
    bits = (second.view(np.uint32) >> 16).astype(np.uint32)
    packed = bits[2 * quarter, row] | bits[2 * quarter + 1, row] << 16
    code = (
        "ld.global.b32 %r3, [%rd1]; ld.global.b32 %r4, [%rd1 + 128]; mov.b32 %r5, 0; "
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r6, %r7, %r8, %r9}, {%r3, %r5}, {%r4}, "
        "{%r5, %r5, %r5, %r5}; st.global.b32 [%rd1], %r6; st.global.b32 [%rd1 + 128], %r7;"
    )
    found, faults = emulate(code, np.concatenate([identity, packed]))
    assert not faults
    found = found.view(np.float32).reshape(2, 32)
    np.testing.assert_array_equal(found, [second[row, 2 * quarter], second[row, 2 * quarter + 1]])


OTHERS = "xor.b32 %r5, %r1, 128; ld.shared.b32 %r4, [%r5];"
"""Reads what the thread of the other warp wrote."""
KEPT = f"{LOAD} st.shared.b32 [%r1], %r3;"
FAULTS = {
    "none": (KEPT + BARRIER + OTHERS + STORE, 1, None),
    "no_barrier": (KEPT + OTHERS + STORE, 1, "shared memory: read of what another warp wrote"),
    "too_early": (
        KEPT + BARRIER + OTHERS + "st.shared.b32 [%r1], %r4;" + BARRIER,
        1,
        "shared memory: written over what another warp read",
    ),
    "nothing_written": (OTHERS + STORE, 1, "shared memory: read of what nothing was written to"),
    "shared_bounds": ("ld.shared.b32 %r4, [%r1 + 512];" + STORE, 1, "shared memory: read out of bounds"),
    "bounds": ("ld.global.b32 %r4, [%rd1 + 4];" + STORE, 1, "global memory: read out of bounds"),
    "two_blocks": (LOAD + "neg.f32 %r4, %r3;" + STORE, 2, "global memory: read of what another block wrote"),
    "one_place": ("st.global.b32 [%rd0], %r0;", 1, "global memory: threads write different numbers"),
    "not_waited_for": (
        "cp.async.ca.shared.global [%r1], [%rd1], 4; cp.async.commit_group;" + BARRIER + OTHERS + STORE,
        1,
        None,
    ),
    "some_threads": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $over;" + BARRIER + "$over: mov.b32 %r4, %r0;" + STORE,
        1,
        "a barrier that some threads do not reach",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    """Two warps, which exchange numbers by shared memory."""
    code, blocks, expected = FAULTS[name]
    numbers = np.arange(64, dtype=np.float32)
    found, faults = emulate(code, numbers, threads=64, blocks=blocks)
    if expected is None:
        assert not faults
        right = np.array_equal(found, np.roll(numbers, 32))
        assert right == (name == "none"), "what is on its way is not there before it is waited for"
    else:
        assert any(line.startswith(expected) for line in faults), faults


@pytest.mark.parametrize(
    "code",
    (
        "wgmma.fence.sync.aligned;",
        "add.sat.f32 %r4, %r3, %r3;",
        "ld.b32 %r4, [%rd1];",
        "mov.u32 %r4, %clock;",
        "bar.sync 1, 32;",
        "add.f32 %r4, %r3, undeclared;",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r4}, {%r4}, {%r4}, {%r4};",
    ),
)
def test_what_is_not_known_is_refused_by_name(code):
    with pytest.raises(UnknownInstruction, match="not known to the emulator") as raised:
        emulate(f"bra.uni $end; {code} $end: mov.b32 %r4, %r0;", NUMBERS)
    assert any(word in str(raised.value) for word in code.rstrip(";").replace(",", " ").split())


COMPILED = """
import torch, triton, triton.language as tl
from emulate.device import emulated
from emulate.faults import UnknownInstruction
from linearize.kernels import launch

@triton.jit
def sums_kernel(x, y, out, rows, inner, N: tl.constexpr, K: tl.constexpr):
    row, column = tl.arange(0, N), tl.arange(0, K)
    inside = (row < rows)[:, None]
    product = tl.zeros([N, N], tl.float32)
    for start in range(0, inner, K):
        left = tl.load(x + row[:, None] * inner + start + column[None, :], mask=inside, other=0.0)
        product = tl.dot(left, tl.load(y + (start + column[:, None]) * N + row[None, :]), product)
    product = product / tl.sum(tl.exp(0.1 * product), 1)[:, None]
    tl.store(out + row[:, None] * N + row[None, :], product, mask=inside)

def compare(arch, size, warps):
    x, y = torch.randn(size, 96).bfloat16(), torch.randn(96, size).bfloat16()
    out = torch.full((size, size), float("nan"))
    arguments = {"x": x, "y": y, "out": out, "rows": size - 2, "inner": 96, "N": size, "K": 32}
    with emulated(arch) as device:
        launch.launch(sums_kernel, (1,), **arguments, num_warps=warps, num_stages=3)
    exact = x.double() @ y.double()
    exact = (exact / (0.1 * exact).exp().sum(1, keepdim=True))[:-2]
    assert (out[:-2] - exact).abs().max() < 1e-5 * exact.abs().max() and out[-2:].isnan().all()
    print(arch, *(made.kernel for made in device.made))

torch.manual_seed(0)
compare(90, 32, 2)
compare(80, 64, 4)
try:
    compare(90, 64, 4)
except UnknownInstruction as error:
    print("wgmma.mma_async" in str(error))
"""


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Where kernels are compiled and not interpreted."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "scripts/kernels", "tests"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_a_compiled_kernel(tmp_path):
    """Copies behind its back in a loop, products by mma, and by wgmma where a GPU has it, which is refused."""
    pytest.importorskip("triton", reason="kernels need Triton to compile")
    (tmp_path / "compiled.py").write_text(COMPILED)  # Triton reads the source of a kernel from its file
    done = in_a_process(str(tmp_path / "compiled.py"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["90 sums_kernel", "80 sums_kernel", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ("pinned_general",))
def test_real_kernels(case):
    """Packed documents' pinned keys, whose gradients a loop's lost copy gave to the first document."""
    pytest.importorskip("triton", reason="kernels need Triton to compile")
    tests = "tests/kernels/test_window_linear_triton.py::test_equals_the_definition"
    done = in_a_process("scripts/kernels/emulate", f"{tests}[triton-{case}]", "-q")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed" in done.stdout and "key_gradient" in done.stdout
