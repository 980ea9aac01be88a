"""The table of docs/blocks.md: what transfer of Llama 3 70B and 405B takes block by block.

PYTHONPATH=. python scripts/results/blocks_table.py
"""

import sys

from linearize.config import compose
from linearize.cost import blocks
from linearize.cost.cards import cards
from linearize.cost.shapes import config_of
from linearize.eval import tables

MODELS = ("llama-3-70b", "llama-3-405b")


def main() -> int:
    """Print markdown: the transfer stage of lolcats, 20 M tokens, on eight H100."""
    count, card = cards("8xh100")
    recipe = compose("lolcats", ["stages.transfer.clip_by=layer"])
    for model in MODELS:
        found = blocks.plan(config_of(model), recipe, count, card, name="lolcats")
        print("\n".join([*found.heading(model), ""]))
        print(tables.markdown(found.cells()))
        print("\n".join(["", *found.sentences(), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
