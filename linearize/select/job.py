"""The whole choice: align all layers shortly, score one at a time, restore greedily, compare with other placements."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from linearize import models, surgery
from linearize.config.layers import keeps_softmax
from linearize.config.schema import Recipe
from linearize.config.values import shown
from linearize.decode.limits import learned_positions
from linearize.distill import memory
from linearize.distill.device import resolve_device, resolve_precision, resolve_weights
from linearize.distill.identity import fingerprint
from linearize.errors import DataError, LinearizeError, RecipeError, UnsupportedModelError
from linearize.eval.rows import Score, Scores, key_of
from linearize.models.sound import check_trainable
from linearize.progress import Meter, count, duration
from linearize.registry import closest
from linearize.select import alignment, samples
from linearize.select.placement import (
    Kept,
    Restored,
    at_random,
    best_first,
    greedy,
    greedy_passes,
    uniform,
    worst_first,
)
from linearize.select.recipe import spacing
from linearize.select.samples import KL, KL_HIT, KL_PASSKEY, PASSKEYS, TEXT, Halves, Sample
from linearize.select.scoring import Scorer, Signature

log = logging.getLogger(__name__)

TRAINING_PASSES, CALIBRATION_PASSES = 3, 10
"""A token of the alignment, or of the calibration, takes about as long as so many tokens of a scored pass."""
SAVED = 0.32
"""Share of a pass that one which begins behind its first blocks leaves out: half of the blocks, not the head."""
BY = {"kl": (TEXT, KL), "recall": (TEXT, KL_HIT), "passkey": (PASSKEYS, KL_PASSKEY)}
"""What greedy restoring lowers: the KL of all tokens, of those that could be recalled, or of pass keys."""
SHARE = 4
"""One layer in so many stays softmax by default, as most published hybrids have it."""


@dataclass(frozen=True)
class Options:
    """What is not the recipe's.

    Attributes:
        keep: layers that stay softmax; None: one in `share`.
        by: a key of `BY`.
        tokens: of the alignment, and of the calibration before it at most; 0 scores mixers as surgery leaves them.
        windows, length: of the text that layers are chosen on, and of the pass keys; as many again, on which nothing
            is chosen, compare placements.
        draws: random placements.
        give: name of a mixer of the recipe's, which the chosen layers get when it is run; while they are chosen they
            are softmax. None: they stay it.
        share: the n of a recipe that keeps every n-th layer, or gives it the mixer `give`, takes its place.
    """

    keep: int | None = None
    by: str = "kl"
    tokens: int = 20_000
    windows: int = 4
    length: int = 512
    draws: int = 3
    give: str | None = None
    share: int = SHARE


@dataclass(frozen=True)
class Selection:
    """What was chosen, and every score that speaks for or against it.

    Attributes:
        layers: that could be chosen.
        alone: layer -> metric -> score of the teacher with this layer alone converted.
        converted: metric -> score with all layers converted, on the windows that choose.
        steps: of greedy restoring.
        chosen: metric -> score after each step, on the windows that choose.
        unseen: name of a placement -> for 0, 1, ... kept layers, score on windows that nothing was chosen on.
        placements: name -> layers that stay softmax, for 1, 2, ... of them.
        differences: placement -> greedy's score minus its, at the last step, on those windows.
        by: metric that greedy restoring lowered.
        teacher: its negative log-likelihood of the pass keys, nats a token; None where they did not fit.
        give: of `Options`.
    """

    layers: Sequence[int]
    alone: dict[int, dict[str, Score]]
    converted: dict[str, Score]
    steps: list[Restored]
    chosen: list[dict[str, Score]]
    unseen: dict[str, list[Score]]
    placements: dict[str, list[Kept]]
    differences: dict[str, Score]
    by: str
    teacher: Score | None = None
    give: str | None = None

    @property
    def kept(self) -> Kept:
        return self.steps[-1].kept


GREEDY, CONVERTED, RESTORED, UNIFORM = "greedy", "converted alone", "restored alone", "uniform"


def select(model: str, recipe: Recipe, out: Path, options: Options, *, command: str) -> Selection:
    """Choose the layers that stay softmax.

    Args:
        model: hub id, checkpoint folder, GGUF file or alias.
        recipe: composed; it converts all layers, or all but evenly spaced ones, or gives those that are not to be
            chosen its own mixer.
        out: folder for scores; what it holds for the same model, recipe and options is not measured again.
        options: see there.
        command: the command line, for rows and messages.

    Raises:
        RecipeError: the recipe chooses layers itself, or has not the mixer that they are to get.
        LinearizeError: `keep` leaves nothing to choose; model or texts are refused, see `distill.run`.
    """
    if every := spacing(recipe.layers, options.give):
        options = dataclasses.replace(options, share=every)
        if options.give is None:
            recipe = dataclasses.replace(recipe, layers="all")
    _check(recipe, options.give)
    with suppress(UnsupportedModelError):  # some show what they are on loaded weights alone
        rows = surgery.plan(models.load_config(model), recipe.mixer, "all").rows
        how_many(options, len(rows), model)
    tokenizer = models.load_tokenizer(models.resolve(model))
    halves = _halves(tokenizer, recipe, options)
    found = alignment.stage_of(recipe, options.tokens, options.length)
    packed = None if found is None else alignment.dataset(recipe, *found, tokenizer, model)
    seen = alignment.calibration(recipe, options.tokens, tokenizer, model)
    device = resolve_device(recipe.run)
    autocast = resolve_precision(recipe.run, device)
    if autocast is not None and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    less = "fewer --windows or a smaller --length, or run.device=cpu"
    with memory.watched(f"choosing layers of {model}", lambda: f"Take {less}"):
        student = _converted(model, recipe, options, device)
        signature = [fingerprint(model), dataclasses.asdict(recipe), options.tokens, options.length]
        signature.append("calibrated" if seen is not None else "as surgery leaves it")
        scores = Scores(out / "scores.json")
        about = Signature(Path(model.rstrip("/")).name, command, recipe.run.seed, key_of(signature))
        scorer = Scorer(student, named_samples(halves), scores, about, autocast)
        _announce(scorer, options, found, seen)
        if seen is not None:
            alignment.calibrated(student, seen, out / "calibration" / about.key, autocast)
        if found is None:
            why = "--tokens 0" if not options.tokens else "the recipe has no stage with a loss per layer"
            start = "surgery leaves" if seen is None else "calibration sets"
            log.info("%s: mixers are scored as %s them", why, start)
        else:
            alignment.align(
                student,
                recipe,
                *found,
                packed,
                out / "alignment" / about.key,
                autocast=autocast,
                command=command,
                less_memory=lambda: f"Take {less}",
            )
        return choose(scorer, options)


def choose(scorer: Scorer, options: Options) -> Selection:
    """Score and choose, with an aligned model.

    Args:
        scorer: of the model, on `named_samples`.
        options: `keep`, `by` and `draws` are read.

    Raises:
        LinearizeError: `keep` is out of range, or there is no token to recall.
    """
    layers, (where, by), seed = scorer.layers, BY[options.by], scorer.signature.seed
    keep = how_many(options, len(layers), scorer.signature.model)
    with _meter(scorer, keep, options) as scorer.meter:
        converted = _everywhere(scorer, ())
        if converted[by].n == 0:
            raise DataError(
                f"--by {options.by}: no token of the text repeats a pair of its window; take a larger --length"
            )
        with scorer.near(tuple(layers)):
            alone = {layer: _everywhere(scorer, tuple(x for x in layers if x != layer)) for layer in layers}
        steps = greedy(layers, keep, lambda kept: scorer(kept, _choice(where))[by].value, scorer.near)
        chosen = [_everywhere(scorer, step.kept) for step in steps]
        cost = {layer: found[by].value for layer, found in alone.items()}
        placements: dict[str, list[Kept]] = {
            GREEDY: [step.kept for step in steps],
            CONVERTED: [worst_first(cost, n) for n in range(1, keep + 1)],
            RESTORED: [best_first(steps[0].scores, n) for n in range(1, keep + 1)],
            UNIFORM: [uniform(layers, n) for n in range(1, keep + 1)],
        }
        for draw in range(options.draws):
            placements[f"random {draw + 1}"] = [at_random(layers, n, seed + draw) for n in range(1, keep + 1)]
        swapped = scorer((), _unseen(where))[by]
        unseen = {
            name: [swapped, *(scorer(kept, _unseen(where))[by] for kept in found)]
            for name, found in placements.items()
        }
        differences = {
            name: scorer.difference(steps[-1].kept, found[-1], by, _unseen(where))
            for name, found in placements.items()
            if name != GREEDY
        }
    scorer.meter = None
    keys = _choice(PASSKEYS)
    teacher = scorer.teacher_nll(keys) if keys in scorer.samples else None
    return Selection(
        layers, alone, converted, steps, chosen, unseen, placements, differences, by, teacher, options.give
    )


def _check(recipe: Recipe, give: str | None) -> None:
    """Refuse a recipe whose layers are not all to be chosen among."""
    offered = [f"--give {name}" for name in recipe.mixers]
    if give is None:
        if recipe.layers == "all":
            return
        remedy = f"{' or '.join(offered)} to choose who gets that mixer" if offered else "take layers=all"
        raise RecipeError(
            [
                f"layers: {shown(recipe.layers)} chooses already, and select would choose among all: {remedy}, or "
                "`linearize run` for the recipe as it is"
            ]
        )
    if give not in recipe.mixers:
        said = closest(give, recipe.mixers) if recipe.mixers else "mixers: names none"
        raise RecipeError([f"--give {give}: the recipe has no such mixer; {said}"])
    if others := [name for name in recipe.mixers if name != give]:
        out = " ".join(f"~mixers.{name} ~layers.use.{name}" for name in others)
        raise RecipeError(
            [f"--give {give}: the recipe gives layers to {', '.join(others)} too; take that out ({out})"]
        )
    if keeps_softmax(recipe.layers, recipe.mixers):
        raise RecipeError(
            [
                f"layers: {shown(recipe.layers)} keeps softmax in some layers, and select would choose among all: take "
                f"layers={{use: {{{give}: {{every: {SHARE}}}}}}}"
            ]
        )


def named_samples(halves: Mapping[str, Halves]) -> dict[str, Sample]:
    """Text and pass keys as the scorer's samples, by the names that rows give them."""
    made = {_choice(kind): found.choice for kind, found in halves.items()}
    return made | {_unseen(kind): found.unseen for kind, found in halves.items()}


def _choice(kind: str) -> str:
    return f"{kind}: choice"


def _unseen(kind: str) -> str:
    return f"{kind}: unseen"


def _everywhere(scorer: Scorer, kept: Kept) -> dict[str, Score]:
    """Metric -> score on all windows that choose."""
    found: dict[str, Score] = {}
    for kind in (TEXT, PASSKEYS):
        if _choice(kind) in scorer.samples:
            found |= scorer(kept, _choice(kind))
    return found


def how_many(options: Options, layers: int, model: str) -> int:
    """How many layers stay softmax.

    Raises:
        LinearizeError: that many cannot, or there is one layer alone.
    """
    if layers < 2:
        raise LinearizeError(f"{model} has {layers} attention layer: there is nothing to choose among")
    keep = options.keep
    if keep is None:
        return max(1, layers // options.share)
    if not 1 <= keep < layers:
        raise LinearizeError(
            f"--keep {keep}: {model} has {layers} attention layers, of which 1 to {layers - 1} can stay softmax"
        )
    return keep


def _halves(tokenizer: Any, recipe: Recipe, options: Options) -> dict[str, Halves]:
    """Text, and pass keys where they fit into a window."""
    made = {TEXT: samples.text(tokenizer, recipe, options.windows, options.length)}
    try:
        keys = len(made[TEXT].choice.ids)  # no more of them than windows of text, however many were asked for
        made[PASSKEYS] = samples.passkeys(tokenizer, keys, options.length, recipe.run.seed)
    except DataError as error:
        if BY[options.by][0] == PASSKEYS:
            raise DataError(f"--by passkey: {error}; take a larger --length") from error
        log.info("no pass keys at --length %s: %s", options.length, error)
    return made


def _converted(source: str, recipe: Recipe, options: Options, device: torch.device) -> Any:
    """The teacher, with fresh mixers in all layers."""
    model: Any
    weights = resolve_weights(recipe.run, device)
    model, _ = models.load_teacher(source, dtype=weights, device=str(device), for_text=True)
    check_trainable(source, model)
    longest = learned_positions(model)
    if longest is not None and options.length > longest:
        raise DataError(
            f"--length {options.length}: {source} has {longest} learned positions; take --length {longest}"
        )
    set_seed(recipe.run.seed)
    return surgery.convert(model, recipe.mixer, "all").requires_grad_(False).eval()


def _announce(scorer: Scorer, options: Options, found: Any, seen: Any) -> None:
    """Say what it will take, from one window's time on this machine."""
    keep = how_many(options, len(scorer.layers), scorer.signature.model)
    placements, scored = _cost(scorer, keep, options)
    trained = 0 if found is None else options.tokens
    calibrated = 0 if seen is None else len(seen) * len(seen[0]["input_ids"])
    tokens = scored - SAVED * _near(scorer, keep, options)
    tokens += TRAINING_PASSES * trained + CALIBRATION_PASSES * calibrated
    seconds = scorer.seconds_a_token() * tokens
    log.info(
        "select (%s of %s layers stay softmax; %s tokens of calibration and %s of alignment, then %s placements, %s "
        "tokens): about %s on this machine where nothing of it is there yet",
        keep,
        len(scorer.layers),
        count(calibrated),
        count(trained),
        placements,
        count(scored),
        duration(seconds),
    )


def _near(scorer: Scorer, keep: int, options: Options) -> int:
    """Tokens of placements that are one layer away from another, see `Scorer.near`."""
    if scorer.student.obstacle is not None:
        return 0
    layers, sizes = len(scorer.layers), {name: sample.ids.numel() for name, sample in scorer.samples.items()}
    alone = layers * sum(sizes.get(_choice(kind), 0) for kind in (TEXT, PASSKEYS))
    return alone + greedy_passes(layers, keep) * sizes.get(_choice(BY[options.by][0]), 0)


def _meter(scorer: Scorer, keep: int, options: Options) -> Meter:
    return Meter("placements", _cost(scorer, keep, options)[1])


def _cost(scorer: Scorer, keep: int, options: Options) -> tuple[int, int]:
    """Placements, each counted as often as it is asked for, and the tokens that they are scored on."""
    where, layers = BY[options.by][0], len(scorer.layers)
    passes = {
        _choice(kind): 1 + layers + keep + (greedy_passes(layers, keep) if kind == where else 0)
        for kind in (TEXT, PASSKEYS)
    }
    passes[_unseen(where)] = 1 + keep * (4 + options.draws)
    asked = {name: number for name, number in passes.items() if name in scorer.samples}
    return sum(asked.values()), sum(n * scorer.samples[name].ids.numel() for name, n in asked.items())
