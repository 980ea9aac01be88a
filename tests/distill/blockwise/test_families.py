"""Blocks of every family: streams, losses and gradients of the whole model, with padding, documents and kept layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import set_seed

from linearize import surgery
from linearize.config import compose
from linearize.config.schema import Recipe
from linearize.distill.blockwise.making import Maker
from linearize.distill.blockwise.parts import Parts
from linearize.distill.positions import counted_from_zero
from linearize.distill.transfer import transfer_step
from linearize.models.routers import routers

CPU = torch.device("cpu")
OBJECTIVE = {"attention_output": 10.0}


def batch() -> dict[str, torch.Tensor]:
    """Two rows: one with padding in front, one of three documents."""
    ids, mask, positions = tiny.left_padded()
    positions[1] = torch.cat([torch.arange(n) for n in (11, 20, 9)])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def packed() -> dict[str, torch.Tensor]:
    """Two rows of documents."""
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((15, 25), (11, 20, 9))]
    )
    return {"input_ids": tiny.tokens(), "position_ids": positions}


def whole(folder: Path, recipe: Recipe, given: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """The converted model after a step's gradient, and the losses."""
    from linearize import models

    model, _ = models.load_teacher(str(folder))
    set_seed(recipe.run.seed)
    model = surgery.convert(model, recipe.mixer, recipe.layers, recipe.mixers).eval()
    model.requires_grad_(False)
    for layer in surgery.converted(model):
        layer.mixer.requires_grad_(True)
    with counted_from_zero(model):
        losses = transfer_step(model, given, OBJECTIVE)
    return model, losses


def hold(folder: Path, recipe: Recipe, size: int, given: dict[str, torch.Tensor]) -> None:
    model, expected = whole(folder, recipe, given)
    theirs = {name: p.grad for name, p in surgery.mixer_state(model).items()}
    maker = Maker(Parts(str(folder), torch.float32), recipe, CPU, None)
    table = maker.table()
    with torch.no_grad(), counted_from_zero(table.whole):
        stream = table.embed(given["input_ids"], given)
    losses: list[torch.Tensor] = []
    gradients: dict[str, Any] = {}
    tuples, values = None, None
    for first in range(0, len(maker.parts.layers), size):
        numbers = range(first, min(first + size, len(maker.parts.layers)))
        block = maker.block(numbers, tuples, stream, given, values)
        tuples = block.tuples
        real = {name for name, p in block.whole.named_parameters() if not p.is_meta}
        others = [p for n, p in enumerate(maker.parts.layers) if n not in numbers]
        assert not [name for name in real if name.startswith(tuple(f"{path}." for path in others))]
        with torch.no_grad():
            behind, handed = (
                block.run(stream, given, values)
                if not block.places
                else teacher(block, stream, given, values)
            )
        if block.places:
            for layer in surgery.converted(block):
                layer.mixer.requires_grad_(True)
            losses.append(
                transfer_step(
                    block,
                    given,
                    OBJECTIVE,
                    layers=block.total,
                    run=lambda block, given, stream=stream, values=values: block.run(stream, given, values),
                )
            )
            gradients |= {name: p.grad for name, p in surgery.mixer_state(block).items()}
        stream = behind
        values = handed if handed is not None else values
    torch.testing.assert_close(torch.cat(losses), expected, rtol=1e-5, atol=1e-6)
    assert list(gradients) == list(theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad(), surgery.mode(model, "teacher"), counted_from_zero(model):
        logits = model(**given, use_cache=False).logits
    with torch.no_grad():
        found = maker.head(tuples).finish(stream, given)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def teacher(block: Any, *given: Any) -> Any:
    with surgery.mode(block, "teacher"):
        return block.run(*given)


def saved(family: str, folder: Path, **changes: Any) -> Path:
    tiny.model(family, **changes).save_pretrained(folder)
    return folder


FEW = ("smollm3", "gemma3", "gpt2", "qwen3_moe")
"""Layers without RoPE, sliding ones, learned positions, experts; the others are slow."""


@pytest.mark.parametrize(
    "family", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in tiny.FAMILIES]
)
def test_every_family(family: str, tmp_path: Path) -> None:
    recipe = Recipe(mixer=tiny.LAWCAT if family != "gpt2" else tiny.LOLCATS)
    hold(saved(family, tmp_path), recipe, 1, packed() if family == "gpt2" else batch())


def test_blocks_of_several_layers_some_of_them_softmax(tmp_path: Path) -> None:
    recipe = Recipe(mixer=tiny.LOLCATS, layers={"every": 3})
    folder = saved("gemma3", tmp_path, num_hidden_layers=5)
    for size in (1, 2, 5):
        hold(folder, recipe, size, batch())


def test_more_layers_than_ten(tmp_path: Path) -> None:
    """Numbers of layers that begin with other layers' numbers."""
    hold(saved("llama", tmp_path, num_hidden_layers=12), Recipe(mixer=tiny.LOLCATS), 5, packed())


def test_another_mixer_in_another_layer(tmp_path: Path) -> None:
    delta = {"update": {"name": "delta"}, "normalizer": {"name": "none"}, "window": {"name": "none"}}
    mixers = {"delta": delta}
    recipe = Recipe(mixer=tiny.LOLCATS, mixers=mixers, layers={"use": {"delta": [1, 2]}})
    hold(saved("llama", tmp_path), recipe, 2, packed())


@pytest.mark.parametrize("size", [1, 3])
def test_values_of_the_first_converted_layer(size: int, tmp_path: Path) -> None:
    recipe = compose("arwkv", ["mixer.update.first_rank=4", "mixer.output.rank=4", "layers=[1,2,3]"])
    hold(saved("qwen3", tmp_path), recipe, size, packed())


def test_routers_choose_in_float32(tmp_path: Path) -> None:
    """As in a whole run, and the stream stays in the weights' own dtype."""
    folder = saved("qwen3_moe", tmp_path)
    parts = Parts(str(folder), torch.bfloat16)
    maker, given = Maker(parts, Recipe(mixer=tiny.LOLCATS), CPU, torch.bfloat16), packed()
    table = maker.table()
    with torch.no_grad(), maker.computing():
        stream = table.embed(given["input_ids"], given)
        block = maker.block(range(1), None, stream, given, None)
        behind, _ = teacher(block, stream, given)
    found = [parameter for router in routers(block) for parameter in router.parameters(recurse=False)]
    assert found and all(parameter.dtype == torch.float32 for parameter in found)
    assert behind.dtype == stream.dtype == torch.bfloat16
