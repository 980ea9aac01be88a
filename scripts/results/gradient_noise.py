"""How far a short stage drifts when its gradients carry noise, beside its recording, on the CPU.

    python scripts/results/gradient_noise.py [RECIPE] [STAGE]

Eight steps as in `tests/distill/test_captured.py::test_of_every_recipe`: recorded against step by step
(`tests/replayed.py`), then step by step with noise, of so many times a gradient's largest number, added to each. Prints
the largest relative difference of a loss, and for every parameter how many numbers lie beyond that test's tolerance.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import replayed
from short_stages import trained

NOISE = (1e-5, 1e-4, 1e-3)


def main(recipe: str = "gated_deltanet_selective", stage: str = "transfer") -> None:
    """Print all comparisons."""

    def run(*, capture: bool = False, watches: Callable[[Any], None] = lambda trainer: None) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return trained(Path(folder), recipe, stage, 8, capture=capture, device="cpu", watches=watches)

    with pytest.MonkeyPatch.context() as patch:
        replayed.on_cpu(patch)
        plain, recorded = run(), run(capture=True)
        assert recorded[2].graph is not None, recorded[2].obstacle
        compare("recorded", plain, recorded)
        for scale in NOISE:
            compare(f"noise {scale:g}", plain, run(watches=noise(scale)))


def noise(scale: float) -> Callable[[Any], None]:
    """What makes the gradients of a trainer's parameters noisy."""

    def watches(trainer: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        for parameter in trainer.parameters.values():
            parameter.register_hook(
                lambda x: x + scale * x.abs().max() * torch.randn(x.shape, generator=generator)
            )

    return watches


def compare(what: str, one: Any, other: Any, rtol: float = 2e-2, atol: float = 5e-3) -> None:
    """Print a line for the losses, and one for each parameter of which a number is beyond."""
    print(what, "losses", max(abs(x - y) / abs(x) for x, y in zip(one[0], other[0], strict=True)))
    for name, x in one[1].items():
        apart = (x - other[1][name]).abs()
        beyond = int((apart > atol + rtol * other[1][name].abs()).sum())
        if beyond:
            print(f"  {name}: {beyond} of {x.numel()} beyond, largest {float(apart.max()):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
