"""Calls of the methods that take more than one step to make numbers of."""

from __future__ import annotations

from typing import Any

from methods_multimodal import cross_attention as ca
from methods_multimodal import data_attribution as da
from methods_multimodal import diffusion, dissection
from methods_multimodal.data_attribution.task import batch_of
from methods_multimodal.text_explanations import vocabulary
from tests.methods.contract.given import Given

WORDS = ("a cat", "a dog", "an ox")


def named_heads(model: Any, given: Given) -> Any:
    """Each head by a text of a small vocabulary."""
    from methods_multimodal.text_explanations import name_heads

    return name_heads(model, given.pictures, vocabulary(list(WORDS)), n_texts=2, rank=3, batch_size=2)


def pair_losses(model: Any, given: Given) -> Any:
    """The contrastive loss and the similarity of each pair."""
    task = da.contrastive_task(model, given.inputs, measure=["loss", "similarity"])
    return task.per_example(batch_of(given.inputs, 0, 2))


def examples(model: Any, given: Given) -> Any:
    """Two pictures, encoded, with a prompt each if the pipeline reads any."""
    prompts = list(given.texts) if "prompt" in given.inputs else None
    return da.diffusion_examples(model, given.drawn_size, prompts)


def denoising_losses(model: Any, given: Given) -> Any:
    """The denoiser's loss of each picture."""
    task = da.diffusion_task(model, timesteps=1)
    return task.per_example(batch_of(examples(model, given), 0, 2))


def journey(model: Any, given: Given) -> Any:
    """Scores of two pictures at the steps of one drawing."""
    task = da.diffusion_task(model, timesteps=1)
    projection = da.Projection(dim=8)
    store = da.featurise(task, examples(model, given), given.folder / "s", projection=projection, progress=False)
    return da.journey_trak(model, store, [given.prompt], inputs={"n_steps": 2, "n_own": 1, **given.options()})


def read_words(model: Any, given: Given) -> Any:
    """The maps that a reader makes of a run."""
    reader = ca.word_reader(model, given.prompt, n_steps=given.family.n_steps, options=given.sizes())
    return reader.maps(model.run(given.drawing, read=reader.reads()))


def neurons(model: Any, given: Given) -> Any:
    """What a prompt's neurons are, beside two others'."""
    statistics = ca.neuron_statistics(model, given.texts, options=given.options(2))
    seen: Any = {"seeds": (0, 1), "thetas": (1.0,)}
    return ca.find_neurons(model, given.prompt, statistics, threshold=0.1, options=given.options(2), **seen)


def read_steps(model: Any, given: Given) -> Any:
    """The predictions and pictures of a run of two steps."""
    reader = diffusion.step_reader(model, 2)
    run = model.run(reader.inputs(given.drawing), read=reader.reads())
    return reader.step_predictions(model, run), reader.pictures(model, run)


def unit_maps(model: Any, given: Given) -> Any:
    """The maps of one residual stream's units, where the model has it."""
    tower = "denoiser" if "num_inference_steps" in given.inputs else given.tower
    units = dissection.Units(model, f"{tower}.blocks.0.hook_resid_post")
    return units.maps(given.first if tower != "denoiser" else given.inputs)


def probed(model: Any, given: Given) -> Any:
    """What a store holds of pictures that one model has looked at, as the units' and as the judge."""
    units = dissection.Units(model, "vision.blocks.0.hook_resid_post")
    batches = [(given.pixels, given.pictures)]
    store = dissection.collect([units], batches, model, given.folder / "s", progress=False)
    return store.rows()


def retrieved(model: Any, given: Given) -> Any:
    """The pictures that a text finds."""
    embeddings = da.image_features(model, given.drawn_size)
    return dissection.retrieving(model, given.pictures, embeddings, n=1)(given.texts[0])
