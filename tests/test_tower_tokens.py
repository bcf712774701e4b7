"""A tower's tokens: what is cut, where padding goes, where a token stands, and what a loss is the mean of."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import mm_adapters as mm

TEXTS = ["what colour is it?", "is there a blue square in the picture, or a red one?"]


@cache
def tower(model: str, name: str) -> Any:
    return mm.load(model).tower(name)


def own_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_padded_on_the_side_that_is_asked_for(side: str) -> None:
    language = tower("tiny-llava", "language")
    tokenizer = language.tokenizer
    tokens = language.to_tokens(TEXTS, prepend_bos=True, padding_side=side)
    short, long = ([tokenizer.bos_token_id, *own_ids(tokenizer, t)] for t in TEXTS)
    pads = [tokenizer.pad_token_id] * (len(long) - len(short))
    assert tokens.tolist() == [pads + short if side == "left" else short + pads, long]


@pytest.mark.parametrize(("model", "name"), [("tiny-clip", "text"), ("tiny-llava", "language")])
def test_a_text_that_is_too_long_is_cut_to_the_context_if_asked(model: str, name: str) -> None:
    found = tower(model, name)
    tokenizer, n_ctx = found.tokenizer, found.cfg.n_ctx
    text = " ".join(["circle"] * (n_ctx + 9))
    with pytest.raises(mm.InputError, match=f"tokens; the {name} tower holds {n_ctx}"):
        found.to_tokens(text)
    ends = [tokenizer.eos_token_id] if name == "text" else []
    whole = [tokenizer.bos_token_id, *own_ids(tokenizer, text)]
    want = whole[: n_ctx - len(ends)] + ends
    assert found.to_tokens(text, prepend_bos=True, truncate=True).tolist() == [want]
    # One that fits exactly is left alone, beside one that does not.
    fits = tokenizer.decode(whole[1 : n_ctx - len(ends)])
    both = found.to_tokens([fits, text], prepend_bos=True, truncate=True)
    assert both.shape == (2, n_ctx)
    assert both[1].tolist() == want
    if ends:  # Pooled at its end token: of a text that is cut too, and the model runs on it.
        torch.testing.assert_close(found(both[1:]), found(text[: len(fits)]), rtol=1e-4, atol=1e-4)


def test_a_tokens_first_and_last_position_are_told_apart() -> None:
    language = tower("tiny-llava", "language")
    text = "a circle and a circle and a square"
    ids = language.to_tokens(text)[0].tolist()
    circle = language.to_single_token(" circle")
    places = [i for i, token in enumerate(ids) if token == circle]
    assert len(places) == 2
    assert language.get_token_position(" circle", text) == places[0]
    assert language.get_token_position(" circle", text, mode="last") == places[1]
    assert language.get_token_position(circle, torch.tensor([ids]), mode="last") == places[1]
    with pytest.raises(mm.InputError, match="mode='middle'"):
        language.get_token_position(" circle", text, mode="middle")
    with pytest.raises(mm.InputError, match="does not occur in"):
        language.get_token_position(" red", text)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_texts_logits_are_those_it_has_alone(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    language = tower("tiny-llava", "language")
    monkeypatch.setattr(language.tokenizer, "padding_side", side)
    logits = language(TEXTS)
    losses = []
    for row, text in enumerate(TEXTS):
        ids = language.to_tokens(text)
        alone = language._root.wrapped(input_ids=ids).logits[0]
        n = ids.shape[1]
        ours = logits[row, -n:] if side == "left" else logits[row, :n]
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)
        losses += torch.nn.functional.cross_entropy(alone[:-1], ids[0, 1:], reduction="none").tolist()
    want = torch.tensor(losses).mean()
    torch.testing.assert_close(language(TEXTS, return_type="loss"), want, rtol=1e-4, atol=1e-4)
    tokens = language.to_tokens(TEXTS)
    mask = (tokens != language.tokenizer.pad_token_id).long()
    given = language(tokens, return_type="loss", attention_mask=mask)
    torch.testing.assert_close(given, want, rtol=1e-4, atol=1e-4)


def test_an_empty_list_of_classes_is_refused() -> None:
    vision = tower("tiny-clip", "vision")
    with pytest.raises(mm.InputError, match="no classes"):
        vision.set_classes([])
    assert vision._class_names is None


@pytest.mark.parametrize(("model", "name"), [("tiny-clip", "text"), ("tiny-llava", "language")])
def test_the_start_token_comes_first_unless_it_is_not_asked_for(model: str, name: str) -> None:
    found = tower(model, name)
    tokenizer, default = found.tokenizer, found.cfg.default_prepend_bos
    ends = [tokenizer.eos_token_id] if name == "text" else []
    own = [*own_ids(tokenizer, "a red circle"), *ends]
    start = tokenizer.bos_token_id
    for prepend, want in ((True, [start, *own]), (False, own), (None, [start, *own] if default else own)):
        assert found.to_tokens("a red circle", prepend_bos=prepend)[0].tolist() == want
    assert found.to_tokens("a red circle", move_to_device=False).device.type == "cpu"
    with pytest.raises(mm.InputError, match="a string or a list of strings"):
        found.to_tokens([])


def test_tokens_are_told_as_text_one_by_one_and_together() -> None:
    language = tower("tiny-llava", "language")
    tokenizer, text = language.tokenizer, "a red circle"
    ids = own_ids(tokenizer, text)
    rows = torch.tensor([ids, ids[::-1]])
    assert language.to_string(rows) == [tokenizer.decode(ids), tokenizer.decode(ids[::-1])]
    assert language.to_string(rows[0]) == language.to_string(ids) == tokenizer.decode(ids)
    pieces = [tokenizer.decode([i]) for i in ids]
    assert language.to_str_tokens(rows[:1]) == language.to_str_tokens(text, prepend_bos=False) == pieces
    assert language.to_str_tokens([text, "red"], prepend_bos=False) == [
        pieces,
        [tokenizer.decode([i]) for i in own_ids(tokenizer, "red")],
    ]
    assert language.to_single_str_token(ids[0]) == pieces[0]
    (red,) = own_ids(tokenizer, " red")
    assert language.to_single_token(" red") == red
    with pytest.raises(mm.InputError, match="tokens here"):
        language.to_single_token("a red circle")
