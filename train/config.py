"""A training run as data: what a recipe holds."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ..zoo.cards import Published
from .data import Affine
from .tasks import ImageClassification, Task


@dataclasses.dataclass
class ModelConfig:
    """Which model.

    Attributes:
        name: an architecture, or with a tag and `pretrained` a model of the zoo to start from.
        arguments: of its builder. A solver is written {$class: Anderson, memory: 4}.
        training: arguments that hold in training only, such as a cheaper adjoint; evaluation and export leave them out.
        pretrained: start from the weights that the name stands for, of the zoo or of a `local-dir:DIR`.
        freeze: patterns of parameters that keep their values, such as "stem.*"; "backbone" is all but the classifier.
    """

    name: str = "conv_deq_tiny"
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False
    freeze: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class DataConfig:
    """Which data, and how they are fed.

    Attributes:
        name: a data set of `restpoint.train.data`.
        validation: the last so many images of the training set are set aside and evaluated instead of the test set,
            every few epochs. Without, the test set is evaluated once, after the last epoch: choose a recipe with a
            validation set, and run it without.
        batch_size: images a training step, of all processes together.
        eval_batch_size: images a batch of evaluation.
        augment: random affine changes of the training images, or None.
        mixup: options of timm.data.Mixup, such as {mixup_alpha: 0.2, cutmix_alpha: 1.0}; None mixes nothing.
        shape: of an image_folder's images as the model gets them: channels, height, width; None for those that a
            pretrained model was trained with, or else (3, 32, 32).
        transform: of an image_folder's training images: options of timm.data.create_transform, such as
            {scale: [0.5, 1.0], hflip: 0.5, auto_augment: rand-m9}; None only resizes.
        workers: processes that read an image_folder's files ahead.
        length: characters of a text that a model sees at a time, or states of a trajectory that it learns to follow;
            None for what the data have of their own.
    """

    name: str = "digits"
    validation: int = 0
    batch_size: int = 128
    eval_batch_size: int = 500
    augment: Affine | None = None
    mixup: dict[str, Any] | None = None
    shape: tuple[int, int, int] | None = None
    transform: dict[str, Any] | None = None
    workers: int = 0
    length: int | None = None


@dataclasses.dataclass
class OptimizerConfig:
    """How the weights move.

    Attributes:
        name: of timm's optimisers.
        lr: the largest learning rate.
        weight_decay: not applied to biases and normalisations.
        clip: largest norm of the gradient, or None.
        clip_mode: "norm", "value" or "agc", as in timm.
        schedule: of timm's schedules.
        warmup_epochs: epochs over which the learning rate rises from nearly zero.
        min_lr: where the schedule ends.
        layer_decay: each group of layers learns this many times as fast as the one after it, down to the first; None
            for one speed. What is nearest to the image changes least.
        arguments: further ones of the optimiser.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float | None = 1.0
    clip_mode: str = "norm"
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    layer_decay: float | None = None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class WarmupConfig:
    """Equilibrium models may begin as the weight-tied networks that they are the limit of.

    Attributes:
        steps: so many of the first steps.
        layers: evaluations of the cell in each solve of those, all of them differentiated through.
    """

    steps: int = 0
    layers: int = 5


@dataclasses.dataclass
class Config:
    """One training run.

    Attributes:
        name: of the resulting model, architecture.tag; the files of the export are called so.
        model: which model.
        data: which data.
        optimizer: how the weights move.
        task: what for.
        epochs: passes over the training set.
        seed: of the weights, the order, the augmentation and the dropout.
        ema: decay of the averaged weights that are evaluated and exported; None exports the last ones.
        threads: of torch on the CPU; results are repeatable for equal numbers. None leaves torch's choice.
        device: "cpu", "cuda" or "cuda:1".
        parallel: with several processes, as torchrun starts them: "ddp" keeps the model in each, "fsdp" shards it.
        accumulate: parts that each process computes its share of a step's batch in, to save memory.
        autocast: "bfloat16" or "float16" computes what can be in that type; float16 with a scaled loss.
        compile: compile what a solver evaluates again and again (the cells and fields of the layers), or where there is
            nothing of the kind the model. Penalties that differentiate twice cannot be compiled.
        warmup: first steps of an equilibrium model by unrolling.
        log_every: steps between two lines of the log and points of the curves.
        checkpoint_every: steps between two checkpoints; None for one after every epoch.
        diagnose_every: steps between two looks at what costs more than a step, such as the spectral radius; 0 for none.
        evaluate_every: epochs between two evaluations on the validation set; the last epoch is always evaluated.
        patience: stop after so many steps in a row with a loss that is not finite.
        data_dir: the folder that holds the data.
        output: the run's folder; None for runs/NAME.
        resume: true goes on from the checkpoint in the run's folder; "auto" does where there is one, and else begins.
        published: what the literature reports for this model on these data, such as
            [{metric: accuracy, value: 0.9958, source: "Chen et al. 2018, table 1"}]; copied to the card.
        note: what else the card should say, such as how far the recipe goes beside the published training.
    """

    name: str = "conv_deq_tiny.digits"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    task: Task = dataclasses.field(default_factory=ImageClassification)
    epochs: int = 10
    seed: int = 0
    ema: float | None = None
    threads: int | None = None
    device: str = "cpu"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    accumulate: int = 1
    autocast: Literal["bfloat16", "float16"] | None = None
    compile: bool = False
    warmup: WarmupConfig = dataclasses.field(default_factory=WarmupConfig)
    log_every: int = 50
    checkpoint_every: int | None = None
    diagnose_every: int = 0
    evaluate_every: int = 1
    patience: int = 20
    data_dir: str | None = None
    output: str | None = None
    resume: bool | Literal["auto"] = False
    published: list[Published] = dataclasses.field(default_factory=list)
    note: str = ""
