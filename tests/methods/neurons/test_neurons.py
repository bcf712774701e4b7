"""Neurons: what is planted is found, sums are complete, controls are matched, errors come before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.neurons import (
    NeuronActivity,
    ablate_neurons,
    attribute_neurons,
    neuron_activity,
    probability_change,
    project_neurons,
)

PLANTED = (1, 5)
TOKEN = 7


def metric(output: Any) -> Tensor:
    return output.logits[:, -1, TOKEN].float()


def last(n_pos: int = 4) -> Tensor:
    return (torch.arange(n_pos) == n_pos - 1).expand(2, n_pos)


@pytest.fixture
def planted() -> tiny.Case:
    """A language model in which one neuron, active in both rows, writes for one token."""
    case = tiny.CASES["llama_lm"]()
    mlp = case.model.model.layers[PLANTED[0]].mlp
    site = f"language.blocks.{PLANTED[0]}.mlp.hook_post"
    active = mm.HookedModel(case.model).run(case.inputs, read=[site])[site][:, -1]
    best = int(active.amin(0).argmax())
    assert active[:, best].min() > 0
    order = [PLANTED[1], best]
    direction = case.model.lm_head.weight[TOKEN] * case.model.model.norm.weight
    with torch.no_grad():
        for weight in (mlp.up_proj.weight, mlp.gate_proj.weight):
            weight[order] = weight[order[::-1]].clone()
        mlp.up_proj.weight[PLANTED[1]] *= 2 / active[:, best].min()
        mlp.down_proj.weight[:, PLANTED[1]] = direction / direction.norm()
    return case


# ---- attribution ---------------------------------------------------------------------------------


def test_attributions_of_a_layer_sum_to_what_it_adds_and_the_planted_neuron_comes_first(
    planted: tiny.Case,
) -> None:
    model = mm.HookedModel(planted.model)
    found = attribute_neurons(model, planted.inputs, {"token": metric}, {"last": last()}, steps=24)
    assert found.completeness().max() < 2e-3
    assert found.top(1) == (PLANTED,)
    silent = model.run(
        planted.inputs,
        edit=[mm.Edit("language.blocks.1.mlp.hook_post", lambda x: x * (~last())[:, :, None])],
    )
    whole = metric(model.run(planted.inputs).output) - metric(silent.output)
    torch.testing.assert_close(found.whole[0, :, 1], whole, rtol=1e-4, atol=1e-5)
    # By hand, one neuron: the mean of its gradient as the layer grows from nothing.
    site, total = "language.blocks.1.mlp.hook_post", torch.zeros(2)
    value = model.run(planted.inputs, read=[site])[site]
    for k in range(24):

        def scaled(x: Tensor, k: int = k) -> Tensor:
            x = x.clone()
            x[:, -1] = value[:, -1] * (k + 0.5) / 24
            return x

        run = model.run(
            planted.inputs, read=[site], edit=[mm.Edit(site, scaled)], grad_of=lambda o: metric(o).sum()
        )
        total += run.grads[site][:, -1, 9] / 24
    torch.testing.assert_close(
        found.attribution[0, 0, :, 1, 9], total * value[:, -1, 9], rtol=1e-4, atol=1e-6
    )


def test_one_gradient_times_the_activation_is_split_by_role() -> None:
    case = tiny.CASES["llava"]()
    model = mm.HookedModel(case.model)
    image = torch.zeros(2, 10, dtype=torch.bool)
    image[:, 1:5] = True
    roles = {"image": image, "text": ~image}
    found = attribute_neurons(model, case.inputs, {"token": metric}, roles, method="gradient")
    site = "language.blocks.0.mlp.hook_post"
    run = model.run(case.inputs, read=[site], grad_of=lambda o: metric(o).sum())
    product = run[site].detach() * run.grads[site]
    torch.testing.assert_close(found.attribution[0, 0, :, 0], product[:, 1:5].sum(1))
    torch.testing.assert_close(found.attribution[0].sum(0)[:, 0], product.sum(1), rtol=1e-4, atol=1e-6)
    assert found.overlap(5).tolist() == [[1.0]]


def test_targets_are_metrics_and_their_top_neurons_overlap_where_they_are_the_same(
    planted: tiny.Case,
) -> None:
    model = mm.HookedModel(planted.model)

    def other(output: Any) -> Tensor:
        return output.logits[:, -1, TOKEN + 1].float()

    found = attribute_neurons(
        model, planted.inputs, {"a": metric, "b": other, "c": metric}, {"last": last()}, method="gradient"
    )
    assert found.overlap(4)[0, 2] == 1
    assert found.overlap(4)[0, 1] < 1
    torch.testing.assert_close(found.attribution[0], found.attribution[2])


def test_roles_that_overlap_and_settings_that_are_none_are_refused() -> None:
    case = tiny.CASES["llama_lm"]()
    model = mm.HookedModel(case.model)
    for roles, message in (
        ({"a": last(), "b": last()}, "The roles a, b overlap"),
        ({}, "There is no role"),
        ({"a": torch.zeros(2, 4, dtype=torch.bool)}, "A row has no position"),
    ):
        with pytest.raises(mm.InputError, match=message):
            attribute_neurons(model, case.inputs, {"token": metric}, roles)
    with pytest.raises(mm.InputError, match="method='x': there is 'integrated' and 'gradient'"):
        attribute_neurons(model, case.inputs, {"token": metric}, {"a": last()}, method="x")
    with pytest.raises(mm.MissingSiteError, match=r"language\.blocks\.9"):
        attribute_neurons(model, case.inputs, {"token": metric}, {"a": last()}, layers=[9])


# ---- what a neuron writes ------------------------------------------------------------------------


def test_the_planted_neuron_raises_its_token_and_the_change_is_that_of_the_model_read_by_hand(
    planted: tiny.Case,
) -> None:
    hf, model = planted.model, mm.HookedModel(planted.model)
    found = probability_change(model, planted.inputs, [TOKEN, TOKEN])
    assert found.top(1) == (PLANTED,)
    sites = ["language.blocks.1.hook_resid_mid", "language.blocks.1.mlp.hook_post"]
    run = model.run(planted.inputs, read=sites)
    with torch.no_grad():
        for neuron in (0, 5, 11):
            state, active = run[sites[0]][0, -1], run[sites[1]][0, -1, neuron]
            added = state + active * hf.model.layers[1].mlp.down_proj.weight[:, neuron]
            before, after = (hf.lm_head(hf.model.norm(x)).log_softmax(-1)[TOKEN] for x in (state, added))
            torch.testing.assert_close(found.increase[0, 1, neuron], after - before, rtol=1e-3, atol=1e-5)
    tokens = project_neurons(model, [PLANTED, (0, 3)], k=3)
    assert int(tokens.tokens[0, 0]) == TOKEN
    assert int(project_neurons(model, [PLANTED], k=1, lowered=True).tokens[0, 0]) != TOKEN
    written = hf.model.layers[0].mlp.down_proj.weight[:, 3] * hf.model.norm.weight @ hf.lm_head.weight.T
    assert tokens.tokens[1].tolist() == written.topk(3).indices.tolist()
    expected = ((written - written.mean()) / written.std()).topk(3).values.detach()
    torch.testing.assert_close(tokens.values[1], expected)
    with pytest.raises(mm.InputError, match=r"Layer 1 of language has the neurons 0 to \d+, not 999"):
        project_neurons(model, [(1, 999)])
    with pytest.raises(mm.InputError, match="one for each of 2 rows"):
        probability_change(model, planted.inputs, [3, 999])


# ---- what a neuron is active for -----------------------------------------------------------------


def activity(rate: Tensor) -> NeuronActivity:
    zeros = torch.zeros_like(rate)
    return NeuronActivity(
        rate, rate, zeros, zeros, (10,) * len(rate), tuple("abcde"[: len(rate)]), (2,), "language"
    )


def test_a_neuron_of_one_domain_has_no_entropy_and_one_of_all_the_most() -> None:
    rate = torch.tensor([[[0.8, 0.5, 0.0, 0.05]], [[0.0, 0.5, 0.0, 0.0]]])
    found = activity(rate)
    two = torch.log(torch.tensor(2.0))
    torch.testing.assert_close(found.entropy(), torch.tensor([[0.0, float(two), float(two), 0.0]]))
    # The last is active too rarely to count.
    assert found.specific(0.25) == {"a": ((2, 0),), "b": ()}
    assert found.specific(0.5, active=0.01) == {"a": ((2, 0), (2, 3)), "b": ()}
    assert found.important(1, measures=["rate"])["a"] in (((2, 0),), ((2, 3),))
    with pytest.raises(mm.InputError, match="measure='x': there is rate, mean, size, largest"):
        found.shares("x")
    with pytest.raises(mm.InputError, match="No neuron is active in more than 90%"):
        found.specific(active=0.9)


def test_activity_is_summed_over_batches_as_over_one_and_by_position() -> None:
    case = tiny.CASES["llava"]()
    model = mm.HookedModel(case.model)
    image = torch.zeros(2, 10, dtype=torch.bool)
    image[:, 1:5] = True
    whole = neuron_activity(model, {"image": [(case.inputs, image)], "text": [(case.inputs, ~image)]})
    rows = [{k: v[[i]] for k, v in case.inputs.items()} for i in (0, 1)]
    split = neuron_activity(
        model,
        {"image": [(r, image[:1]) for r in rows], "text": ((r, ~image[:1]) for r in rows)},
    )
    site = "language.blocks.1.mlp.hook_post"
    value = model.run(case.inputs, read=[site])[site]
    torch.testing.assert_close(whole.rate[0, 1], (value[:, 1:5] > 0).float().mean((0, 1)))
    torch.testing.assert_close(whole.largest[0, 1], value[:, 1:5].amax((0, 1)))
    torch.testing.assert_close(whole.size[1, 1], value[~image].abs().mean(0))
    for name in ("rate", "mean", "size", "largest"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), rtol=1e-4, atol=1e-6)
    assert whole.n == split.n == (8, 12)
    with pytest.raises(mm.InputError, match="beside another domain; there is image"):
        neuron_activity(model, {"image": [(case.inputs, None)]})
    with pytest.raises(mm.InputError, match="the mask of its positions is"):
        neuron_activity(model, {"a": [(case.inputs, image[:, :3])], "b": [(case.inputs, None)]})


# ---- ablation ------------------------------------------------------------------------------------


def test_ablating_the_planted_neuron_costs_its_token_more_than_its_controls(
    planted: tiny.Case, tmp_path: Path
) -> None:
    model = mm.HookedModel(planted.model)
    found = ablate_neurons(model, planted.inputs, metric, [PLANTED], where=last(), n_controls=6)
    site = "language.blocks.1.mlp.hook_post"

    def silent(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, -1, PLANTED[1]] = 0
        return x

    run = model.run(planted.inputs, edit=[mm.Edit(site, silent)])
    torch.testing.assert_close(found.ablated, metric(run.output))
    assert found.effect().high < min(found.control_effect(kind).low for kind in ("neurons", "turned"))
    assert found.above_control("turned").high < 0
    assert all(
        layer == 1 and neuron != PLANTED[1] for draw in found.control_neurons for layer, neuron in draw
    )
    value = model.run(planted.inputs, read=[site])[site]
    weight = planted.model.model.layers[1].mlp.down_proj.weight.detach()
    norm = value[:, -1].square().mean(0).sqrt() * weight.norm(dim=0)
    assert found.norm == pytest.approx(float(norm[PLANTED[1]]), rel=1e-5)
    torch.testing.assert_close(
        found.control_norm, torch.stack([norm[draw[0][1]] for draw in found.control_neurons])
    )
    again = type(found).load(found.save(tmp_path / "ablation.safetensors"))
    assert again.effect().mean == found.effect().mean


def test_controls_are_as_many_in_each_layer_near_in_norm_and_the_turned_write_as_much() -> None:
    case = tiny.CASES["llama_lm"]()
    model = mm.HookedModel(case.model)
    neurons = [(0, 1), (0, 7), (1, 3)]
    found = ablate_neurons(model, case.inputs, metric, neurons, to="mean", n_controls=4)
    sites = {i: f"language.blocks.{i}.mlp.hook_post" for i in (0, 1)}
    norms = {}
    for layer, site in sites.items():
        value = model.run(case.inputs, read=[site])[site].flatten(0, 1)
        weight = case.model.model.layers[layer].mlp.down_proj.weight.detach()
        norms[layer] = value.square().mean(0).sqrt() * weight.norm(dim=0)
    for draw in found.control_neurons:
        assert sorted(layer for layer, _ in draw) == [0, 0, 1]
        assert len({*draw, *neurons}) == 6
        ((only,),) = ([n for layer, n in draw if layer == 1],)
        order = (norms[1] - norms[1][3]).abs().argsort().tolist()
        assert order.index(only) <= 8
    # One layer: what reaches the stream of the ablation and of the turned control is as long.
    from methods_multimodal.neurons import ablation

    weight = case.model.model.layers[0].mlp.down_proj.weight.detach().T
    change = ablation._set(torch.zeros(len(weight)), [1, 7], None, "zero")
    turned = ablation._turned(change, weight, [1, 7], torch.Generator().manual_seed(0))
    value = torch.randn(2, 4, len(weight))
    lengths = [((of(value) - value) @ weight).norm(dim=-1) for of in (change, turned)]
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-4, atol=1e-6)
    assert not (turned(value) - value)[..., [1, 7]].any()


def test_what_cannot_be_ablated_is_refused() -> None:
    case = tiny.CASES["llama_lm"]()
    model = mm.HookedModel(case.model)
    for neurons, message in (([], "There are no neurons"), ([(0, 1), (0, 1)], "named twice")):
        with pytest.raises(mm.InputError, match=message):
            ablate_neurons(model, case.inputs, metric, neurons)
    width = case.model.config.intermediate_size
    with pytest.raises(mm.InputError, match=r"there are no \d+ others to"):
        ablate_neurons(model, case.inputs, metric, [(0, i) for i in range(width - 1)])
    alone = ablate_neurons(model, case.inputs, metric, [(0, 1)], n_controls=0)
    with pytest.raises(mm.InputError, match="no control 'neurons'"):
        alone.control_effect()
