"""Models that give every word of a sentence a tag."""

from .bilstm_crf import BiLSTMCRF, bilstm_crf_small
from .words import Vocabulary, WordCharacters, encode_words, tokenize

__all__ = ["BiLSTMCRF", "Vocabulary", "WordCharacters", "bilstm_crf_small", "encode_words", "tokenize"]
