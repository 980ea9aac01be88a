"""The table of docs/plan.md: what stages of two kinds need at sizes that one card holds and that none does.

PYTHONPATH=. python scripts/results/plan_table.py
"""

import sys

from linearize.cli.planning import way
from linearize.config import compose
from linearize.cost.cards import cards
from linearize.cost.shapes import config_of
from linearize.cost.stages import plan
from linearize.eval import tables

MODELS = ("llama-3-8b", "qwen3-32b", "llama-3-70b", "llama-3-405b")
KL = ["stages.recover.train=[all]", "stages.recover.objective={logits_kl: 1}", "~stages.recover.lora"]


def main() -> int:
    """Print markdown: lolcats as it is, then its second stage with all weights and KL, on eight H100."""
    count, card = cards("8xh100")
    rows = []
    for model in MODELS:
        config = config_of(model)
        for number, overrides in enumerate(([], KL)):
            found = plan(config, compose("lolcats", overrides), count, card, model=model, name="lolcats")
            for stage in found.stages[number:]:
                rows.append(
                    {
                        "model": model,
                        "stage": stage.kind,
                        "8 x h100": way(stage),
                        "GiB a card": f"{stage.fit.peak / 2**30:.1f}",
                        "cards": stage.fit.cards,
                        "GFLOPs a token": f"{stage.flops / 1e9:.1f}",
                        "MFU": "" if stage.mfu is None else f"{100 * stage.mfu:.0f} %",
                        "tokens/s": "" if stage.rate is None else f"{stage.rate:,.0f}",
                        "hours": "" if stage.hours is None else f"{stage.hours:.2f}",
                        "dollars": "" if stage.money is None else f"{stage.money:.2f}",
                    }
                )
    print(tables.markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
