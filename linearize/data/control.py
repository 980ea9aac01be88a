"""Control tokens, and text that only spells one: `</s>` in a corpus is four characters, not the end of a document.

Two forms of a text can be told apart. In a *plain* text nothing counts as a control token. In a *written* one, which a
template made, those that it spells count, except where `mark` has put a name in place of the spelling before: the
template's own control tokens and the ones that a message only mentions then differ.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Around a control token's name. Unicode keeps these two out of all text."""


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, whether added or named (bos, eos, unk, ...).

    Added tokens that are not special (`<think>` of some models, runs of spaces) are text like any other.

    Args:
        tokenizer: of transformers, fast or slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        spellings = {str(token): index for index, token in added.items() if token.special}
        spellings |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        # Some checkpoints name an ordinary character as a special token, such as "!" for padding: it stays text.
        spellings = {spelling: index for spelling, index in spellings.items() if len(spelling.strip()) > 1}
        self.ids = frozenset(spellings.values())
        self._names = {spelling: f"{OPEN}{index}{CLOSE}" for index, spelling in enumerate(spellings)}
        self._spellings = {name: spelling for spelling, name in self._names.items()}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        """Matches a spelling, the longest first; nothing where there are no control tokens."""
        longest = sorted(self._names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest)) or r"(?!)")

    @cached_property
    def _either(self) -> re.Pattern[str]:
        return re.compile(f"{OPEN}\\d+{CLOSE}|{self._spelled.pattern}")

    def spelled(self, text: str) -> str | None:
        """The first control token that a text spells, or None."""
        found = self._spelled.search(text)
        return found.group() if found else None

    def mark(self, value: Any) -> Any:
        """Every string in a value of lists and dicts with names in place of spelled control tokens; roles stay."""
        if isinstance(value, str):
            return self._spelled.sub(lambda found: self._names[found.group()], value.replace(OPEN, ""))
        if isinstance(value, dict):
            return {key: item if key == "role" else self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list) else value

    def unmark(self, text: str) -> str:
        """A marked text as it reads, with the spellings back in place."""
        if OPEN not in text:
            return text
        return self._either.sub(lambda found: self._spellings.get(found.group(), found.group()), text)

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Stretches of a marked text: (text, whether it is a control token that the text only mentions)."""
        pieces = re.split(f"({OPEN}\\d+{CLOSE})", text)
        return [(self._spellings.get(piece, piece), piece in self._spellings) for piece in pieces if piece]

    def broken(self, text: str) -> list[str]:
        """The text in pieces, each spelled control token cut behind its first character."""
        cuts = [0, *(found.start() + 1 for found in self._spelled.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(cuts) if start < end]

    def plain(self, text: str) -> list[int] | None:
        """Ids of a plain text by the twin; None where the tokenizer has none."""
        if self._twin is None:
            return None
        self._twin.encode_special_tokens = True
        return self._twin.encode(text, add_special_tokens=False).ids

    def written(self, text: str) -> list[int] | None:
        """Ids of a marked text by the twin: names mean spellings, and spellings mean control tokens; or None."""
        if self._twin is None:
            return None
        swapped = self._either.sub(lambda found: self._other(found.group()), text)
        self._twin.encode_special_tokens = False
        return self._twin.encode(swapped, add_special_tokens=False).ids

    def _other(self, found: str) -> str:
        return self._spellings.get(found) or self._names.get(found, found)

    @cached_property
    def _twin(self) -> Tokenizer | None:
        """The same tokenizer with control tokens under names that no text holds; None for a slow one.

        `split_special_tokens` is not enough: it only keeps added tokens from being looked for. A vocabulary of Unigram
        or of whole words holds `</s>` as a piece, and merges converted from SentencePiece build it out of `</` and
        `s>`. The ids stay, so a written text gets its control tokens by these names, in one pass and with the same
        treatment of the spaces around them.
        """
        if not isinstance(self._backend, Tokenizer):
            return None
        try:
            state = json.loads(self._backend.to_str())
        except Exception:  # of no narrower kind: a part that is written in Python cannot be copied
            return None
        state["truncation"] = state["padding"] = state["post_processor"] = None
        for token in state["added_tokens"]:
            if token["content"] in self._names:
                # A normalizer may drop or rewrite the characters of a name.
                token |= {
                    "content": self._names[token["content"]],
                    "normalized": False,
                    "single_word": False,
                    "special": True,
                }
        model = state["model"]
        vocabulary = model["vocab"]
        model["vocab"] = (
            {self._names.get(piece, piece): index for piece, index in vocabulary.items()}
            if isinstance(vocabulary, dict)
            else [[self._names.get(piece, piece), score] for piece, score in vocabulary]
        )
        if model.get("unk_token") in self._names:
            model["unk_token"] = self._names[model["unk_token"]]
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [pair for pair in model["merges"] if not self._builds(pair, prefix)]
        return Tokenizer.from_str(json.dumps(state))

    def _builds(self, merge: Any, prefix: str) -> bool:
        """Whether a merge makes a control token, or takes one."""
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return any(piece in self._names for piece in (left, right, left + right.removeprefix(prefix)))
