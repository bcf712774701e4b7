"""Calls of the methods that take more than one step to make numbers of."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from methods_multimodal import (
    attribution,
    circuits,
    diffusion,
    dissection,
    lenses,
    patching,
    probing,
    relevance,
    report,
)
from methods_multimodal import cross_attention as ca
from methods_multimodal import data_attribution as da
from methods_multimodal import neurons as single_neurons
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


def features_read(model: Any, given: Given) -> Any:
    """`read_features`, place by place."""
    roles = ("mean",) if model.kind == "diffusion" else ("mean", "last")
    rows = probing.read_features(model, [given.inputs], sites=first_stream(model, given), roles=roles)
    return {place.column: rows.at(place) for place in rows.places}


def probed_layers(model: Any, given: Given) -> Any:
    """`probe`, of which row it is: rows come again, so that all parts of the split have both."""
    batches = [given.inputs] * 5
    rows = probing.read_features(model, batches[:1], sites=first_stream(model, given)).n_rows
    labels = {"row": list(range(rows)) * 5} if rows > 1 else {"batch": [0, 1, 0, 1, 0]}
    train, validation, test = torch.arange(5 * rows).split([3 * rows, rows, rows])
    return probing.probe(
        model,
        batches,
        labels,
        sites=first_stream(model, given),
        split=probing.Split(train, validation, test),
        strengths=(0.01, 1.0),
    )


def shared_out(model: Any, given: Given) -> Any:
    """`modality_shares` of the first row, by the number that an edit moves."""
    return probing.modality_shares(model, [given.first], metric=given.metric, n_orders=2, side=2, batch=8)


def asked_in_words(model: Any, given: Given) -> Any:
    """`prompt_probe` of two pictures and two answers."""
    prompts = "a {}" if model.kind == "contrastive" else given.question
    n = 1 if model.kind == "contrastive" else len(given.first["input_ids"])
    return probing.prompt_probe(model, given.pictures[:n], ["w3"] * n, prompts, values=["w3", "w4"])


def first_stream(model: Any, given: Given) -> list[str]:
    """The output of the first block that a user would look at."""
    tower = "denoiser" if model.kind == "diffusion" else given.tower
    return [f"{tower}.blocks.0.hook_resid_post"]


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


def trained_lens(model: Any, given: Given) -> Any:
    """A tuned lens of one step."""
    sets = [[given.inputs], [given.inputs], [given.inputs]]
    return lenses.train_tuned_lens(model, *sets, position=-1, n_steps=1, rates=(1e-3,))


def tuned(model: Any, given: Given) -> Any:
    """The tuned lens of a lens trained before."""
    return lenses.tuned_lens(model, given.inputs, given.ready)


def trained_heads(model: Any, given: Given) -> Any:
    """An attention lens of one step."""
    sets = [[given.inputs], [given.inputs], [given.inputs]]
    return lenses.train_attention_lens(model, 0, *sets, n_steps=1, rates=(1e-3,))


def read_heads(model: Any, given: Given) -> Any:
    """The attention lens of a lens trained before."""
    return lenses.attention_lens(model, given.inputs, given.ready)


def indexed_words(model: Any, given: Given) -> Any:
    """The words of the inputs' own texts."""
    return lenses.contextual_index(model, [given.inputs], per_word=2)


def latent_words(model: Any, given: Given) -> Any:
    """What the last positions are nearest to."""
    return lenses.latent_lens(model, given.inputs, given.ready, position=-1)


def drawn_layers(model: Any, given: Given) -> Any:
    """What each layer of the text encoder draws."""
    return lenses.diffusion_lens(model, [given.prompt], [0], options=given.options())


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


def roles_of(model: Any, given: Given) -> patching.TokenRoles:
    """The roles of the language tower's positions."""
    return patching.token_roles(model, given.inputs)


def last_of(model: Any, given: Given) -> Any:
    """The last attended position of each row, as a mask."""
    ids = given.inputs[model.check_tower("language").input_name]
    last = torch.zeros(ids.shape, dtype=torch.bool)
    return last.scatter(1, model.row_positions(given.inputs)[:, None], True)


def registers(model: Any, given: Given) -> Any:
    """`register_positions`, and all others."""
    found = patching.register_positions(model, given.inputs, above=0.5)
    return found, ~found


def corrupted_run(model: Any, given: Given, how: Any, **settings: Any) -> Any:
    """The metric as it is, and of a corrupted state at all positions."""
    site = "language.blocks.0.hook_resid_pre"
    everywhere = torch.ones_like(last_of(model, given))
    corruption = how(model, given.inputs, everywhere, site=site, **settings)
    runs = [model.run(given.inputs), model.run(corruption.inputs, edit=corruption.edits)]
    return [given.metric(run.output) for run in runs]


def pictures_exchanged(model: Any, given: Given) -> Any:
    """`other_pictures`."""
    return patching.other_pictures(model, given.inputs, given.corrupted).inputs


def words_exchanged(model: Any, given: Given) -> Any:
    """`other_words`, of the last word."""
    name = model.check_tower("language").input_name
    ids = given.inputs[name].clone()
    ids[:, -1] = torch.where(ids[:, -1] == 7, 8, 7)
    return patching.other_words(model, given.inputs, given.inputs | {name: ids}).positions


def answered(model: Any, given: Given) -> Any:
    """`answer_logits`."""
    return patching.answer_logits(model, given.inputs, [5, 5], [6, 7])(model.run(given.inputs).output)


def answered_likely(model: Any, given: Given) -> Any:
    """`answer_log_prob`."""
    return patching.answer_log_prob(model, given.inputs, [5, 6])(model.run(given.inputs).output)


def knocked_out(model: Any, given: Given) -> Any:
    """`knock_out`, of all that the last position reads in the first layer."""
    last = last_of(model, given)
    cut = patching.Cut("all", last, ~last, layers=(0,))
    return patching.knock_out(model, given.inputs, given.metric, [cut])


def traced_states(model: Any, given: Given) -> Any:
    """`trace`, of noise in the last position's first state."""
    last = last_of(model, given)
    noise = patching.noised(model, given.inputs, last, site="language.blocks.0.hook_resid_pre")
    return patching.trace(
        model, given.inputs, noise, given.metric, {"last": last}, layers=[0], part="hook_mlp_out"
    )


def flows(model: Any, given: Given) -> Any:
    """`information_flow`, of the question to the last position."""
    return patching.information_flow(model, given.inputs, given.metric, flows=[("question", "last")])


def attributed_neurons(model: Any, given: Given) -> Any:
    """`attribute_neurons`."""
    roles = {"last": last_of(model, given)}
    settings: Any = {"layers": [0], "steps": 2}
    return single_neurons.attribute_neurons(model, given.inputs, {"m": given.metric}, roles, **settings)


def active_neurons(model: Any, given: Given) -> Any:
    """`neuron_activity`."""
    last = last_of(model, given)
    domains = {"last": [(given.inputs, last)], "all": [(given.inputs, None)]}
    return single_neurons.neuron_activity(model, domains, layers=[0])


def ablated_neurons(model: Any, given: Given) -> Any:
    """`ablate_neurons`."""
    return single_neurons.ablate_neurons(model, given.inputs, given.metric, [(0, 1), (0, 2)], n_controls=1)


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
    # Two images exchanged are the same two on average: the second row keeps its own. Rows of tiles may have
    # different numbers of them: the first row's are mirrored.
    first = {
        k: v.flip(-1)
        for k, v in given.inputs.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    first = first if given.is_tiled else given.corrupted
    corrupted = {
        k: torch.cat([first[k][:1], v[1:]]) if isinstance(v, torch.Tensor) and k in first else v
        for k, v in given.inputs.items()
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


def edges_for_mib(model: Any, given: Given) -> Any:
    """`write_mib`, of the first tower that has blocks: the scores that its readers find."""
    scores = scored_edges(model, given)
    tower = next(name for name in ("language", "text", "vision") if name in model.towers)
    with tempfile.TemporaryDirectory() as folder:
        return list(
            circuits.read_mib(
                circuits.write_mib(model, scores, Path(folder) / "e.json", tower=tower)
            ).values()
        )


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
