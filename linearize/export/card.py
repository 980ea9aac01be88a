"""The model card of an export: what it is, how it was made, what it scores, how to load it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from linearize.config.words import ranges
from linearize.markdown import row, text
from linearize.surgery import converted


def model_card(
    model: PreTrainedModel, *, base: str, recipe: dict[str, Any], metrics: dict[str, Any], about: str = ""
) -> str:
    """Markdown with the hub's front matter.

    Args:
        model: the converted model.
        base: what was converted.
        recipe: the composed recipe.
        metrics: ``{"rows": [{"name", "perplexity": {text: value}, "tasks": {...}}]}``.
        about: a further paragraph.
    """
    layers = converted(model)
    growing = sum(not layer.mixer.has_fixed_state for layer in layers)
    but = f", but for {growing} that see every token" if growing else ""
    kept = getattr(model.config, "num_hidden_layers", len(layers)) - len(layers)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [linearize, linear-attention]",
        "---",
        "",
        f"# {text(base or type(model).__name__)}, linearized",
        "",
        f"{len(layers)} attention layers were converted with linearize, "
        f"{kept} stay softmax. Converted layers decode from a state of fixed size, whatever the context's length{but}.",
        "",
    ]
    if recipe.get("description"):
        paper = f" ({text(recipe['paper'])})" if recipe.get("paper") else ""
        lines += [f"Recipe: {text(recipe['description'])}{paper}", ""]
    lines += [about, ""] if about else []
    lines += [
        "## Load",
        "",
        "```python",
        "import linearize  # registers the model type",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "```",
        "",
        "Without the package: `AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)`, after reading "
        "`modeling_linearized.py`, and `AutoTokenizer` likewise.",
        "",
    ]
    if layers:
        lines += _mixers(model)
    if recipe.get("stages"):
        lines += ["## Training", ""]
        lines += ["| stage | objective | tokens | learning rate | trained |", "|---|---|---|---|---|"]
        for name, stage in recipe["stages"].items():
            objective = ", ".join(f"{weight} x {key}" for key, weight in stage.get("objective", {}).items())
            trained = ", ".join(stage.get("train", []))
            tokens = f"{stage.get('tokens', 0):,}"
            cells = (name, objective, tokens, stage.get("lr", ""), trained)
            lines.append(row([text(cell) for cell in cells]))
        data = recipe.get("data", {})
        lines += ["", f"Text: {text(data.get('source'))}, packed to {data.get('length')} tokens.", ""]
    rows = metrics.get("rows", [])
    if rows:
        names = sorted({name for measured in rows for name in measured.get("perplexity", {})})
        lines += ["## Perplexity", ""]
        lines += [row(["model", *map(text, names)]), "|---" * (len(names) + 1) + "|"]
        for measured in rows:
            found = measured.get("perplexity", {})
            values = [f"{found[name]:.2f}" if name in found else "" for name in names]
            lines.append(row([text(measured["name"]), *values]))
        lines.append("")
    return "\n".join(lines)


def _mixers(model: PreTrainedModel) -> list[str]:
    """A table of parts for each mixer, under the layers that have it where there are several."""
    plan, lines = model.config.linearize, []
    names = [numbers["mixer"] for numbers in plan["layers"].values()]
    for name, mixer in plan["mixers"].items():
        own = [layer.layer_idx for layer, given in zip(converted(model), names, strict=True) if given == name]
        title = f"Layers {ranges(own)}: {text(name)}" if len(plan["mixers"]) > 1 else "Layer"
        lines += [f"## {title}", "", "| part | choice |", "|---|---|"]
        for part, options in mixer.items():
            rest = ", ".join(f"{key} {value}" for key, value in options.items() if key != "name")
            lines.append(row([text(part), text(f"{options['name']} ({rest})" if rest else options["name"])]))
        lines.append("")
    return lines
