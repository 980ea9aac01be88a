"""Which values each field of the schema allows, beyond its type: ranges and fixed choices.

Every number has both ends. Upper ends are no advice: they lie far beyond what any run has used, and keep out what can
only be a slip of the hand (a learning rate of 1e38, a batch of 10^12), which would die in a library's own words later.
"""

from __future__ import annotations

from linearize.config import schema
from linearize.config.ranges import Range, above, at_least, share

TEMPLATES = ("none", "rendered", "alpaca", "chat")

CHOICES: dict[type, dict[str, tuple[str, ...]]] = {
    schema.DataConfig: {"template": TEMPLATES},
    schema.StageDataConfig: {"template": (*TEMPLATES, "preference")},
    schema.StageConfig: {"clip_by": ("all", "layer")},
    schema.RunConfig: {
        "device": ("auto", "cpu", "cuda"),
        "precision": ("auto", "fp32", "bf16"),
        "weights": ("auto", "float32", "bfloat16"),
        "compile": ("auto", "always", "never"),
        "shard": ("auto", "none", "full"),
        "teacher_device": ("auto", "cpu"),
    },
    schema.ExportConfig: {"dtype": ("auto", "float32", "bfloat16", "float16")},
}
"""Class -> field -> the only values it may have."""

ITEM_CHOICES: dict[type, dict[str, tuple[str, ...]]] = {
    schema.LoraConfig: {"targets": ("q", "k", "v", "o")},
    schema.StageConfig: {
        "train": ("mixers", "lora", "all"),
        "freeze": ("embeddings", "norms", "mlp"),
    },
}
"""Class -> list field -> the only values its items may have; none twice, and at least one but in `MAY_BE_EMPTY`."""

TRACKERS = (
    "tensorboard", "wandb", "trackio", "aim", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab",
)  # fmt: skip
"""What `run.trackers` may name; a test holds them to accelerate's."""

MAY_BE_EMPTY = frozenset({"freeze"})
"""List fields of `ITEM_CHOICES` whose default is empty."""

WIDEST = 65_536
"""Of a head's, a projection's or a batch's width: no model's is larger."""
LONGEST = 10_000_000
"""Tokens in a sequence."""
MOST = 10**12
"""Steps between two events, or things counted."""
SEEDS = Range(0, 2**32 - 1001)
"""Each stage adds its number to the seed, which must stay below 2^32."""

RULES: dict[type, dict[str, Range]] = {
    schema.LoraConfig: {"rank": at_least(1, WIDEST), "alpha": above(0, 1e6), "dropout": share(whole=False)},
    schema.StageConfig: {
        "objective": Range(0, 1e9),  # zero takes an inherited objective out
        "tokens": at_least(1, 10**15),
        "batch_size": at_least(1, WIDEST),
        "lr": above(0, 100),
        "lr_mixers": above(0, 100),
        "lr_schedule": share(whole=True),
        "min_lr_ratio": share(whole=True),
        "warmup_ratio": share(whole=False),
        "decay_ratio": above(0, 1),
        "weight_decay": at_least(0, 100),
        "grad_clip": at_least(0, 1e9),
        "window_dropout": share(whole=True),
        "top_k": at_least(0, 10**6),
        "dpo_beta": above(0, 1000),
        "log_every": at_least(1, MOST),
        "save_every": at_least(1, MOST),
    },
    schema.DataConfig: {"length": at_least(2, LONGEST), "echo": share(whole=True)},
    schema.TeacherConfig: {
        "temperature": at_least(0, 100),
        "top_k": at_least(0, 10**7),
        "top_p": above(0, 1),
        "length": at_least(64, LONGEST),
        "seed": SEEDS,
    },
    schema.StageDataConfig: {"length": at_least(2, LONGEST), "echo": share(whole=True)},
    schema.EvalConfig: {
        "length": at_least(2, LONGEST),
        "max_windows": at_least(0, MOST),
        "task_limit": at_least(0, MOST),
    },
    schema.CalibrateConfig: {"tokens": Range(0, 131_072)},  # all at once
    schema.RunConfig: {"seed": SEEDS, "sequence": at_least(1, 4096)},
}
"""Class -> field -> its range; of a mapping's values where the field is one. A test finds numbers that have none."""

OVER_STAGE: dict[type, dict[str, type]] = {
    schema.StageConfig: {"batch_size": int, "window_dropout": float, "lr_schedule": float},
    schema.StageDataConfig: {"length": int},
}
"""Class -> field that may change within a stage (`schedule`) -> kind of its numbers."""
NAMED_COURSES: dict[type, dict[str, tuple[str, ...]]] = {
    schema.StageConfig: {"lr_schedule": ("cosine", "constant", "wsd")},
}
"""Class -> field of `OVER_STAGE` -> what stands there in place of a list."""

LAYER = Range(0, 9999)
"""Numbers of layers."""
EVERY = Range(2, 10_000)
"""n of `layers: {every: n}`."""
PLACES = Range(1, 10_000)
"""n of `first: n` and `last: n`, and letters of a pattern."""
SEQUENCES = at_least(1, WIDEST)
"""At once on a device."""
CHAT = share(whole=True)
"""Of a teacher's documents, in its chat template."""
WORKERS = at_least(0, 256)
"""Processes of a data loader."""
STAGES = 100
"""Stages of a recipe at most."""
LONGEST_NAME = 100
"""Characters of a stage's name, which is part of a folder's."""
