"""Small converted models for the tests of decoding, on the CPU and, where there is one, on CUDA."""

from __future__ import annotations

import pytest
import tiny
import torch

from linearize import surgery

ON_BOTH = [
    pytest.param("cpu"),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
devices = pytest.mark.parametrize("device", ON_BOTH)
# as wide as the Triton kernels take at least
HEDGEHOG = {"feature_map": {"name": "hedgehog", "dim": 16}}
LOLCATS = {**HEDGEHOG, "window": {"name": "sliding", "size": 6}}
MIXERS = {
    "lolcats": LOLCATS,
    "linear": HEDGEHOG,
    "lawcat": tiny.LAWCAT,
    "terraced": {**HEDGEHOG, "window": {"name": "terraced", "size": 4}},
    "pinned": {"window": {"name": "sliding", "size": 5, "first": 2}},
    "rwkv7": {
        "feature_map": {"name": "identity"},
        "gate": {"name": "rwkv7", "rank": 3},
        "update": {"name": "rwkv7", "rank": 3, "first_values": True},
        "normalizer": {"name": "none"},
    },
    "softmax": tiny.SOFTMAX,
    "nope": {"window": {"name": "full", "log_base": 3}, "position": {"name": "rope", "window": False}},
}


def crossed(families, kinds: dict):
    """Families by kinds of layers: the first family with all, the others with one in which softmax layers stay.

    What a family does of its own is in these, and what the kinds do follows from no family; the other pairs are slow.
    """
    kept = [name for name in kinds if name != "all"]
    quick = {(families[0], name) for name in kinds}
    quick |= {(family, kept[n % len(kept)]) for n, family in enumerate(families)}
    return pytest.mark.parametrize(
        ("family", "layers"),
        [
            pytest.param(
                family,
                layers,
                id=f"{family}-{name}",
                marks=[] if (family, name) in quick else [pytest.mark.slow],
            )
            for name, layers in kinds.items()
            for family in families
        ],
    )


def hybrid(family: str = "llama", layers="all", mixer=LOLCATS, device: str = "cpu", **changes):
    model = surgery.convert(tiny.model(family, **changes), mixer, layers)
    tiny.randomize(layer.mixer for layer in surgery.converted(model))
    return model.to(device)
