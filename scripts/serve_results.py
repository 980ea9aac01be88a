"""One JSON file and one page beside it for what serve_load.py and serve_engine.py measured, each a part of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def part(file: Path, name: str) -> dict[str, Any]:
    """What the file has of a part; nothing where it has none.

    Args:
        file: JSON, an object of parts.
        name: of the part.
    """
    found: dict[str, Any] = (
        json.loads(file.read_text(encoding="utf-8")).get(name, {}) if file.is_file() else {}
    )
    return found


def put(file: Path, name: str, found: dict[str, Any], section: str) -> None:
    """Put a part into the file, and its section into the page; other parts and sections stay.

    Args:
        file: JSON; the page is the same name with .md.
        name: of the part.
        found: what was measured.
        section: Markdown whose first line, a heading of the first level, tells it from others.
    """
    parts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**parts, name: found}, indent=1) + "\n", encoding="utf-8")
    page = file.with_suffix(".md")
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    sections = {
        each.split("\n", 1)[0]: each.strip()
        for each in re.split(r"^(?=# )", text, flags=re.M)
        if each.strip()
    }
    sections[section.split("\n", 1)[0]] = section.strip()
    page.write_text("\n\n".join(sections.values()) + "\n", encoding="utf-8")
