"""Every public method that takes a model, one line each: its kinds of families, and a tiny call."""

from __future__ import annotations

import inspect

from methods_multimodal import (
    attribution,
    circuits,
    diffusion,
    dissection,
    lenses,
    neurons,
    patching,
    probing,
    relevance,
    report,
)
from methods_multimodal import cross_attention as ca
from methods_multimodal import data_attribution as da
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
    Method(te.decompositions, SEEING, calls.split_in_batches),
    Method(te.name_heads, SEEING, calls.named_heads),
    Method(te.head_effects, SEEING, calls.effects_of_heads),
    Method(te.readability, PAIRS, lambda m, x: te.readability(m, calls.vocabulary())),
    Method(te.second_order, SEEING, lambda m, x: te.second_order(m, images=x.pixels, layer=0)),
    Method(te.segment, SEEING, lambda m, x: te.segment(m, x.pictures, x.directions())),
    Method(te.token_states, SPEAKING, lambda m, x: te.token_states(m, [x.inputs], 0)),
    Method(lenses.attribute_logits, PAIRS, lambda m, x: lenses.attribute_logits(m, x.inputs)),
    Method(lenses.attribute_tokens, SPEAKING, lambda m, x: lenses.attribute_tokens(m, x.inputs, [5])),
    Method(lenses.logit_lens, SPEAKING, lambda m, x: lenses.logit_lens(m, x.inputs, final_norm=True)),
    Method(probing.read_features, (*BLOCKS, "diffusion"), calls.features_read),
    Method(probing.probe, (*BLOCKS, "diffusion"), calls.probed_layers),
    Method(probing.modality_shares, (*PAIRS, *ASKED), calls.shared_out),
    Method(probing.prompt_probe, (*PAIRS, *ASKED), calls.asked_in_words),
    Method(lenses.train_tuned_lens, SPEAKING, calls.trained_lens),
    Method(lenses.tuned_lens, SPEAKING, calls.tuned, calls.trained_lens),
    Method(lenses.train_attention_lens, SPEAKING, calls.trained_heads),
    Method(lenses.attention_lens, SPEAKING, calls.read_heads, calls.trained_heads),
    Method(lenses.contextual_lens, ASKED, lambda m, x: lenses.contextual_lens(m, x.inputs, -1)),
    Method(lenses.contextual_index, ASKED, lambda m, x: lenses.contextual_index(m, [x.inputs], per_word=2)),
    Method(lenses.latent_lens, ASKED, calls.latent_words, calls.indexed_words),
    Method(lenses.first_token_logits, SPEAKING, lambda m, x: lenses.first_token_logits(m, [x.inputs])),
    Method(lenses.clip_lens, SEEING, lambda m, x: lenses.clip_lens(m, x.pixels, x.directions())),
    Method(lenses.diffusion_lens, DRAWING, calls.drawn_layers),
    Method(patching.patch_heads, BLOCKS, lambda m, x: patching.patch_heads(m, *x.patched, **x.first_layer)),
    Method(patching.patch_positions, BLOCKS, calls.patched_positions),
    Method(patching.patch_units, BLOCKS, calls.patched_units),
    Method(patching.token_roles, ASKED, calls.roles_of),
    Method(patching.register_positions, ASKED, calls.registers),
    Method(patching.noised, ASKED, lambda m, x: calls.corrupted_run(m, x, patching.noised)),
    Method(patching.averaged, ASKED, lambda m, x: calls.corrupted_run(m, x, patching.averaged)),
    Method(patching.resampled, ASKED, lambda m, x: calls.corrupted_run(m, x, patching.resampled)),
    Method(patching.other_pictures, ASKED, calls.pictures_exchanged),
    Method(patching.other_words, SPEAKING, calls.words_exchanged),
    Method(patching.answer_logits, ASKED, calls.answered),
    Method(patching.answer_log_prob, ASKED, calls.answered_likely),
    Method(patching.trace, SPEAKING, calls.traced_states),
    Method(patching.knock_out, SPEAKING, calls.knocked_out),
    Method(patching.information_flow, ASKED, calls.flows),
    Method(patching.head_importance, SPEAKING, lambda m, x: patching.head_importance(m, x.inputs, [5, 6])),
    Method(patching.position_importance, SPEAKING,
           lambda m, x: patching.position_importance(m, x.inputs, [5, 6], [(0, 0)])),
    Method(neurons.attribute_neurons, SPEAKING, calls.attributed_neurons),
    Method(neurons.probability_change, SPEAKING,
           lambda m, x: neurons.probability_change(m, x.inputs, [5, 6], layers=[0])),
    Method(neurons.project_neurons, SPEAKING, lambda m, x: neurons.project_neurons(m, [(0, 1), (0, 2)], k=3)),
    Method(neurons.neuron_activity, SPEAKING, calls.active_neurons),
    Method(neurons.ablate_neurons, SPEAKING, calls.ablated_neurons),
    Method(attribution.path_gradients, BLOCKS, calls.along_path),
    Method(circuits.circuit_nodes, BLOCKS, lambda m, x: [len(n.name) for n in circuits.circuit_nodes(m)]),
    Method(circuits.score_nodes, BLOCKS, calls.scored_nodes),
    Method(circuits.score_edges, ("streamed",), calls.scored_edges),
    Method(circuits.write_mib, ("streamed",), calls.edges_for_mib),
    Method(circuits.faithfulness_curve, (*PAIRS, *ASKED), calls.curve),
    Method(circuits.check_circuit, (*PAIRS, *ASKED), calls.checked_circuit),
    Method(relevance.head_maps, LOOKING, calls.first_heads),
    Method(dissection.Units, (*LOOKING, "diffusion"), calls.unit_maps),
    Method(dissection.collect, PAIRS, calls.probed),
    Method(dissection.with_shuffled_weights, SEEING, calls.shuffled_twin),
    Method(dissection.embed_concepts, PAIRS, lambda m, x: dissection.embed_concepts(m, x.texts)),
    Method(dissection.retrieving, PAIRS, calls.retrieved),
    Method(dissection.asking, ASKED, calls.asked),
    Method(dissection.drawing, DRAWING, calls.drawn),
    Method(da.image_features, SEEING, lambda m, x: da.image_features(m, x.drawn_size)),
    Method(da.contrastive_task, PAIRS, calls.pair_losses),
    Method(da.diffusion_examples, DRAWING, calls.examples),
    Method(da.diffusion_task, ("trained",), calls.denoising_losses),
    Method(da.trajectory, DRAWING, calls.followed),
    Method(da.journey_trak, ("trained",), calls.journey, calls.stored),
    Method(diffusion.StepReader, DRAWING, calls.read_steps),
    Method(diffusion.step_reader, DRAWING, calls.read_steps),
    Method(diffusion.sampling_of, DRAWING, lambda m, x: diffusion.sampling_of(m)),
    Method(diffusion.pictures_of, DRAWING, calls.pictures_made),
    Method(diffusion.decode, DRAWING, lambda m, x: diffusion.decode(m, x.latents, grid=(2, 2))),
    Method(ca.clip_score, PAIRS, lambda m, x: ca.clip_score(m, x.prompt)(x.drawn_size)),
    Method(ca.clip_contrast, PAIRS, lambda m, x: ca.clip_contrast(m, *x.texts)(x.drawn_size)),
    Method(ca.grid, DRAWING, lambda m, x: ca.grid(m)),
    Method(ca.word_reader, DRAWING, calls.read_words),
    Method(ca.word_maps, DRAWING, lambda m, x: ca.word_maps(m, x.drawing | {"prompt": x.prompt})[0]),
    Method(ca.word_changes, DRAWING, calls.changed_words),
    Method(ca.patch_words, DRAWING, calls.patched_words),
    Method(ca.knock_out_words, DRAWING, calls.blocked_words),
    Method(ca.ablate_heads, DRAWING, calls.silenced_heads),
    Method(ca.attribute_patching, DRAWING, calls.attributed),
    Method(ca.effects_of_parts, DRAWING, calls.effects_of_parts),
    Method(ca.restore_layers, DRAWING, calls.restored_layers),
    Method(ca.restore_text, DRAWING, calls.restored_text),
    Method(ca.bind_attributes, DRAWING, calls.bound),
    Method(ca.edit_words, DRAWING, calls.edited),
    Method(ca.neuron_statistics, DRAWING, calls.usual_neurons),
    Method(ca.memorisation_score, DRAWING, calls.memorised),
    Method(ca.find_neurons, DRAWING, calls.neurons),
    Method(report.contrastive_report, PAIRS, lambda m, x: report.contrastive_report(m, x.pictures, x.texts)),
    Method(report.vlm_report, ASKED, lambda m, x: report.vlm_report(m, x.pictures, x.question)),
    Method(report.flow_report, ASKED, lambda m, x: report.flow_report(m, x.pictures, x.question)),
    Method(report.diffusion_report, DRAWING, calls.diffusion_page),
    Method(report.words_report, DRAWING, calls.words_page),
    Method(report.trace_report, DRAWING, calls.trace_page),
)
# fmt: on

# Refusals that name no missing site or role: at most five.
OWN_REASONS: tuple[Reason, ...] = (
    Reason(
        r"(text_explanations|lenses)\..*",
        r"pooled by (\w+), which is not split|divides its summary by its length",
        "the summary is no sum over one position: its record's pool, or its mount's unit",
        lambda x, said: any(t.pool == said[1] or t.mount.unit for t in x.model.towers.values()),
    ),
    Reason(
        r"text_explanations\.second_order|(lenses|patching|neurons)\..*|probing\.prompt_probe",
        r"has no (W_\w|unembedding)",
        "a matrix that no module of this model has: its record's heads, or its mount's project",
        lambda x, said: (
            x.model.towers[x.tower].projection is None
            if said[1] == "unembedding"
            else said[1] not in x.model.towers[x.tower].weights(0).names("attn")
        ),
    ),
    Reason(
        r"(?!text_explanations|lenses\.(?!diffusion_lens)).*",
        r"makes embeddings in|packed into positions",
        "latents, or images, are no map: its record's sampling, or grids",
        lambda x, _: (
            any(s.packed or not s.pictures for s in x.model.record.sampling.values())
            or any(t.record.grids is not None for t in x.model.towers.values())
        ),
    ),
    Reason(
        r"report\.contrastive_report|cross_attention\.bind_attributes",
        r"pairs each image with one text|takes no (callback_on_step_end)",
        "the model's own call does not allow it: it captions and makes no logits of all pairs, or it is a "
        "pipeline that calls nobody between its steps",
        lambda x, said: (
            said[1] not in inspect.signature(type(x.model.wrapped).__call__).parameters
            if said[1]
            else any(t.role == "language" for t in x.model.towers.values())
        ),
    ),
    Reason(
        r"relevance\.head_maps|dissection\.Units|report\.(vlm|flow)_report|probing\.(modality_shares|prompt_probe)",
        r"one image, one grid|one image per row|at different positions",
        "an image comes in tiles, each with a grid: its layout",
        lambda x, _: x.is_tiled,
    ),
)
