"""No call is launched that a device has no shared memory for: it runs in torch, or is refused by name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linearize.kernels import dispatch, launch
from linearize.kernels.window_linear import chunk, shared_memory, window_linear

ROOT = Path(__file__).resolve().parents[2]
H100, A100 = 232_448, 166_912


def call(dim: int, dtype: torch.dtype, *, window: int = 256, map_dim: int = 64, trains: bool = True) -> None:
    """A call with documents, sinks and factors."""
    tokens, heads, single = 2048, 4, torch.float32

    def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, requires_grad=trains)

    maps = [draw(heads, dim, map_dim, dtype=single) for _ in range(2)]
    factor = draw(heads, dtype=single)
    out, _ = window_linear(
        draw(1, tokens, heads, dim), draw(1, tokens, heads, dim), draw(1, tokens, heads, dim), *maps,
        window=window, scaling=0.1, window_weight=factor, linear_weight=factor, sink=draw(heads, dtype=single),
        codes=torch.zeros(1, tokens, dtype=torch.int32),
    )  # fmt: skip
    if trains:
        out.sum().backward()


def names(made: list[launch.Launch]) -> set[str]:
    return {one.kernel.fn.__name__ for one in made}


@pytest.fixture
def recorded():
    pytest.importorskip("triton")
    with dispatch.kernels("triton"), launch.record() as made:
        yield made


def test_tiles_shrink_where_those_of_whole_chunks_have_no_room(recorded):
    call(128, torch.float32)
    assert {"output_kernel", "key_gradient_kernel"} <= names(recorded)
    assert not any(name.startswith("aligned") for name in names(recorded))


@pytest.mark.parametrize("dim", [64, 128])
def test_what_fits_runs_as_before(recorded, dim):
    call(dim, torch.bfloat16)
    assert "aligned_output_kernel" in names(recorded)


def test_forward_alone_needs_less(recorded):
    call(256, torch.bfloat16, trains=False)
    assert "aligned_output_kernel" in names(recorded)
    with pytest.raises(
        dispatch.KernelError, match=r"window_linear.*256 and 256, maps of 64, torch.bfloat16, with gradie"
    ):
        call(256, torch.bfloat16)


@pytest.mark.parametrize("map_dim", [64, 128])
def test_what_does_not_fit_is_refused_by_name(recorded, map_dim):
    with pytest.raises(dispatch.KernelError) as caught:
        call(256, torch.float32, map_dim=map_dim)
    need = shared_memory.need(torch.float32, 256, 256, map_dim, trains=True)
    for expected in (
        "window_linear",
        "head dims 256 and 256",
        f"{min(need.aligned, need.general):,} bytes",
        f"{H100:,}",
    ):
        assert expected in str(caught.value)
    assert not recorded


def test_with_a_free_choice_torch_runs_it(monkeypatch):
    """As on a device that has no room for anything."""
    choice = SimpleNamespace(use_triton=lambda *tensors: True, automatic=dispatch.automatic)
    monkeypatch.setattr(
        chunk, "dispatch", choice
    )  # here alone: what the torch form is made of chooses for itself
    monkeypatch.setattr(shared_memory, "shared_memory", lambda device: 1024)
    call(16, torch.float32, window=64, map_dim=16)


def test_the_table_is_whole():
    """Every head dim that kernels see, every width of maps; more is needed with gradients, and of wider maps."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (16, 32, 64, 128, 256):
            found = [shared_memory.need(dtype, dim, dim, width, trains=True) for width in shared_memory.MAPS]
            assert all(need is not None and min(need.aligned, need.general) >= 1024 for need in found)
            assert found[2].aligned <= found[3].aligned and found[2].general <= found[3].general
    assert shared_memory.need(torch.bfloat16, 16, 256, 64, trains=True) is None
    assert not shared_memory.rule(torch.device("cpu"), torch.bfloat16, 16, 256, 64, trains=True)[0]


def test_a_launch_that_fails_for_lack_of_it_names_operator_sizes_and_remedy():
    kernel = SimpleNamespace(
        fn=SimpleNamespace(__name__="output_kernel", __module__="linearize.kernels.window_linear.x")
    )
    error = SimpleNamespace(required=300_000, limit=H100, name="shared memory")
    arguments = {"q": torch.zeros(1, dtype=torch.bfloat16), "K": 256, "V": 128, "num_warps": 4}
    text = launch.out_of_resources(kernel, arguments, error)
    for expected in (
        "window_linear",
        "output_kernel",
        "300,000 of shared memory",
        "232,448",
        "K 256, V 128",
        "=torch",
    ):
        assert expected in text


SWEEP = """
from functools import partial
from test_shared_memory import call
import torch

CALLS = {{
    f"{{dim}}, window {{window}}, maps {{maps}}, {{dtype}}": partial(call, dim, dtype, window=window, map_dim=maps)
    for dim, dtype, window, maps in {shapes}
}}
"""


def compiled(tmp_path: Path, shapes: str) -> list[dict]:
    """What the assembler says of calls that the predicate lets pass, in a process where kernels are compiled."""
    pytest.importorskip("triton")
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "sweep.py").write_text(SWEEP.format(shapes=shapes))
    environment = {
        **os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }  # fmt: skip
    script = ROOT / "scripts" / "kernels" / "aot.py"
    command = [sys.executable, str(script), "--arch", "90", "--jobs", "1", "--calls", str(tmp_path / "calls")]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "rows.json")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert (tmp_path / "rows.json").is_file(), done.stdout + done.stderr[-2000:]
    return json.loads((tmp_path / "rows.json").read_text())


@pytest.mark.slow
def test_a_compiled_call_takes_no_more_than_the_table_says(tmp_path):
    rows = compiled(tmp_path, "[(32, torch.float16, 64, 16)]")
    need = shared_memory.need(torch.float16, 32, 32, 16, trains=True)
    assert rows and 0 < max(row["shared"] for row in rows) <= need.aligned <= H100


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton to compile")
def test_nothing_that_is_let_pass_needs_more_than_the_limit(tmp_path):
    """Over head dims, windows and dtypes; calls that are refused are left out of the sweep, as they are of a run."""
    shapes = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (16, 64, 128, 256):
            for maps in (64, 128):
                need = shared_memory.need(dtype, dim, dim, maps, trains=True)
                if min(need.aligned, need.general) <= H100:
                    shapes += [f"({dim}, {dtype}, {window}, {maps})" for window in (16, 64, 256, 1024)]
    rows = compiled(tmp_path, f"[{', '.join(shapes)}]")
    assert len(rows) > 100 and [row for row in rows if row["shared"] > H100] == []
