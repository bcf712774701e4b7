"""Knockouts against the same mask given to the model itself, and blocks that do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.patching import Cut, information_flow, knock_out, token_roles
from methods_multimodal.patching import attention_knockout as room
from mm_adapters import StoreError
from tests.methods.contract.families import family


def no_run(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a run")


def last_logit(output: Any) -> Tensor:
    return output.logits[:, -1, 3].float()


def mask(n_pos: int, *positions: list[int]) -> Tensor:
    where = torch.zeros(len(positions), n_pos, dtype=torch.bool)
    for row, at in enumerate(positions):
        where[row, at] = True
    return where


@pytest.mark.parametrize("name", ["llama_lm", "llava", "llava_siglip_qwen"])
def test_a_cut_in_all_layers_is_the_models_own_run_with_that_mask(name: str) -> None:
    case = tiny.CASES[name]()
    n_rows, n_pos = case.inputs["input_ids"].shape
    queries, keys = mask(n_pos, [3, n_pos - 1], [n_pos - 1]), mask(n_pos, [1, 3], [0, 2])
    found = knock_out(mm.HookedModel(case.model), case.inputs, last_logit, [Cut("a", queries, keys)])
    allowed = torch.ones(n_pos, n_pos, dtype=torch.bool).tril().expand(n_rows, 1, n_pos, n_pos).clone()
    for row, (asking, asked) in enumerate((([3, n_pos - 1], [1, 3]), ([n_pos - 1], [0, 2]))):
        for query in asking:
            for key in asked:
                if key != query:
                    allowed[row, 0, query, key] = False
    own = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    language = case.model.model if name == "llama_lm" else case.model.model.language_model
    with torch.no_grad():
        embedded = mm.HookedModel(case.model).run(case.inputs, read=["language.hook_embed"])[
            "language.hook_embed"
        ]
        states = language(inputs_embeds=embedded, attention_mask=own).last_hidden_state
        logits = case.model.lm_head(states)
    torch.testing.assert_close(found.values[0], logits[:, -1, 3], rtol=1e-5, atol=1e-6)
    assert (found.values[0] - found.base).abs().min() > 1e-4


def test_one_head_of_one_layer_is_blocked_and_its_mass_is_what_it_attended() -> None:
    case = tiny.CASES["llava"]()
    model = mm.HookedModel(case.model)
    keys, queries = mask(10, [1, 2], [4]), mask(10, [9], [9])
    cut = Cut("a", queries, keys, layers=(1,), heads=(2,))
    found = knock_out(model, case.inputs, last_logit, [cut])
    site = "language.blocks.1.attn.hook_pattern"
    pattern = model.run(case.inputs, read=[site])[site]
    torch.testing.assert_close(
        found.mass[0], torch.stack([pattern[0, 2, 9, [1, 2]].sum(), pattern[1, 2, 9, 4]])
    )

    def by_hand(here: Tensor) -> Tensor:
        here = here.clone()
        for row, at in ((0, [1, 2]), (1, [4])):
            here[row, 2, 9, at] = 0
            here[row, 2, 9] /= here[row, 2, 9].sum()
        return here

    expected = last_logit(model.run(case.inputs, edit=[mm.Edit(site, by_hand)]).output)
    torch.testing.assert_close(found.values[0], expected, rtol=1e-5, atol=1e-6)
    assert found.layers == ((1,),)


def test_a_block_that_the_model_does_not_take_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny.CASES["llava"]()
    # False written into an additive mask: zero is added, and nothing is blocked.
    monkeypatch.setattr(room._Blocker, "_block", lambda self, scores, at: self._forget(scores, at))

    def forget(self: Any, scores: Tensor, at: str) -> Tensor:
        self.dead[at] = torch.zeros(1, dtype=torch.bool)
        return scores + torch.zeros_like(scores)

    monkeypatch.setattr(room._Blocker, "_forget", forget, raising=False)
    cut = Cut("a", mask(10, [9], [9]), mask(10, [1], [1]))
    with pytest.raises(mm.AttentionUnreachableError, match=r"hook_pattern still has 0\.\d"):
        knock_out(mm.HookedModel(case.model), case.inputs, last_logit, [cut])


def test_a_query_without_any_key_attends_to_nothing() -> None:
    case = tiny.CASES["blip"]()
    model = mm.HookedModel(case.model)
    queries = mask(4, [3], [2, 3])
    found = knock_out(model, case.inputs, last_logit, [Cut("a", queries, None, (0,), None, "cross_attn")])

    def silent(z: Tensor) -> Tensor:
        return z.masked_fill(queries[:, :, None, None], 0.0)

    run = model.run(case.inputs, edit=[mm.Edit("language.blocks.0.cross_attn.hook_z", silent)])
    torch.testing.assert_close(found.values[0], last_logit(run.output), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mass, torch.ones(1, 2))


def test_a_cut_that_blocks_nothing_or_does_not_fit_is_refused_before_a_run() -> None:
    case = tiny.CASES["llava"]()
    model = mm.HookedModel(case.model)
    model.run = no_run
    none = Cut("none", mask(10, [9], [9]), mask(10, [1], []))
    with pytest.raises(mm.InputError, match=r"'none' blocks nothing: there are no keys of row 1"):
        knock_out(model, case.inputs, last_logit, [none])
    with pytest.raises(mm.MissingSiteError, match=r"language\.blocks\.7\.attn"):
        knock_out(model, case.inputs, last_logit, [Cut("a", mask(10, [9]), mask(10, [1]), (7,))])


def test_a_knockout_that_was_stopped_goes_on_and_other_cuts_are_refused(tmp_path: Path) -> None:
    case = tiny.CASES["llava"]()
    model, folder = mm.HookedModel(case.model), tmp_path / "work"
    cuts = [Cut(str(i), mask(10, [9], [9]), mask(10, [i], [i])) for i in range(3)]
    whole = knock_out(model, case.inputs, last_logit, cuts)
    stop, run = [3], model.run

    def stopping(*args: Any, **kwargs: Any) -> Any:
        stop[0] -= 1
        if stop[0] < 0:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    model.run = stopping
    with pytest.raises(KeyboardInterrupt):
        knock_out(model, case.inputs, last_logit, cuts, folder=folder)
    stop[0] = 2  # The base, and what was left.
    found = knock_out(model, case.inputs, last_logit, cuts, folder=folder)
    assert torch.equal(found.values, whole.values)
    stop[0] = 9
    with pytest.raises(StoreError, match="differ"):
        knock_out(model, case.inputs, last_logit, cuts[:2], folder=folder)
    saved = whole.save(tmp_path / "knockout.safetensors")
    assert torch.equal(type(whole).load(saved).effect, whole.effect)


# ---- flow ----------------------------------------------------------------------------------------


def test_what_the_question_reads_in_the_last_layer_never_reaches_the_answer() -> None:
    case = family("llava")
    found = information_flow(case.model("hooked"), case.inputs, last_logit)
    assert found.flows == (("image", "question"), ("question", "last"), ("image", "last"))
    # Changed attention is formed from its pattern, which differs from the fused kernel in rounding.
    assert found.effect[0, -1].abs().max() < 1e-6
    assert found.effect[2].abs().min() > 1e-2
    assert found.interval().shape == (2, 3, len(found.windows))


def test_a_window_of_all_layers_is_one_cut_in_all_of_them() -> None:
    case = family("llava")
    model = case.model("hooked")
    roles = token_roles(model, case.inputs)
    n_layers = model.towers["language"].n_layers()
    flow = information_flow(model, case.inputs, last_logit, window=n_layers)
    cut = knock_out(model, case.inputs, last_logit, [Cut("a", roles["last"], roles["image"])])
    assert torch.equal(flow.values[2, 0], cut.values[0])
    with pytest.raises(mm.InputError, match=f"window={n_layers + 1}: a window holds 1 to {n_layers}"):
        information_flow(model, case.inputs, last_logit, window=n_layers + 1)


def test_a_tower_that_reads_by_cross_attention_has_that_flow_and_no_image() -> None:
    case = family("blip")
    model = case.model("hooked")

    def metric(output: Any) -> Tensor:
        return output.logits[[0, 1], [3, 2], 3].float()

    found = information_flow(model, case.inputs, metric)
    assert found.flows == (("read", "question"), ("question", "last"), ("read", "last"))
    assert found.effect[2].abs().min() > 0
    # What the question reads in the last layer is not read again.
    assert found.effect[0, -1].abs().max() < 1e-6
    with pytest.raises(mm.MissingSiteError, match="language tower's layout has no 'image' role"):
        information_flow(model, case.inputs, metric, flows=[("image", "last")])
