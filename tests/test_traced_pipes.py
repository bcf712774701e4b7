"""Several inputs in transformers' own pipeline, and a tokenizer's options in a call: as each is by itself."""

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
from transformers import pipeline
from zoo_inputs import INPUTS

import mm_adapters as mm
from mm_adapters.records import registry
from mm_adapters.traced import TracedModel

SHORT, LONG = "a red circle", "a blue square on a white background"
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TracedModel:
    """A decoder whose positions have a table, and one whose are rotary, with a tokenizer that fits."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    mm.families.records()
    monkeypatch.setattr(registry, "_RECORDS", dict(registry._RECORDS))
    stand_ins.register_all()
    torch.manual_seed(3)
    made = copy.deepcopy(tiny_tokenizers.llama())
    common = {"vocab_size": len(made), "eos_token_id": None, "bos_token_id": 1, "initializer_range": 0.5}
    if request.param == "gpt2":
        config: Any = GPT2Config(n_positions=32, n_embd=24, n_layer=2, n_head=4, **common)
        return TracedModel(GPT2LMHeadModel(config).eval(), tokenizer=made)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, **common,
    )  # fmt: skip
    return TracedModel(LlamaForCausalLM(config).eval(), tokenizer=made)


def said(records: Any) -> list[str]:
    """The texts that a pipeline made, of each input."""
    return [r[0]["generated_text"] if isinstance(r, list) else r["generated_text"] for r in records]


def test_several_invokes_of_a_pipe_are_one_batch_with_rows_of_their_own(model: TracedModel) -> None:
    theirs: Any = pipeline("text-generation", model=model.wrapped, tokenizer=copy.deepcopy(model.tokenizer))
    alone = [said(theirs(text, **OPTIONS))[0] for text in (SHORT, LONG)]
    site = "language.blocks.1.hook_resid_post"
    with model.pipe(**OPTIONS) as tracer:
        with tracer.invoke(SHORT):
            first = model.site(site)[:, -1].save()
            result = nnsight.save(tracer.result)
        with tracer.invoke(LONG):
            second = model.site(site)[:, -1].save()
        with tracer.invoke():
            both = model.site(site)[:, -1].save()
    assert said(result) == alone
    assert torch.equal(both, torch.cat([first, second]))
    for text, value in ((SHORT, first), (LONG, second)):
        want = model.run({"text": text}, read=[site])[site][:, -1]
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-4)
    with model.pipe([SHORT, LONG], **OPTIONS) as tracer:
        listed = model.site(site)[:, -1].save()
        result = nnsight.save(tracer.result)
    assert said(result) == alone
    assert torch.equal(listed, both)


def test_an_edit_in_one_invoke_of_a_pipe_leaves_the_others_alone(model: TracedModel) -> None:
    with model.pipe(LONG, **OPTIONS) as tracer:
        want = nnsight.save(tracer.result)
    with model.pipe() as tracer:
        with tracer.invoke(SHORT, **OPTIONS):
            for _ in tracer.iter[:4]:
                model.site("language.blocks.0.hook_resid_post")[:] = 0
        with tracer.invoke([LONG], **OPTIONS):
            result = nnsight.save(tracer.result)
    assert said(result)[1] == said(want)[0]
    with model.pipe(SHORT, **OPTIONS) as tracer:
        unedited = nnsight.save(tracer.result)
    assert said(result)[0] != said(unedited)[0]


def piped(model: TracedModel, *invokes: tuple[Any, dict[str, Any]]) -> None:
    with model.pipe() as tracer:
        for given, options in invokes:
            with tracer.invoke(given, **options):
                pass


def test_invokes_of_a_pipe_that_cannot_be_one_batch_are_refused(model: TracedModel) -> None:
    with pytest.raises(mm.InputError, match="max_new_tokens is 2 in one invoke and 3"):
        piped(model, (SHORT, {"max_new_tokens": 2}), (LONG, {"max_new_tokens": 3}))
    with pytest.raises(mm.InputError, match="one text or a list of texts each"):
        piped(model, (SHORT, {}), ([{"role": "user", "content": "hello"}], {}))
    with pytest.raises(ValueError, match="needs an input"):
        piped(model)


def test_a_text_is_cut_only_where_truncation_says_so(model: TracedModel) -> None:
    ids = model.tokenizer(LONG).input_ids
    with torch.no_grad(), model.trace(LONG, truncation=True, max_length=4):
        cut = model.output.logits.save()
    with torch.no_grad():
        want = model.wrapped(input_ids=torch.tensor([ids[:4]])).logits
    assert torch.equal(cut, want)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke([LONG, SHORT], truncation=True, max_length=6):
            pass
        with tracer.invoke(LONG):
            pass
        with tracer.invoke():
            given = nnsight.save(model.inputs[1])
    assert given["attention_mask"].sum(1).tolist() == [
        6,
        min(6, len(model.tokenizer(SHORT).input_ids)),
        len(ids),
    ]
    with torch.no_grad(), model.trace(LONG, add_special_tokens=False):
        plain = nnsight.save(model.inputs[1]["input_ids"])
    assert plain.tolist() == [ids[1:]]
    too_long = " ".join([LONG] * 5)
    with pytest.raises(mm.InputError, match=r"tokens long.*reads at most"), model.trace(too_long):
        pass
    with torch.no_grad(), model.trace(too_long, truncation=True):  # To what the model reads.
        longest = nnsight.save(model.inputs[1]["input_ids"])
    assert longest.shape == (1, 32)
    with model.scan([LONG, SHORT], truncation=True, max_length=7):
        shape = nnsight.save(tuple(model.site("language.blocks.0.hook_resid_post").shape))
    assert shape == (2, 7, 24)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"text": LONG, "max_length": 4}, "does not take max_length"),
        ({"text": LONG, "add_special_tokens": False, "max_length": 4}, "truncation=True cuts a text to"),
        ({"input_ids": torch.tensor([[1, 4]]), "truncation": True}, "there is no text to make tokens of"),
        ({"text": LONG, "truncaton": True}, "does not take truncaton"),
    ],
)
def test_options_of_a_tokenizer_that_mean_nothing_are_refused(
    model: TracedModel, call: dict[str, Any], says: str
) -> None:
    with pytest.raises(mm.InputError, match=says), model.trace(**call):
        pass
    with pytest.raises(mm.InputError, match="does not take"):
        model.run(call | {"truncation": True})


def test_options_of_a_tokenizer_beside_images_are_refused() -> None:
    llava = mm.load("tiny-llava", engine="nnsight")
    refused = pytest.raises(mm.InputError, match="places of images")
    with refused, llava.trace(**INPUTS["tiny-llava"], truncation=True, max_length=5):
        pass
    siglip = tiny.CASES["siglip"]().model
    padded = TracedModel(siglip, tokenizer=copy.deepcopy(tiny_tokenizers.llama()))
    with pytest.raises(mm.InputError, match="in one way only"), padded.trace(text=SHORT, truncation=True):
        pass
