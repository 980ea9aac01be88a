"""Foreign layouts: a checkpoint written as another library's own, where that library's layer is the same function."""

from linearize.export.layouts.write import LAYOUTS, export_layout

__all__ = ["LAYOUTS", "export_layout"]
