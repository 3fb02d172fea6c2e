"""A tag for every word of a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...solvers.options import options
from ...zoo import create_model
from ..data.conllu import Sentences
from .sentence_figures import draw_tags, least_sure, spelled
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Sentences of which a picture is drawn are sought among the first so many, and as long as can be read.
SOUGHT = 300
SHORTEST, LONGEST = 7, 12


@options
class SequenceTagging(Task):
    """The negative log-likelihood of whole tag sequences.

    A model offers `log_likelihood(words, tags)` and `decode(words)`; one that also offers `fit(words)` is given the
    words of the training set before the first step.

    Args:
        encoder: a pretrained model of the zoo whose words, spelling and LSTMs the model starts from, by its
            `start_from`; None starts from chance.
    """

    encoder: str | None = None

    kind = "tagging"
    metric = "accuracy"

    def prepare(self, model: nn.Module, source: Any) -> None:
        """Show the model the words that it will be trained on, or give it an encoder that knows some already.

        Raises:
            ValueError: the model has no `start_from`, or other sizes than the encoder.
        """
        if self.encoder is not None:
            if not hasattr(model, "start_from"):
                raise ValueError(f"encoder: {type(model).__name__} has no start_from, and cannot start from another.")
            model.start_from(create_model(self.encoder, pretrained=True))  # type: ignore[operator]
        if hasattr(model, "fit"):
            model.fit(torch.cat(source.train.words))  # type: ignore[operator]

    def draw(self, model: nn.Module, source: Any) -> Figure | None:
        """The probabilities of all tags, in two sentences of the test set that a model with `distribution` doubts."""
        if not hasattr(model, "distribution"):
            return None
        device = next(model.parameters()).device
        words, tags = source.test.take(slice(SOUGHT)).padded()
        chain = model.distribution(words.to(device))  # type: ignore[operator]
        lengths = (tags >= 0).sum(1).tolist()
        chosen = least_sure(zip(lengths, chain.entropy.tolist(), strict=True), SHORTEST, LONGEST, 2)
        if not chosen:
            return None
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.4), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(chosen), squeeze=False)[0]
        for axis, i in zip(axes, chosen, strict=True):
            end = lengths[i]
            shares = chain.marginals.states[i, :end].cpu()
            picture = draw_tags(axis, spelled(words[i, :end]), shares, source.classes, tags[i, :end].tolist())
        figure.colorbar(picture, ax=axes, label="probability", shrink=0.8)
        figure.suptitle(
            f"{source.name}: probabilities of tags where they are least sure; circled: what is right, red where missed",
            size=11,
        )
        return figure

    def losses(self, model: nn.Module, batch: Sentences, step: int) -> Outcome:
        """Negative log-likelihood in nats a word."""
        words, tags = batch
        log_likelihood = model.log_likelihood(words, tags)  # type: ignore[operator]
        loss = -log_likelihood.sum() / (words[..., 0] != 0).sum()
        return Outcome(loss, {"nll": float(loss.detach())})

    def evaluate(self, model: nn.Module, batches: Iterable[Sentences]) -> dict[str, float]:
        """How often the most probable tags are right.

        Returns:
            accuracy, the share of words; sentences, the share of sentences without a fault; nll, the negative
            log-likelihood in nats a word.
        """
        was_training = model.training
        model.eval()
        right = words_seen = whole = sentences = 0
        nll = 0.0
        with torch.no_grad():
            for words, tags in batches:
                inside = tags >= 0
                hit = model.decode(words) == tags  # type: ignore[operator]
                right += int((hit & inside).sum())
                whole += int((hit | ~inside).all(1).sum())
                words_seen, sentences = words_seen + int(inside.sum()), sentences + len(tags)
                nll -= float(model.log_likelihood(words, tags).sum())  # type: ignore[operator]
        model.train(was_training)
        return {"accuracy": right / words_seen, "sentences": whole / sentences, "nll": nll / words_seen}
