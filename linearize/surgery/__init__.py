"""Surgery: find a model's attention layers, hang mixers inside them, and keep the teacher one switch away."""

from linearize.surgery.attention import LinearizedAttention, family_of
from linearize.surgery.control import (
    as_teacher_layers,
    branch_off,
    fresh_mixers,
    load_mixer_state,
    mixer_state,
    mode,
    observe,
    reset_mixers,
    trusting,
)
from linearize.surgery.convert import convert
from linearize.surgery.inspection import attention_layers, skeleton
from linearize.surgery.layer_call import LayerCall
from linearize.surgery.model import converted
from linearize.surgery.plan import Plan, plan, select
from linearize.surgery.projections import ROLES, projections, role_modules

__all__ = [
    "ROLES",
    "LayerCall",
    "LinearizedAttention",
    "Plan",
    "as_teacher_layers",
    "attention_layers",
    "branch_off",
    "convert",
    "converted",
    "family_of",
    "fresh_mixers",
    "load_mixer_state",
    "mixer_state",
    "mode",
    "observe",
    "plan",
    "projections",
    "reset_mixers",
    "role_modules",
    "select",
    "skeleton",
    "trusting",
]
