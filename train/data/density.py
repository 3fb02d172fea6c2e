"""Densities in the plane that are known exactly, to learn from fresh samples and to be compared with."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from .batches import generator_of, part_of
from .source import register_data

Points = tuple[Float[Tensor, "batch 2"], Float[Tensor, " batch"]]

# Of the points that models are measured on, and that recipes are chosen by. torch's generator has 32 bits of a seed.
TEST_SEED, VALIDATION_SEED = 2_000_000_011, 2_000_000_033


class PlaneDensity(abc.ABC):
    """A probability density in the plane, within the square [-extent, extent]^2 but for rounding."""

    extent: float = 6.0

    @abc.abstractmethod
    def sample(self, n: int, generator: Generator) -> Float[Tensor, "n 2"]:
        """Draw n points, in float64."""

    @abc.abstractmethod
    def log_prob(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        """Log density in nats, of points in float64."""

    @property
    def entropy(self) -> float:
        """In nats; by the trapezoidal rule, which converges faster than any power of the spacing for these."""
        line = torch.linspace(-self.extent, self.extent, 401, dtype=torch.float64)
        grid = torch.cartesian_prod(line, line)
        log_p = torch.cat([self.log_prob(part) for part in grid.split(60_000)])
        return -float(torch.special.xlogy(log_p.exp(), log_p.exp()).sum() * (line[1] - line[0]) ** 2)


class EightGaussians(PlaneDensity):
    """Eight normal densities of standard deviation 0.35, evenly spaced on a circle of radius 2.8."""

    radius, std = 4 / math.sqrt(2), 0.5 / math.sqrt(2)

    def _centres(self) -> Tensor:
        angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        return self.radius * torch.stack([angles.cos(), angles.sin()], dim=1)

    def sample(self, n: int, generator: Generator) -> Float[Tensor, "n 2"]:
        """A centre, and a normal displacement."""
        which = torch.randint(8, (n,), generator=generator)
        return self._centres()[which] + self.std * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def log_prob(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        """Of the mixture."""
        squares = (x.unsqueeze(1) - self._centres()).square().sum(2) / self.std**2
        return (-squares / 2).logsumexp(1) - math.log(8 * 2 * math.pi * self.std**2)


class TwoMoons(PlaneDensity):
    """Points on two interleaved half circles of radius 2, with normal noise of standard deviation 0.2."""

    radius, std = 2.0, 0.2
    # The half circles' centres; the second one is upside down.
    centres = ((-1.0, -0.5), (1.0, 0.5))

    def sample(self, n: int, generator: Generator) -> Float[Tensor, "n 2"]:
        """A half circle, an angle, and a normal displacement."""
        which = torch.randint(2, (n,), generator=generator)
        angle = math.pi * torch.rand(n, generator=generator, dtype=torch.float64) + math.pi * which
        circle = self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        centre = torch.tensor(self.centres, dtype=torch.float64)[which]
        return centre + circle + self.std * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def log_prob(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        """The average over both arcs; in the angle by Gauss-Legendre quadrature, exact to rounding."""
        nodes, weights = _gauss_legendre(64)
        parts = []
        for k, centre in enumerate(self.centres):
            angles = math.pi * (nodes + k)
            arc = torch.tensor(centre, dtype=torch.float64) + self.radius * torch.stack([angles.cos(), angles.sin()], 1)
            squares = torch.cdist(x, arc).square() / self.std**2
            parts.append(-squares / 2 + (weights / 2).log())
        return torch.cat(parts, dim=1).logsumexp(1) - math.log(2 * math.pi * self.std**2)


class Checkerboard(PlaneDensity):
    """Uniform on the eight dark squares, of side 2, of a board that covers [-4, 4]^2."""

    extent = 4.5

    def sample(self, n: int, generator: Generator) -> Float[Tensor, "n 2"]:
        """A dark square, and a point of it."""
        column = torch.randint(4, (n,), generator=generator)
        row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
        corner = torch.stack([column, row], dim=1).double() * 2 - 4
        return corner + 2 * torch.rand(n, 2, generator=generator, dtype=torch.float64)

    def log_prob(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        """-log 32 on dark squares, else minus infinity."""
        square = ((x + 4) / 2).floor()
        dark = ((square >= 0) & (square < 4)).all(1) & (square.sum(1) % 2 == 0)
        return torch.where(dark, -math.log(32), -math.inf).to(x.dtype)

    @property
    def entropy(self) -> float:
        """log 32."""
        return math.log(32)


class Pinwheel(PlaneDensity):
    """Five normal densities, long in the radial direction, that are wound up by an angle proportional to the radius.

    The winding keeps areas, so that the density is known, unlike that of the pinwheel whose winding depends on the
    unwound coordinate.
    """

    arms, radius, radial, tangential, winding = 5, 2.0, 0.6, 0.2, 0.5

    def _turned(self, x: Tensor, angle: Tensor) -> Tensor:
        cosine, sine = angle.cos(), angle.sin()
        return torch.stack([cosine * x[:, 0] - sine * x[:, 1], sine * x[:, 0] + cosine * x[:, 1]], dim=1)

    def sample(self, n: int, generator: Generator) -> Float[Tensor, "n 2"]:
        """A point of the first arm, turned to an arm, and wound."""
        arm = torch.randint(self.arms, (n,), generator=generator) * (2 * math.pi / self.arms)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        straight = noise * noise.new_tensor([self.radial, self.tangential]) + noise.new_tensor([self.radius, 0.0])
        return self._turned(straight, arm + self.winding * straight.norm(dim=1))

    def log_prob(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        """Unwound, the mixture's."""
        unwound = self._turned(x, -self.winding * x.norm(dim=1))
        parts = []
        for k in range(self.arms):
            straight = self._turned(unwound, x.new_full((len(x),), -2 * math.pi * k / self.arms))
            scaled = (straight - x.new_tensor([self.radius, 0.0])) / x.new_tensor([self.radial, self.tangential])
            parts.append(-scaled.square().sum(1) / 2)
        area = 2 * math.pi * self.radial * self.tangential
        return torch.stack(parts, dim=1).logsumexp(1) - math.log(self.arms * area)


def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], by the eigenvalues of the Jacobi matrix (Golub and Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (values + 1) / 2, vectors[0].square()


class PointBatches:
    """Batches of fresh points with their true log density, a function of seed and epoch.

    Args:
        density: where the points come from.
        count: points an epoch.
        batch_size: points a batch; the last may be smaller.
        seed: of the points.
        device: where the batches go.
        fresh: other points at every epoch, instead of always those of the first.

    Raises:
        ValueError: a size below one.
    """

    def __init__(
        self,
        density: PlaneDensity,
        count: int,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        fresh: bool = True,
    ) -> None:
        if batch_size < 1 or count < 1:
            raise ValueError(f"Batches need at least one point; got batch_size {batch_size} and {count} points.")
        self.density, self.count, self.batch_size = density, count, batch_size
        self.seed, self.device, self.fresh = seed, device, fresh

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def rows(self, place: int) -> int:
        """Points in batch `place` of an epoch."""
        return min(self.batch_size, self.count - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Points]:
        """The batches of epoch `index`, from batch `start` on, as (points, log density), in float32.

        Of each batch the part of process `rank` of `world`.
        """
        for place in range(start, len(self)):
            n = self.rows(place)
            points = self.density.sample(n, generator_of(self.seed, index if self.fresh else 0, place))
            points = points[part_of(n, rank, world)]
            log_p = self.density.log_prob(points)
            yield points.float().to(self.device), log_p.float().to(self.device)

    def __iter__(self) -> Iterator[Points]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class PointSource:
    """A density to sample from, with its papers.

    Attributes:
        name: by which recipes and cards call it.
        density: itself.
        train_count: fresh points an epoch.
        test_count: points that metrics are reported on, always the same.
        licence: of the data.
        citation: where the density comes from.
    """

    name: str
    density: PlaneDensity
    citation: str
    train_count: int = 51_200
    test_count: int = 20_000
    licence: str = "none needed: drawn from a formula"

    @property
    def split(self) -> str:
        """The two parts in words, and how well any model can do."""
        parts = f"fresh points at every step train; {self.test_count:,} points of another seed are measured"
        return f"{parts}; the density's own entropy is {self.density.entropy:.4f} nats"

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: its number of dimensions."""
        return {"dim": 2}

    @property
    def card_fields(self) -> dict[str, object]:
        """What the data say on a card."""
        return {}

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[PointBatches, PointBatches]:
        """Points to train on, and those to measure on: of the test set, or so many others for `validation`."""
        training = PointBatches(self.density, self.train_count, batch_size, seed=seed, device=device)
        if not validation:
            return training, self.test_batches(eval_batch_size, device=device)
        seed = VALIDATION_SEED
        return training, PointBatches(self.density, validation, eval_batch_size, seed=seed, device=device, fresh=False)

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> PointBatches:
        """The points that metrics are reported on, or the first so many of them."""
        count = self.test_count if limit is None else min(limit, self.test_count)
        return PointBatches(self.density, count, batch_size, seed=TEST_SEED, device=device, fresh=False)


def _register(name: str, density: PlaneDensity, citation: str) -> None:
    def load(data_dir: Path | None = None) -> PointSource:
        return PointSource(name, density, citation)

    load.__name__ = name
    load.__doc__ = type(density).__doc__
    register_data(load)


_register("two_moons", TwoMoons(), "the density behind scikit-learn's make_moons, scaled and with uniform angles")
_register("eight_gaussians", EightGaussians(), "Grathwohl et al. 2019, figure 2")
_register("checkerboard", Checkerboard(), "Grathwohl et al. 2019, figure 2")
_register("pinwheel", Pinwheel(), "after Johnson et al. 2016, with a winding that keeps areas")
