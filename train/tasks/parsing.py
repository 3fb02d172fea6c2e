"""The dependency tree of a sentence."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ...solvers.options import options
from ..data.conllu import Sentences
from .tagging import SequenceTagging


@options
class DependencyParsing(SequenceTagging):
    """The negative log-likelihood of whole trees and of their relations.

    A model offers `log_likelihood(words, trees)` and `decode(words)`, where trees are the head and the relation of
    every word; one that also offers `fit(words)` is given the words of the training set before the first step.
    """

    kind = "parsing"
    metric = "las"

    def evaluate(self, model: nn.Module, batches: Iterable[Sentences]) -> dict[str, float]:
        """How often words hang from the right head, over all words, punctuation included.

        Returns:
            las, the share of words with the right head and relation; uas, with the right head; sentences, the share of
            sentences whose heads are all right; nll, the negative log-likelihood of trees and relations in nats a word.

        Source: Zeman et al. 2018 (the measures of the shared task).
        """
        was_training = model.training
        model.eval()
        labelled = attached = seen = whole = sentences = 0
        nll = 0.0
        with torch.no_grad():
            for words, trees in batches:
                inside = words[..., 0] != 0
                hit = model.decode(words) == trees  # type: ignore[operator]
                head = hit[..., 0]
                labelled += int((hit.all(2) & inside).sum())
                attached += int((head & inside).sum())
                whole += int((head | ~inside).all(1).sum())
                seen, sentences = seen + int(inside.sum()), sentences + len(words)
                nll -= float(model.log_likelihood(words, trees).sum())  # type: ignore[operator]
        model.train(was_training)
        return {"las": labelled / seen, "uas": attached / seen, "sentences": whole / sentences, "nll": nll / seen}
