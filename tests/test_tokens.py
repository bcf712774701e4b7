"""Each position is named for what it is, whichever tokenizer cut the text."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_tokenizers as made_here
import torch

from mm_adapters._errors import InputError, WordNotFoundError
from mm_adapters.tokens import words as _words
from mm_adapters.tokens.layout import TokenLayout, language_layout, text_layout, vision_layout
from mm_adapters.tokens.tokenizers import tokenizer_view_of
from mm_adapters.tokens.words import align_words, split_words

TEXTS = [
    "a red circle",
    "a red circle left of a Red square",
    "UNUSUALLY purple-ish, isn't it?!",
    "  two   spaces\nand a line ",
    "don't; the dog's (small) hat... 3.5 cm",
    "café crème, s'il vous plaît",
    "ein großer Würfel",
    "☃ snow ❤️ 红色的圆 and हिन्दी",
    "supercalifragilisticexpialidocious",
    "red red red",
    "!",
    "",
]
FAST = ["clip", "llama", "qwen", "bert"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "clip": made_here.clip(),
        "open_clip": made_here.open_clip_simple(),
        "llama": made_here.llama(),
        "qwen": made_here.qwen(),
        "bert": made_here.bert(),
        "siglip": made_here.siglip(tmp_path_factory.mktemp("siglip")),
    }


def rows(tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return tokenizer(texts), None
    out = tokenizer(texts, padding=True, return_tensors="pt")
    return out["input_ids"], out["attention_mask"]


def letters(tokenizer: Any, ids: list[int]) -> str:
    """What some tokens say, without marks, spaces and case."""
    tokenizer_view = tokenizer_view_of(tokenizer)
    said = tokenizer_view.decode(ids) if ids else ""
    return "".join(said.split()).casefold()


@pytest.mark.parametrize("name", ["clip", "open_clip", "llama", "qwen"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_a_word_spell_it(tokenizers: dict[str, Any], name: str, text: str) -> None:
    """The other road: decode each word's tokens alone. A token may hold a neighbour's letter."""
    tokenizer = tokenizers[name]
    ids, mask = rows(tokenizer, [text, TEXTS[4]])
    layout = text_layout([text, TEXTS[4]], tokenizer, ids, mask)
    for word in layout.words[0]:
        assert word.text.casefold() in letters(tokenizer, ids[0, list(word.positions)].tolist())
        assert text[slice(*word.span)] == word.text
    found = [w.text for w in layout.words[0]]
    assert found == [t for t, _, _ in split_words(text) if any(c.isalnum() for c in t)]


@pytest.mark.parametrize("name", ["clip", "open_clip", "llama", "qwen"])
def test_of_random_text_every_letter_and_every_token_has_a_place(
    tokenizers: dict[str, Any], name: str
) -> None:
    tokenizer = tokenizers[name]
    source = random.Random(1)
    alphabet = "aaBbe  \n'-,.!?_09éßñøΩжщ中圆の☃→" + "red"
    for _ in range(60):
        text = "".join(source.choices(alphabet, k=source.randint(0, 24)))
        ids = tokenizer_view_of(tokenizer).encode(text)[0]
        read = align_words(text, tokenizer, ids)
        entries = read.words + read.marks
        placed = {i for e in entries for i in range(*e.span)}
        assert placed == {i for i, c in enumerate(text) if not c.isspace()}
        held = {p for e in entries for p in e.positions}
        blank = {p for p, i in enumerate(ids) if not letters(tokenizer, [i])}
        assert held | blank | {p for p, r in enumerate(read.roles) if r != "word"} == set(range(len(ids)))
        assert all(read.roles[p] == "word" for p in held)
        for entry in entries:
            assert list(entry.positions) == sorted(set(entry.positions))


@pytest.mark.parametrize("name", FAST)
def test_letters_laid_along_the_text_agree_with_the_tokenizers_own_offsets(
    tokenizers: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers[name]
    tokenizer_view = tokenizer_view_of(tokenizer)
    vocabulary = sorted({w for t in (*TEXTS, *made_here.CORPUS) for w in t.split() if w.isascii()})
    source = random.Random(0)
    texts = [t for t in TEXTS if t.isascii()] + [
        source.choice([" ", ", ", "-"]).join(source.choices(vocabulary, k=source.randint(1, 9)))
        for _ in range(40)
    ]
    for text in texts:
        ids = tokenizer_view.encode(text)[0]
        if tokenizer_view.special & set(ids[1:-1]):
            continue
        exact = align_words(text, tokenizer, ids)
        blind = replace(tokenizer_view, encode=lambda t: (tokenizer_view.encode(t)[0], None))
        with monkeypatch.context() as patch:
            patch.setattr(_words, "tokenizer_view_of", lambda _, blind=blind: blind)
            assert align_words(text, tokenizer, ids) == exact


def test_a_word_of_several_tokens_has_all_of_them(tokenizers: dict[str, Any]) -> None:
    text = "a supercalifragilistic hat"
    ids, mask = rows(tokenizers["clip"], [text])
    layout = text_layout([text], tokenizers["clip"], ids, mask)
    where = layout.where("supercalifragilistic")
    assert len(where) >= 3
    assert where == list(range(2, 2 + len(where)))
    assert layout.where("hat") == [2 + len(where)]
    assert layout.where("supercalifragilistic hat") == [*where, 2 + len(where)]


@pytest.mark.parametrize("name", ["clip", "open_clip", "llama", "qwen", "bert", "siglip"])
def test_a_word_that_occurs_twice_has_two_entries(tokenizers: dict[str, Any], name: str) -> None:
    text = "a red circle and a RED square and a red circle"
    ids, mask = rows(tokenizers[name], [text])
    layout = text_layout([text], tokenizers[name], ids, mask)
    each = [layout.where("red", occurrence=n) for n in range(3)]
    assert layout.where("Red") == sorted(p for at in each for p in at)
    assert all(each)
    assert [w.occurrence for w in layout.words[0] if w.text.lower() == "red"] == [0, 1, 2]
    both = [layout.where("red circle", occurrence=n) for n in range(2)]
    assert both[0][: len(each[0])] == each[0]
    assert both[1][: len(each[2])] == each[2]
    assert layout.where("red square")[: len(each[1])] == each[1]
    with pytest.raises(WordNotFoundError, match="occurrence 3; it has 3, from 0"):
        layout.where("red", occurrence=3)


def test_a_word_not_found_is_an_error_that_lists_the_words(tokenizers: dict[str, Any]) -> None:
    text = "a red, round circle"
    ids, mask = rows(tokenizers["clip"], [text])
    layout = text_layout([text], tokenizers["clip"], ids, mask)
    for absent in ("green", "circ", "red round", "", " "):
        with pytest.raises(WordNotFoundError, match="Its words: a, red, round, circle"):
            layout.where(absent)
    assert layout.where("red, round") == [2, 3, 4]
    assert layout.where(",") == [3]
    with pytest.raises(WordNotFoundError, match="no text"):
        vision_layout(1, (2, 2)).where("red")


@pytest.mark.parametrize("name", ["clip", "open_clip", "siglip"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_of_padding_that_looks_like_the_end_the_first_is_the_end(
    tokenizers: dict[str, Any], name: str, with_mask: bool
) -> None:
    tokenizer = tokenizers[name]
    texts = ["a red circle !", "", "a small blue square left of a ring"]
    if name == "open_clip":  # Its padding is the token "!".
        ids, mask = tokenizer(texts), None
    else:
        out = tokenizer(texts, padding="max_length", return_tensors="pt")
        ids, mask = out["input_ids"], out["attention_mask"] if with_mask else None
    layout = text_layout(texts, tokenizer, ids, mask)
    for row, text in enumerate(texts):
        roles = layout.roles[row]
        (end,) = layout.positions("end", row)
        assert set(roles[end + 1 :]) == {"pad"}
        assert "pad" not in roles[:end]
        assert layout.positions("start", row) == ([] if name == "siglip" else [0])
        assert int(layout.mask("pad")[row].sum()) == ids.shape[1] - end - 1
        assert bool(layout.words[row]) == bool(text)
    # What tokens alone say gives the same, without the text and the tokenizer's help.
    assert text_layout(None, tokenizer, ids, mask).roles == layout.roles


def test_left_and_right_padding_are_seen(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama"]
    texts = ["a red circle", "what colour is the circle? red"]
    for side in ("left", "right"):
        out = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        for mask in (out["attention_mask"], None):
            layout = text_layout(texts, tokenizer, out["input_ids"], mask)
            assert torch.equal(~layout.mask("pad"), out["attention_mask"].bool())
            n_pad = int((out["attention_mask"][0] == 0).sum())
            assert layout.positions("start", 0) == [n_pad if side == "left" else 0]
            start = layout.positions("start", 0)[0]
            assert layout.where("red", row=0) == [start + 2]


def test_an_unknown_token_at_the_end_is_a_word_even_if_padding_looks_like_it(
    tokenizers: dict[str, Any],
) -> None:
    tokenizer = tokenizers["bert"]
    ids = tokenizer("red ☃", return_tensors="pt")["input_ids"]
    layout = text_layout(["red ☃"], tokenizer, ids)
    assert layout.roles[0] == ("start", "word", "word", "end")
    assert layout.where("☃") == [2]


def test_tokens_that_are_not_the_texts_own_are_laid_along_it(tokenizers: dict[str, Any]) -> None:
    """As when a pipeline cleans the text first, or a model has written on."""
    tokenizer = tokenizers["llama"]
    ids = tokenizer("a  red circle, and a blue square", return_tensors="pt")["input_ids"]
    layout = text_layout(["a red circle"], tokenizer, ids)
    own = text_layout(None, tokenizer, ids)
    assert layout.where("red circle") == own.where("red circle")
    assert own.where("blue")
    with pytest.raises(WordNotFoundError):
        layout.where("blue")


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("written", [True, False])
def test_image_tokens_get_their_image_and_patch(tokenizers: dict[str, Any], name: str, written: bool) -> None:
    tokenizer = tokenizers[name]
    image = tokenizer.convert_tokens_to_ids("<image>")
    long = ["<image>" * 6 + "<image>" * 6 + "\nis the red circle red?", "<image>" * 6 + "\nwhere"]
    short = ["<image><image>\nis the red circle red?", "<image>\nwhere"]
    texts = short if written else ["is the red circle red?", "where"]
    side = "left" if name == "llama" else "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    out = tokenizer(long, padding=True, padding_side=side, return_tensors="pt")
    ids, mask = out["input_ids"], out["attention_mask"]
    layout = language_layout(texts, tokenizer, ids, mask, image, (2, 3))
    assert torch.equal(layout.mask("image"), ids == image)
    assert torch.equal(layout.mask("pad"), mask == 0)
    first = layout.positions("image")[0]
    assert [layout.patch_rc(first + i) for i in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert layout.image_index[0][first : first + 12] == (0,) * 6 + (1,) * 6
    assert layout.position_of(1, 0, image=1) == first + 9
    assert layout.where("red", occurrence=0) == layout.where("red circle")[: len(layout.where("red")) // 2]
    assert "image" not in [w.text for w in layout.words[0]]
    assert [w.text for w in layout.words[1]] == ["where"]
    with pytest.raises(ValueError, match="'word', which has no patch"):
        layout.patch_rc(layout.where("circle")[0])
    same = language_layout(texts, tokenizer, ids, mask, image, [(2, 3)] * 3)
    assert same == layout


def test_images_of_different_sizes_and_class_places_are_told_apart(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama"]
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = tokenizer("<image>" * (5 + 3) + "red", return_tensors="pt")["input_ids"]
    layout = language_layout(["<image><image>red"], tokenizer, ids, None, image, [(2, 2), (1, 2)], n_class=1)
    first = layout.positions("image")[0]
    assert layout.patches[0][first : first + 8] == (
        None,
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        None,
        (0, 0),
        (0, 1),
    )
    assert layout.grid is None
    for wrong in ([(2, 2)], (3, 3), [(2, 2), (1, 2)]):
        with pytest.raises(InputError, match="has 8 image tokens"):
            language_layout(["red"], tokenizer, ids, None, image, wrong)
    with pytest.raises(InputError, match="1 grids more than images"):
        language_layout(["red"], tokenizer, ids, None, image, [(2, 2), (2, 2), (2, 2)])


def test_a_vision_layout_counts_patches_line_by_line() -> None:
    layout = vision_layout(2, (3, 4), n_class=1, n_register=2)
    assert layout.n_pos == 15
    assert layout.n_rows == 2
    assert layout.positions("class") == [0]
    assert layout.positions("register", 1) == [1, 2]
    slow = torch.arange(12).reshape(3, 4)
    for pos in layout.positions("patch"):
        row, col = layout.patch_rc(pos)
        assert slow[row, col] == pos - 3
        assert layout.position_of(row, col) == pos
    for wrong in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match="3 x 4"):
            layout.position_of(*wrong)
    with pytest.raises(ValueError, match="'class', which has no patch"):
        layout.patch_rc(0)
    with pytest.raises(ValueError, match="No role 'patches'; there is class"):
        layout.positions("patches")
    latents = vision_layout(1, (2, 2), n_class=0, role="latent")
    assert set(latents.roles[0]) == {"latent"}
    assert latents.patch_rc(3) == (1, 1)


def test_words_of_any_script_are_cut_where_a_reader_would() -> None:
    cut: Callable[[str], list[str]] = lambda text: [w for w, _, _ in split_words(text)]  # noqa: E731
    assert cut("a_b don't 3.5") == ["a_b", "don", "'", "t", "3", ".", "5"]
    assert cut("红色的 circle") == ["红", "色", "的", "circle"]
    assert cut("हिन्दी है") == ["हिन्दी", "है"]
    assert cut("cafe\u0301 ❤️x") == ["cafe\u0301", "❤️", "x"]


def test_texts_and_rows_must_be_as_many(tokenizers: dict[str, Any]) -> None:
    ids, _ = rows(tokenizers["clip"], ["a"])
    with pytest.raises(InputError, match="2 texts for 1 rows"):
        text_layout(["a", "b"], tokenizers["clip"], ids)
    with pytest.raises(InputError, match="is no tokenizer of transformers or open_clip"):
        text_layout(["a"], object(), ids)


def test_a_layout_can_be_compared_and_hashed() -> None:
    assert isinstance(hash(vision_layout(1, (2, 2))), int)
    assert vision_layout(1, (2, 2)) == TokenLayout(
        roles=(("class", "patch", "patch", "patch", "patch"),),
        grid=(2, 2),
        patches=((None, (0, 0), (0, 1), (1, 0), (1, 1)),),
        image_index=((0, 0, 0, 0, 0),),
        grids=((None, (2, 2), (2, 2), (2, 2), (2, 2)),),
        tiles=((None, 0, 0, 0, 0),),
    )
