"""Nothing in a one-token step waits for the device, moves data from the host, or has a shape that depends on data.

Steps run on the meta device, where tensors have no data: what would look at some raises. Dispatch goes both ways, to
the torch forms, and to the Triton kernels' registered shapes.
"""

from __future__ import annotations

import covering
import pytest
import torch
from compositions import SHAPES, Draw, label, make, registered
from on_device import META, OnDevice, no_autocast, to_meta

from linearize.bench.subjects import TEACHER, convert, random_model, subjects
from linearize.decode import Decoder, Sampling
from linearize.decode.cache import tensors
from linearize.decode.row_choice import Wish, Wishes, likelihoods
from linearize.decode.slots import Slots
from linearize.kernels import dispatch

# as wide as the kernels take, and small otherwise
SIZES = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 2}
WITHOUT_KERNEL = ("arwkv", "radlads_rwkv7", "swa_sinks", TEACHER)
"""What may run in torch; whoever gives these a kernel takes them out."""


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    no_autocast(monkeypatch)


@pytest.mark.parametrize("name", covering.recipes([*subjects(), TEACHER]))
def test_of_every_recipe(name, monkeypatch):
    """A whole step of the engine, the choice of the token included; layers that stay softmax keep keys in place."""
    model = convert(random_model("cpu", torch.bfloat16, "tiny", **SIZES), name)
    to_meta(model)
    for triton in (False, True):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(dispatch, "use_triton", lambda *x, triton=triton: triton)
            decoder = Decoder(model, 2, eos=[2], length=8, capture=False)
            decoder._reset()
            decoder.clock.start(0)
            with OnDevice(), decoder._decoding():
                decoder._eager_step()
            held = tensors(decoder.cache)
            with OnDevice() as mode, decoder._decoding():
                decoder._eager_step()
        assert triton == ("linearize" in mode.seen) or name in set(WITHOUT_KERNEL) - {TEACHER}
        after = tensors(decoder.cache)
        assert after.keys() == held.keys() and all(after[key] is held[key] for key in held), (
            "written in place"
        )


@pytest.mark.parametrize("name", covering.recipes([*subjects(), TEACHER], covering.states))
def test_of_rows_that_come_and_go(name, monkeypatch):
    """A step over slots and the choice of their tokens; keys of softmax layers go to a place of each row's own.

    Without such layers pieces of prompts are recorded too.
    """
    model = convert(random_model("cpu", torch.bfloat16, "tiny", **SIZES), name)
    to_meta(model)
    slots = Slots(model, 3, 8, prompts=2)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "use_triton", lambda *x: False)
        slots.prepare()
    wishes = Wishes(3, META)
    wishes[1] = Wish(Sampling(True, 0.5, 3, 0.9))
    held = {name: (id(x), x.shape) for name, x in slots._held.held.items()}
    for triton in (False, True):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(dispatch, "use_triton", lambda *x, triton=triton: triton)
            with OnDevice() as mode:
                logits = slots._forward(2)
            assert logits.shape == (2, 97)
            draws = torch.zeros(2, device=META)
            with OnDevice():
                wishes.choose(logits, draws)
                likelihoods(logits, wishes.choose(logits, None), 2)
            if triton and not slots._rows.held:
                ids = torch.zeros(2, 6, dtype=torch.int64, device=META)
                with OnDevice():
                    assert slots._reading._call(ids, ids.clone(), 6, 0, None).shape == (2, 97)
        assert triton == ("linearize" in mode.seen) or name in WITHOUT_KERNEL
    assert {name: (id(x), x.shape) for name, x in slots._held.held.items()} == held


@pytest.mark.parametrize(
    "mixer", [m for m in registered() if m.get("window", {}).get("name") != "full"], ids=label
)
def test_of_every_composition(mixer):
    """Padding among the rows too, which the engine does not have."""
    shape = SHAPES["grouped"]
    made = make(mixer, shape, torch.float32)
    to_meta(made)
    state = made.initial_state(2, torch.float32, META)
    held = dict(state.tensors)
    given = Draw.of(shape, 1, torch.float32).apply(lambda x: x.to(META))
    with OnDevice():
        for valid in (None, torch.ones(2, 1, dtype=torch.bool, device=META)):
            given.run(made.step, state=state, valid=valid)
    assert all(state[name] is held[name] for name in held)


def test_the_form_of_the_device_is_that_of_the_cpu(monkeypatch):
    """On the CPU a terraced window hands on nothing where no block begins; elsewhere a block whose keys are masked."""
    for mixer in registered():
        if mixer.get("window", {}).get("name") != "terraced" or mixer["window"].get("overlap"):
            continue
        shape = SHAPES["grouped"]
        made = make(mixer, shape, torch.float64)
        given = Draw.of(shape, 40, torch.float64)
        valid = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) > 0.2
        answers = []
        for masked in (False, True):
            state = made.initial_state(2, torch.float64, torch.device("cpu"))
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda masked=masked: masked)
                steps = [given[slice(t, t + 1)].run(made.step, state=state, valid=valid[:, t : t + 1])
                         for t in range(40)]  # fmt: skip
            answers.append(torch.cat(steps, 1))
        torch.testing.assert_close(*answers, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: bool(x.any()),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.repeat_interleave(x),
        lambda x: x + torch.tensor([1], device="cpu").to(META),
    ],
    ids=["bool", "item", "tolist", "cpu", "nonzero", "mask", "repeats", "from_host"],
)
def test_what_looks_at_data_would_show(look):
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), OnDevice():
        look(torch.ones(3, dtype=torch.int64, device=META))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*subjects(), TEACHER])
def test_every_recipe_is_captured(name):
    """The graph gives the tokens of the same steps one by one."""
    model = convert(random_model("cuda", torch.bfloat16, "tiny", **SIZES), name).requires_grad_(False)
    ids = torch.randint(97, (2, 150), generator=torch.Generator().manual_seed(0)).cuda()
    one, other = (
        Decoder(model, 2, length=256, capture=capture).generate(ids, None, 80) for capture in (True, False)
    )
    assert torch.equal(one, other)
