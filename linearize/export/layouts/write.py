"""`linearize export PATH --layout NAME`: read a checkpoint, write it in a foreign layout, whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from linearize.errors import LinearizeError
from linearize.export.layouts import fla, gguf_file
from linearize.export.layouts.source import read
from linearize.export.origin import read_note
from linearize.export.save import replace_folder, save_tokenizer
from linearize.markdown import text
from linearize.models.tokenizer import load_tokenizer
from linearize.modes import open_up
from linearize.registry import closest
from linearize.storing import ONCE_MORE, could_not_write
from linearize.version import __version__

LAYOUTS = ("fla", "gguf")
COPIED = ("generation_config.json", "linearize.json", "LICENSE")
"""Files that say the same of the model in every layout."""


def export_layout(path: str | Path, layout: str, out: str | Path) -> str:
    """Write a converted checkpoint as another library's own.

    Args:
        path: a folder that `save` wrote, its weights plain.
        layout: fla: a folder for flash-linear-attention 0.6. gguf: a file for llama.cpp.
        out: the new folder or file.

    Returns:
        Which of that library's models it is now, in words.

    Raises:
        LinearizeError: no such layout.
        UnsupportedModelError: the library has no model that computes the same; the message lists every difference.
        CheckpointError: no converted checkpoint, one that is quantized or holds adapters, or `out` cannot be written.
    """
    path, out = Path(path), Path(out)
    if layout not in LAYOUTS:
        raise LinearizeError(f"layout={layout!r}: {closest(layout, LAYOUTS)}")
    if out.resolve() == path.resolve():
        raise LinearizeError(f"{out} is the checkpoint that is to be written; give another place")
    source = read(path, layout)
    tokenizer = load_tokenizer(path)
    scratch: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        if layout == "gguf":
            said = gguf_file.write(source, tokenizer, scratch / out.name)
            (scratch / out.name).replace(out)
        else:
            said = fla.write(source, scratch)
            save_tokenizer(tokenizer, scratch)
            (scratch / "README.md").write_text(_card(path, said), encoding="utf-8")
            for name in COPIED:
                if (path / name).is_file():
                    shutil.copyfile(path / name, scratch / name)
            open_up(scratch)
            replace_folder(scratch, out)
    except (OSError, SafetensorError) as error:
        raise could_not_write(out, error, untouched=True, again=ONCE_MORE) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return said


def _card(path: Path, said: str) -> str:
    """A short model card: what the folder is, and how it is loaded."""
    note = read_note(path)
    base = text(note.get("base") or "a teacher")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [linearize, linear-attention, flash-linear-attention]
---

# {base}, linearized

{said}, written by linearize {__version__} from a conversion of {base}. Weights that took a factor are float32.

## Load

```python
import fla.models  # flash-linear-attention 0.6
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH")
```
"""
