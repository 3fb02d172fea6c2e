"""Deep equilibrium models."""

from .conv import BranchCell, ConvDEQ, conv_deq_small, conv_deq_tiny
from .language import CausalCell, DEQLanguageModel, deq_lm_tiny, test_deq_lm
from .layer import DEQ, Problem
from .mdeq import (
    MDEQ,
    MDEQSegmenter,
    mdeq_large,
    mdeq_large_cityscapes,
    mdeq_large_imagenet,
    mdeq_large_imagenet_reg,
    mdeq_large_reg,
    mdeq_small_cityscapes,
    mdeq_small_imagenet,
    mdeq_small_imagenet_reg,
    mdeq_tiny,
    mdeq_xl_cityscapes,
    mdeq_xl_imagenet,
    test_mdeq,
)
from .transformer import AddPosition, DEQViT, TokenCell, deq_vit_small, deq_vit_tiny, test_deq_vit

__all__ = [
    "DEQ",
    "MDEQ",
    "AddPosition",
    "BranchCell",
    "CausalCell",
    "ConvDEQ",
    "DEQLanguageModel",
    "DEQViT",
    "MDEQSegmenter",
    "Problem",
    "TokenCell",
    "conv_deq_small",
    "conv_deq_tiny",
    "deq_lm_tiny",
    "deq_vit_small",
    "deq_vit_tiny",
    "mdeq_large",
    "mdeq_large_cityscapes",
    "mdeq_large_imagenet",
    "mdeq_large_imagenet_reg",
    "mdeq_large_reg",
    "mdeq_small_cityscapes",
    "mdeq_small_imagenet",
    "mdeq_small_imagenet_reg",
    "mdeq_tiny",
    "mdeq_xl_cityscapes",
    "mdeq_xl_imagenet",
    "test_deq_lm",
    "test_deq_vit",
    "test_mdeq",
]
