"""Text encoders with random weights and a dozen words, saved as `transformers` saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ("a", "red", "blue", "bar", "across", "down", "of", "cat", "on", "the", "mat", "and")
KINDS = ("t5", "clip", "bert")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def save_encoder(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """Save an encoder of 8 features (BERT: 12) and its tokenizer, which adds [CLS] and [SEP]."""
    numbers = {token: number for number, token in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _network(kind, len(numbers)).save_pretrained(folder)
    return folder


def _network(kind: str, words: int) -> Any:
    if kind == "t5":
        return T5EncoderModel(T5Config(vocab_size=words, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    if kind == "clip":
        return CLIPTextModel(
            CLIPTextConfig(vocab_size=words, hidden_size=8, intermediate_size=16, projection_dim=8, num_hidden_layers=2,
                           num_attention_heads=2, max_position_embeddings=16, eos_token_id=3)
        )  # fmt: skip
    return BertModel(
        BertConfig(vocab_size=words, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                   max_position_embeddings=16)
    )  # fmt: skip
