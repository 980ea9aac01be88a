"""The mesa layer: a query reads what least squares over all keys says (MesaNet, von Oswald et al. 2025, 2506.05233)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.kernels import dispatch
from linearize.kernels.conjugate import conjugate_solve
from linearize.kernels.gated_linear import gated_linear_step
from linearize.mixers.base import LayerShape, Part, Partial, fill, product, summed, wide
from linearize.mixers.options import number
from linearize.mixers.state import State
from linearize.mixers.update import UPDATES, WIDEST, Stream
from linearize.mixers.update.least_squares import LOWEST, Systems, solve
from linearize.mixers.update.shared import Overwriting


@UPDATES.register("mesa")
class Mesa(Overwriting):
    """H_t = a_t H_{t-1} + b_t k k^T, G_t = a_t G_{t-1} + b_t k v^T, o_t = scale G_t^T (H_t + Lambda)^-1 q_t.

    G^T (H + Lambda)^-1 is the matrix that best maps every key so far to its value, a ridge regression whose weights
    are b = sigmoid(x W + c) and the decays since; Lambda = 0.25 + softplus of a weight for each head and feature, one
    at the start. Keys and queries are brought to length one. The system is solved by a fixed number of steps of
    conjugate gradients from zero; as many as features are as good as exact. A step multiplies every query by its own
    H_t, which is linear attention on the keys with keys for values, and no H_t is ever written down: one kernel takes
    all steps of a text (`kernels.conjugate.conjugate_chunk`). Gradients are those of the exact solution, by as many
    steps on the gradient that comes in, as the paper's; nothing of the steps is kept.

    Limitations: a text is multiplied `steps` times forward and as often backward, and a token `steps` times by the
    state's second matrix; a decay per feature would make H asymmetric, which conjugate gradients cannot solve. The
    paper has a norm behind the heads where a learned scale for each query head stands here.
    """

    decays = ("none", "head")

    @dataclass
    class Config(Part.Config):
        steps: int = number(30, least=1, most=256)
        """Of conjugate gradients; 30 as published."""
        beta_bias: float = number(0.0, least=-1000, most=1000)
        """c at the start: 0 weighs every token by one half."""
        ridge: float = number(1.0, above=LOWEST, most=1e6)
        """Lambda at the start."""
        scale: float = number(1.0, above=0)
        """Scale of the output at the start."""

    def make(self, shape: LayerShape) -> None:
        self.steps = self.config.steps
        self.beta_weight = nn.Parameter(torch.empty(shape.hidden_dim(), self.heads))
        self.beta_bias = nn.Parameter(torch.empty(self.heads))
        self.ridge = nn.Parameter(torch.empty(self.heads, self.feature_dim))
        super().make(shape)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill(self.beta_weight, 0.0)
        fill(self.beta_bias, self.config.beta_bias)
        above = torch.tensor(self.config.ridge - LOWEST, dtype=torch.float64)
        fill(self.ridge, above + (-(-above).expm1()).log())  # what softplus makes `above` of

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        size = (batch, self.heads, self.feature_dim, self.feature_dim)
        return super().initial(batch, dtype, device) | {"gram": torch.zeros(size, dtype=dtype, device=device)}

    def parallel(self, stream: Stream) -> Partial:
        q, k, keys, ridge = self._terms(stream)
        systems = Systems(keys, k, _decayed(stream), None, None, ridge, dense=True)
        found, _ = solve(systems, q, self.steps)
        return self._scaled(systems.read(found, stream.v, None)[0])

    def chunked(self, stream: Stream, state: State) -> Partial:
        q, k, keys, ridge = self._terms(stream)
        # a sum over the text, which can pass what float16 holds
        keys, k, v = stream.narrow(keys, k, stream.v, grows=True)
        (q,) = stream.narrow(q)
        wider = max(self.feature_dim, self.value_dim) > WIDEST and dispatch.automatic()
        systems = Systems(keys, k, stream.log_decay, stream.docs, state["gram"], ridge, in_torch=wider)
        found, gram = solve(systems, q, self.steps)
        out, sums = systems.read(found, v, state["sums"])
        assert gram is not None and sums is not None
        state.write({"sums": sums, "gram": gram})
        return self._scaled(out.to(stream.q.dtype))

    def step(self, stream: Stream, state: State) -> Partial:
        q, k, keys, ridge = (x[:, 0] if x.dim() == 4 else x for x in self._terms(stream))
        q = wide(q)
        decay = None if stream.log_decay is None else stream.log_decay[:, 0]
        gram = state["gram"]
        with self.form():
            gated_linear_step(q.to(keys.dtype), keys, k, decay, gram)
            found = conjugate_solve(gram, q, ridge, self.steps)
            out, _ = gated_linear_step(found.to(keys.dtype), keys, stream.v[:, 0], decay, state["sums"])
        return self._scaled(out[:, None])

    def _terms(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [B, T, H, F], k and k times b [B, T, M, F], and Lambda [H, F]."""
        assert stream.hidden is not None
        # the key of a token that nobody may see is zero
        k, q = F.normalize(stream.k, dim=-1), F.normalize(stream.q, dim=-1)
        logits = product(stream.hidden, self.beta_weight)
        share = (logits + self.beta_bias.to(logits.dtype)).sigmoid()
        ridge = LOWEST + F.softplus(self.ridge.to(wide(q).dtype))
        return q, k, k * share[..., None].to(k.dtype), ridge.repeat_interleave(q.shape[2] // self.heads, 0)

    def _scaled(self, out: Tensor) -> Partial:
        return Partial(self.scaled(out), None)


def _decayed(stream: Stream) -> Tensor:
    """What has decayed of each key under each query [B, M, T, T]; zero where the query does not see it."""
    tokens = stream.k.shape[1]
    log_decay = stream.k.new_zeros(stream.k.shape[:3]) if stream.log_decay is None else stream.log_decay
    since = summed(log_decay.double()).transpose(1, 2)  # differences of sums over the text
    order = torch.arange(tokens, device=stream.k.device)
    seen = (order[:, None] >= order) & (stream.docs[:, :, None] == stream.docs[:, None])
    left = (since[..., None] - since[..., None, :]).masked_fill(~seen[:, None], -torch.inf)
    return left.to(log_decay.dtype).exp()
