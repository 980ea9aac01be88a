"""The recipe of the user's own that a choice ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from linearize.config.compose import is_file_name, to_yaml
from linearize.config.schema import Recipe
from linearize.select.placement import Kept
from linearize.storing import write_file


def spacing(layers: object, give: str | None = None) -> int:
    """n of a recipe's `{every: n}`, by which every n-th layer stays softmax; 0 where it says anything else.

    With `give`, the name of a mixer, the n of `{use: {give: {every: n}}}`, by which every n-th layer gets it.
    """
    if give is not None:
        layers = layers["use"].get(give) if isinstance(layers, dict) and set(layers) == {"use"} else None
    return layers["every"] if isinstance(layers, dict) and set(layers) == {"every"} else 0


def write(
    path: Path,
    name: str,
    recipe: Recipe,
    overrides: Sequence[str],
    kept: Kept,
    command: str,
    give: str | None = None,
) -> Path:
    """Write the recipe with the chosen layers.

    It starts from the shipped recipe by name; what came from a file or was overridden is spelled out whole, since a
    file can start from its own folder alone, and so is what spaces its layers evenly, which would be merged with these.

    Args:
        path: YAML to write.
        name: the RECIPE argument.
        recipe: composed.
        overrides: of the command line.
        kept: layers that stay softmax.
        command: the command line, for the header.
        give: name of the mixer that they get instead.
    """
    listed = f"[{', '.join(map(str, kept))}]"
    said = f"{{use: {{{give}: {listed}}}}}" if give else f"{{keep: {listed}}}"
    layers = {"use": {give: list(kept)}} if give else {"keep": list(kept)}
    header = "".join(f"# {line}\n" for line in ("Layers chosen by", *f"  {command}".splitlines()))
    if overrides or is_file_name(name) or spacing(recipe.layers):
        body = to_yaml(replace(recipe, layers=layers))
    else:
        body = f"defaults: [{name}, _self_]\n\nlayers: {said}\n"
    write_file(path, header + body)
    return path
