"""Probabilities of images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.flow import ImageFlow
from ...models.flow.coupling import COUPLINGS
from ...solvers.options import options, suggest
from ..data.pixels import Pixels
from .flow_figures import image_figure, tiled
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 100
GRID = 8


@options
class ImageDensity(Task):
    """An image flow by flow matching, without a solve in training, and its exact bits a dimension.

    Attributes:
        coupling: which noise goes with which image of a batch: "independent", or "optimal" for the pairs of least
            total squared distance, whose lines cross less.

    Raises:
        ValueError: another coupling.

    Source: Lipman et al. 2023; the optimal pairs: Tong et al. 2024 (OT-CFM).
    """

    coupling: str = "independent"

    kind = "image-density"
    metric = "log_likelihood"

    def __post_init__(self) -> None:
        """Check the knob."""
        if self.coupling not in COUPLINGS:
            raise ValueError(
                f"coupling must be one of {', '.join(map(repr, COUPLINGS))}; got {self.coupling!r}."
                f"{suggest(self.coupling, list(COUPLINGS))}"
            )

    def losses(self, model: nn.Module, batch: Pixels, step: int) -> Outcome:
        """The matching loss of a batch of pixels with fresh noise, a pixel."""
        assert isinstance(model, ImageFlow)
        x, _ = model.dequantise(batch[0])
        loss = model.matching_loss(x, coupling=self.coupling).mean() / math.prod(model.shape)
        return Outcome(loss, {"matching": float(loss.detach())})

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """64 samples as one picture."""
        assert isinstance(model, ImageFlow)
        return {"samples": tiled(_samples(model), GRID).float() / (model.levels - 1)}

    def use(self, model: nn.Module, batch: Pixels) -> Tensor:
        """The pixels' log probability."""
        assert isinstance(model, ImageFlow)
        return model.pixel_log_prob(batch[0])

    def draw(self, model: nn.Module, source: Any) -> Figure:
        """64 images of the test set, and as many samples."""
        assert isinstance(model, ImageFlow)
        white = model.levels - 1
        pixels, _ = next(iter(source.test_batches(GRID**2, GRID**2)))
        samples = model.sample_pixels(GRID**2).cpu()
        return image_figure({"measured images": pixels.cpu() / white, "samples of the flow": samples / white}, GRID)

    def evaluate(self, model: nn.Module, batches: Iterable[Pixels]) -> dict[str, float]:
        """Likelihood of pixels, with noise of dequantisation and divergence that is the same at every call.

        Returns:
            bits_per_dimension, an unbiased estimate of a bound on the code length, and its standard error over the
            images, which the noise's is part of; log_likelihood in nats an image; evaluations (mean an image); images,
            how many.
        """
        assert isinstance(model, ImageFlow)
        was_training = model.training
        model.eval()
        found: list[Tensor] = []
        evaluations: list[Tensor] = []
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(0)
            for pixels, _ in batches:
                # Parts of one size, so that steps, which a part shares, do not depend on the size of the batches.
                for part in pixels.split(CHUNK):
                    x, scaled = model.dequantise(part)
                    carried = model.transport(x)
                    found.append((model.base_log_prob(carried.value) + carried.log_det + scaled).double())
                    evaluations.append(carried.solution.stats.evaluations.double())
        model.train(was_training)
        log_p = torch.cat(found)
        bits = model.bits_per_dimension(log_p)
        return {
            "bits_per_dimension": float(bits.mean()),
            "bits_error": float(bits.std()) / math.sqrt(len(bits)),
            "log_likelihood": float(log_p.mean()),
            "evaluations": float(torch.cat(evaluations).mean()),
            "images": float(len(bits)),
        }


def _samples(model: ImageFlow) -> Tensor:
    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(0)
        return model.sample_pixels(GRID**2).cpu()


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
