"""The tokenizers split what they should and give back what they were given."""

import numpy as np
import pytest

from mm_adapters.zoo import captions, tokenizer, world


@pytest.fixture(scope="module")
def clip():
    return tokenizer.clip_tokenizer()


@pytest.fixture(scope="module")
def llava():
    return tokenizer.llava_tokenizer()


def test_some_words_are_several_tokens_and_the_others_one(clip, llava):
    assert clip.tokenize("triangle") == ["tri", "ang", "le</w>"]
    for word in tokenizer.words():
        expected = list(tokenizer.PIECES.get(word, (word,)))
        assert clip.tokenize(word) == [*expected[:-1], expected[-1] + "</w>"]
        assert [t.lstrip("\u0120") for t in llava.tokenize(" " + word)] == expected


def test_captions_come_back(clip, llava):
    for i in range(100):
        caption = captions.caption(world.scene(i), np.random.default_rng(i)).text()
        assert clip.decode(clip(caption).input_ids, skip_special_tokens=True).split() == caption.split()
        assert llava.decode(llava(caption).input_ids, skip_special_tokens=True) == caption
        assert len(clip(caption).input_ids) <= tokenizer.CONTEXT


def test_unknown_words_fall_apart_and_come_back(clip, llava):
    text = "Zebra \u00fc!"
    assert clip.unk_token_id not in clip(text, add_special_tokens=False).input_ids
    assert clip.decode(clip(text, add_special_tokens=False).input_ids).replace(" ", "") == "zebra\u00fc!"
    assert llava.decode(llava(text, add_special_tokens=False).input_ids) == text


def test_clip_pads_with_the_end_of_text(clip):
    ids = clip("a red circle", padding="max_length").input_ids
    assert len(ids) == tokenizer.CONTEXT
    assert ids[0] == clip.bos_token_id
    assert set(ids[4:]) == {clip.eos_token_id} == {clip.pad_token_id}


def test_merges_never_join_two_pieces():
    spelled = [(tuple("ab"), tuple("ab")), (tuple("abab"),)]
    merges = tokenizer.learn_merges(spelled)
    assert merges == [("a", "b"), ("ab", "ab")]
    assert tokenizer.learn_merges(spelled[:1]) == [("a", "b")]
