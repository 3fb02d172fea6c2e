"""A language model of one transformer block at its rest point."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from ...solvers import Solution
from ...solvers.fixed_point import FixedPointSolver
from ...solvers.fixed_point.api import AnyAdjoint
from ..dropout import VariationalDropout
from ..registry import register_model
from .layer import DEQ, Problem

WAVELENGTH = 10_000.0

Tokens = Int[Tensor, "batch length"]
States = Float[Tensor, "batch length channels"]


def rotated(x: Float[Tensor, "batch heads length width"]) -> Float[Tensor, "batch heads length width"]:
    """`x` with its pairs of channels turned by angles that grow with the position.

    Products of two such vectors know their positions by the distance alone.

    Source: Su et al. 2021, RoFormer, equation 34.
    """
    length, width = x.shape[-2:]
    # In float32 under autocast, too: positions are integers that bfloat16 cannot tell apart.
    frequencies = WAVELENGTH ** -(torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=x.device, dtype=torch.float32).outer(frequencies)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)


class CausalCell(nn.Module):
    """f(z, x) = norm(h + mlp(h)) with h = norm(x_r + attention(W z + x_qkv)): a transformer block that sees the past.

    The injection x has four parts for every position: three are added to its query, key and value, and x_r stands where
    an explicit block has its skip connection. Position t of f depends on the positions up to t alone.

    Args:
        channels: of the state.
        heads: of the attention.
        mlp_ratio: hidden channels of the MLP, in multiples of `channels`.
        dropout: probability of variational dropout of what attention and MLP add: one mask of channels a solve, the
            same at every position.

    Source: Bai, Kolter and Koltun 2019, section 3.2 (weight-tied transformer).
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = int(channels * mlp_ratio)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.drop = VariationalDropout(dropout, channelwise=True)

    def forward(self, z: States, x: Float[Tensor, "batch length injected"]) -> States:
        """f(z, x)."""
        injected, skip = x.split([3 * z.shape[2], z.shape[2]], dim=2)
        h = _normalised(skip + self._dropped(self._attend(self.qkv(z) + injected)))
        return _normalised(h + self._dropped(self.down(F.gelu(self.up(h)))))

    def _attend(self, qkv: Tensor) -> Tensor:
        batch, length, _ = qkv.shape
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Written out: fused attention has no second derivative, which penalties on the Jacobian need.
        scores = rotated(q) @ rotated(k).transpose(2, 3) / math.sqrt(q.shape[3])
        future = torch.ones(length, length, dtype=torch.bool, device=qkv.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=3)
        return self.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def _dropped(self, y: Tensor) -> Tensor:
        return self.drop(y.transpose(1, 2)).transpose(1, 2)


def _normalised(y: Tensor) -> Tensor:
    return F.layer_norm(y, y.shape[2:])


@dataclasses.dataclass(frozen=True)
class _Start:
    """z0 = 0 of every position of an injection."""

    channels: int

    def __call__(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], self.channels)


class DEQLanguageModel(nn.Module):
    """The next token of a text, from the rest point of one causal transformer block: a transformer of any depth.

    Tokens are embedded and make the injection; the state, one vector a position, is found from zero; a linear layer
    reads the logits off it. A sample is a whole text, whose positions the solver moves together: the equation is
    causal, z_t = f(z_1, ..., z_t, x_1, ..., x_t), so that its solution is, too, and a solver's iterates are as far as
    they have converged. Under `Picard` with a fixed number of steps they are exactly.

    Where it follows Bai et al.: one weight-tied block with post-norm, the injection into queries, keys and values, the
    implicit gradient of constant memory, dropout whose masks one solve keeps. Where not: the block's first skip
    connection carries the injection instead of the state, since z -> norm(z + ...) begins as nearly the identity, which
    has no rest point to find, and this as a contraction; normalisation has no parameters, so that the state lies on a
    sphere; positions are rotations (Su et al. 2021) in place of learnt relative ones; no memory of an earlier piece of
    the text; embedding and output are not tied, and of one size for all tokens.

    Args:
        num_tokens: size of the vocabulary.
        channels: of a position's state; a multiple of twice the heads.
        heads: of the attention.
        mlp_ratio: hidden channels of the MLP, in multiples of `channels`.
        dropout: of the `CausalCell`.
        context: tokens that `generate` looks back on; those of training pieces, as a rule.
        solver, adjoint, rtol, atol, max_steps: of the `DEQ`.

    Attributes:
        num_tokens, context: as given.

    Raises:
        ValueError: an option out of range.

    Source: Bai, Kolter and Koltun 2019, Deep equilibrium models.

    Example:
        >>> model = DEQLanguageModel(num_tokens=65, channels=32, heads=2)
        >>> model(torch.zeros(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 7, 65])
    """

    def __init__(
        self, *, num_tokens: int = 65, channels: int = 192, heads: int = 6, mlp_ratio: float = 4.0,
        dropout: float = 0.0, context: int = 128, solver: FixedPointSolver | None = None,
        adjoint: AnyAdjoint | None = None, rtol: float = 1e-4, atol: float = 0.0, max_steps: int = 50,
    ) -> None:  # fmt: skip
        super().__init__()
        if channels % (2 * heads):
            raise ValueError(
                f"DEQLanguageModel: channels must be a multiple of 2 * heads = {2 * heads}; got {channels}."
            )
        if num_tokens < 1 or context < 1:
            raise ValueError(
                f"DEQLanguageModel: num_tokens and context must be positive; got {num_tokens} and {context}."
            )
        self.num_tokens, self.context = num_tokens, context
        self.embed = nn.Embedding(num_tokens, channels)
        self.inject = nn.Linear(channels, 4 * channels)
        self.deq = DEQ(
            CausalCell(channels, heads, mlp_ratio, dropout), solver=solver, adjoint=adjoint, rtol=rtol, atol=atol,
            max_steps=max_steps, state=_Start(channels),
        )  # fmt: skip
        self.readout = nn.Linear(channels, num_tokens)

    def problem(self, tokens: Tokens, z0: States | None = None) -> Problem:
        """The fixed-point problem of texts, as `restpoint.solvers.diagnose` takes it, from z0 or from zero.

        Raises:
            ValueError: a token outside the vocabulary, or tokens of another shape.
        """
        return self.deq.problem(self._injection(tokens), z0)

    def solve_problem(self, problem: Problem) -> Solution[Tensor]:
        """The states at rest (batch, length, channels) of texts given as their `problem`."""
        return self.deq.solve_problem(problem)

    def solve(self, tokens: Tokens, z0: States | None = None) -> Solution[Tensor]:
        """The states at rest as a Solution: how many steps each text took, how well it converged."""
        return self.solve_problem(self.problem(tokens, z0))

    def forward_head(self, states: States) -> Float[Tensor, "batch length num_tokens"]:
        """Logits of the token after each position."""
        return self.readout(states)

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch length num_tokens"]:
        """Logits of the token after each position, from the tokens up to it."""
        return self.forward_head(self.deq(self._injection(tokens)))

    @torch.no_grad()
    def generate(
        self,
        prompt: Tokens,
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: Generator | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Continue texts, token by token, each drawn given the `context` tokens before it.

        Every solve starts from the rest points of the one before, which the new token does not move.

        Args:
            prompt: one token at least.
            length: how many tokens to add.
            temperature: the logits are divided by it; 0 takes the most probable token.
            top_k: draw among the so many most probable tokens; None among all.
            generator: of the draws.

        Returns:
            The prompts with their continuations, (batch, prompt + length).

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, or an option out of range.
        """
        if length < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"generate: length and temperature must not be negative, top_k not below 1; got {length}, "
                f"{temperature} and {top_k}."
            )
        if prompt.ndim != 2 or prompt.shape[1] == 0:
            raise ValueError(f"generate: expected a prompt (batch, length) of one token at least; got {prompt.shape}.")
        was_training = self.training
        self.eval()
        tokens, z0 = prompt, None
        for _ in range(length):
            states = self.solve(tokens[:, -self.context :], z0).value
            following = _draw(self.forward_head(states[:, -1:])[:, 0].float(), temperature, top_k, generator)
            tokens = torch.cat([tokens, following], dim=1)
            # The window moves on when it is full; positions are relative, so that the states move with it.
            z0 = F.pad(states, (0, 0, 0, 1))[:, -min(tokens.shape[1], self.context) :]
        self.train(was_training)
        return tokens

    def _injection(self, tokens: Tokens) -> Tensor:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"DEQLanguageModel: expected tokens (batch, length) of integers; got {tuple(tokens.shape)} of "
                f"{tokens.dtype}."
            )
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= self.num_tokens:
            raise ValueError(f"DEQLanguageModel: tokens must lie in 0 ... {self.num_tokens - 1}; got {low} to {high}.")
        return self.inject(self.embed(tokens))


def _draw(
    logits: Float[Tensor, "batch num_tokens"], temperature: float, top_k: int | None, generator: Generator | None
) -> Int[Tensor, "batch 1"]:
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)


@register_model(family="deq_lm", task="language-modelling", accepts=DEQLanguageModel)
def deq_lm_tiny(**arguments: Any) -> DEQLanguageModel:
    """An equilibrium transformer that continues texts character by character: 192 channels."""
    return DEQLanguageModel(**arguments)


@register_model(family="deq_lm", task="language-modelling", accepts=DEQLanguageModel)
def test_deq_lm(**arguments: Any) -> DEQLanguageModel:
    """An equilibrium language model small enough for tests."""
    return DEQLanguageModel(**{"channels": 16, "heads": 2, "mlp_ratio": 2.0, "context": 8, **arguments})
