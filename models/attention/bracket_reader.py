"""A reader of brackets that looks for their partners: where attention by trees shows what it is for."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from ...solvers.options import suggest
from ..registry import register_model
from .sparse import NORMALIZERS, SparseAttention
from .structured import StructuredAttention

TREES = ("tree", "projective-tree")

CLOSING, OPENING = 0, 1


class BracketReader(nn.Module):
    """From coloured brackets to the colour that each of them is asked for, through the weights of one attention head.

    A bidirectional LSTM reads which brackets open and which close, without their colours, and makes queries and keys;
    the values are the colours. Nothing but the weights can lead a colour to where it is asked for.

    Args:
        num_colours: colours of opening brackets.
        dim: of the LSTM's results, and of queries and keys; even.
        attention: "softmax", "sparsemax", "entmax15", or a structure over all brackets at once: "tree",
            "projective-tree".

    Raises:
        ValueError: an attention that there is not.

    Source: Kim, Denton, Hoang and Rush 2017, sections 3.2 and 4.1 (attention by projective trees, for strings with
    brackets).
    """

    def __init__(self, *, num_colours: int = 8, dim: int = 32, attention: str = "projective-tree") -> None:
        super().__init__()
        known = [*NORMALIZERS, *TREES]
        if attention not in known:
            raise ValueError(
                f"BracketReader: attention must be one of {', '.join(map(repr, known))}; got {attention!r}."
                f"{suggest(attention, known)}"
            )
        self.num_colours = num_colours
        self.embedding = nn.Embedding(2, dim)
        self.lstm = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)
        sizes: dict[str, Any] = {"embed_dim": dim, "num_heads": 1, "vdim": num_colours, "batch_first": True}
        self.attention = (
            StructuredAttention(**sizes, structure=attention)
            if attention in TREES
            else SparseAttention(**sizes, normalizer=attention)
        )
        self.head = nn.Linear(dim, num_colours)

    def forward(self, strings: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length colours"]:
        """Logits of the colour that every bracket is asked for.

        Args:
            strings: `CLOSING`, or `OPENING` and more by its colour.
        """
        return self.attend(strings)[0]

    def attend(
        self, strings: Int[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch length colours"], Float[Tensor, "batch length length"]]:
        """The logits, and the weights from every bracket to all of them."""
        opening = strings >= OPENING
        colours = nn.functional.one_hot((strings - OPENING).clamp(min=0), self.num_colours)
        values = (colours * opening.unsqueeze(2)).to(self.head.weight.dtype)
        read = self.lstm(self.embedding(opening.long()))[0]
        mixed, weights = self.attention(read, read, values)
        return self.head(mixed), weights


@register_model(family="bracket_reader", task="sequence-labelling", accepts=BracketReader)
def bracket_reader(**arguments: Any) -> BracketReader:
    """A reader of brackets: an LSTM, and one head of attention by projective trees, or by what else is asked for."""
    return BracketReader(**arguments)
