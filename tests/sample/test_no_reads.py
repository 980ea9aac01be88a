"""A step of a writer reads nothing of the device and makes no shape that depends on data, whoever ends a document."""

from __future__ import annotations

import pytest
import tiny
import torch
from on_device import OnDevice, no_autocast, to_meta

from linearize.decode.newest import attending
from linearize.kernels import dispatch
from linearize.sample.choice import Narrow
from linearize.sample.writer import Writer


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_step(family, triton, monkeypatch):
    no_autocast(monkeypatch)
    model = tiny.model(family)
    to_meta(model)
    made = Writer(
        model, 3, Narrow(True, 0.9, 20, 0.9), [[3, 4], [5]], ends=[2], length=16, steps=40, capture=False
    )
    made._reset()
    made.clock.start(0)
    monkeypatch.setattr(dispatch, "use_triton", lambda *x: triton)
    with torch.no_grad(), attending(made.config):
        made._eager_step()  # makes the states
        held = {name: id(x) for name, x in vars(made).items() if isinstance(x, torch.Tensor)}
        with OnDevice():
            made._eager_step()
    assert held == {name: id(x) for name, x in vars(made).items() if isinstance(x, torch.Tensor)}, "in place"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_graph_writes_what_the_steps_write():
    model = tiny.model().cuda()
    order = torch.randint(2, (4, 9), generator=torch.Generator().manual_seed(0)).numpy()
    texts = []
    for capture in (True, False):
        options = {"ends": [2, 7, 9], "length": 16, "steps": 200, "capture": capture}
        made = Writer(model, 4, Narrow(True, 0.9, 20, 0.9), [[3, 4], [5]], **options)
        made.prepare_order(9)
        texts += [made.write(order, 0).tolist(), made.write(order, 1).tolist(), made.write(order, 0).tolist()]
    assert texts[0] == texts[2] == texts[3] == texts[5] and texts[1] == texts[4] != texts[0]
