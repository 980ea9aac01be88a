"""Write the tables of docs/recipes.md and docs/export.md from the recipes, between the markers there.

python scripts/recipe_table.py            # writes
python scripts/recipe_table.py --check    # exit code 1 where a table is not current
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from linearize.cli.recipes import composition, source
from linearize.config import list_recipes, outline
from linearize.config.compose import RECIPES
from linearize.config.layers import keeps_softmax
from linearize.config.variants import given
from linearize.export.layouts import fla, gguf_file
from linearize.export.layouts.body import Body
from linearize.export.layouts.difference import Difference
from linearize.export.layouts.layer import Given
from linearize.mixers import LayerShape, normalize

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- recipes: written by scripts/recipe_table.py -->", "<!-- end of recipes -->"
DIFFERENCES = ("Paper against code:", "The paper leaves open:", "What a recipe cannot say:", "Differs")
"""How the part of a recipe's header begins that tells it from its paper."""
SHAPE = LayerShape(9, 3, 64, 64, 0.125, model_dim=576, rotary="half")
BODY = Body("llama", 30, 576, 1536, 49152, 1e-5, True, 8192, 100000.0, "default", {}, "bfloat16")
"""A Llama, SmolLM2-135M's sizes, for which layouts are judged."""
TRAINED = {"all": "everything", "lora": "LoRA"}


def main(arguments: list[str] | None = None) -> int:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    stale = []
    for path, text in current().items():
        if path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale) or "nothing"
    print(f"{'not current' if options.check else 'written'}: {names}", file=sys.stderr)
    return int(options.check and bool(stale))


def current() -> dict[Path, str]:
    """Each file -> its text with its tables as the recipes have them now."""
    recipes = {name: outline(name) for name, _ in list_recipes()}
    tables = {
        ROOT / "docs" / "recipes.md": [
            table(
                ["recipe", "what it does", "paper"],
                [[_link(name), recipe["description"], paper(recipe)] for name, recipe in recipes.items()],
            ),
            table(
                ["recipe", "parts", "stages", "what differs from the paper"],
                [
                    [f"`{name}`", composition(recipe), stages(recipe), differences(name)]
                    for name, recipe in recipes.items()
                ],
            ),
        ],
        ROOT / "docs" / "export.md": [
            table(
                ["recipe", "fla", "llama.cpp"],
                [[f"`{name}`", *layouts(recipe)] for name, recipe in recipes.items()],
            )
        ],
    }
    return {path: between(path.read_text(encoding="utf-8"), rows) for path, rows in tables.items()}


def between(text: str, tables: list[str]) -> str:
    """The text with what stands between each pair of markers replaced, in their order."""
    made, *rest = text.split(BEGIN)
    for rows, part in zip(tables, rest, strict=True):
        made += f"{BEGIN}\n{rows}{END}{part.split(END)[1]}"
    return made


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Markdown, one line a row."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def paper(recipe: dict[str, Any]) -> str:
    """Who, when, and the link."""
    who, number = source(recipe.get("paper", ""))
    return f"{who}, [{number}](https://arxiv.org/abs/{number})" if number else ""


def stages(recipe: dict[str, Any]) -> str:
    """What each stage trains, on which objectives, for how many tokens."""
    words = []
    for name, stage in (recipe.get("stages") or {}).items():
        trained = [TRAINED.get(kind, kind) for kind in stage["train"]]
        without = f" but {', '.join(stage['freeze'])}" if stage.get("freeze") else ""
        words.append(
            f"{name}: {' + '.join(stage['objective'])} on {', '.join(trained)}{without}, {stage['tokens']}"
        )
    return "; ".join(words) or "none"


def differences(name: str) -> str:
    """What the recipe's own header says on where it leaves the paper."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    text = " ".join(line.removeprefix("#").strip() for line in header)
    starts = [text.index(opening) for opening in DIFFERENCES if opening in text]
    said = text[min(starts) :] if starts else ""
    said = re.sub(r"Differs( from the (paper|study|fork))?: (\w)", lambda found: found[3].upper(), said)
    return re.sub(r"[\w.]+=\{[^}]*\}|\w+\.[\w.]+=[\w.-]+|~[\w.]+", _code, said)


def layouts(recipe: dict[str, Any]) -> list[str]:
    """What a Llama converted by the recipe is in each foreign layout, or what differs from the nearest layer there."""
    mixers, layers = recipe.get("mixers") or {}, recipe.get("layers", "all")
    givens = [Given(normalize(mixer), SHAPE, BODY.eps) for mixer in given(recipe["mixer"], mixers, layers)]
    there, here = fla.compare(givens, BODY), gguf_file.compare(givens)
    kept = [gguf_file.kept("some")] if keeps_softmax(layers, mixers) else []
    return [_judged(there[0].name, there[1]), _judged(here[0].name, [*here[1], *kept])]


def _judged(name: str, differences: list[Difference]) -> str:
    if not differences:
        return f"**{name}**"
    return f"{name}, but " + "; ".join(f"{one.part}: {one.ours}" for one in differences)


def _code(found: re.Match[str]) -> str:
    """Overrides in the text as code, a full stop behind them outside."""
    text = found[0].rstrip(".")
    return f"`{text}`{found[0][len(text) :]}"


def _link(name: str) -> str:
    return f"[`{name}`](../recipes/{name}.yaml)"


if __name__ == "__main__":
    sys.exit(main())
