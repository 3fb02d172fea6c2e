"""Simulated mechanics: trajectories of a pendulum and of two bodies, and energies to hold predictions to."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ...solvers.ode import Dopri8, solve_ode
from .batches import generator_of, part_of
from .source import DataError, register_data

Trajectories = tuple[Float[Tensor, "batch seen state"], tuple[float, ...], Float[Tensor, "batch times state"]]

# How much longer than in training the trajectories are that models are measured on.
HORIZONS = 10
SEEN = 5
PARTS = {"train": 1, "validation": 2, "test": 3}


class System(abc.ABC):
    """A Hamiltonian system of unit constants; states are positions before momenta.

    Attributes:
        degrees: of freedom.
    """

    degrees: int

    @abc.abstractmethod
    def energy(self, state: Float[Tensor, "*batch state"]) -> Float[Tensor, " *batch"]:
        """The conserved energy."""

    @abc.abstractmethod
    def field(self, t: Tensor, state: Float[Tensor, "batch state"]) -> Float[Tensor, "batch state"]:
        """Hamilton's equations."""

    @abc.abstractmethod
    def draw(self, count: int, generator: Generator) -> Float[Tensor, "count state"]:
        """Initial states, in float64."""

    def simulate(
        self, start: Float[Tensor, "batch state"], times: Float[Tensor, " times"]
    ) -> Float[Tensor, "batch times state"]:
        """Trajectories, in float64 to ten digits."""
        with torch.no_grad():
            solution = solve_ode(self.field, start.double(), times, solver=Dopri8(), rtol=1e-10, atol=1e-10)
        return solution.value.transpose(0, 1)


class Pendulum(System):
    """H = 3 (1 - cos q) + p^2, which swings from sides up to 132 degrees.

    Source: Greydanus et al. 2019, experiment 2; the constants and the radii of initial states are those of its code.
    """

    degrees = 1

    def energy(self, state: Float[Tensor, "*batch state"]) -> Float[Tensor, " *batch"]:
        """See `System`."""
        q, p = state.unbind(-1)
        return 3 * (1 - q.cos()) + p.square()

    def field(self, t: Tensor, state: Float[Tensor, "batch state"]) -> Float[Tensor, "batch state"]:
        """See `System`."""
        q, p = state.unbind(-1)
        return torch.stack([2 * p, -3 * q.sin()], dim=-1)

    def draw(self, count: int, generator: Generator) -> Float[Tensor, "count state"]:
        """Anywhere in the ring of radii 1.3 to 2.3 of (q, p), uniformly in radius and angle."""
        radius, angle = torch.rand(2, count, generator=generator, dtype=torch.float64)
        angle = 2 * math.pi * angle
        return (radius + 1.3).unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)


class TwoBodies(System):
    """Two bodies of mass 1 in the plane that attract each other: H = |p1|^2 / 2 + |p2|^2 / 2 - 1 / |q1 - q2|.

    States are x1, y1, x2, y2 and as many momenta.

    Source: Greydanus et al. 2019, experiment 4: almost circular orbits around a centre of mass at rest.
    """

    degrees = 4

    def energy(self, state: Float[Tensor, "*batch state"]) -> Float[Tensor, " *batch"]:
        """See `System`."""
        apart = (state[..., 2:4] - state[..., :2]).norm(dim=-1)
        return state[..., 4:].square().sum(-1) / 2 - 1 / apart

    def field(self, t: Tensor, state: Float[Tensor, "batch state"]) -> Float[Tensor, "batch state"]:
        """See `System`."""
        apart = state[..., 2:4] - state[..., :2]
        force = apart / apart.norm(dim=-1, keepdim=True) ** 3
        return torch.cat([state[..., 4:], force, -force], dim=-1)

    def draw(self, count: int, generator: Generator) -> Float[Tensor, "count state"]:
        """Bodies 0.5 to 1.5 from the centre, in any direction, 5 % off the speed of a circular orbit."""
        radius, angle = torch.rand(2, count, 1, generator=generator, dtype=torch.float64)
        radius, angle = radius + 0.5, 2 * math.pi * angle
        off = 1 + 0.05 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
        q = radius * torch.cat([angle.cos(), angle.sin()], dim=1)
        p = torch.cat([-angle.sin(), angle.cos()], dim=1) / (2 * radius.sqrt()) * off
        return torch.cat([q, -q, p, -p], dim=1)


class TrajectoryBatches:
    """Batches of pieces of trajectories, a function of seed and epoch.

    Args:
        system: that moved so.
        states: whole trajectories.
        spacing: time between two states.
        length: states of a piece; None for whole trajectories.
        batch_size: pieces a batch. Without `shuffle` a last, smaller batch is kept.
        steps: batches an epoch, of pieces drawn at random; None for every trajectory once, in order.
        seed: of the pieces.
        device: where the batches go.

    Raises:
        ValueError: a size below one, or a piece longer than the trajectories.
    """

    def __init__(
        self,
        system: System,
        states: Float[Tensor, "count times state"],
        spacing: float,
        length: int | None,
        batch_size: int,
        *,
        steps: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        length = states.shape[1] if length is None else length
        if batch_size < 1 or not SEEN <= length <= states.shape[1]:
            raise ValueError(
                f"Batches need one piece of {SEEN} to {states.shape[1]} states at least; got {batch_size} of {length}."
            )
        self.system, self.states, self.spacing, self.length = system, states, spacing, length
        self.batch_size, self.steps, self.seed, self.device = batch_size, steps, seed, device

    def __len__(self) -> int:
        return -(-len(self.states) // self.batch_size) if self.steps is None else self.steps

    def rows(self, place: int) -> int:
        """Pieces in batch `place` of an epoch."""
        left = len(self.states) - place * self.batch_size
        return self.batch_size if self.steps is not None else min(self.batch_size, left)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Trajectories]:
        """The batches of epoch `index`, from batch `start` on, in float32; of each the part of process `rank`.

        A batch is the first states of its pieces, the times of all of them from zero on, and those states.
        """
        times = tuple(self.spacing * k for k in range(self.length))
        for place in range(start, len(self)):
            rows = self.rows(place)
            which = place * self.batch_size + torch.arange(rows)
            first = torch.zeros(rows, dtype=torch.int64)
            if self.steps is not None:
                generator = generator_of(self.seed, index, place)
                which = torch.randint(len(self.states), (rows,), generator=generator)
                first = torch.randint(self.states.shape[1] - self.length + 1, (rows,), generator=generator)
            mine = part_of(rows, rank, world)
            window = first[mine].unsqueeze(1) + torch.arange(self.length)
            pieces = self.states[which[mine].unsqueeze(1), window].float().to(self.device)
            yield pieces[:, :SEEN], times, pieces

    def __iter__(self) -> Iterator[Trajectories]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class TrajectorySource:
    """Simulated trajectories with noise to learn from, and long ones without to be measured on.

    Attributes:
        name: by which recipes and cards call it.
        system: that moves.
        span: time that a training trajectory lasts.
        observations: states of it, evenly spaced.
        counts: trajectories to train on, to choose by, and to measure on.
        noise: standard deviation of what is added to positions and momenta of training trajectories.
        piece: states that a model is trained to follow at a time, the first included.
        citation: where the experiment comes from.
        steps: batches an epoch.
        licence: of the data.
    """

    name: str
    system: System
    span: float
    observations: int
    counts: tuple[int, int, int]
    noise: float
    piece: int
    citation: str
    steps: int = 100
    licence: str = "none needed: simulated"

    @property
    def spacing(self) -> float:
        """Time between two observations."""
        return self.span / (self.observations - 1)

    @property
    def split(self) -> str:
        """The two parts in words."""
        train, _, test = self.counts
        noise = f"noise of {self.noise:g}" if self.noise else "no noise"
        return (
            f"{train} trajectories of {self.observations} states over a time of {self.span:g}, with {noise}, train; "
            f"{test} others without noise, over {HORIZONS} times as long, are measured"
        )

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: the degrees of freedom."""
        return {"degrees": self.system.degrees}

    @property
    def card_fields(self) -> dict[str, Any]:
        """What the data say on a card."""
        return {}

    def trajectories(self, part: str, count: int) -> Float[Tensor, "count times state"]:
        """The first `count` trajectories of a part: "train", "validation" or "test"."""
        longer = 1 if part == "train" else HORIZONS
        times = self.spacing * torch.arange(longer * (self.observations - 1) + 1, dtype=torch.float64)
        generator = generator_of(0, PARTS[part])
        states = self.system.simulate(self.system.draw(count, generator), times)
        if part == "train":
            states = states + self.noise * torch.randn(states.shape, generator=generator, dtype=torch.float64)
        return states

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[TrajectoryBatches, TrajectoryBatches]:
        """Pieces to train on, and whole long trajectories to measure on: of the test set, or `validation` others.

        Raises:
            DataError: there are fewer others.
        """
        if validation > self.counts[1]:
            raise DataError(f"{self.name}: {validation} trajectories to choose by wanted; there are {self.counts[1]}.")
        training = TrajectoryBatches(
            self.system, self.trajectories("train", self.counts[0]), self.spacing, self.piece, batch_size,
            steps=self.steps, seed=seed, device=device,
        )  # fmt: skip
        if not validation:
            return training, self.test_batches(eval_batch_size, device=device)
        held_out = self.trajectories("validation", validation)
        return training, TrajectoryBatches(self.system, held_out, self.spacing, None, eval_batch_size, device=device)

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> TrajectoryBatches:
        """The long trajectories that metrics are reported on, or the first so many of them."""
        count = self.counts[2] if limit is None else min(limit, self.counts[2])
        states = self.trajectories("test", count)
        return TrajectoryBatches(self.system, states, self.spacing, None, batch_size, device=device)


@register_data
def pendulum(data_dir: Path | None = None) -> TrajectorySource:
    """A pendulum: 25 noisy trajectories of 45 states to learn from, each about one period long."""
    return TrajectorySource(
        "pendulum", Pendulum(), 3.0, 45, (25, 25, 25), 0.1, 16, "Greydanus et al. 2019, experiment 2: an ideal pendulum"
    )


@register_data
def two_bodies(data_dir: Path | None = None) -> TrajectorySource:
    """Two bodies that orbit each other: 800 trajectories of 50 states to learn from."""
    return TrajectorySource(
        "two_bodies", TwoBodies(), 20.0, 50, (800, 50, 50), 0.0, 8, "Greydanus et al. 2019, experiment 4: two bodies"
    )
