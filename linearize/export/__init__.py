"""Give back an ordinary checkpoint: save, load, model card, and a bundle that loads without this package."""

from linearize.export.adapter import load_adapter
from linearize.export.load import load
from linearize.export.save import save

__all__ = ["load", "load_adapter", "save"]
