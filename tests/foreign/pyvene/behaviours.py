"""What pyvene's IntervenableModel does, a function each: it takes the class, builds a model of it and returns
what it saw. pyvene ships no tests; these are the promises of its README and docstrings, in our words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pyvene as pv
import torch
from foreign.pyvene.models import BASE, OTHER, SOURCE, gpt2, gru, llama, mlp, vectors
from torch import Tensor

Behaviour = TypeVar("Behaviour", bound=Callable[..., Any])
BEHAVIOURS: dict[str, Callable[[Any], Any]] = {}
# Two rows, one position each.
AT = {"sources->base": ([[[2], [3]]], [[[1], [4]]])}
PLACES = (
    "block_input", "block_output", "mlp_input", "mlp_activation", "mlp_output", "attention_input",
    "attention_value_output", "attention_output", "query_output", "key_output", "value_output",
)  # fmt: skip
HEADS = ("head_attention_value_output", "head_query_output", "head_key_output", "head_value_output")


def restated(behaviour: Behaviour) -> Behaviour:
    BEHAVIOURS[behaviour.__name__] = behaviour
    return behaviour


def made(
    kind: Any, model: Any, *representations: dict[str, Any], mode: str = "parallel", **options: Any
) -> Any:
    """An intervenable model; interventions begin at the same random weights whichever class it is."""
    torch.manual_seed(1)
    config = pv.IntervenableConfig(
        [{"layer": 1, "component": "block_output", "unit": "pos"} | one for one in representations], mode=mode
    )
    return kind(config, model, **options)


def vanilla(**more: Any) -> dict[str, Any]:
    return {"intervention_type": pv.VanillaIntervention} | more


def logits(outputs: Any) -> Any:
    # pyvene's own models return a tuple, their logits first.
    return tuple(None if one is None else one[0] if isinstance(one, tuple) else one.logits for one in outputs)


# ---- where and at which units --------------------------------------------------------------------


def at_component(component: str, kind: Any) -> Any:
    return logits(made(kind, gpt2(), vanilla(component=component))(BASE, [SOURCE], AT))


def at_heads(component: str, kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(component=component, unit="h"))
    return logits(model(BASE, [SOURCE], {"sources->base": ([[[1], [0]]], [[[2], [3]]])}))


def at_position_of_heads(component: str, kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(component=component, unit="h.pos"))
    where = [[[[1], [1]], [[2], [3]]]]
    return logits(model(BASE, [SOURCE], {"sources->base": (where, where)}))


@restated
def at_a_path(kind: Any) -> Any:
    one = {"component": "transformer.h[0].mlp.output", "intervention": pv.VanillaIntervention(embed_dim=24)}
    return logits(made(kind, gpt2(), one)(BASE, [SOURCE], AT))


@restated
def at_several_positions(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(max_number_of_units=3))
    where = [[[0, 1, 3], [1, 2, 4]]]
    return logits(model(BASE, [SOURCE], {"sources->base": (where, where)}))


@restated
def at_the_whole_output(kind: Any) -> Any:
    return logits(made(kind, gpt2(), vanilla())(BASE, [SOURCE]))


@restated
def at_one_number_for_all_rows(kind: Any) -> Any:
    return logits(made(kind, gpt2(), vanilla())(BASE, [SOURCE], {"sources->base": 3}))


@restated
def at_a_pair_of_numbers(kind: Any) -> Any:
    return logits(made(kind, gpt2(), vanilla())(BASE, [SOURCE], {"sources->base": (3, 1)}))


@restated
def at_a_list_of_numbers(kind: Any) -> Any:
    return logits(
        made(kind, gpt2(), vanilla(max_number_of_units=2))(BASE, [SOURCE], {"sources->base": [1, 2, 3]})
    )


@restated
def at_locations_of_the_base_only(kind: Any) -> Any:
    model = made(kind, gpt2(), {"intervention_type": pv.ZeroIntervention})
    return logits(model(BASE, None, {"base": 2})), logits(
        model(BASE, unit_locations={"sources->base": (None, 3)})
    )


# ---- several interventions, sources and groups ---------------------------------------------------


@restated
def two_interventions_of_two_sources(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(layer=0), vanilla(layer=2))
    where = [[[1], [2]], [[3], [4]]]
    return logits(model(BASE, [SOURCE, OTHER], {"sources->base": (where, where)}))


@restated
def one_source_of_two_interventions(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(layer=0), vanilla(layer=2))
    return logits(model(BASE, [SOURCE, None], {"sources->base": ([[[1]] * 2, None], [[[1]] * 2, None])}))


@restated
def interventions_in_turn(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(layer=0), vanilla(layer=2), mode="serial")
    where = {"source_0->source_1": 1, "source_1->base": 3}
    return logits(model(BASE, [SOURCE, OTHER], where))


@restated
def a_group_shares_a_source(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(layer=0, group_key=0), vanilla(layer=2, group_key=0))
    where = [[[1], [2]], [[3], [4]]]
    return logits(model(BASE, [SOURCE], {"sources->base": (where, where)}))


@restated
def linked_interventions_share_weights(kind: Any) -> Any:
    one = {
        "intervention_type": pv.LowRankRotatedSpaceIntervention, "low_rank_dimension": 4,
        "intervention_link_key": 0,
    }  # fmt: skip
    model = made(kind, gpt2(), one | {"layer": 0}, one | {"layer": 2})
    return logits(model(BASE, [SOURCE, SOURCE], {"sources->base": 2})), model.count_parameters()


@restated
def interventions_at_one_place_follow_each_other(kind: Any) -> Any:
    add = {"intervention_type": pv.AdditionIntervention, "source_representation": torch.ones(24)}
    model = made(kind, gpt2(), add, {"intervention_type": pv.ZeroIntervention}, add)
    return logits(model(BASE, unit_locations={"base": 2}))


@restated
def interventions_in_an_order(kind: Any) -> Any:
    order = lambda model, representations: sorted(representations, reverse=True)  # noqa: E731
    model = made(kind, gpt2(), vanilla(layer=0), vanilla(layer=2), intervenables_sort_fn=order)
    return model.sorted_keys, logits(model(BASE, [SOURCE, OTHER], {"sources->base": 2}))


# ---- kinds of interventions ----------------------------------------------------------------------


@restated
def a_constant_source(kind: Any) -> Any:
    one = vanilla(source_representation=torch.linspace(-1, 1, 24))
    return logits(made(kind, gpt2(), one)(BASE, unit_locations={"base": 2}))


@restated
def an_addition(kind: Any) -> Any:
    one = {"intervention_type": pv.AdditionIntervention, "source_representation": torch.linspace(-1, 1, 24)}
    return logits(made(kind, gpt2(), one)(BASE, unit_locations={"base": 2}))


@restated
def a_subtraction(kind: Any) -> Any:
    one = {"intervention_type": pv.SubtractionIntervention}
    return logits(made(kind, gpt2(), one)(BASE, [SOURCE], AT))


@restated
def a_skip(kind: Any) -> Any:
    one = {"intervention_type": pv.SkipIntervention}
    return logits(made(kind, gpt2(), one)(BASE, [SOURCE], {"sources->base": 2}))


@restated
def a_function(kind: Any) -> Any:
    one = {"intervention": lambda base, source: base + 2 * source}
    return logits(made(kind, gpt2(), one)(BASE, [SOURCE], {"sources->base": 2}))


@restated
def noise(kind: Any) -> Any:
    model = made(kind, gpt2(), {"intervention": pv.NoiseIntervention(embed_dim=24)})
    return logits(model(BASE, unit_locations={"base": [0, 1, 2, 4]}))


@restated
def a_class_of_the_users(kind: Any) -> Any:
    class Half(pv.ConstantSourceIntervention, pv.LocalistRepresentationIntervention):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)

        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
            return base / 2

    return logits(made(kind, gpt2(), {"intervention_type": Half})(BASE, unit_locations={"base": 2}))


@restated
def collected_values(kind: Any) -> Any:
    model = made(kind, gpt2(), {"intervention_type": pv.CollectIntervention})
    (_, collected), after = model(BASE, unit_locations={"base": 2})
    return collected, after


@restated
def collected_next_to_an_edit(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(layer=0), {"layer": 2, "intervention_type": pv.CollectIntervention})
    where = {"sources->base": ([[[1]] * 2, None], [[[1]] * 2, [[3]] * 2])}
    (_, collected), after = model(BASE, [SOURCE, None], where)
    return collected, after.logits


def in_a_subspace(of: Any, kind: Any) -> Any:
    one = {"intervention_type": of, "subspace_partition": [[0, 12], [12, 24]]}
    model = made(kind, gpt2(), one | ({"low_rank_dimension": 24} if of is LOW_RANK else {}))
    return [logits(model(BASE, [SOURCE], AT, subspaces=which)) for which in (0, [[[1], [0]]], [0, 1])]


LOW_RANK = pv.LowRankRotatedSpaceIntervention
ROTATED = {
    "rotated": (pv.RotatedSpaceIntervention, {}),
    "low_rank": (LOW_RANK, {"low_rank_dimension": 4}),
    "boundless": (pv.BoundlessRotatedSpaceIntervention, {}),
    "sigmoid_mask": (pv.SigmoidMaskIntervention, {}),
    "sigmoid_mask_rotated": (pv.SigmoidMaskRotatedSpaceIntervention, {}),
}


def learned(name: str, kind: Any) -> Any:
    """Three steps of gradient descent, and what comes out then."""
    of, options = ROTATED[name]
    model = made(kind, gpt2(), {"intervention_type": of} | options)
    optimizer = torch.optim.SGD(model.get_trainable_parameters(), lr=0.5)
    losses = []
    for step in range(3):
        model.set_temperature(torch.tensor(10.0 - step))
        if name == "sigmoid_mask_rotated":  # Theirs passes it over; ours sets every one that has one.
            model.interventions[model.sorted_keys[0]].set_temperature(torch.tensor(10.0 - step))
        _, after = model(BASE, [SOURCE], AT)
        loss = after.logits[:, -1].logsumexp(-1).mean() - after.logits[:, -1, 7].mean()
        loss.backward()
        optimizer.step()
        model.set_zero_grad()
        losses.append(loss.detach())
    return losses, logits(model(BASE, [SOURCE], AT)), [name for name, _ in model.named_parameters()]


# ---- calls ---------------------------------------------------------------------------------------


@restated
def only_the_edited_output_unless_asked(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla())
    return logits(model(BASE, [SOURCE], AT)), logits(model(BASE, [SOURCE], AT, output_original_output=True))


@restated
def the_output_as_a_record(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(), {"intervention_type": pv.CollectIntervention})
    where = {"sources->base": ([[[1]] * 2, None], [[[1]] * 2, [[3]] * 2])}
    out = model(BASE, [SOURCE, None], where, output_original_output=True, return_dict=True)
    return out.original_outputs, out.intervened_outputs.logits, out.collected_activations


@restated
def a_loss_of_labels(kind: Any) -> Any:
    _, after = made(kind, gpt2(), vanilla())(BASE, [SOURCE], AT, labels=BASE["input_ids"])
    return after.loss


@restated
def values_are_given_as_sources(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla())
    given = {model.sorted_keys[0]: torch.linspace(-1, 1, 48).reshape(2, 1, 24)}
    return logits(model(BASE, None, AT, source_representations=given))


@restated
def a_source_as_a_tensor(kind: Any) -> Any:
    model = made(kind, gpt2(), {"intervention_type": pv.AdditionIntervention})
    vector = torch.linspace(-1, 1, 24)
    return logits(model(BASE, unit_locations={"base": 2}, source_representations=vector))


@restated
def adaptors_are_given_the_modules_input(kind: Any) -> Any:
    class Adaptor(pv.ConstantSourceIntervention, pv.LocalistRepresentationIntervention):
        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **given: Any) -> Tensor:
            return base + 2 * given["args"]

    model = made(kind, gpt2(), {"intervention_type": Adaptor}, as_adaptor=True)
    return logits(model(BASE, unit_locations={"base": 2}))


@restated
def calls_do_not_change_the_next_one(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla())
    first = logits(model(BASE, [SOURCE], AT))
    model(OTHER, [SOURCE], AT)
    return first, logits(model(BASE, [SOURCE], AT)), model.model(**BASE).logits


@restated
def a_static_location_fast(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla(), use_fast=True)
    where = [[[2], [2]]]
    return logits(model(BASE, [SOURCE], {"sources->base": (where, where)}))


def generation(on_prompt: bool, kind: Any) -> Any:
    one = {"intervention_type": pv.AdditionIntervention, "source_representation": 3 * torch.ones(24)}
    model = made(kind, gpt2(), one)
    given = {"max_new_tokens": 4, "do_sample": False, "intervene_on_prompt": on_prompt}
    where = {"base": 2} if on_prompt else {"base": 0}
    return model.generate(BASE, unit_locations=where, output_original_output=True, **given)


@restated
def generation_without_locations(kind: Any) -> Any:
    one = {"intervention_type": pv.AdditionIntervention, "source_representation": 3 * torch.ones(24)}
    model = made(kind, gpt2(), one)
    return model.generate(
        BASE, unit_locations=None, intervene_on_prompt=True, max_new_tokens=4, do_sample=False
    )


@restated
def generation_from_a_source(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla())
    given = {"max_new_tokens": 4, "do_sample": False, "intervene_on_prompt": True}
    return model.generate(BASE, [SOURCE], {"sources->base": (3, 4)}, **given)


@restated
def what_a_wrong_number_of_sources_raises(kind: Any) -> Any:
    try:
        made(kind, gpt2(), vanilla(layer=0), vanilla(layer=2))(BASE, [SOURCE] * 3, {"sources->base": 1})
    except ValueError as error:
        return str(error)


# ---- the model and its weights -------------------------------------------------------------------


@restated
def the_models_weights_are_frozen(kind: Any) -> Any:
    model = made(kind, gpt2(), {"intervention_type": LOW_RANK, "low_rank_dimension": 4})
    frozen = [p.requires_grad for p in model.model.parameters()]
    return frozen, len(model.get_trainable_parameters()), model.count_parameters(), model.model.training


@restated
def the_models_weights_may_train(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla())
    model.enable_model_gradients()
    model.eval()
    _, after = model(BASE, [SOURCE], AT)
    after.logits.sum().backward()
    grads = {name: p.grad for name, p in model.model.named_parameters()}
    named = [name for name, _ in model.named_parameters()]
    counted = model.count_parameters(include_model=True)
    model.disable_model_gradients()
    return grads, named, counted, [p.requires_grad for p in model.model.parameters()]


@restated
def modes_and_devices(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla())
    model.train()
    training = model.model.training
    model.eval()
    model.set_device("cpu")
    return training, model.model.training, model.get_device(), model.BACKEND


@restated
def gradients_are_cleared(kind: Any) -> Any:
    model = made(kind, gpt2(), {"intervention_type": LOW_RANK, "low_rank_dimension": 4})
    cleared = []
    for clear in (model.set_zero_grad, model.zero_grad):
        model(BASE, [SOURCE], AT)[1].logits.sum().backward()
        before = [p.grad is not None and bool(p.grad.any()) for p in model.get_trainable_parameters()]
        clear()
        cleared += [before, [p.grad is None or not p.grad.any() for p in model.get_trainable_parameters()]]
    model.disable_intervention_gradients()
    return cleared


@restated
def caches_are_empty_after_a_call(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla())
    model(BASE, [SOURCE], AT)
    return model.get_cached_activations(), model.get_cached_hot_activations()


@restated
def weights_are_saved_and_read(kind: Any) -> Any:
    """The files differ (ours are not pickled); what comes back does not."""
    one = {"intervention_type": LOW_RANK, "low_rank_dimension": 4}
    model = made(kind, gpt2(), one)
    before = logits(model(BASE, [SOURCE], AT))
    with TemporaryDirectory() as folder:
        model.save(folder)
        again = kind.load(folder, gpt2())
    return before, logits(again(BASE, [SOURCE], AT))


@restated
def a_metric_over_batches(kind: Any) -> Any:
    model = made(kind, gpt2(), vanilla())
    batch = {
        **BASE, "source_input_ids": SOURCE["input_ids"], "labels": torch.tensor([3, 4]),
        "source_0->base.0.pos": torch.tensor([[2], [3]]), "source_0->base.1.pos": torch.tensor([[1], [4]]),
    }  # fmt: skip
    metric = lambda after, labels: float(after[0][:, -1].gather(1, labels[0][:, None]).mean())  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.eval_alignment([batch, batch], metric, None)


# ---- other models --------------------------------------------------------------------------------


def of_llama(component: str, kind: Any) -> Any:
    return logits(made(kind, llama(), vanilla(component=component))(BASE, [SOURCE], AT))


@restated
def an_mlp(kind: Any) -> Any:
    model = made(kind, mlp(), vanilla(component="block_output", layer=0))
    where = {"sources->base": ([[[0]] * 4], [[[0]] * 4])}
    return logits(model(vectors(0, 4, 1, 8), [vectors(1, 4, 1, 8)], where))


@restated
def a_part_of_an_mlps_output(kind: Any) -> Any:
    one = vanilla(component="mlp_activation", layer=2, subspace_partition=[[0, 4], [4, 8]])
    model = made(kind, mlp(), one)
    where = {"sources->base": ([[[0]] * 4], [[[0]] * 4])}
    subspaces = [[[1], [0], [0], [1]]]
    return logits(model(vectors(0, 4, 1, 8), [vectors(1, 4, 1, 8)], where, subspaces=subspaces))


def of_gru(component: str, kind: Any) -> Any:
    model = made(kind, gru(), vanilla(component=component, layer=0, unit="t"))
    where = {"sources->base": ([[[1]]], [[[3]]])}  # One row: pyvene 0.1.8 writes no more.
    return logits(model(vectors(0, 1, 5, 8), [vectors(1, 1, 5, 8)], where))


@restated
def a_gru_at_several_times(kind: Any) -> Any:
    model = made(kind, gru(), vanilla(component="cell_output", layer=1, unit="t", max_number_of_units=2))
    where = {"sources->base": ([[[1, 2]]], [[[1, 3]]])}
    return logits(model(vectors(0, 1, 5, 8), [vectors(1, 1, 5, 8)], where))


def each(names: Iterable[Any], behaviour: Callable[..., Any], word: str) -> None:
    for name in names:
        BEHAVIOURS[f"{word}_{getattr(name, '__name__', name)}"] = partial(behaviour, name)


each(PLACES, at_component, "at")
each(HEADS, at_heads, "heads_at")
each(("head_attention_value_output", "head_value_output"), at_position_of_heads, "positions_of_heads_at")
each(
    (pv.VanillaIntervention, pv.RotatedSpaceIntervention, pv.LowRankRotatedSpaceIntervention),
    in_a_subspace,
    "subspaces",
)
each(ROTATED, learned, "learns")
each((True, False), generation, "generation_on_prompt")
each(("block_input", "block_output", "mlp_output", "attention_output", "query_output"), of_llama, "llama")
each(("cell_output", "x2h_output", "reset_h2h_output", "update_gate_output"), of_gru, "gru")
