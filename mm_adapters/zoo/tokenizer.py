"""The zoo's tokenizers: real byte-level BPE, learnt from the world's own words.

Some words are left in several pieces on purpose ("tri|ang|le"), because methods that follow a word
through a model must cope with that. Any other word falls apart into letters, as in the large ones.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from mm_adapters.zoo import captions, world

CONTEXT = 32
PIECES = {
    "triangle": ("tri", "ang", "le"),
    "triangles": ("tri", "ang", "les"),
    "diamond": ("dia", "mond"),
    "diamonds": ("dia", "monds"),
    "striped": ("stri", "ped"),
    "purple": ("pur", "ple"),
    "background": ("back", "ground"),
}
_FUNCTION_WORDS = (
    *("a", "an", "the", "of", "in", "on", "and", "is", "are", "there", "this", "that", "it"),
    *("no", "yes", "not", "with", "to", "what", "which", "where", "how", "many"),
    *("photo", "picture", "image", "drawing", "painting", "question", "answer"),
    *("colour", "color", "size", "texture", "position", "count", "kind"),
)


def words() -> list[str]:
    """Every word the world's captions, questions and answers are made of."""
    vocabulary = [*world.SHAPES, *world.COLOURS, *world.BACKGROUNDS, *world.SIZES, *world.TEXTURES]
    vocabulary += [captions.Phrase(shape=s).words(plural=True) for s in world.SHAPES]
    vocabulary += [word for phrase in (*world.POSITIONS, *world.RELATIONS) for word in phrase.split()]
    vocabulary += [*captions.NUMBERS, *captions.NOUNS, *(n + "s" for n in captions.NOUNS), "background"]
    return sorted({*vocabulary, *_FUNCTION_WORDS})


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE writes text in."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def learn_merges(spelled: Iterable[tuple[tuple[str, ...], ...]]) -> list[tuple[str, str]]:
    """BPE merges that make every piece of every word one symbol and never join two pieces.

    Each word is pieces, each piece symbols. The commonest pair is merged first, ties by spelling.
    """
    pieces = [list(piece) for word in spelled for piece in word]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for piece in pieces for pair in itertools.pairwise(piece))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merged(piece, best) for piece in pieces]


def _merged(piece: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in piece:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def clip_tokenizer() -> CLIPTokenizer:
    """tiny-clip's tokenizer: lower-case, words end in `</w>`, padded with the end of text."""

    def spell(word: str) -> tuple[tuple[str, ...], ...]:
        pieces = [list(piece) for piece in PIECES.get(word, (word,))]
        pieces[-1][-1] += "</w>"
        return tuple(map(tuple, pieces))

    merges = learn_merges(map(spell, words()))
    alphabet = byte_alphabet()
    symbols = [*alphabet, *(s + "</w>" for s in alphabet), *(a + b for a, b in merges)]
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)  # pyright: ignore


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the tokenizer, also as the `vocab.json` and `merges.txt` that older readers expect."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """tiny-llava's tokenizer: byte-level BPE that starts with `<s>` and knows `<image>`."""
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]

    def spell(word: str, before: str) -> tuple[tuple[str, ...], ...]:
        pieces = [tuple(piece) for piece in PIECES.get(word, (word,))]
        return ((*before, *pieces[0]), *pieces[1:])

    spelled = [spell(word, space) for word in words()] + [spell(word, "") for word in words()]
    merges = learn_merges(spelled)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    symbols = [*special, *dict.fromkeys([*byte_alphabet(), *(a + b for a, b in merges)])]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=256,
    )
