"""The names in a sentence, and their kinds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...models.tagging.entities import spans
from ...solvers.options import options
from ..data.conllu import Sentences
from .tagging import SequenceTagging


@options
class EntityRecognition(SequenceTagging):
    """The negative log-likelihood of whole sequences of tags that say where names begin and go on.

    A model offers `log_likelihood(words, tags)` and `decode(words)`, with 0 outside of names, 2 k + 1 where one of kind
    k begins and 2 k + 2 where it goes on; one that also offers `fit(words)` is given the words of the training set
    before the first step.

    Args:
        encoder: see `SequenceTagging`.
    """

    kind = "entity-recognition"
    metric = "f1"

    def evaluate(self, model: nn.Module, batches: Iterable[Sentences]) -> dict[str, float]:
        """How many names are found; one counts where its first and last word and its kind are right.

        Returns:
            f1, the harmonic mean of precision and recall over all names; precision; recall; accuracy, the share of
            words with the right tag; nll, the negative log-likelihood in nats a word.

        Source: Sang and De Meulder 2003; Derczynski et al. 2017 (the entity measure).
        """
        was_training = model.training
        model.eval()
        both = said = there = right = seen = 0
        nll = 0.0
        with torch.no_grad():
            for words, tags in batches:
                inside = tags >= 0
                decoded = model.decode(words)  # type: ignore[operator]
                right += int(((decoded == tags) & inside).sum())
                seen += int(inside.sum())
                nll -= float(model.log_likelihood(words, tags).sum())  # type: ignore[operator]
                for mine, gold in zip(names(decoded), names(tags), strict=True):
                    both, said, there = both + len(mine & gold), said + len(mine), there + len(gold)
        model.train(was_training)
        return {
            "f1": 2 * both / max(said + there, 1),
            "precision": both / max(said, 1),
            "recall": both / max(there, 1),
            "accuracy": right / seen,
            "nll": nll / seen,
        }


def names(tags: Tensor) -> list[set[tuple[int, int, int]]]:
    """The `spans` of each sentence of (batch, length), -1 beyond its end."""
    return [set(spans([tag for tag in row if tag >= 0])) for row in tags.tolist()]
