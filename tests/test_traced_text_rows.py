"""The text arguments of a call, as nnsight's users write them: each form is the library's own call."""

from __future__ import annotations

import copy
from typing import Any

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import numpy as np
import pytest
import tiny
import tiny_tokenizers
import torch

import mm_adapters as mm
from mm_adapters.traced import TracedModel

IDS = [1, 7, 8, 9]
LONG = [1, 9, 4, 3, 5]


def tokenizer() -> Any:
    made = copy.deepcopy(tiny_tokenizers.llama())
    made.pad_token = made.convert_ids_to_tokens(0)
    return made


@pytest.fixture
def opt() -> TracedModel:
    return TracedModel(tiny.CASES["opt_lm"]().model, tokenizer=tokenizer())


def traced(model: Any, *invokes: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[dict[str, Any], Any]:
    """What the module is given by these invokes together, and its output."""
    with torch.no_grad(), model.trace() as tracer:
        for args, kwargs in invokes:
            with tracer.invoke(*args, **kwargs):
                pass
        with tracer.invoke():
            given = nnsight.save(model.inputs[1])
            output = nnsight.save(model.output)
    return given, output


@pytest.mark.parametrize(
    "form",
    [
        IDS,
        [IDS],
        torch.tensor(IDS),
        torch.tensor([IDS]),
        [torch.tensor(IDS)],
        [torch.tensor([IDS])],
        np.array(IDS),
        np.array([IDS]),
        [np.int64(i) for i in IDS],
        {"input_ids": IDS},
        {"input_ids": [IDS]},
        {"input_ids": torch.tensor([IDS]), "attention_mask": [[1, 1, 1, 1]]},
    ],
    ids=str,
)
def test_token_ids_of_each_form_are_one_row(opt: TracedModel, form: Any) -> None:
    with torch.no_grad():
        want = opt.wrapped(input_ids=torch.tensor([IDS])).logits
        with opt.trace(form):
            logits = opt.output.logits.save()
    assert torch.equal(logits, want)
    assert opt._batch_size(form) == 1


@pytest.mark.parametrize("form", [[LONG, IDS], [torch.tensor([LONG]), torch.tensor(IDS)]], ids=str)
def test_rows_of_unequal_length_are_padded_under_a_mask(opt: TracedModel, form: Any) -> None:
    given, output = traced(opt, ((form,), {}))
    assert given["input_ids"].tolist() == [LONG, [0, *IDS]]
    assert given["attention_mask"].tolist() == [[1] * 5, [0, 1, 1, 1, 1]]
    with torch.no_grad():
        want = opt.wrapped(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(output.logits[1, 1:], want, rtol=1e-4, atol=1e-5)
    assert opt._batch_size(form) == 2


@pytest.mark.parametrize("labels", [LONG, torch.tensor(LONG), [LONG]], ids=str)
def test_labels_beside_one_row_are_those_of_its_tokens(opt: TracedModel, labels: Any) -> None:
    with torch.no_grad():
        want = opt.wrapped(input_ids=torch.tensor([LONG]), labels=torch.tensor([LONG])).loss
        with opt.trace(LONG, labels=labels):
            loss = opt.output.loss.save()
    torch.testing.assert_close(loss, want)


def test_an_invoke_without_labels_adds_nothing_to_the_loss(opt: TracedModel) -> None:
    given, output = traced(opt, ((IDS,), {"labels": IDS}), ((LONG,), {}))
    assert given["labels"].tolist() == [[-100, *IDS], [-100] * 5]
    of_each = output.logits[0, :-1].log_softmax(-1)[range(4), IDS]
    torch.testing.assert_close(output.loss, -of_each.mean())  # As the library counts it, the first token too.


def test_embeddings_are_batched_as_tokens_are(opt: TracedModel) -> None:
    embed = opt.wrapped.get_input_embeddings()
    with torch.no_grad():
        rows = [embed(torch.tensor([IDS])), embed(torch.tensor([LONG]))]
        want = opt.wrapped(inputs_embeds=rows[0]).logits[0]
    given, output = traced(opt, ((), {"inputs_embeds": rows[0][0]}), ((), {"inputs_embeds": rows[1]}))
    assert given["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1] * 5]
    assert not given["inputs_embeds"][0, 0].any()
    torch.testing.assert_close(output.logits[0, 1:], want, rtol=1e-4, atol=1e-5)


def test_what_a_decoder_reads_has_its_own_length_and_is_padded_at_the_right() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    config = T5Config(
        vocab_size=400, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    plain = T5ForConditionalGeneration(config).eval()
    model = TracedModel(plain, tokenizer=tokenizer())
    short = {"input_ids": torch.tensor([LONG]), "decoder_input_ids": torch.tensor([[0, 5]])}
    long = {"input_ids": torch.tensor([IDS]), "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    given, output = traced(model, ((), short), ((long,), {}))
    assert given["decoder_input_ids"].tolist() == [[0, 5, 0], [0, 5, 6]]
    with torch.no_grad():
        want = plain(**short).logits[0]
    torch.testing.assert_close(output.logits[0, :2], want, rtol=1e-4, atol=1e-5)
    given, _ = traced(model, ((IDS,), {"labels": [5, 3]}), ((LONG,), {"labels": [5, 6, 7]}))
    assert given["labels"].tolist() == [[5, 3, -100], [5, 6, 7]]
    with pytest.raises(mm.InputError, match=r"1 of 2 rows have `decoder_input_ids`.*in each invoke"):
        traced(model, ((), short), ((IDS,), {}))


def test_rows_that_do_not_match_are_refused_before_the_model_runs(opt: TracedModel) -> None:
    with pytest.raises(mm.InputError, match="`labels` has 1 rows, but `input_ids` has 2"):
        traced(opt, (([IDS, IDS],), {"labels": [IDS]}))
    with pytest.raises(mm.InputError, match=r"labels has the shapes \[1\], \[1, 5\].*the same way"):
        traced(opt, ((IDS,), {"labels": 1}), ((LONG,), {"labels": [LONG]}))
    opt.tokenizer.pad_token = None
    opt.wrapped.config.pad_token_id = None
    traced(opt, ((IDS,), {}), ((IDS,), {}))  # Nothing is padded.
    with pytest.raises(mm.InputError, match=r"without a pad token.*pad_token = "):
        traced(opt, ((IDS,), {}), ((LONG,), {}))


def test_pictures_and_what_comes_with_them_stay_as_they_are() -> None:
    case = tiny.CASES["qwen2_vl"]()
    model = TracedModel(case.model)
    with torch.no_grad(), model.trace(**case.inputs):
        given = nnsight.save(model.inputs[1])
        logits = model.output.logits.save()
    assert all(torch.equal(given[k], v) for k, v in case.inputs.items())
    with torch.no_grad():
        assert torch.equal(logits, case.model(**case.inputs).logits)
