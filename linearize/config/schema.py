"""The recipe as typed dataclasses: every key that a recipe may hold, its type, its default and what it means.

Defaults are the field's usual choices; `recipes/base.yaml` only repeats what a reader wants to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from linearize.config.schedule import Over

Whole = int | list[Any]
Number = float | list[Any]
"""Of fields that may change within a stage: a number, or a list as `schedule` reads it."""


@dataclass
class LoraConfig:
    """Low-rank adapters on the projections (Hu et al. 2021), through peft."""

    rank: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o"])
    """Roles of the projections: q, k, v, o; a fused projection counts for each role that it holds."""
    merge: bool = True
    """Merge the adapter into the exported weights; false keeps it apart in checkpoint/adapter."""


@dataclass
class StageDataConfig:
    """What one stage changes in the recipe's `data`: a key that is absent or null keeps the recipe's value."""

    source: Any = None
    mix: dict[str, Any] | None = None
    """Takes the place of the recipe's source or mix, as `source` does."""
    split: str | None = None
    text_field: str | None = None
    template: str | None = None
    """As in `data`, or preference: pairs for dpo, in columns prompt, chosen and rejected."""
    length: Whole | None = None
    """Also as a list over the stage, [512, 1024, 4096]: each a divisor of the longest."""
    boundaries: bool | None = None
    echo: float | None = None


@dataclass
class StageConfig:
    """One stage of training."""

    objective: dict[str, float] = field(default_factory=dict)
    """Objective name -> weight. All of one level: per layer (attention transfer), of the whole model, or on pairs."""
    tokens: int = 1_000_000
    """Training tokens in all; accepts 20M, 500k."""
    batch_size: Whole = 8
    """Sequences of one optimizer step; also as a list over the stage, [[0, 8], [0.1, 32]] or [8, 16, 32]."""
    micro_batch: Any = "auto"
    """Sequences on the device at once, a divisor of `batch_size`: auto (on CUDA as many as fit, of 131,072
    tokens at most), or a number. The step is the same whatever it is."""
    lr: float = 1e-3
    """Peak learning rate (AdamW)."""
    lr_schedule: Any = "cosine"
    """What follows the warm-up: cosine (down to min_lr_ratio), constant, wsd (constant, then in the last decay_ratio of
    the steps a line down to min_lr_ratio), or shares of the peak as a list over the stage, [[0, 1], [0.5, 0.1]]."""
    min_lr_ratio: float = 0.1
    """cosine and wsd end at this share of the peak."""
    decay_ratio: float = 0.2
    """wsd: share of the steps in which the rate falls."""
    warmup_ratio: float = 0.03
    """Share of the steps that warm up linearly."""
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    clip_by: str = "all"
    """Whose norm: all (of all gradients together) or, in per-layer stages, layer: each layer's by itself, at most
    grad_clip / sqrt(converted layers), so that no layer looks at another one (`linearize blocks` asks for it)."""
    train: list[str] = field(default_factory=lambda: ["mixers"])
    """What trains: mixers, lora, all."""
    lr_mixers: float | None = None
    """Peak learning rate of the mixers, where it is not `lr`; both follow the same schedule."""
    freeze: list[str] = field(default_factory=list)
    """What `train: [all]` leaves out: embeddings (the output head too), norms, mlp."""
    untie: bool = False
    """Tied embeddings are apart during the stage; then the trained head is thrown away and they are tied again
    (RADLADS, Goldstein et al. 2025, arXiv 2505.03005). Nothing happens to a model whose embeddings are not tied."""
    lora: LoraConfig | None = None
    """Adapters for this stage; needed when `train` holds lora."""
    window_dropout: Number = 0.0
    """How often, per layer and batch, the window is off, so that the linear branch alone learns the whole output; also
    as a list over the stage, [0.9, 0.75, 0.5]. In per-layer stages queries that see nothing without the window have no
    loss then; others need window.overlap: true."""
    top_k: int = 0
    """logits_kl: only so many of the teacher's likeliest tokens and one bucket for all others, computed once for the
    stage's text and kept in the run folder until the stage ends; 0 for all tokens, in every step."""
    dpo_beta: float = 0.1
    """dpo: how strongly the student is held to the teacher."""
    data: StageDataConfig | None = None
    """Training text of this stage, where it differs from the recipe's `data`."""
    gradient_checkpointing: bool = False
    """Trade compute for memory in whole-model stages."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    save_every: int = 200
    """Optimizer steps between two resumable checkpoints."""

    def length_key(self, name: str) -> str:
        """Where the length of its sequences is set, for advice: `name`'s own data, or the recipe's."""
        own = self.data is not None and self.data.length is not None
        return f"stages.{name}.data.length" if own else "data.length"


@dataclass
class CalibrateConfig:
    """What is set in closed form before any training: decays, strengths, feature maps, shares and sizes."""

    tokens: int = 0
    """Training tokens that are looked at; 0 leaves the mixers at their published start. Shipped recipes: 16384."""


@dataclass
class TeacherConfig:
    """How the teacher writes text, where `data.source` or `data.mix` names it."""

    temperature: float = 0.9
    """Scores are divided by it; 0 takes the likeliest token."""
    top_k: int = 512
    """Only so many likeliest tokens are drawn from; 0 for all, which is slow."""
    top_p: float = 0.95
    """And of these only the fewest that hold this share of the mass."""
    length: int = 1024
    """Tokens of a document at most, opening included."""
    chat: Any = "auto"
    """Share of the documents that answer a first turn in the tokenizer's chat template: auto (0.3 where there is one,
    else 0), or a number from 0 to 1."""
    batch: Any = "auto"
    """Documents written at once: auto (up to 2048, by the device's memory; 8 on the CPU), or a number."""
    seed: int = 0
    """Of openings and draws. Not `run.seed`: a run with another seed reads the same text in another order."""


@dataclass
class DataConfig:
    """Training text."""

    source: Any = "builtin"
    """builtin, a file or folder (parquet, JSONL, txt), a glob, a hub dataset name, a list of these, or teacher (the
    model itself writes the text)."""
    mix: dict[str, Any] = field(default_factory=dict)
    """In place of `source`: source -> weight, or {weight, template, text_field, split} for one that is read in another
    way. Weights are shares of the tokens."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """How the source `teacher` is written."""
    validation: Any = "builtin"
    """Held-out text for perplexity, in the same forms."""
    split: str = "train"
    """Split of a hub dataset."""
    text_field: str = "text"
    """Column that holds the text."""
    template: str = "none"
    """none (plain text), rendered (text in which a chat template is written out), alpaca, or chat (the tokenizer's chat
    template)."""
    length: int = 1024
    """Tokens in a packed sequence."""
    boundaries: bool = True
    """Documents packed into one sequence do not see each other."""
    echo: float = 0.0
    """Share of the training sequences in which passages come again further on, so that there is much to remember."""

    def of(self, stage: StageConfig) -> DataConfig:
        """What a stage trains on: this, with what the stage changes; of several lengths the longest."""
        changed = {} if stage.data is None else vars(stage.data)
        changed = {key: value for key, value in changed.items() if value is not None}
        if "source" in changed:
            changed = {"mix": {}, **changed}
        elif "mix" in changed:
            changed["source"] = DataConfig.source
        if "length" in changed:
            changed["length"] = Over.of(changed["length"]).most
        return replace(self, **changed)


@dataclass
class EvalConfig:
    """What is measured before, between and after the stages."""

    length: int = 1024
    """Window of the perplexity, in tokens."""
    max_windows: int = 50
    """At most this many windows of a text; 0 = all."""
    batch_size: Any = "auto"
    """Windows, or items of a task, at once: auto (on CUDA as many as fit, up to 32; else 4), or a number."""
    texts: dict[str, str] = field(default_factory=dict)
    """Further texts: name -> file."""
    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks of eval/tasks, or [all]."""
    task_data: str = ""
    """Folder that holds the tasks' JSONL files."""
    task_limit: int = 0
    """Items of each task; 0 = all."""
    ablations: bool = True
    """Also measure with one branch off and with untrained mixers."""


@dataclass
class RunConfig:
    """Where and how it runs."""

    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda."""
    precision: str = "auto"
    """auto (bf16 autocast on CUDA, else float32), fp32, bf16. Masters stay float32."""
    weights: str = "auto"
    """Of what does not train, the teacher included: auto (bfloat16 where the passes are and the device is CUDA, else
    float32), float32, bfloat16. What trains has float32 weights in any case."""
    workers: Any = "auto"
    """Processes that read the packed text: auto (two on CUDA, none elsewhere), or a number."""
    capture: bool = True
    """On CUDA, record a training step once and replay it as one CUDA graph, where that can be done."""
    compile: str = "auto"
    """Whether end-to-end stages compile the model's blocks: auto (on CUDA, in stages of many steps), always, never."""
    shard: str = "auto"
    """Of several processes, whether each keeps a part of the base weights alone, the teacher's included: auto (on CUDA,
    where a copy for each does not fit by `linearize plan`), none, full."""
    sequence: int = 1
    """Of several processes, how many hold each sequence together, a stretch of it each (sequence parallelism); a
    divisor of their number."""
    teacher: str = ""
    """Another model, of the same tokenizer, whose predictions end-to-end stages learn (logits_kl, dpo); empty: MODEL
    itself. Attention transfer imitates MODEL's own attention in any case."""
    teacher_device: str = "auto"
    """Where a teacher of its own is kept: auto (as the model), cpu (the machine's memory, each block on the device for
    as long as it computes)."""
    trackers: Any = "auto"
    """Where numbers go beside metrics.jsonl: auto (TensorBoard's files in the run folder, where it is installed), none,
    or names that accelerate knows, [tensorboard, wandb, trackio, ...]."""
    profile: bool = False
    """Write a trace of three steps of each stage into the run folder, trace-STAGE.json."""


@dataclass
class ExportConfig:
    """The checkpoint that a run ends with."""

    dtype: str = "auto"
    """Of all weights but the mixers', which stay float32: auto (what the teacher's checkpoint holds most of), float32,
    bfloat16, float16."""


@dataclass
class Recipe:
    """A whole conversion: which layers, which mixer, which stages, on which text."""

    description: str = ""
    """One line, shown by `linearize recipes`."""
    paper: str = ""
    """Reference, shown in the report and the model card."""
    layers: Any = "all"
    """Which attention layers are converted, and into which mixer; the rest stay softmax. all | {every: n} (every n-th
    stays) | [0, 2, 5] | {keep: [7, 15], use: {NAME: {first: 2}}} | a pattern such as LLLS; see config/layers.py."""
    mixer: dict[str, Any] = field(default_factory=dict)
    """Part -> {name, options}: feature_map, window, update, combine."""
    mixers: dict[str, Any] = field(default_factory=dict)
    """Name -> what a mixer of that name, which `layers` gives to some layers, changes in `mixer`."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Run in the order written."""
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
