"""Triton's kernels on the CPU as they are compiled for a GPU: their PTX, instruction by instruction, on numpy.

Triton's interpreter runs the Python of a kernel, and hides what its compiler makes of it. Here the compiler has worked:
`program` reads the PTX, `threads` holds the registers of a block's threads side by side, `arithmetic`, `conversion`,
`movement` and `warps` say what each instruction does to them, `memory` keeps the bytes and looks for places out of
bounds and for races between barriers, `block` runs one block behind the other, and `device` stands in for
`linearize.kernels.launch.launch`.

    python scripts/kernels/emulate tests/kernels/test_window_linear_triton.py -k triton-pinned_general

An instruction, a modifier or an operand that is not known ends the run with its name; nothing is guessed.

What is not modelled: ptxas (what it makes of the PTX: its order, registers, spills), time, caches, and the order in
which warps and blocks really run; wgmma, the tensor memory accelerator, mbarriers, clusters and atomics, which are
refused (a kernel with wgmma runs as compiled for sm_80: `--arch 80`). Sums of tensor cores are exact and then rounded
to the nearest float32, where a GPU cuts off bits; approximate functions are exact.
"""
