"""Prove that an export is the model, before anybody relies on it: load it in a fresh process and compare."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import linearize
from linearize import launched
from linearize.errors import CheckpointError
from linearize.export import reloading
from linearize.kernels import dispatch
from linearize.memory import machine
from linearize.mixers.offloaded import device_of

log = logging.getLogger(__name__)

LENGTH = 96
"""Tokens of the test text: more than a window, so that keys have left it."""
MARGIN = 1.2
"""Memory that a second copy of the model takes, in copies."""


def verify(
    model: PreTrainedModel,
    folder: Path,
    *,
    remote_code: bool,
    tensors: dict[str, list[Any]] | None = None,
) -> None:
    """Load a folder in a fresh process, with this package and without it, and hold it against the model.

    Every tensor must be the model's bit by bit, none missing and none left over; logits of a random text must be equal
    within the rounding of the model's dtype, and so must greedy decoding with a cache, both without Triton kernels.

    Where memory does not hold a second copy of the model, a warning says so and nothing is compared.

    Args:
        model: what was saved.
        folder: an exported checkpoint.
        remote_code: also load it through `trust_remote_code=True`, with this package out of reach.
        tensors: fingerprints of what was saved, for a model that has no weights itself; these alone are compared.

    Raises:
        CheckpointError: the folder does not give back the model; the message names what differs first.
    """
    log.info("checking the export: a fresh process loads it and compares it with the model ...")
    expected = {} if tensors is not None else _expected(model, _text(model))
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    free, _ = machine()
    if 0 < free < MARGIN * size:
        log.warning(
            "the export was not checked: %.1f GB of memory are free, and a second copy of the model takes %.1f GB; "
            "load it once where there is more memory",
            free / 1e9,
            MARGIN * size / 1e9,
        )
        return
    with tempfile.TemporaryDirectory(prefix="linearize-check-") as scratch:
        work = Path(scratch)
        answers = work / "expected.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in expected.items()}, answers)
        settings = {
            "folder": str(folder.absolute()),
            "expected": str(answers) if tensors is None else None,
            "result": str(work / "result.json"),
            "tensors": reloading.fingerprints(model) if tensors is None else tensors,
            "device": str(device_of(model)),
            "threads": torch.get_num_threads(),
            "precision": torch.get_float32_matmul_precision(),
            "remote_code": remote_code,
            "root": str(Path(linearize.__file__).parent.parent),
        }
        wrong = in_new_process(settings, work)
    if wrong is not None:
        raise CheckpointError(wrong)


def in_new_process(settings: dict[str, Any], work: Path) -> str | None:
    """Run `reloading` on the settings; what is wrong with the folder, or None.

    Args:
        settings: as `verify` makes them.
        work: a folder for the messages of the two processes, and for the code that transformers caches.

    Raises:
        CheckpointError: the process cannot be started, or ended without a result.
    """
    asked = work / "settings.json"
    asked.write_text(json.dumps(settings), encoding="utf-8")
    # -P: the folder of the program holds modules whose names are not for everybody
    command = [sys.executable, "-P", reloading.__file__, str(asked)]
    environment = {
        **launched.without(os.environ),
        dispatch.VARIABLE: "torch",
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, check=False
        )
    except OSError as error:
        raise CheckpointError(
            f"a process that checks the export cannot be started ({error}); the command was: {' '.join(command)}"
        ) from error
    result = Path(settings["result"])
    if not result.is_file():
        if done.returncode < 0:
            log.warning(
                "the export was not checked: the process that loaded it was killed by signal %d (for lack of memory?)",
                -done.returncode,
            )
            return None
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise CheckpointError(
            f"the process that checks the export ended with code {done.returncode} before it could: {last}"
        )
    wrong: str | None = json.loads(result.read_text(encoding="utf-8"))["wrong"]
    return wrong


def _text(model: PreTrainedModel) -> Tensor:
    """Random token ids [1, T], the same at every call."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or LENGTH + reloading.NEW_TOKENS
    length = max(1, min(LENGTH, longest - reloading.NEW_TOKENS))
    return torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _expected(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """The model's own answers, on the CPU, by the operators' torch forms, as the fresh process has them.

    Kernels have tests of their own. A conversion that is still far from its teacher makes several percent of the logits
    from the last bits in which a kernel differs, and its folder is no less the model for that.

    Raises:
        CheckpointError: it cannot generate, or gives no numbers.
    """
    training = model.training
    model.eval()
    try:
        with dispatch.kernels("torch"):
            found = reloading.answers(model, ids.to(device_of(model)))
    except (
        Exception
    ) as error:  # after a training nothing may be lost, whatever it is that a family's code raises
        raise CheckpointError(
            f"the model itself, in memory, cannot generate text with a cache ({type(error).__name__}: {error})"
        ) from error
    finally:
        model.train(training)
    if not found["logits"].isfinite().all():
        raise CheckpointError(
            "the model itself gives logits that are not finite (NaN or infinity), so nothing can be compared with it; "
            "train it again with a lower learning rate"
        )
    return {"ids": ids, **{name: tensor.cpu() for name, tensor in found.items()}}
