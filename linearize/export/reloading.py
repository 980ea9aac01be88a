"""What an export is held against, and the program that loads one in a process of its own and compares.

It runs as a file, ``python reloading.py settings.json``, and imports this package only once the folder has been loaded
without it: that is what the checkpoint's readers do.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer of each width, as which a tensor's bits are summed."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits, as a share of the largest logit, by the dtype that the model computes in."""
ROUGH = 2e-2
"""The same where the two did not compute alike: kernels against plain torch, a device against the CPU."""
NEW_TOKENS = 8


def fingerprint(tensor: Tensor) -> list[Any]:
    """Dtype, shape, and the sum of the bits as integers: the same on every device, and in every order.

    Of a quantized tensor it is the sums of its codes and scales.
    """
    if is_traceable_wrapper_subclass(tensor):
        parts = [fingerprint(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        return [str(tensor.dtype), list(tensor.shape), parts]
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])
    return [str(tensor.dtype), list(tensor.shape), int(bits.sum(dtype=torch.int64))]


def fingerprints(model: Any) -> dict[str, list[Any]]:
    """`fingerprint` of every tensor that a checkpoint holds."""
    return {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def answers(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Logits [1, T, V] of a text, and what greedy decoding with a cache makes of it, [1, T + n]."""
    from transformers import GenerationConfig

    mask = torch.ones_like(ids)
    own = model.generation_config
    # Stop strings, penalties, other caches: the model is compared, not how its makers would have it sampled.
    model.generation_config = GenerationConfig()
    try:
        tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
        )
    finally:
        model.generation_config = own
    return {"logits": model(ids, attention_mask=mask).logits, "tokens": tokens}


def difference(expected: dict[str, Tensor], model: Any, tolerance: float) -> str | None:
    """How a model's answers differ from the expected ones, or None.

    Args:
        expected: `ids` [1, T], and `answers` to them.
        model: the loaded one.
        tolerance: of logits, as a share of the largest; tokens may differ where two logits are as near as that.
    """
    ids = expected["ids"].to(model.device)
    found = {name: tensor.cpu() for name, tensor in answers(model, ids).items()}
    want, got = expected["logits"].double(), found["logits"].double()
    if not got.isfinite().all():
        return "its logits are not finite"
    allowed = tolerance * max(1.0, want.abs().max().item())
    apart = (want - got).abs().amax(-1)[0]
    wrong = (apart > allowed).nonzero()
    if len(wrong):
        place = int(wrong[0])
        return f"its logits differ from the model's by {apart[place]:.3g} at token {place} of a test text"
    unequal = (expected["tokens"] != found["tokens"]).nonzero()
    if len(unequal):
        place, start = int(unequal[0, 1]), ids.shape[1]
        with torch.no_grad():
            scores = model(expected["tokens"][:, :place].to(model.device)).logits[0, -1].double()
        token, other = int(expected["tokens"][0, place]), int(found["tokens"][0, place])
        if scores.max() - scores[token] > 2 * allowed or scores.max() - scores[other] > 2 * allowed:
            return f"greedy decoding gives token {other} and not {token}, {place - start} tokens after a test text"
    return None


def compare(settings: dict[str, Any], *, package: bool) -> str | None:
    """What is wrong with a folder, or None.

    Args:
        settings: see `linearize.export.verify`.
        package: load it with this package, else with the code that it brings along.
    """
    from transformers import AutoModelForCausalLM

    way = "loaded" if package else "loaded with trust_remote_code=True and without linearize"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        settings["folder"], dtype="auto", output_loading_info=True, trust_remote_code=not package
    )
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report[kind])
        if names:
            return f"{way}, {len(names)} of its tensors are {kind.removesuffix('_keys')} ({names[0]}, ...)"
    for name, found in fingerprints(model.eval()).items():
        want = settings["tensors"].get(name)
        # a tensor that is wider in memory than the model's dtype is rounded on loading: logits tell whether it matters
        if want is None or (found[0] == want[0] and found != want):
            return f"{way}, its tensor {name} is not the model's"
    if settings["expected"] is None:
        return None
    expected = load_file(settings["expected"])
    alike = package
    try:
        model.to(settings["device"])
    except torch.OutOfMemoryError:  # the model itself is there as well
        model.to("cpu")
        alike = False
    same = alike and str(settings["device"]).startswith("cpu")
    tolerance = max(TOLERANCE.get(model.dtype, ROUGH), 0.0 if same else ROUGH)
    wrong = difference(expected, model, tolerance)
    return None if wrong is None else f"{way}, {wrong}"


def compare_in_turn(settings: dict[str, Any]) -> str | None:
    """`compare` in the ways that the settings ask for, one after the other, for the memory of one model."""
    if settings["remote_code"]:
        # as on a machine without it
        sys.modules["linearize"] = None  # type: ignore[assignment]
        try:
            wrong = compare(settings, package=False)
        finally:
            del sys.modules["linearize"]
        gc.collect()
        if wrong is not None:
            return wrong
    sys.path.insert(0, settings["root"])
    import linearize  # noqa: F401 - registers the model types

    return compare(settings, package=True)


def main(path: str) -> int:
    """Write what is wrong, or null, beside the settings."""
    file = Path(path)
    settings = json.loads(file.read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    torch.set_float32_matmul_precision(settings["precision"])
    try:
        wrong = compare_in_turn(settings)
    except Exception as error:  # whatever it is that keeps the folder from being loaded is what is asked for
        first = (str(error).strip() or "no message").splitlines()[0]
        wrong = f"it cannot be loaded or run: {type(error).__name__}: {first}"
    Path(settings["result"]).write_text(json.dumps({"wrong": wrong}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
