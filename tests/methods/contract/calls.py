"""Calls of the methods that take more than one step to make numbers of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from methods_multimodal import attribution, circuits, diffusion, dissection, patching, relevance, report
from methods_multimodal import cross_attention as ca
from methods_multimodal import data_attribution as da
from methods_multimodal import text_explanations as te
from methods_multimodal.data_attribution.task import batch_of
from tests.methods.contract.given import Given

WORDS = ("a cat", "a dog", "an ox")


def vocabulary() -> te.Vocabulary:
    """A small one."""
    return te.vocabulary(list(WORDS))


def named_heads(model: Any, given: Given) -> Any:
    """Each head by a text of a small vocabulary."""
    return te.name_heads(model, given.pictures, vocabulary(), n_texts=2, rank=3, batch_size=2, n_null=2)


def effects_of_heads(model: Any, given: Given) -> Any:
    """What each head does along the texts of a small vocabulary."""
    return te.head_effects(model, given.pictures, vocabulary(), batch_size=2)


def shuffled_twin(model: Any, given: Given) -> Any:
    """The weights of a copy whose first tower's are shuffled."""
    twin = dissection.with_shuffled_weights(model, next(iter(model.towers)))
    return {name: weight.detach() for name, weight in twin.wrapped.named_parameters()}


def pair_losses(model: Any, given: Given) -> Any:
    """The contrastive loss and the similarity of each pair."""
    task = da.contrastive_task(model, given.inputs, measure=["loss", "similarity"])
    return task.per_example(batch_of(given.inputs, 0, 2))


def examples(model: Any, given: Given) -> Any:
    """Two pictures, encoded, with a prompt each if the pipeline reads any."""
    prompts = list(given.texts) if hasattr(model.wrapped, "encode_prompt") else None
    more = {name: torch.tensor(given.inputs[name]) for name in ("class_labels",) if name in given.inputs}
    return da.diffusion_examples(model, given.drawn_size, prompts) | more


def denoising_losses(model: Any, given: Given) -> Any:
    """The denoiser's loss of each picture."""
    task = da.diffusion_task(model, timesteps=1)
    return task.per_example(batch_of(examples(model, given), 0, 2))


def stored(model: Any, given: Given) -> Any:
    """The gradients of two pictures, in a store."""
    task = da.diffusion_task(model, timesteps=1)
    projection = da.Projection(dim=8)
    return da.featurise(
        task, examples(model, given), given.folder / "s", projection=projection, progress=False
    )


def journey(model: Any, given: Given) -> Any:
    """Scores of two pictures at the steps of one drawing."""
    inputs = {"n_steps": 2, "n_own": 1, **given.options()}
    return da.journey_trak(model, given.ready, [given.prompt], inputs=inputs)


def read_words(model: Any, given: Given) -> Any:
    """The maps that a reader makes of a run."""
    reader = ca.word_reader(model, given.prompt, n_steps=given.family.n_steps, options=given.sizes())
    return reader.maps(model.run(given.drawing, read=reader.reads()))


def neurons(model: Any, given: Given) -> Any:
    """What a prompt's neurons are, beside two others'."""
    statistics = ca.neuron_statistics(model, given.texts, options=given.options())
    seen: Any = {"seeds": (0, 1), "thetas": (1.0,)}
    return ca.find_neurons(model, given.prompt, statistics, threshold=0.1, options=given.options(), **seen)


def read_steps(model: Any, given: Given) -> Any:
    """The predictions and pictures of a run of two steps."""
    reader = diffusion.step_reader(model, 2)
    run = model.run(reader.inputs(given.drawing), read=reader.reads())
    predictions = reader.step_predictions(model, run)
    return predictions, reader.pictures(model, run) if reader.sampling.pictures else None


def unit_maps(model: Any, given: Given) -> Any:
    """The maps of one residual stream's units, where the model has it."""
    tower = "denoiser" if model.kind == "diffusion" else given.tower
    units = dissection.Units(model, f"{tower}.blocks.0.hook_resid_post")
    return units.maps(given.first if tower != "denoiser" else given.inputs)


def probed(model: Any, given: Given) -> Any:
    """What a store holds of pictures that one model has looked at, as the units' and as the judge."""
    units = dissection.Units(model, "vision.blocks.0.hook_resid_post")
    batches = [({k: v[:1] for k, v in given.pixels.items()}, given.pictures[:1])]
    store = dissection.collect([units], batches, model, given.folder / "s", progress=False)
    return store.rows()


def retrieved(model: Any, given: Given) -> Any:
    """The pictures that a text finds."""
    embeddings = da.image_features(model, given.drawn_size)
    return dissection.retrieving(model, given.pictures, embeddings, n=1)(given.texts[0])


def split_in_batches(model: Any, given: Given) -> Any:
    """`decompositions`."""
    return list(te.decompositions(model, images=given.pictures, tokens="sum"))


def patched_positions(model: Any, given: Given) -> Any:
    """`patch_positions`."""
    return patching.patch_positions(model, *given.patched, units=[(0,), (1, 2)], **given.first_layer)


def patched_units(model: Any, given: Given) -> Any:
    """`patch_units`."""
    return patching.patch_units(model, *given.patched, given.site, "pos", units=[(0,)], layers=[0])


def first_heads(model: Any, given: Given) -> Any:
    """`head_maps`."""
    return relevance.head_maps(
        model, given.first, given.layout(given.tower), tower=given.tower, layers=[0], query=-1
    )


def asked(model: Any, given: Given) -> Any:
    """`asking`."""
    return dissection.asking(model, given.question, max_new_tokens=2)(given.pictures[:1])


def drawn(model: Any, given: Given) -> Any:
    """`drawing`."""
    return dissection.drawing(model, n=1, **given.options())(given.prompt)


def followed(model: Any, given: Given) -> Any:
    """`trajectory`."""
    return da.trajectory(model, [given.prompt], n_own=1, n_steps=2, **given.options())


def changed_words(model: Any, given: Given) -> Any:
    """`word_changes`."""
    return ca.word_changes(model, given.prompt, batch=3, options=given.options())


def patched_words(model: Any, given: Given) -> Any:
    """`patch_words`."""
    return ca.patch_words(model, given.cases, given.redness, batch=4, options=given.options())


def blocked_words(model: Any, given: Given) -> Any:
    """`knock_out_words`."""
    return ca.knock_out_words(model, given.cases, given.redness, batch=4, options=given.options())


def silenced_heads(model: Any, given: Given) -> Any:
    """`ablate_heads`."""
    return ca.ablate_heads(model, given.cases, given.redness, [ca.Part()], batch=4, options=given.options())


def attributed(model: Any, given: Given) -> Any:
    """`attribute_patching`, part by part."""
    record = ca.attribute_patching(model, given.cases, given.redness, options=given.options())
    return record.of(ca.grid(model))


def restored_layers(model: Any, given: Given) -> Any:
    """`restore_layers`."""
    return ca.restore_layers(model, given.cases, given.redness, batch=4, options=given.options())


def restored_text(model: Any, given: Given) -> Any:
    """`restore_text`."""
    return ca.restore_text(model, given.cases, given.redness, batch=4, options=given.options())


def bound(model: Any, given: Given) -> Any:
    """`bind_attributes`."""
    return ca.bind_attributes(
        model, given.prompt, [("a", "cat")], n_steps=given.family.n_steps, options=given.sizes()
    )


def edited(model: Any, given: Given) -> Any:
    """`edit_words`."""
    return ca.edit_words(
        model,
        given.prompt,
        [ca.WordEdit("a dog", "replace")],
        n_steps=given.family.n_steps,
        options=given.sizes(),
    )


def usual_neurons(model: Any, given: Given) -> Any:
    """`neuron_statistics`."""
    return ca.neuron_statistics(model, given.texts, options=given.options())


def memorised(model: Any, given: Given) -> Any:
    """`memorisation_score`."""
    return [ca.memorisation_score(model, t, seeds=(0, 1, 2), options=given.options()) for t in given.texts]


def diffusion_page(model: Any, given: Given) -> Any:
    """`diffusion_report`."""
    return report.diffusion_report(model, given.prompt, steps=2, **given.sizes())


def words_page(model: Any, given: Given) -> Any:
    """`words_report`."""
    return report.words_report(model, given.prompt, steps=given.family.n_steps, **given.sizes())


def trace_page(model: Any, given: Given) -> Any:
    """`trace_report`."""
    return report.trace_report(
        model,
        given.prompt,
        "cat",
        "dog",
        given.redness,
        seeds=(0, 1),
        steps=given.family.n_steps,
        n_groups=1,
        **given.sizes(),
    )


def pictures_made(model: Any, given: Given) -> Any:
    """`pictures_of`, of what a pipeline could have given."""
    return diffusion.pictures_of(model, SimpleNamespace(images=given.drawn_size))


def along_path(model: Any, given: Given) -> Any:
    """`path_gradients`, from an MLP's output to none."""
    site = given.site.format(0)
    value = model.run(given.inputs, read=[site])[site]
    path = {site: attribution.Ends(value, torch.zeros_like(value))}
    shares = attribution.midpoints(2)
    return attribution.path_gradients(model, given.inputs, [site], path, given.metric, shares=shares).grads


def pairs(given: Given) -> list[circuits.Pairs]:
    """One batch; of texts a token differs, and no padding."""
    ids = given.inputs.get("input_ids")
    if not given.pixels and isinstance(ids, torch.Tensor):
        other = ids.clone()
        other[:, 1] = ids.flip(0)[:, 1]
        return [circuits.Pairs(given.inputs, {**given.inputs, "input_ids": other}, given.metric)]
    # Two images exchanged are the same two on average: the second row keeps its own.
    corrupted = {
        k: torch.cat([v[:1], given.inputs[k][1:]]) if isinstance(v, torch.Tensor) else v
        for k, v in given.corrupted.items()
    }
    return [circuits.Pairs(given.inputs, corrupted, given.metric)]


def some_nodes(model: Any) -> Any:
    """The first tower's first nodes."""
    return circuits.circuit_nodes(model)[:4]


def scored_nodes(model: Any, given: Given) -> Any:
    """`score_nodes`, by patching: that needs no gradient."""
    return circuits.score_nodes(model, pairs(given), some_nodes(model), method="exact").scores


def scored_edges(model: Any, given: Given) -> Any:
    """`score_edges`."""
    return circuits.score_edges(model, pairs(given), points=2)


def curve(model: Any, given: Given) -> Any:
    """`faithfulness_curve`."""
    names = [node.name for node in circuits.circuit_nodes(model)]
    return circuits.faithfulness_curve(model, pairs(given), names, sizes=[1])


def checked_circuit(model: Any, given: Given) -> Any:
    """`check_circuit`."""
    names = [node.name for node in some_nodes(model)]
    return circuits.check_circuit(model, pairs(given), names, n_random=1)


def effects_of_parts(model: Any, given: Given) -> Any:
    """`effects_of_parts`, patched and estimated."""
    few = {"batch": 4, "options": given.options(), "points": 2}
    parts = ca.grid(model)
    exact = ca.effects_of_parts(model, given.cases, given.redness, parts, **few)
    fast = ca.effects_of_parts(model, given.cases, given.redness, parts, exact_up_to=0, **few)
    return exact.effects, fast.effects, fast.whole
