"""The version, in a file without imports: packaging reads it, and it works uninstalled."""

from __future__ import annotations

__version__ = "0.1.0"
