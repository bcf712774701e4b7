"""Every public method that takes a model, one line each: its kinds of families, and a call with tiny inputs."""

from __future__ import annotations

from methods_multimodal import cross_attention as ca
from methods_multimodal import data_attribution as da
from methods_multimodal import diffusion, dissection, lenses, patching, relevance, report
from methods_multimodal import text_explanations as te
from tests.methods.contract import calls
from tests.methods.contract.kinds import Kind
from tests.methods.contract.method import Method, Reason

PAIRS: tuple[Kind, ...] = ("contrastive",)
SEEING: tuple[Kind, ...] = ("contrastive", "vision")
SPEAKING: tuple[Kind, ...] = ("vlm", "language")
BLOCKS: tuple[Kind, ...] = ("contrastive", "vision", "text", "language", "vlm")
LOOKING: tuple[Kind, ...] = ("contrastive", "vision", "vlm")
ASKED: tuple[Kind, ...] = ("vlm",)
DRAWING: tuple[Kind, ...] = ("diffusion",)

# fmt: off
METHODS: tuple[Method, ...] = (
    Method(te.decompose, SEEING, lambda m, x: te.decompose(m, images=x.pixels)),
    Method(te.decompositions, SEEING, lambda m, x: list(te.decompositions(m, images=x.pictures, tokens="sum"))),
    Method(te.name_heads, SEEING, calls.named_heads),
    Method(te.second_order, SEEING, lambda m, x: te.second_order(m, images=x.pixels, layer=0)),
    Method(te.segment, SEEING, lambda m, x: te.segment(m, x.pictures, x.directions())),
    Method(te.token_states, SPEAKING, lambda m, x: te.token_states(m, [x.inputs], 0)),
    Method(lenses.attribute_logits, PAIRS, lambda m, x: lenses.attribute_logits(m, x.inputs)),
    Method(lenses.attribute_tokens, SPEAKING, lambda m, x: lenses.attribute_tokens(m, x.inputs, [5])),
    Method(lenses.logit_lens, SPEAKING, lambda m, x: lenses.logit_lens(m, x.inputs, final_norm=True)),
    Method(patching.patch_heads, BLOCKS, lambda m, x: patching.patch_heads(m, *x.patched, **x.first_layer)),
    Method(patching.patch_positions, BLOCKS, lambda m, x: patching.patch_positions(m, *x.patched, units=[(0,), (1, 2)], **x.first_layer)),
    Method(patching.patch_units, BLOCKS, lambda m, x: patching.patch_units(m, *x.patched, x.site, "pos", units=[(0,)], layers=[0])),
    Method(relevance.head_maps, LOOKING, lambda m, x: relevance.head_maps(m, x.first, x.layout(x.tower), tower=x.tower, layers=[0], query=-1)),
    Method(dissection.Units, (*LOOKING, "diffusion"), calls.unit_maps),
    Method(dissection.collect, PAIRS, calls.probed),
    Method(dissection.embed_concepts, PAIRS, lambda m, x: dissection.embed_concepts(m, x.texts)),
    Method(dissection.retrieving, PAIRS, calls.retrieved),
    Method(dissection.asking, ASKED, lambda m, x: dissection.asking(m, x.question, max_new_tokens=2)(x.pictures[:1])),
    Method(dissection.drawing, DRAWING, lambda m, x: dissection.drawing(m, n=1, output_type="pt", **x.options())(x.prompt)),
    Method(da.image_features, SEEING, lambda m, x: da.image_features(m, x.drawn_size)),
    Method(da.contrastive_task, PAIRS, calls.pair_losses),
    Method(da.diffusion_examples, DRAWING, calls.examples),
    Method(da.diffusion_task, DRAWING, calls.denoising_losses),
    Method(da.trajectory, DRAWING, lambda m, x: da.trajectory(m, [x.prompt], n_own=1, n_steps=2, **x.options())),
    Method(da.journey_trak, DRAWING, calls.journey),
    Method(diffusion.StepReader, DRAWING, calls.read_steps),
    Method(diffusion.step_reader, DRAWING, calls.read_steps),
    Method(diffusion.pictures_of, DRAWING, lambda m, x: diffusion.pictures_of(m, m.run(x.drawing).output)),
    Method(diffusion.decode, DRAWING, lambda m, x: diffusion.decode(m, x.latents, grid=(2, 2))),
    Method(ca.clip_score, PAIRS, lambda m, x: ca.clip_score(m, x.prompt)(x.drawn_size)),
    Method(ca.clip_contrast, PAIRS, lambda m, x: ca.clip_contrast(m, *x.texts)(x.drawn_size)),
    Method(ca.grid, DRAWING, lambda m, x: ca.grid(m)),
    Method(ca.word_reader, DRAWING, calls.read_words),
    Method(ca.word_maps, DRAWING, lambda m, x: ca.word_maps(m, x.drawing)[0]),
    Method(ca.patch_words, DRAWING, lambda m, x: ca.patch_words(m, x.cases, x.redness, batch=4, options=x.options(4))),
    Method(ca.knock_out_words, DRAWING, lambda m, x: ca.knock_out_words(m, x.cases, x.redness, batch=4, options=x.options(4))),
    Method(ca.ablate_heads, DRAWING, lambda m, x: ca.ablate_heads(m, x.cases, x.redness, [ca.Part()], batch=4, options=x.options(4))),
    Method(ca.attribute_patching, DRAWING, lambda m, x: ca.attribute_patching(m, x.cases, x.redness, options=x.options(2))),
    Method(ca.restore_layers, DRAWING, lambda m, x: ca.restore_layers(m, x.cases, x.redness, batch=4, options=x.options(4))),
    Method(ca.restore_text, DRAWING, lambda m, x: ca.restore_text(m, x.cases, x.redness, batch=4, options=x.options(4))),
    Method(ca.bind_attributes, DRAWING, lambda m, x: ca.bind_attributes(m, x.prompt, [("a", "cat")], n_steps=x.family.n_steps, options=x.sizes())),
    Method(ca.edit_words, DRAWING, lambda m, x: ca.edit_words(m, x.prompt, [ca.WordEdit("a dog", "replace")], n_steps=x.family.n_steps, options=x.sizes(2))),
    Method(ca.neuron_statistics, DRAWING, lambda m, x: ca.neuron_statistics(m, x.texts, options=x.options(2))),
    Method(ca.memorisation_score, DRAWING, lambda m, x: [ca.memorisation_score(m, t, seeds=(0, 1), options=x.options(2)) for t in x.texts]),
    Method(ca.find_neurons, DRAWING, calls.neurons),
    Method(report.contrastive_report, PAIRS, lambda m, x: report.contrastive_report(m, x.pictures, x.texts)),
    Method(report.vlm_report, ASKED, lambda m, x: report.vlm_report(m, x.pictures, x.question)),
    Method(report.diffusion_report, DRAWING, lambda m, x: report.diffusion_report(m, x.prompt, steps=2, **x.sizes())),
    Method(report.words_report, DRAWING, lambda m, x: report.words_report(m, x.prompt, steps=x.family.n_steps, **x.sizes())),
    Method(report.trace_report, DRAWING, lambda m, x: report.trace_report(m, x.prompt, "cat", "dog", x.redness, seeds=(0, 1), steps=x.family.n_steps, n_groups=1, **x.sizes(4))),
)
# fmt: on

# Refusals that name no missing site or role: at most five.
OWN_REASONS: tuple[Reason, ...] = ()
