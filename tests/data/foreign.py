"""Tiny tokenizers of the kinds that models come with, made with Hugging Face's library, and folders that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = ["hello world the cat sat on a mat", "rain fell  softly\n", "def f(x):\n    return x + 1\n"] * 8
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def byte_level() -> Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(LINES, trainer)
    return found


def llama(metaspace: bool = False) -> Tokenizer:
    """As Llama 2's: blanks are a letter, one stands in front of a text, what is no piece is bytes. It would add a
    token, cut texts off and fill them up, if it were let."""
    found = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence(blanks)
    special = ["<unk>", "<s>", "</s>", *BYTES]
    found.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    )
    if metaspace:  # as transformers 5 writes it
        found.normalizer = None
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found.enable_truncation(5)
    found.enable_padding(length=20)
    return found


def unigram(words: bool = False) -> Tokenizer:
    """The characters it knows, in one case and one width; special tokens are pieces like others. `words`: as T5's, cut
    at blanks, each word with one in front."""
    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    blanks = pre_tokenizers.Metaspace()
    found.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), blanks]) if words else blanks
    )
    found.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    found.train_from_iterator(LINES, trainer)
    return found


def word_piece() -> Tokenizer:
    """As BERT's: words without blanks, accents and capitals."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    found.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=70, special_tokens=special, show_progress=False)
    )
    return found


def saved(folder: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    """A folder with its tokenizer.json and further JSON files, `tokenizer_config={...}` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
