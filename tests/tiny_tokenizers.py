"""Tokenizers of every sort we meet, made in the test from a small corpus; nothing is downloaded."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

CORPUS = [
    "a red circle left of a blue square",
    "a small green triangle on a white background",
    "what colour is the circle? red",
    "how many squares are there? two",
    "USER: ASSISTANT: <0x0A>",
    "the yellow star is above the purple ring, and the cyan cross is below it.",
    "un café crème, s'il vous plaît",
    "Ein großer, grüner Würfel",
]


@cache
def clip() -> Any:
    """CLIP's own vocabulary (it ships with open_clip), in transformers' class."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    source = SimpleTokenizer()
    vocab = dict(source.encoder)
    vocab["<|startoftext|>"] = vocab.pop("<start_of_text>")
    vocab["<|endoftext|>"] = vocab.pop("<end_of_text>")
    return CLIPTokenizer(vocab=vocab, merges=list(source.bpe_ranks), model_max_length=77)


@cache
def open_clip_simple() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@cache
def llama() -> Any:
    """Llama's sort: leading-space marks, and bytes for what the vocabulary lacks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, LlamaTokenizer

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    vocab, merges = _parts(made)
    out = LlamaTokenizer(vocab=vocab, merges=merges)
    out.add_special_tokens({"pad_token": "<pad>"})
    out.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    out.add_bos_token = True
    return out


@cache
def qwen() -> Any:
    """Qwen2's sort: byte-level, no start token, case kept."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, Qwen2Tokenizer

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=sorted(alphabet)))
    vocab, merges = _parts(made)
    out = Qwen2Tokenizer(vocab=vocab, merges=merges)
    out.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return out


@cache
def bert() -> Any:
    """BERT's sort: ## for the inside of a word, accents and case dropped."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    made = BertWordPieceTokenizer(lowercase=True)
    made.train_from_iterator(CORPUS, vocab_size=90, show_progress=False)
    return BertTokenizer(vocab=made.get_vocab())


def siglip(folder: Path) -> Any:
    """SigLIP's own: sentencepiece without offsets, punctuation dropped, end = padding."""
    import sentencepiece
    from transformers import SiglipTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=110,
        model_type="unigram",
        pad_id=-1,
        unk_id=2,
        bos_id=-1,
        eos_id=1,
        hard_vocab_limit=False,
        control_symbols=["<extra>"],
        minloglevel=2,
    )
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return SiglipTokenizer(str(path), model_max_length=64)


def _parts(tokenizer: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]
