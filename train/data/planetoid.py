"""Citation networks: which papers cite each other, the words of each, and its subject."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ...models.graph import Graph, Pattern
from .batches import part_of
from .source import DataError, register_data

Nodes = tuple[Graph, Int[Tensor, " nodes"], Bool[Tensor, " nodes"]]

# One step sees the whole graph; an epoch is so many of them, after which a run is saved.
STEPS = 20
SUBJECTS = {
    "cora": (
        "Theory", "Reinforcement Learning", "Genetic Algorithms", "Neural Networks", "Probabilistic Methods",
        "Case Based", "Rule Learning",
    ),
    "citeseer": ("AI", "ML", "IR", "DB", "Agents", "HCI"),
}  # fmt: skip


class NodeBatches:
    """The whole graph again and again, with the nodes that count.

    Args:
        graph: with its features.
        labels: of all nodes.
        nodes: those that count.
        steps: batches an epoch.
        device: where they go.
    """

    def __init__(
        self, graph: Graph, labels: Tensor, nodes: Tensor, steps: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.graph, self.labels = graph.to(device), labels.to(device)
        self.mask = torch.zeros(len(labels), dtype=torch.bool)
        self.mask[nodes] = True
        self.mask, self.steps = self.mask.to(device), steps

    def __len__(self) -> int:
        return self.steps

    def rows(self, place: int) -> int:
        """Nodes of the graph, all of which every batch holds."""
        return len(self.labels)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Nodes]:
        """The graph, the labels, and which nodes count, once a step.

        Raises:
            DataError: there are several processes, and one graph cannot be shared among them.
        """
        if world > 1:
            whole = part_of(len(self.labels), rank, world)
            raise DataError(f"One graph cannot be shared by {world} processes: nodes {whole} hear of all others.")
        for _ in range(start, self.steps):
            yield self.graph, self.labels, self.mask

    def __iter__(self) -> Iterator[Nodes]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class NodeSource:
    """A graph some of whose nodes have known labels.

    Attributes:
        name: by which recipes and cards call it.
        graph: all of it, in training, too; only labels are held out.
        labels: of all nodes; -1 where nobody knows, which no part of the split holds.
        train, validation, test: nodes.
        classes: the name of each label.
        split: the parts in words.
        citation: where they come from.
        licence: of the data.
    """

    name: str
    graph: Graph
    labels: Int[Tensor, " nodes"]
    train: Int[Tensor, " a"]
    validation: Int[Tensor, " b"]
    test: Int[Tensor, " c"]
    classes: tuple[str, ...]
    split: str
    citation: str
    licence: str = "none stated"

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: its classes, and the features of a node."""
        return {"num_classes": len(self.classes), "features": self.graph.features}

    @property
    def card_fields(self) -> dict[str, Any]:
        """What the data say on a card: what the classes are called."""
        return {"labels": self.classes}

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[NodeBatches, NodeBatches]:
        """The training nodes, and those to measure on: of the test set, or the first of the split's validation nodes.

        Raises:
            DataError: the split has fewer nodes for validation.
        """
        if validation > len(self.validation):
            raise DataError(
                f"{self.name}: the split has {len(self.validation)} nodes for validation; {validation} wanted."
            )
        measured = self.validation[:validation] if validation else self.test
        training = NodeBatches(self.graph, self.labels, self.train, STEPS, device)
        return training, NodeBatches(self.graph, self.labels, measured, device=device)

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> NodeBatches:
        """The test nodes, or the first so many of them, in one batch."""
        return NodeBatches(self.graph, self.labels, self.test[:limit], device=device)


def _load(name: str, data_dir: Path | None, citation: str) -> NodeSource:
    file = f"planetoid-{name}.npz"
    if data_dir is None:
        raise DataError(f"{name}: give the folder that holds {file} (--data-dir).")
    folder = data_dir.expanduser()
    path = next((p for p in (folder / file, folder / "planetoid" / file) if p.is_file()), folder / file)
    try:
        # Of bytes: numpy leaves a damaged file open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as held:
            part = {key: torch.from_numpy(held[key]) for key in held.files}
        nodes, features = (int(n) for n in part["x_shape"])
        labels, edges = part["y"].long(), part["edge_index"].long()
        train, validation, test = (part[key].long() for key in ("train", "val", "test"))
        starts, words, counts = part["x_indptr"].long(), part["x_indices"].long(), part["x_data"].float()
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{name}: {path} is missing, damaged, or of another layout: {error}.") from error
    classes = SUBJECTS[name]
    fits = len(starts) == nodes + 1 and int(starts[0]) == 0 and bool((starts.diff() >= 0).all())
    fits = fits and int(starts[-1]) == len(words) == len(counts) and edges.ndim == 2 and len(edges) == 2
    if not (fits and len(labels) == nodes):
        raise DataError(f"{name}: the parts of {path} do not fit each other.")
    split = torch.cat([train, validation, test])
    if len(split.unique()) != len(split) or not 0 <= int(split.min()) <= int(split.max()) < nodes:
        raise DataError(f"{name}: the parts of the split in {path} overlap, or name nodes that do not exist.")
    if not (int(labels[split].min()) >= 0 and int(labels.max()) < len(classes)):
        found = f"{int(labels[split].min())} to {int(labels.max())}"
        raise DataError(f"{name}: {path} has the labels {found}; there are {len(classes)} classes, from 0 on.")
    try:
        row = torch.arange(nodes).repeat_interleave(starts.diff())
        entries = Pattern.of(row, words, (nodes, features))
        if len(entries) != len(words) or not bool(counts.isfinite().all()):
            raise ValueError("a feature of a node is there twice, or not finite")
        counts = counts[torch.argsort(row * features + words)]
        total = entries.sum_rows(counts).clamp_min(1e-12)
        graph = Graph(Pattern.of(edges[1], edges[0], (nodes, nodes)), entries, counts / total[row])
    except (ValueError, IndexError) as error:
        raise DataError(f"{name}: the graph in {path} is broken: {error}.") from error
    parts = f"{len(train)} labelled nodes ({len(train) // len(classes)} a class) train, {len(validation)} validate"
    return NodeSource(
        name, graph, labels, train, validation, test, classes,
        f"the standard Planetoid split of all {nodes:,} nodes: {parts}, {len(test):,} are measured; the features and "
        "edges of all nodes are seen in training",
        citation,
    )  # fmt: skip


@register_data
def cora(data_dir: Path | None = None) -> NodeSource:
    """Cora: 2,708 papers on machine learning, 1,433 words, 7 subjects.

    The words of a paper are scaled to the sum 1.

    Args:
        data_dir: holds planetoid-cora.npz, or planetoid/ with it: features in CSR as `x_indptr`, `x_indices`,
            `x_data` and `x_shape`, `edge_index`, labels `y`, and the nodes `train`, `val` and `test`.

    Raises:
        DataError: no folder was given, or the file is missing, damaged, or of another layout.
    """
    return _load(
        "cora", data_dir, "Sen et al. 2008, Collective classification in network data; Yang et al. 2016 (split)"
    )


@register_data
def citeseer(data_dir: Path | None = None) -> NodeSource:
    """Citeseer: 3,327 papers on computer science, 3,703 words, 6 subjects; otherwise as `cora`.

    Fifteen of the papers have neither words nor a subject, and count nowhere.

    Args:
        data_dir: holds planetoid-citeseer.npz, or planetoid/ with it.

    Raises:
        DataError: as `cora` does.
    """
    return _load("citeseer", data_dir, "Giles et al. 1998, CiteSeer; Sen et al. 2008; Yang et al. 2016 (split)")
