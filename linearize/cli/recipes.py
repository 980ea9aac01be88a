"""`linearize recipes`: what is shipped, and what a recipe says once it is composed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from linearize.cli.run import composed
from linearize.config import list_recipes, outline, to_yaml
from linearize.config.names import DEFAULT, SOFTMAX
from linearize.config.variants import sections
from linearize.console import console

WIDTH = 100
"""Columns of the list, on terminals that have so many."""


def main(options: argparse.Namespace) -> int:
    """List the shipped recipes: name, one line each, and who published it."""
    from rich.table import Table

    screen = console()
    table = Table(box=None, header_style="bold", pad_edge=False, width=min(WIDTH, screen.width))
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does", ratio=1, overflow="fold")
    table.add_column("paper", no_wrap=True)
    for name, description in list_recipes():
        table.add_row(name, description, "\n".join(source(outline(name).get("paper", ""))).strip())
    screen.print(table)
    screen.print(
        "\n`linearize recipes show NAME` prints one in full; its file can be copied and changed. `linearize parts` "
        "lists what layers are made of."
    )
    return 0


def show(options: argparse.Namespace) -> int:
    """Print the composed, checked recipe as YAML that can be saved and run."""
    text = to_yaml(composed(options))
    console().print(text, end="", markup=False, soft_wrap=True)
    return 0


def composition(recipe: Mapping[str, Any]) -> str:
    """The parts of a recipe's mixers, and which layers get which.

    Args:
        recipe: its files as they say it (`config.outline`).
    """
    layers, mixers = recipe.get("layers", "all"), recipe.get("mixers") or {}
    found = [", ".join(parts(recipe["mixer"]))]
    for name, whole in sections(recipe["mixer"], mixers).items():
        if name != DEFAULT:
            found.append(f"{_places(layers, name)}: {', '.join(parts(whole))}")
    kept = _places(layers, SOFTMAX)
    return "; ".join(
        [*found, f"{kept} {'stays' if kept.startswith('1 ') else 'stay'} softmax"] if kept else found
    )


def _places(layers: Any, name: str) -> str:
    """Which layers get a mixer, or stay softmax, in words; empty where none does."""
    if layers == "all":
        return ""
    if isinstance(layers, str):
        count = layers.count("S" if name == SOFTMAX else name[:1].upper())
        return f"{count} layer{'s' if count > 1 else ''} in {len(layers)}" if count else ""
    if isinstance(layers, list):
        return f"all but layers {', '.join(map(str, layers))}" if name == SOFTMAX else ""
    where = layers.get("use", {}).get(name) if name != SOFTMAX else layers.get("keep", layers)
    if isinstance(where, list):
        return f"layers {', '.join(map(str, where))}"
    words = {"every": "1 layer in {}", "first": "the first {}", "last": "the last {}"}
    return " and ".join(words[key].format(_of(n)) for key, n in (where or {}).items() if key in words)


def _of(places: float) -> str:
    """A number of layers, or a share of them, in words."""
    return str(places) if places >= 1 else "half" if places == 0.5 else f"{100 * places:g} % of the layers"


def source(paper: str) -> tuple[str, str]:
    """Who and when, and the arXiv number, of "Title (Authors 2024), arXiv 2410.10254"; empty where there is none."""
    found = re.search(r"\(([^()]+ \d{4})\), arXiv (\d{4}\.\d{4,5})", paper)
    return (found[1], found[2]) if found else ("", "")


def parts(mixer: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a mixer is put together from, in the order of the grammar: the registered names and what tells them apart.

    Args:
        mixer: a recipe's section; parts that it leaves out, or names none, are left out here.
    """
    named = {part: options for part, options in mixer.items() if options.get("name", "none") != "none"}
    recurrent, both = "feature_map" in named, {"feature_map", "window"} <= set(named)
    found = []
    if "short_conv" in named:
        found.append(f"{named['short_conv']['name']} conv ({named['short_conv'].get('roles', 'qk')})")
    if recurrent:
        found.append(_feature_map(named["feature_map"]))
    if "gate" in named:
        gate = named["gate"]
        found.append(f"{gate['name']} gate" + _slopes(gate))
    if recurrent:
        update = mixer.get("update", {})
        words = {"start": "learned start", "first_values": "first layer's values"}
        said = ", ".join(word for key, word in words.items() if update.get(key))
        found.append(update.get("name", "additive") + (f" ({said})" if said else ""))
        normalizer = mixer.get("normalizer", {}).get("name", "running_sum")
        found += [] if normalizer == "none" else [normalizer]
    if "window" in named:
        found.append(_window(named["window"]))
    if both:
        found.append(mixer.get("combine", {}).get("name", "shared_normalizer"))
    if "output" in named:
        found.append(f"output {named['output']['name']}")
    return found + _position(mixer.get("position", {}), recurrent=recurrent, window="window" in named)


def _slopes(gate: Mapping[str, Any]) -> str:
    said = [gate["slopes"]] if "slopes" in gate else []
    said += ["learned"] if gate.get("learned") is True else []
    return f" ({', '.join(said)})" if said else ""


def _feature_map(options: Mapping[str, Any]) -> str:
    size = [str(options["dim"])] if "dim" in options else []
    flags = {"tied": "tied", "l2_normalize": "of length 1"}
    return " ".join([options["name"], *size, *(word for key, word in flags.items() if options.get(key))])


def _window(options: Mapping[str, Any]) -> str:
    words = f"{options['name']} window" + (f" {options['size']}" if "size" in options else "")
    extras = {
        "first": f"first {options.get('first')}",
        "overlap": "overlap",
        "log_base": f"log of the length, base {options.get('log_base')}",
    }
    more = [word for key, word in extras.items() if options.get(key)]
    more += ["sinks"] if options.get("sinks", "none") != "none" else []
    return words + (f" ({', '.join(more)})" if more else "")


_OTHER = {"recurrent": "window", "window": "recurrence"}


def _position(options: Mapping[str, Any], *, recurrent: bool, window: bool) -> list[str]:
    off = [
        branch
        for branch, there in (("recurrent", recurrent), ("window", window))
        if there and not options.get(branch, True)
    ]
    own = options.get("name", "rope")
    found = [] if own == "rope" or not recurrent else [own]
    if not off:
        return found
    return [*found, "no RoPE" if len(off) == recurrent + window else f"no RoPE but in the {_OTHER[off[0]]}"]
