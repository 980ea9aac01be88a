"""Teaches transformers' Auto classes every `linearized_<base>` model type, on demand.

`import linearize` must be enough for `AutoModelForCausalLM.from_pretrained(path)`, for any base family, without
importing torch or every family's code: the config mapping is given a dictionary that makes the classes of a
`linearized_*` type when it is first asked for one.
"""

from __future__ import annotations

import sys
from typing import Any

from linearize.late import after_import

TYPE_PREFIX = "linearized_"


class OnDemand(dict[str, Any]):
    """Registered config classes by model type, with `linearized_<base>` made when asked for.

    Args:
        known: the mapping's extra entries so far.
        bases: model types that transformers itself knows.
    """

    def __init__(self, known: dict[str, Any], bases: Any) -> None:
        super().__init__(known)
        self._bases = bases

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        ours = isinstance(key, str) and key.startswith(TYPE_PREFIX)
        return ours and str(key).removeprefix(TYPE_PREFIX) in self._bases

    def __getitem__(self, key: str) -> Any:
        if not super().__contains__(key) and key in self:
            from linearize.export.registration import register

            register(key.removeprefix(TYPE_PREFIX))
        return super().__getitem__(key)


def install() -> None:
    """Hook the config mapping of transformers, and peft's tables once it is imported; idempotent."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(CONFIG_MAPPING._extra_content, OnDemand):
        CONFIG_MAPPING._extra_content = OnDemand(CONFIG_MAPPING._extra_content, CONFIG_MAPPING._mapping)
        after_import("peft.utils.constants", _install_adapters)


def _install_adapters() -> None:
    """Give `linearized_<base>` what peft does by default for each base: which modules get an adapter."""
    constants = sys.modules["peft.utils.constants"]
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for base, value in list(table.items()):
                table.setdefault(TYPE_PREFIX + base, value)
