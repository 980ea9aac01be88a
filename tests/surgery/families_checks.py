"""What a family must hold, through files: identity surgery in every form, both kinds of training, export and reload."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families_configs
import torch
from families_reader import Reader, answers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import linearize
from linearize import models, objectives, surgery
from linearize.config.schema import LoraConfig, StageConfig
from linearize.distill.finetune import predict, predict_teacher
from linearize.distill.positions import counted_from_zero
from linearize.distill.trainable import prepare, trained
from linearize.distill.transfer import transfer_step
from linearize.errors import LinearizeError, UnsupportedModelError

SOFTMAX = {"window": {"name": "full"}}
LOLCATS = {
    "feature_map": {"name": "hedgehog", "dim": 8},
    "window": {"name": "sliding", "size": 6},
    "combine": {"name": "shared_normalizer"},
}
UNTURNED = {
    **LOLCATS,
    "window": {"name": "sliding", "size": 6, "overlap": True},
    "position": {"name": "rope", "recurrent": False},
}
TOLERANCE = 1e-5
"""Of the largest logit."""
ROLES = ["q", "k", "v", "o"]


class NotBuilt(Exception):
    """transformers itself cannot make, save and load the type here."""


@dataclass
class Verdict:
    """What became of one model type: `exact`, `refused`, `not built`, or `failed` with its problems."""

    model_type: str
    verdict: str = "exact"
    reason: str = ""
    layers: str = ""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)


def build(model_type: str, folder: Path) -> None:
    """Save a tiny model with random weights far from their start.

    Raises:
        NotBuilt: with transformers' reason.
    """
    reason = ""
    for changes in ({}, {"num_key_value_heads": 4}):
        try:
            torch.manual_seed(0)
            made = AutoModelForCausalLM.from_config(
                families_configs.tiny_config(model_type, **changes), dtype=torch.float32
            ).eval()
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.12)
                else:
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
            for module in made.modules():
                if getattr(module, "padding_idx", None) is not None and hasattr(module, "weight"):
                    module.weight.data[module.padding_idx] = 0  # loading does so in some families
            with torch.no_grad():
                logits = made(input_ids=Inputs.of(made).ids, use_cache=False).logits
            made.save_pretrained(folder)
            again = load(folder)
        except Exception as error:  # whatever a family's own code raises over a tiny config is the reason
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        with torch.no_grad():
            reloaded = again(input_ids=Inputs.of(again).ids, use_cache=False).logits
        if (reloaded - logits).abs().max() > TOLERANCE * logits.abs().max():
            raise NotBuilt("transformers does not load its own file of it with equal logits")
        return
    raise NotBuilt(reason)


def load(folder: Path) -> PreTrainedModel:
    """The untouched teacher."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass
class Inputs:
    """Ids [2, 40], the first row left-padded by 7, and which arguments the model takes."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    takes_positions: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, families_configs.VOCABULARY, (2, 40), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        ids[0, :7] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return cls(ids, mask, positions, "position_ids" in inspect.signature(model.forward).parameters)

    def at(self, tokens: slice) -> dict[str, Tensor]:
        """Arguments for some of the tokens, everything before them in the cache."""
        given = {"input_ids": self.ids[:, tokens], "attention_mask": self.mask[:, : tokens.stop]}
        return given | ({"position_ids": self.positions[:, tokens]} if self.takes_positions else {})

    @property
    def packed(self) -> Tensor:
        return torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)

    @property
    def prompt(self) -> dict[str, Tensor]:
        return {
            "ids": self.ids,
            "prompt": self.ids[:, :20].contiguous(),
            "mask": self.mask[:, :20].contiguous(),
        }


def forms(model: PreTrainedModel, inputs: Inputs, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """Logits of the model in every form, or in the named ones; padding cut off."""
    found = {}
    for name in names or FORMS:
        with torch.no_grad():
            out = FORMS[name](model, inputs)
        if out is not None:
            found[name] = out
    return found


def own_forms(model: PreTrainedModel, inputs: Inputs, notes: list[str]) -> dict[str, Tensor]:
    """The forms that the untouched model has itself; a note says which ones it fails in."""
    found = {}
    for name in FORMS:
        try:
            found |= forms(model, inputs, [name])
        except Exception as error:  # a fault of the untouched model, whatever it is, is no fault of surgery
            notes.append(f"the untouched model fails in '{name}' ({type(error).__name__})")
    return found


def _padded(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    return model(**inputs.at(slice(0, 40)), use_cache=False).logits[inputs.mask.bool()]


def _packed(model: PreTrainedModel, inputs: Inputs) -> Tensor | None:
    if not inputs.takes_positions:
        return None
    return model(input_ids=inputs.ids, position_ids=inputs.packed, use_cache=False).logits


def _generation(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Logits of greedy, cached generation; other tokens would give other logits."""
    out = model.generate(
        inputs.prompt["prompt"],
        attention_mask=inputs.prompt["mask"],
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits, 1)


def _stepwise(model: PreTrainedModel, inputs: Inputs, prefill: int) -> Tensor | None:
    step = model(**inputs.at(slice(0, prefill)), use_cache=True)
    if getattr(step, "past_key_values", None) is None:
        return None
    logits = [step.logits]
    for t in range(prefill, 40):
        step = model(**inputs.at(slice(t, t + 1)), past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits)
    return torch.cat(logits, 1)[inputs.mask.bool()]


FORMS: dict[str, Callable[[Any, Inputs], Tensor | None]] = {
    "plain": lambda model, inputs: model(input_ids=inputs.ids, use_cache=False).logits,
    "left padding": _padded,
    "packed": _packed,
    "prefill and tokens": lambda model, inputs: _stepwise(model, inputs, 25),
    "token by token": lambda model, inputs: _stepwise(model, inputs, 1),
    "generation": _generation,
}
"""Ways to run a model; None where it takes no such arguments or keeps no cache."""


class Judge:
    """The checks of one type, in order; a check that fails is noted and the others go on."""

    def __init__(self, model_type: str, folder: Path, reader: Reader) -> None:
        self.verdict = Verdict(model_type)
        self.folder = folder
        self.reader = reader

    def run(self) -> Verdict:
        """The verdict; every exception of ours is one of its problems."""
        teacher_folder = self.folder / "teacher"
        try:
            build(self.verdict.model_type, teacher_folder)
        except NotBuilt as error:
            self.verdict.verdict, self.verdict.reason = "not built", str(error)
            return self.verdict
        teacher = load(teacher_folder)
        inputs = Inputs.of(teacher)
        expected = own_forms(teacher, inputs, self.verdict.notes)
        planned = self._refusal(lambda: surgery.plan(models.load_config(teacher_folder), LOLCATS))
        converted = self._refusal(lambda: surgery.convert(load(teacher_folder), LOLCATS))
        if converted:
            self.verdict.verdict, self.verdict.reason = "refused", planned or converted
            if re.search(r"[A-Z]\w*Error: ", self.verdict.reason):
                self.verdict.problems.append(f"an internal error is no reason: {self.verdict.reason}")
            if not planned:
                self.verdict.notes.append("by convert and run, when the weights are there")
        elif not self.verdict.problems:
            if planned:
                self.verdict.notes.append(f"inspect does not know it without its weights: {planned}")
            self._exact(teacher_folder, inputs, expected)
        with self._checking("the untouched model afterwards"):
            kept = {name: expected[name] for name in ("plain", "generation") if name in expected}
            self._compare("the untouched model afterwards", forms(teacher, inputs, kept), kept)
            self._compare("the teacher loaded again", forms(load(teacher_folder), inputs, kept), kept)
        if self.verdict.problems:
            self.verdict.verdict = "failed"
        return self.verdict

    def _refusal(self, action: Callable[[], Any]) -> str:
        try:
            action()
        except LinearizeError as error:
            return " ".join(str(error).split())
        except Exception as error:
            self.verdict.problems.append(f"crash: {type(error).__name__}: {str(error)[:300]}")
        return ""

    @contextmanager
    def _checking(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            told = " ".join(str(error).split())
            self.verdict.problems.append(f"{what}: {type(error).__name__}: {told[-300:]}")

    def _compare(
        self, what: str, found: dict[str, Tensor], expected: dict[str, Tensor], noise: float = 0.0
    ) -> None:
        for name in expected:
            out, wanted = found[name], expected[name]
            scale = max(1.0, wanted.abs().max().item())
            difference = (out - wanted).abs().max().item()
            self.verdict.differences[f"{what}, {name}"] = difference
            if not difference <= max(TOLERANCE * scale, noise):
                self.verdict.problems.append(f"{what}, {name}: off by {difference:.1e}")

    def _exact(self, folder: Path, inputs: Inputs, expected: dict[str, Tensor]) -> None:
        with self._checking("identity"):
            model = surgery.convert(load(folder), SOFTMAX)
            plan = surgery.plan(load(folder), SOFTMAX)
            self.verdict.layers = (
                f"{len(surgery.converted(model))} of {model.config.get_text_config().num_hidden_layers}"
            )
            assert len(plan.rows) == len(surgery.converted(model)), "inspect and convert count other layers"
            self._compare("identity", forms(model, inputs, expected), expected)
        with self._checking("teacher mode"):
            model = surgery.convert(load(folder), LOLCATS)
            wanted = {name: out for name, out in expected.items() if name != "token by token"}
            with surgery.mode(model, "teacher"):
                self._compare("teacher mode", forms(model, inputs, wanted), wanted)
            generator = torch.Generator().manual_seed(2)
            for layer in surgery.converted(model):
                for parameter in layer.mixer.parameters():
                    parameter.data.normal_(generator=generator)
        with self._checking("hybrid"):
            self._forms_agree(model, inputs, expected)
        with self._checking("training"):
            model = self._train(model, inputs, expected, self._roles(folder))
        with self._checking("rotation off"):
            self._unturned(folder, inputs, expected)
        with self._checking("export"):
            linearize.save(model, self.folder / "out")
            before = answers(model, inputs.prompt)
            after = self.reader.ask(self.folder / "out", inputs.prompt, self.folder)
            assert torch.equal(after["tokens"], before["tokens"]), "reloaded, it generates other tokens"
            self._compare("reloaded", {"logits": after["logits"]}, {"logits": before["logits"]})

    def _forms_agree(
        self, model: PreTrainedModel, inputs: Inputs, expected: dict[str, Tensor], what: str = "hybrid"
    ) -> None:
        """Cached and padded forms of a hybrid, up to what the untouched model's own cached form is off."""
        found = forms(model, inputs, expected)
        padded, wanted = found["left padding"], expected["left padding"]
        for name in ("prefill and tokens", "token by token"):
            if name not in found:
                continue
            noise = (expected[name] - wanted).abs().max().item()
            if noise > 1e-2:
                note = f"the untouched model's own {name} differ by {noise:.1g}"
                self.verdict.notes += [] if note in self.verdict.notes else [note]
            else:
                self._compare(what, {name: found[name]}, {name: padded}, noise=4 * noise)

    def _unturned(self, folder: Path, inputs: Inputs, expected: dict[str, Tensor]) -> None:
        """A branch without the rotation reads a cache and padding as it reads the whole, or is refused by name."""
        try:
            model = surgery.convert(load(folder), UNTURNED)
        except UnsupportedModelError as error:
            assert "cannot be rotated back" in str(error), str(error)
            self.verdict.notes.append("no rotation off in a branch (refused)")
            return
        names = [name for name in ("left padding", "prefill and tokens") if name in expected]
        self._forms_agree(model, inputs, {name: expected[name] for name in names}, "rotation off")

    def _roles(self, folder: Path) -> list[str]:
        """The roles that adapters can be hung on, as the plan says before anything is trained."""
        model, found = load(folder), []
        for role in ROLES:
            try:
                surgery.plan(model, LOLCATS, roles=[role])
                found.append(role)
            except UnsupportedModelError:
                self.verdict.notes.append(
                    f"no adapters on {role}: no linear layer plays it (refused in the plan)"
                )
            if found == ["q"] and self._refusal(lambda: surgery.plan(model, LOLCATS, roles=ROLES)) == "":
                return ROLES
        return found

    def _train(
        self, model: Any, inputs: Inputs, expected: dict[str, Tensor], roles: list[str]
    ) -> PreTrainedModel:
        batch = {"input_ids": inputs.ids, "labels": inputs.ids}
        untouched = expected["plain"]
        if inputs.takes_positions:
            batch["position_ids"] = torch.arange(40).expand(2, -1)
            original = load(self.folder / "teacher")
            with torch.no_grad(), counted_from_zero(original):
                untouched = predict(original, batch)
            if (untouched - expected["plain"]).abs().max() > TOLERANCE * expected["plain"].abs().max():
                self.verdict.notes.append("does not count positions from 0, as packed training text does")
        with counted_from_zero(model):
            return self._trained(model, inputs, batch, untouched, roles)

    def _trained(
        self, model: Any, inputs: Inputs, batch: dict[str, Tensor], untouched: Tensor, roles: list[str]
    ) -> PreTrainedModel:
        model = prepare(model, StageConfig(train=["mixers"]))
        losses = transfer_step(model, batch, {"attention_output": 1.0})
        assert losses.isfinite().all() and (losses > 0).all(), f"transfer losses {losses.tolist()}"
        self._step(model)
        model = prepare(model, StageConfig(train=["lora"], lora=LoraConfig(rank=2, targets=roles)))
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        teacher = predict_teacher(model, batch)
        self._compare("teacher under adapters", {"plain": teacher}, {"plain": untouched})
        targets = objectives.next_targets(inputs.ids, batch.get("position_ids"))
        objectives.token_backward(
            predict(model, batch), targets, {"next_token": 1.0, "logits_kl": 1.0}, teacher=teacher
        )
        self._step(model)
        return model.merge_and_unload().eval()

    def _step(self, model: Any) -> None:
        """One step of plain gradient descent on everything that trains."""
        lacking = [name for name, parameter in trained(model).items() if parameter.grad is None]
        assert not lacking, f"no gradient reaches {lacking[:3]}"
        with torch.no_grad():
            for parameter in trained(model).values():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), (
                    "a gradient is not finite"
                )
                parameter -= 1e-2 * parameter.grad / (parameter.grad.norm() + 1)
        model.zero_grad()
