"""The dependency tree of a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...solvers.options import options
from ..data.conllu import Sentences
from .sentence_figures import Tree, draw_arcs, draw_tree, least_sure, spelled
from .tagging import LONGEST, SHORTEST, SOUGHT, SequenceTagging

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@options
class DependencyParsing(SequenceTagging):
    """The negative log-likelihood of whole trees and of their relations.

    A model offers `log_likelihood(words, trees)` and `decode(words)`, where trees are the head and the relation of
    every word; one that also offers `fit(words)` is given the words of the training set before the first step.
    """

    kind = "parsing"
    metric = "las"

    def draw(self, model: nn.Module, source: Any) -> Figure | None:
        """The best tree and the probabilities of all arcs, of the sentence of the test set that is doubted most."""
        if not hasattr(model, "distribution"):
            return None
        device = next(model.parameters()).device
        data = source.test.take(slice(SOUGHT))
        kept = [i for i, words in enumerate(data.words) if SHORTEST <= len(words) <= LONGEST]
        if not kept:
            return None
        words, trees = (x.to(device) for x in data.take(kept).padded())
        distribution = model.distribution(words)  # type: ignore[operator]
        lengths = (words[..., 0] != 0).sum(1).tolist()
        (i,) = least_sure(zip(lengths, distribution.entropy.tolist(), strict=True), SHORTEST, LONGEST, 1)
        end = lengths[i]
        text, truth = spelled(words[i, :end].cpu()), trees[i, :end, 0].tolist()
        heads, relations = model.decode(words)[i, :end].T.tolist()  # type: ignore[operator]
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.4), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        draw_tree(left, Tree(text, heads, [source.classes[r] for r in relations], truth))
        left.set_title("the most probable tree; wrong heads in red", size=11)
        picture = draw_arcs(right, text, distribution.marginals[i, : end + 1, 1 : end + 1].cpu(), truth)
        right.set(ylabel="head")
        right.set_title("probabilities of arcs; circled: what is right, red where missed", size=11)
        figure.colorbar(picture, ax=right, label="probability")
        return figure

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
