"""Write the openings that a teacher's text is sampled from; the same lists give the same file.

    python scripts/make_openings.py

Everything is written for this project: templates and words in scripts/openings. Each opening is one use of a template
with words that a seeded generator draws; none stands twice.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from openings import words
from openings.forms import FORMS, TURNS
from openings.prose import PROSE

OUT = Path(__file__).parent.parent / "linearize" / "sample" / "openings.json"
EACH = 190
"""Openings of a kind, where its templates have so many."""
CHAT = 700
"""First turns of conversations."""
ATTEMPTS = 40
"""Draws for each opening wanted."""


def main() -> None:
    rng = random.Random(0)
    taken: set[str] = set()
    found = {kind: drawn(templates, EACH, rng, taken) for kind, templates in {**PROSE, **FORMS}.items()}
    found["chat"] = drawn(TURNS, CHAT, rng, taken)
    OUT.write_text(json.dumps(found, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    texts = [text for texts in found.values() for text in texts]
    print(f"{OUT}: {len(texts):,} openings of {len(found)} kinds, {OUT.stat().st_size:,} bytes")


def drawn(templates: list[str], most: int, rng: random.Random, taken: set[str]) -> list[str]:
    """So many openings that are not `taken` yet, each template about as often as another.

    None ends with a space: tokenizers have the space in front of the word that follows.
    """
    made: list[str] = []
    for attempt in range(ATTEMPTS * most):
        text = filled(templates[attempt % len(templates)], rng).rstrip(" ")
        if text not in taken and len(made) < most:
            taken.add(text)
            made.append(text)
    return made


def filled(template: str, rng: random.Random) -> str:
    """A template with its words, capitalized as their names in it are."""
    lists = {
        "subject": words.SUBJECTS, "other": words.SUBJECTS, "place": words.PLACES, "otherplace": words.PLACES,
        "first": words.FIRST, "otherfirst": words.FIRST, "last": words.LAST, "work": words.WORK,
        "otherwork": words.WORK,
        "dish": words.DISHES, "skill": words.SKILLS, "product": words.PRODUCTS, "function": words.FUNCTIONS,
        "thing": words.THINGS, "sport": words.SPORTS, "law": words.LAWS,
    }  # fmt: skip
    numbers = {"two": (11, 98), "day": (3, 28), "four": (1000, 9899), "small": (2, 9)}

    def word(match: re.Match[str]) -> str:
        name = match.group(1)
        key = name.lower()
        if key in numbers:
            return str(rng.randint(*numbers[key]))
        if name == "Other":  # a second surname
            return rng.choice(words.LAST)
        text = rng.choice(lists[key])
        if key == "thing":
            return text if name == "Thing" else text.lower()
        if name.isupper():
            return text.upper()
        return text[:1].upper() + text[1:] if name[0].isupper() else text

    return (
        re.sub(r"\{(\w+)\}", word, template.replace("{{", "\0").replace("}}", "\1"))
        .replace("\0", "{")
        .replace("\1", "}")
    )


if __name__ == "__main__":
    main()
