"""Rotary positions as the teacher has them, in each branch on or off (Liger, LAWCAT and Lizard rotate in part)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.mixers.base import LayerShape, Part
from linearize.mixers.position import POSITIONS, Position


@POSITIONS.register("rope")
class Rope(Position):
    """The teacher's own rotation; where a branch has it off, the layer's q and k are rotated back exactly.

    Rotating back knows pairs of halves (Llama, Qwen, Gemma, GPT-OSS) and of neighbours (Cohere, GLM, Llama 4), on whole
    heads, their first dims or their last ones (DeepSeek); models without RoPE, or NoPE layers, have nothing to rotate
    back and stay as they are.

    Limitations: the layer must be handed its cosines and sines; where it looks them up itself or takes them in another
    order (GPT-J, CodeGen, RecurrentGemma), a branch cannot have the rotation off.
    """

    @dataclass
    class Config(Part.Config):
        window: bool = True
        """The window's q and k are rotated."""
        recurrent: bool = True
        """The recurrent branch's q and k are rotated."""

    def __init__(self, config: Config, shape: LayerShape) -> None:
        super().__init__(config, shape)
        self.window_rotated, self.recurrent_rotated = config.window, config.recurrent
