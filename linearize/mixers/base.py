"""What every part of a mixer shares: the shape legend, the layer's numbers, masks, and the branches' currency.

Legend, for the whole package: B batch, T tokens, H query heads, N key-value heads, G = H / N query heads to a
key-value head, K key dim, V value dim, F feature dim, D model dim, C chunk length, W window length, S keys seen by a
query. One layout everywhere: [B, T, H, K].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.kernels import dispatch
from linearize.kernels.window_linear.reference import divide

if TYPE_CHECKING:
    from linearize.mixers.statistics import Statistics

CHUNK = 64
"""Tokens in a chunk of the chunked forms: the window's usual size, and the tile that GPU kernels like."""


@dataclass(frozen=True)
class LayerShape:
    """The numbers of one attention layer that a mixer is built from, read off the teacher by surgery.

    Attributes:
        heads, kv_heads: query and key-value heads.
        key_dim, value_dim: width of a head.
        scaling: factor on q.k before the softmax.
        softcap: tanh soft cap on the scaled scores (Gemma 2), or None.
        sliding_window: tokens that the teacher's own layer sees, or None for all.
        chunk: tokens in a chunk of the teacher's own layer, which sees nothing of earlier ones (Llama 4), or None.
        model_dim: width of the hidden states, D, or None where nobody measured it.
        rotary: how q and k have been rotated: "none", a name of `rotations.WAYS` ("half": rotate-half, possibly
            partial), or "other".
        turns: radians by which a token turns each pair of dims of a rotation of halves from the first dim, or None.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    chunk: int | None = None
    model_dim: int | None = None
    rotary: str = "none"
    turns: tuple[float, ...] | None = None

    @property
    def group(self) -> int:
        """Query heads to a key-value head."""
        return self.heads // self.kv_heads

    def hidden_dim(self) -> int:
        """D, for parts that cannot be built without it.

        Raises:
            LinearizeError: the shape was written down by hand, without `model_dim`.
        """
        if self.model_dim is None:
            raise LinearizeError("this mixer reads hidden states: LayerShape needs model_dim, their width")
        return self.model_dim

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class Partial:
    """What a branch gives: weighted sum of values, sum of weights, and the log scale that both are divided by.

    The branch's true weights are ``weight * exp(stabilizer)``, so two partials can share one normalizer.

    Attributes:
        numerator: [B, T, H, V], float32 or wider.
        denominator: [B, T, H], or None for a branch without a normalizer.
        stabilizer: [B, T, H] (the row maximum of a softmax branch), or None for a branch that needs none.
        divided: the numerator has been divided by the denominator already, as kernels give it; see `sums`.
    """

    numerator: Tensor
    denominator: Tensor | None
    stabilizer: Tensor | None = None
    divided: bool = False

    def normalized(self) -> Tensor:
        """numerator / denominator, zero where nothing was seen; the numerator of a branch without a normalizer."""
        if self.denominator is None or self.divided:
            return self.numerator
        return divide(self.numerator, self.denominator)

    def sums(self) -> Partial:
        """With the weighted sum of values in the numerator, whatever it holds now."""
        if not self.divided or self.denominator is None:
            return self
        return Partial(
            self.numerator.to(self.denominator.dtype) * self.denominator[..., None],
            self.denominator,
            self.stabilizer,
        )

    def every(self, step: int) -> Partial:
        """Each `step`-th token."""
        denominator, stabilizer = (
            None if x is None else x[:, ::step] for x in (self.denominator, self.stabilizer)
        )
        return Partial(self.numerator[:, ::step], denominator, stabilizer, self.divided)

    def scaled(self, factor: Tensor) -> Partial:
        """Both sums times a factor [B, T, H]; a named method, since torch.compile cannot trace `*` of a dataclass."""
        denominator = None if self.denominator is None else self.denominator * factor
        return Partial(self.numerator * factor[..., None], denominator, self.stabilizer)


class Part(nn.Module):
    """A building block of a mixer: a registered class with a typed `Config` and its own initialization."""

    name: ClassVar[str] = ""

    @dataclass
    class Config:
        """Options of the part; overridden by each class."""

    def reset_parameters(self) -> None:
        """Put every parameter at its initial value."""

    def calibrate(self, statistics: Statistics) -> None:
        """Set parameters from what is known of the teacher's layer; a part without a closed form stays as it is."""

    def starts(self, statistics: Statistics) -> list[dict[str, Tensor]]:
        """Other values of its parameters that may come nearer the teacher, of which each head takes its best.

        Every value has the parameter's own shape, heads first. The values at hand always compete.
        """
        return []

    def runs(self) -> dict[str, int]:
        """Parameters that hold all heads several times along an axis, one step after another -> how often."""
        return {}

    def take(self, whole: Part, rank: int, ranks: int) -> None:
        """Be the part of one process's heads, where anything but parameters and buffers follows from a head's number.

        Args:
            whole: the same part, of all heads.
            rank, ranks: which process, of how many.
        """

    def resize(self, factor: Tensor) -> bool:
        """Multiply what each query head gives by a factor [H]; false, and nothing done, where no parameter says it."""
        return False


def put(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter to a calibrated value, broadcast and in its own dtype."""
    with torch.no_grad():
        parameter.copy_(value.expand_as(parameter))


def fill(parameter: Tensor, value: Tensor | float) -> None:
    """Initialize a parameter in place, unless transformers has just loaded it from a checkpoint."""
    if getattr(parameter, "_is_hf_initialized", False):
        return
    with torch.no_grad():
        if isinstance(value, Tensor):
            parameter.copy_(value.expand_as(parameter))
        else:
            parameter.fill_(value)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and states are kept in: float32, or float64 when the inputs are."""
    return torch.promote_types(dtype, torch.float32)


def documents(starts: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Number of the document that each token belongs to.

    Args:
        starts: [B, T] bool, true where a document begins, or None for one document a row.

    Returns:
        [B, T] int64; 0 is the document that a carried state belongs to.
    """
    if starts is None:
        return torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    return starts.to(torch.int64).cumsum(1)


def positions(valid: Tensor, docs: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
    """How many valid tokens of the own document came before.

    Args:
        valid: [B, T] bool, false on padding.
        docs: [B, T] int64, see `documents`.
        carried: [B] int64, valid tokens that document 0 has had before.

    Returns:
        position [B, T] int64 (on padding that of the token before it, or -1), and `carried` [B] for the next call.
    """

    own = valid.to(torch.int64)
    total = own.cumsum(1)
    opens = torch.cat([torch.zeros_like(docs[:, :1]), docs], 1).diff(dim=1) != 0
    in_document = total - torch.where(opens, total - own, 0).cummax(1).values
    position = in_document + carried[:, None] * (docs == 0) - 1
    return position, position[:, -1] + 1


def running(values: Tensor, docs: Tensor, carried: Tensor | None = None) -> Tensor:
    """The sum of a token's own document up to and with the token's.

    Args:
        values: [B, T, ...], zero on padding.
        docs: [B, T] document numbers, non-decreasing; what is carried belongs to document 0.
        carried: [B, ...], the sum of the tokens before, or None for none.

    Returns:
        as `values`, float32 or wider.
    """
    values = wide(values)
    total = summed(values)
    own = (docs != 0).view(*docs.shape, *[1] * (values.dim() - 2))
    if docs.shape[1] > 1:
        before = torch.cat([torch.zeros_like(docs[:, :1]), docs[:, :-1]], 1)
        place = torch.arange(docs.shape[1], device=docs.device).expand_as(docs)
        opened = torch.where(docs != before, place, 0).cummax(1).values
        index = opened.view(own.shape).expand_as(total)
        total = total - torch.where(own, (total - values).gather(1, index), 0.0)
    return total if carried is None else total + torch.where(own, 0.0, carried[:, None].to(total.dtype))


def summed(values: Tensor) -> Tensor:
    """values.cumsum(1) of [B, T, ...]; compiled or on a GPU in pieces of PIECE tokens, and the pieces' sums likewise.

    A sum over more tokens with few numbers beside it Inductor gives to several programs, and then fails to write their
    code ("Error in codegen for ComputedBuffer ... SplitScan", torch 2.11), so that the whole mixer would run part by
    part. Torch's own kernel goes through a dimension that is not the last one number after the other, which long
    prompts wait for.
    """
    tokens = values.shape[1]
    if tokens <= PIECE or not (values.is_cuda or torch.compiler.is_compiling()):
        return values.cumsum(1)
    return _in_pieces(values)


def _in_pieces(values: Tensor) -> Tensor:
    tokens = values.shape[1]
    filled = torch.cat([values, values.new_zeros(values.shape[0], -tokens % PIECE, *values.shape[2:])], 1)
    pieces = filled.unflatten(1, (-1, PIECE)).cumsum(2)
    ends = pieces[:, :, -1]
    ends = ends.cumsum(1) if ends.shape[1] <= PIECE else _in_pieces(ends)
    before = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    return (pieces + before[:, :, None]).flatten(1, 2)[:, :tokens]


PIECE = 32
"""Tokens of a sum that Inductor never gives to several programs, and that torch's kernel soon goes through."""
NARROW = (torch.bfloat16, torch.float16)


def narrows(*tensors: Tensor) -> bool:
    """Whether kernels take these as they are, in bfloat16 or float16, and add up in float32."""
    if dispatch.use_triton(*tensors):
        return tensors[-1].dtype in NARROW
    return False


def wide(x: Tensor) -> Tensor:
    """In the accumulator's dtype: for what is done number by number, which a compiler fuses with what follows."""
    return x.to(accumulator(x.dtype))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight in the dtype of x, as a model's own layers multiply, then `wide`."""
    return wide(x @ weight.to(x.dtype))


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """[B, T, N, K] -> [B, T, N * times, K]: each key-value head once for each of its query heads."""
    return x if times == 1 else x.repeat_interleave(times, dim=2)
