"""linearize: turn a pretrained softmax transformer into a linear-attention one that decodes in constant memory.

After `import linearize`, `AutoModelForCausalLM.from_pretrained` loads what `linearize run` exports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize.auto import install
from linearize.late import after_import
from linearize.version import __version__

if TYPE_CHECKING:
    from linearize.decode import load_state, save_state
    from linearize.eval.generation import generate, read_state
    from linearize.export.load import load
    from linearize.export.save import save
    from linearize.surgery.convert import convert

__all__ = ["__version__", "convert", "generate", "load", "load_state", "read_state", "save", "save_state"]

# Importing this mapping takes seconds and brings torch along, which `linearize --help` has no use for.
after_import("transformers.models.auto.configuration_auto", install)


def __getattr__(name: str) -> Any:
    # the heavy half of the package is imported by the first use of it
    if name in ("load", "save"):
        from linearize import export

        return getattr(export, name)
    if name == "convert":
        from linearize.surgery import convert

        return convert
    if name in ("generate", "read_state"):
        from linearize.eval import generation

        return getattr(generation, name)
    if name in ("load_state", "save_state"):
        from linearize import decode

        return getattr(decode, name)
    raise AttributeError(f"module 'linearize' has no attribute '{name}'")
