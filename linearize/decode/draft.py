"""A model that drafts for another: whether it can, the decoder of the two that is kept, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linearize.decode.arguments import evaluating
from linearize.decode.choice import Request, fingerprint, request, unknown_steps
from linearize.decode.limits import learned_positions
from linearize.decode.prefix import Prefix
from linearize.decode.reach import check_reach
from linearize.decode.reuse import STEP
from linearize.decode.speculator import Speculator
from linearize.errors import LinearizeError
from linearize.mixers.offloaded import device_of

MOST = 64
"""Tokens of a round. Far fewer pay: a round's worth is what is taken of it."""


def check_tokens(tokens: Any) -> None:
    """Refuse a number of tokens that no round drafts.

    Raises:
        LinearizeError: it is no whole number, or beyond `MOST`.
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MOST:
        raise LinearizeError(f"a draft of {tokens!r} tokens; give a whole number from 1 to {MOST}")


@dataclass
class Drafted:
    """What drafting has come to, over all calls.

    Attributes:
        rounds: launches of the model, those of a batch's rows counted each.
        drafted, taken: tokens proposed in them, and those of them that the model took.
        tokens: tokens made in them, what the model added itself among them.
        seconds: from the first new token of a call to its last.
        graph: whether the last call's rounds were a CUDA graph.
    """

    rounds: int = 0
    drafted: int = 0
    taken: int = 0
    tokens: int = 0
    seconds: float = 0.0
    graph: bool = False

    @property
    def rate(self) -> float:
        """Share of the drafted tokens that were taken."""
        return self.taken / self.drafted if self.drafted else 0.0

    @property
    def speed(self) -> float:
        """Tokens a second, of all rows."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        if not self.rounds:
            return "nothing was drafted"
        return (
            f"{self.taken:,} of {self.drafted:,} drafted tokens taken ({self.rate:.0%}), "
            f"{self.tokens / self.rounds:.2f} tokens a round, {self.speed:,.1f} tokens/s"
        )


@dataclass
class Draft:
    """A model that drafts for the one that `generate` is given.

    Attributes:
        model: a causal language model of transformers, converted or not, on the same device; smaller is quicker.
        tokenizer: its tokenizer, which must have the tokens of the model's; None: the caller knows that it does.
        tokens: drafted in a round.
        state: what it has read of the text that `generate` goes on from; without, it sees what comes behind it alone.
        count: what came of it.
    """

    model: Any
    tokenizer: Any = None
    tokens: int = 4
    state: Prefix | None = None
    count: Drafted = field(default_factory=Drafted)
    _kept: tuple[Any, Speculator] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        if not isinstance(self.model, torch.nn.Module):
            raise LinearizeError(
                f"a draft by {self.model!r:.80}; give a model that is loaded, linearize.load(PATH)"
            )
        if self.state is not None and not isinstance(self.state, Prefix):
            raise LinearizeError(
                f"a draft with the state {self.state!r:.80}; give one that is loaded, linearize.load_state(PATH)"
            )

    def check(self, model: Any, tokenizer: Any = None, state: Prefix | None = None) -> None:
        """Refuse to draft for a model with other tokens, on another device, or from another text.

        Args:
            model, tokenizer: which the draft is for.
            state: which the model goes on from.

        Raises:
            LinearizeError: names what differs, or what in one of the models cannot be decoded ahead.
        """
        for name, which in (("the model", model), ("the draft", self.model)):
            problems = unknown_steps(which)
            if problems:
                raise LinearizeError(f"{name} cannot be decoded ahead of a text: {'; '.join(problems)}")
        here, there = device_of(model), device_of(self.model)
        if here != there:
            raise LinearizeError(f"the draft is on {there} and the model on {here}; put both on one device")
        self._check_tokens(model, tokenizer)
        if self.state is None:
            return
        if state is None:
            raise LinearizeError(
                "the draft goes on from a state and the model does not; give the model its state of that text too"
            )
        if (self.state.digest, self.state.tokens) != (state.digest, state.tokens):
            raise LinearizeError(
                f"the draft's state is of another text ({self.state.tokens:,} tokens) than the model's "
                f"({state.tokens:,}); read one text with both models, or leave the draft's state out"
            )
        try:
            self.state.check(self.model, self.tokenizer)
        except LinearizeError as error:
            raise LinearizeError(f"the draft's state: {error}") from error

    def _check_tokens(self, model: Any, tokenizer: Any) -> None:
        if self.tokenizer is not None and tokenizer is not None:
            mine, its = self.tokenizer.get_vocab(), tokenizer.get_vocab()
            apart = [word for word in its.keys() | mine.keys() if its.get(word) != mine.get(word)]
            if apart:
                word = min(apart, key=lambda x: (its.get(x, len(its)), x))
                raise LinearizeError(
                    f"the draft has another tokenizer: {len(apart):,} tokens differ ({word[:40]!r} is "
                    f"{its.get(word, 'none')} for the model and {mine.get(word, 'none')} for the draft), and what it "
                    "drafts would be other words; take a draft with the model's own tokenizer"
                )
            return
        sizes = [x.get_input_embeddings().weight.shape[0] for x in (model, self.model)]
        if sizes[0] != sizes[1]:
            raise LinearizeError(
                f"the draft has {sizes[1]:,} tokens and the model {sizes[0]:,}; give both tokenizers, which say "
                "whether they are the same but for unused rows, or take a draft with the model's own"
            )

    def speculator(
        self,
        model: Any,
        batch: int,
        length: int,
        asked: Request,
        *,
        capture: bool,
        compile: bool = False,  # noqa: A002 - torch's name
    ) -> Speculator:
        """The decoder for a request, the last one if it fits and neither model has changed since.

        Args:
            model: whose text it is.
            batch: rows.
            length: tokens of the texts, new ones included.
            asked: what to make.
            capture: see `Speculator`.
            compile: forwards of a round.
        """
        most = asked.tokens
        if capture and device_of(model).type == "cuda":  # what is captured is worth keeping for other lengths
            length, most = (-(-n // STEP) * STEP for n in (length, most))
        facts = (batch, self.tokens, asked.sampling, asked.eos, asked.pad, capture, compile)
        key = (id(model), fingerprint(model), fingerprint(self.model), facts)
        if self._kept is not None and self._kept[0] == key:
            made = self._kept[1]
            if made.most >= most and (made.length >= length or not made.holds_tokens):
                return made
        self._kept = None  # its memory first
        made = Speculator(
            model,
            self.model,
            batch,
            self.tokens,
            asked.sampling,
            eos=asked.eos,
            pad=asked.pad,
            length=length,
            tokens=most,
            capture=capture,
            compile={} if compile else None,
        )
        self._kept = key, made
        return made


def speculate_ids(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    draft: Draft,
    *,
    capture: bool = True,
    compile: bool = False,  # noqa: A002 - torch's name
    on_tokens: Callable[[Tensor], None] | None = None,
    every: int = 16,
    prefix: Prefix | None = None,
) -> Tensor:
    """New tokens [B, n] for prompts, as `generate_ids` gives them, drafted by one model and checked by the other.

    Args:
        model, ids, mask, options, on_tokens, every, prefix: see `generate_ids`.
        draft: which `Draft.check` has let through.
        capture: take a CUDA graph where it can be had.
        compile: `torch.compile` the forwards of a round: minutes once, then faster rounds.

    Raises:
        LinearizeError: options that cannot be drafted for, or more tokens than the positions of a model reach.
    """
    before = 0 if prefix is None else prefix.tokens
    asked, problems = request(model, before + ids.shape[1], options)
    if asked is None:
        raise LinearizeError(
            f"{'; '.join(problems)}: a draft serves greedy decoding and sampling with temperature, top_k and top_p "
            "alone; leave it out, or generate without a draft"
        )
    total = before + ids.shape[1] + asked.tokens
    check_reach(model, total, "a draft")
    table = learned_positions(draft.model)
    seen = total - (before if draft.state is None else 0)
    if table is not None and seen > table:
        raise LinearizeError(
            f"{seen:,} tokens are more than the draft's {table:,} learned positions; make fewer tokens, or take "
            "another draft"
        )
    made = draft.speculator(model, ids.shape[0], total, asked, capture=capture, compile=compile)
    with evaluating(model), evaluating(draft.model):
        try:
            found = made.generate(
                ids,
                mask,
                asked.tokens,
                on_tokens=on_tokens,
                every=every,
                prefix=prefix,
                draft_prefix=draft.state,
            )
        except BaseException:
            draft._kept = None  # in the middle of something
            raise
    count, rounds = draft.count, int(made.rounds.sum())
    count.rounds += rounds
    count.drafted += rounds * draft.tokens
    count.taken += int(made.accepted.sum())
    count.tokens += int(made.made.sum()) - ids.shape[0]
    count.seconds += made.seconds
    count.graph = made.graph is not None
    return found
