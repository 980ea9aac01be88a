"""What a compiled step reads of a state before a kernel writes into it is what stood there."""

from __future__ import annotations

import pytest
import torch
from decoding import devices
from torch import Tensor

from linearize.bench.subjects import convert, layers_of_each, random_model
from linearize.decode import Decoder
from linearize.decode.cache import tensors
from linearize.decode.ordered import in_order
from linearize.kernels import dispatch


@torch.library.custom_op("linearize_tests::take_slot", mutates_args=("ring", "counter"))
def take_slot(ring: Tensor, counter: Tensor, x: Tensor) -> Tensor:
    ring[counter % len(ring)] = x
    counter.add_(1)
    return 2 * x


@take_slot.register_fake
def _(ring, counter, x):
    return torch.empty_like(x)


def step(ring: Tensor, counter: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Reads of a ring and its counter, used at once and behind what writes; one behind it as well."""
    leaves = (ring[(counter + 1) % len(ring)] * 0.5).exp()
    age = (counter - torch.arange(len(ring))) % len(ring)
    made = take_slot(ring, counter, x + leaves.sum())
    return leaves + made, (age < 3).to(x.dtype) * made.sum(), ring.sum() + counter


def test_reads_of_a_state_are_made_before_it_is_written():
    def given():
        return torch.arange(10.0).view(5, 2), torch.tensor([7]), torch.tensor([[0.5, 2.0]])

    one, other = given(), given()
    torch._dynamo.reset()
    with torch.no_grad(), in_order():
        compiled = torch.compile(step, dynamic=False)
        for _ in range(3):
            for made, right in zip(compiled(*one), step(*other), strict=True):
                torch.testing.assert_close(made, right)
            for held, right in zip(one, other, strict=True):
                torch.testing.assert_close(held, right)


@devices
@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["based", "gated_delta_window", "best_constant", "lolcats_terraced", "halo"]
)
def test_a_compiled_step_leaves_the_state_that_others_leave(recipe, device):
    """Behind more tokens than a window holds, so that keys leave it."""
    if device == "cpu" and not dispatch.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    sizes = {
        "hidden_size": 64,
        "head_dim": 16,
        "num_hidden_layers": layers_of_each(recipe) if device != "cpu" else 1,
    }
    model = convert(random_model(device, torch.float32, "tiny", **sizes), recipe)
    ids = torch.randint(97, (2, 80), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    with dispatch.kernels("triton"):
        for compile in (None, {}):  # noqa: A001 - torch's name
            torch._dynamo.reset()
            decoder = Decoder(model, 2, length=128, compile=compile)
            decoder.prepare()
            assert decoder.obstacle is None
            decoder.read(ids, None)
            decoder.run(5)
            found.append({name: x.clone() for name, x in tensors(decoder.cache).items()})
    for name, right in found[0].items():
        torch.testing.assert_close(
            found[1][name], right, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
