"""A process that has converted nothing: it loads what another one has saved and answers what the model computes.

Run as a script, it reads one JSON line a request, `{"path", "inputs", "out"}`, and answers "ok" or what went wrong.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NEW = 10


def answers(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of `ids` [B, T] in one pass, and greedy tokens behind the left-padded `prompt`, cached."""
    with torch.no_grad():
        logits = model(input_ids=inputs["ids"], use_cache=False).logits
        tokens = model.generate(
            inputs["prompt"], attention_mask=inputs["mask"], max_new_tokens=NEW, do_sample=False
        )
    return {"logits": logits.contiguous(), "tokens": tokens.contiguous()}


class Reader:
    """The other process, started with the first question."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(
        self, path: Path, inputs: dict[str, Tensor], scratch: Path, seconds: float = 600
    ) -> dict[str, Tensor]:
        """What the model saved at `path` answers there.

        Raises:
            RuntimeError: it could not be loaded or run; the message holds the traceback's end.
        """
        if self.process is None:
            root = Path(__file__).parents[2]
            pythonpath = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": pythonpath},
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        save_file(inputs, scratch / "inputs.safetensors")
        request = {
            "path": str(path),
            "inputs": str(scratch / "inputs.safetensors"),
            "out": str(scratch / "out.safetensors"),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answer = (
                json.loads(self.process.stdout.readline() or '"it died"')
                if selector.select(seconds)
                else "no answer"
            )
        if answer in ("no answer", "it died"):
            self.close()
        if answer != "ok":
            raise RuntimeError(answer)
        return load_file(scratch / "out.safetensors")

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def main() -> None:
    """Answer requests until the input ends."""
    import linearize

    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            model = linearize.load(request["path"], dtype=torch.float32)
            save_file(answers(model, load_file(request["inputs"])), request["out"])
            answer = "ok"
        except Exception:
            answer = traceback.format_exc()[-600:]
        answers_to.write(json.dumps(answer) + "\n")
        answers_to.flush()


if __name__ == "__main__":
    main()
