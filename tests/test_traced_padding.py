"""A text in a batch is what it is alone, at whichever side its padding stands: in invokes, lists and runs."""

from __future__ import annotations

import copy
from typing import Any

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import pytest
import tiny
import tiny_tokenizers
import torch
from foreign import stand_ins
from torch import Tensor

import mm_adapters as mm
from mm_adapters.inputs.padding import counts_padding, is_padded_left, pads_left, row_positions
from mm_adapters.records import registry
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.traced import TracedModel

SHORT, LONG = [1, 5, 9], [1, 7, 3, 6, 11, 9]
# Decoders with rotary positions, with a table that is counted for the mask (OPT), and with one that is told.
# PaliGemma is not one of them: without its token types a mask makes a row another, padded or not.
DECODERS = (
    "llava", "llava_siglip_qwen", "llava_mistral", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "gemma3", "idefics2", "mllama", "internvl", "pixtral", "chameleon", "emu3", "opt_lm", "llama_lm", "gpt2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    mm.families.records()
    monkeypatch.setattr(registry, "_RECORDS", dict(registry._RECORDS))
    stand_ins.register_all()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    # A large spread makes the positions matter, which a common one hides.
    config = GPT2Config(vocab_size=400, n_positions=32, n_embd=24, n_layer=2, n_head=4, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def module(name: str) -> Any:
    return gpt2() if name == "gpt2" else tiny.CASES[name]().model


def tokenizer(padding_side: str = "right") -> Any:
    made = copy.deepcopy(tiny_tokenizers.llama())
    made.pad_token = made.convert_ids_to_tokens(0)
    made.padding_side = padding_side
    return made


def logits_of(model: Any, row: list[int]) -> Tensor:
    """What the library's own model makes of a row alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0]


def close(value: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_the_last_position_of_each_row_is_what_it_is_alone(name: str) -> None:
    plain = module(name)
    model = TracedModel(plain, tokenizer=tokenizer())
    assert model.tokenizer.padding_side == "left"
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(SHORT):
            short = model.output.logits.save()
        with tracer.invoke(LONG):
            long = model.output.logits.save()
    close(short[0, -3:], logits_of(plain, SHORT))
    close(long[0], logits_of(plain, LONG))
    with torch.no_grad(), model.trace([SHORT, LONG]):
        rows = model.output.logits.save()
    close(rows, torch.cat([short, long]))


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_texts_padded_at_the_left_are_told_their_positions_by_either_engine(engine: str) -> None:
    plain, texts = gpt2(), ["a red circle", "a blue square on a white background"]
    model: Any = mm.wrap(plain, tokenizer=tokenizer("left"), engine=engine)
    rows = model.prepare(text=texts)
    lengths = [len(model.preparer.tokenizer(text).input_ids) for text in texts]
    assert rows["position_ids"].tolist()[0][-lengths[0] :] == [*range(lengths[0])]
    together = model.run({"text": texts}).output.logits[:, -1]
    for text, last in zip(texts, together, strict=True):
        close(last, logits_of(plain, model.preparer.tokenizer(text).input_ids)[-1])
    assert "position_ids" not in model.prepare(text=texts[1])  # Nothing is padded.
    beside = mm.wrap(plain, tokenizer=tokenizer("right"), engine=engine)  # type: ignore[call-overload]
    assert "position_ids" not in beside.prepare(text=texts)


@pytest.mark.parametrize("name", ["gpt2", "opt_lm", "llama_lm"])
def test_a_row_generates_in_a_batch_what_it_generates_alone(name: str) -> None:
    plain = module(name)
    plain.generation_config.eos_token_id = None
    model = TracedModel(plain, tokenizer=tokenizer())
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = plain.generate(
        torch.tensor([SHORT]), attention_mask=torch.ones(1, 3, dtype=torch.long), pad_token_id=0, **options
    )
    with model.generate(pad_token_id=0, **options) as tracer:
        with tracer.invoke(SHORT):
            short = nnsight.save(tracer.result)
        with tracer.invoke(LONG):
            pass
    assert short[0, -4:].tolist() == alone[0, -4:].tolist()
    rows = model.generate([SHORT, LONG], pad_token_id=0, **options)
    assert rows[0, -4:].tolist() == alone[0, -4:].tolist()


def test_texts_generate_in_a_batch_what_they_generate_alone() -> None:
    model = TracedModel(gpt2(), tokenizer=tokenizer())
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    texts = ["a red circle", "a blue square on a white background"]
    rows = model.generate(text=texts, **options)
    for row, text in zip(rows, texts, strict=True):
        assert row[-4:].tolist() == model.generate(text=text, **options)[0, -4:].tolist()


def test_the_encoder_of_an_encoder_decoder_is_padded_at_the_right() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(2)
    config = T5Config(
        vocab_size=400, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    plain = T5ForConditionalGeneration(config).eval()
    model = TracedModel(plain, tokenizer=tokenizer("left"))
    assert model.tokenizer.padding_side == "right"
    start = torch.tensor([[0, 4]])
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(SHORT, decoder_input_ids=start):
            short = model.output.logits.save()
        with tracer.invoke(LONG, decoder_input_ids=torch.tensor([[0, 4, 7]])):
            pass
    with torch.no_grad():
        want = plain(input_ids=torch.tensor([SHORT]), decoder_input_ids=start).logits[0]
    close(short[0, :2], want)


def test_a_run_of_prepared_tensors_is_the_models_own_call_of_them() -> None:
    plain = gpt2()
    model = TracedModel(plain, tokenizer=tokenizer())
    prepared = {
        "input_ids": torch.tensor([[0, 0, 0, *SHORT], LONG]),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6]),
    }
    with torch.no_grad():
        want = plain(**prepared).logits
    assert torch.equal(model.run(prepared).output.logits, want)
    with torch.no_grad(), model.trace(prepared):  # As nnsight's: what is padded is told.
        told = model.output.logits.save()
    close(told[0, -3:], logits_of(plain, SHORT))
    assert not torch.allclose(want[0, -3:], told[0, -3:], atol=1e-2)


def test_which_models_count_padding_is_read_off_their_tables() -> None:
    counting = {
        name: counts_padding(m := module(name), SiteMap(m)) for name in ("gpt2", "opt_lm", "llama_lm")
    }
    assert counting == {"gpt2": True, "opt_lm": False, "llama_lm": False}
    for name, left in {"gpt2": True, "blip_2": True, "blip_2_t5": False, "blip": False}.items():
        plain = module(name)
        assert pads_left(plain, SiteMap(plain)) is left, name


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_positions_count_from_the_first_token_only_after_padding(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]], dtype=dtype)
    assert row_positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert is_padded_left(mask)
    assert not is_padded_left(mask[1:])
