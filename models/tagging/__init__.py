"""Models that give every word of a sentence a tag."""

from .bilstm_crf import BiLSTMCRF, bilstm_crf_entities, bilstm_crf_small
from .encoder import SentenceEncoder
from .words import Vocabulary, WordCharacters, encode_words, tokenize

__all__ = [
    "BiLSTMCRF",
    "SentenceEncoder",
    "Vocabulary",
    "WordCharacters",
    "bilstm_crf_entities",
    "bilstm_crf_small",
    "encode_words",
    "tokenize",
]
