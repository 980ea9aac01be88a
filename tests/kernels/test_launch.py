"""What a launch on a CUDA device adds to its kernel's options, on tensors that only say that they are there."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from linearize.kernels import launch


class Kernel:
    """Keeps what it is launched with."""

    def __init__(self) -> None:
        self.given: dict[str, object] = {}

    def __getitem__(self, grid):
        return lambda **arguments: self.given.update(arguments, grid=grid)


@pytest.fixture
def device(monkeypatch):
    """A function that sets the capability and the current device; it gives the devices that were switched to."""
    switched = []

    @contextmanager
    def use(index):
        switched.append(index)
        yield

    def made(capability, current=0):
        launch._architecture.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "device", use)
        return switched

    yield made
    launch._architecture.cache_clear()


def on_gpu(index: int = 0) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, device=f"cuda:{index}")


@pytest.mark.parametrize(
    ("capability", "registers"), [((8, 0), 255), ((8, 9), 255), ((9, 0), None), ((12, 0), None)]
)
def test_sm_80_hears_how_many_registers_there_are(device, capability, registers):
    device(capability)
    kernel = Kernel()
    launch.launch(kernel, (3,), x=on_gpu(), num_warps=4)
    assert kernel.given.get("maxnreg") == registers and kernel.given["grid"] == (3,)


def test_a_kernel_that_has_its_own_number_keeps_it(device):
    device((8, 0))
    kernel = Kernel()
    launch.launch(kernel, (3,), x=on_gpu(), maxnreg=168)
    assert kernel.given["maxnreg"] == 168


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="a CUDA device that is there must be a second one")
def test_the_tensors_device_is_the_one_that_runs(device):
    switched = device((9, 0), current=0)
    launch.launch(Kernel(), (1,), x=on_gpu(0))
    assert switched == []
    launch.launch(Kernel(), (1,), x=on_gpu(1))
    assert switched == [1]


def test_an_empty_grid_launches_nothing():
    kernel = Kernel()
    launch.launch(kernel, (0, 4), x=torch.zeros(1))
    assert kernel.given == {}
