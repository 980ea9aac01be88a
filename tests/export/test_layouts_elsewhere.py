"""Foreign layouts in the libraries themselves, where they are installed (`make test-layouts`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import laid_out
import pytest
import torch
from laid_out import recipe

import linearize
from linearize.export.layouts import export_layout

ROOT = Path(__file__).resolve().parent.parent.parent
HEADS = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
RWKV6 = recipe("radlads_rwkv6", output={"name": "none"}, gate={"name": "rwkv6", "rank": 8})
SENTENCE = "The miller's 12 sacks, weighed thrice:  340 lb — the third <eos>"


def test_fla_gives_the_same_logits():
    pytest.importorskip("fla")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "fla_layout.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert re.search(r"^(\d\d) of \1 agree", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("mixer", "changes", "tolerance"),
    [
        (recipe("arwkv"), {}, 1e-4),
        (recipe("arwkv", normalizer={"name": "group_norm"}, output={"name": "none"}), {}, 1e-4),
        (RWKV6, {"family": "qwen2"}, 1e-4),
        # llama.cpp rounds activations to the weights' dtype before it multiplies
        (recipe("arwkv"), {"dtype": torch.bfloat16}, 5e-2),
    ],
)
def test_llama_cpp_gives_the_same_logits(tmp_path, mixer, changes, tolerance):
    numpy, llama_cpp = pytest.importorskip("numpy"), pytest.importorskip("llama_cpp")
    folder = laid_out.saved(tmp_path / "run", mixer, stirred=0.1, **HEADS, **changes)
    export_layout(folder, "gguf", tmp_path / "run.gguf")
    ids = laid_out.text(40)[0].tolist()
    with torch.no_grad():
        wanted = linearize.load(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    model = llama_cpp.Llama(
        str(tmp_path / "run.gguf"), n_ctx=128, logits_all=True, verbose=False, n_threads=1
    )
    model.eval(ids[:30])
    for token in ids[30:]:
        model.eval([token])
    found = torch.from_numpy(numpy.array(model.scores[: len(ids)]))
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()
    tokens = model.tokenize(SENTENCE.encode(), add_bos=False, special=True)
    assert tokens == laid_out.tokenizer()(SENTENCE).input_ids
