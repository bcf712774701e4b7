"""Lenses beside distributions: contextual, latent, CLIP, diffusion, first token, early exit, anomalies."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import tiny
import torch

import mm_adapters as mm
from methods_multimodal import lenses
from methods_multimodal.core.embed import embed, unit
from methods_multimodal.lenses import LensReading
from tests.methods.contract.families import family


def reading(scores: torch.Tensor, **options: Any) -> LensReading:
    """A reading of logits, of one position a row."""
    n, layers, _ = scores.shape
    names = tuple(f"layer {i}" for i in range(layers))
    total = scores.logsumexp(-1)
    return LensReading(scores, total, "logit", "logit", names, (), tuple(range(n)), (0,) * n, **options)


# -- contextual ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_contextual_scores_are_cosines_of_hidden_states(engine: Any) -> None:
    given = family("llava")
    inputs = given.inputs
    n_pos = inputs["input_ids"].shape[1]
    spans = [[n_pos - 1, n_pos - 2], [n_pos - 1]]
    found = lenses.contextual_lens(given.model(engine), inputs, spans)
    with torch.no_grad():
        # The last of transformers' own is normalised, so it is left out here.
        states = given.case.model(**inputs, output_hidden_states=True).hidden_states[:-1]
    for entry in range(0, len(found.rows), 3):
        row, at = found.rows[entry], found.positions[entry]
        for i, j in product(range(len(states)), repeat=2):
            word = states[j][row, spans[row]].mean(0)
            cosine = torch.cosine_similarity(states[i][row, at], word, 0)
            torch.testing.assert_close(found.scores[entry, i, j], cosine)
    last = lenses.contextual_lens(given.model(engine), inputs, -1)
    assert torch.equal(last.scores[4:], found.scores[4:])


@pytest.mark.parametrize("words", [["w5"], [[0, 99], [0]], [[], [0]], "w5"])
def test_words_that_are_not_there_are_refused(words: Any) -> None:
    with pytest.raises(mm.InputError, match=r"give words of each|positions are 0 to"):
        lenses.contextual_lens(family("llava").model("hooked"), family("llava").inputs, words)


def test_the_grounding_box_is_the_best_of_all_windows() -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        scores = torch.randn(4, 6, generator=rng)
        above = (scores - scores.mean() - 0.5 * scores.std(correction=0)).numpy()
        best = max(
            (
                (t, a, b, c)
                for t in range(4)
                for b in range(t + 1, 5)
                for a in range(6)
                for c in range(a + 1, 7)
            ),
            key=lambda w: above[w[0] : w[2], w[1] : w[3]].sum(),
        )
        assert lenses.grounding_box(scores, 0.5) == best
    planted = torch.zeros(8, 8)
    planted[2:5, 3:7] = 1
    planted[0, 0] = torch.nan
    assert lenses.grounding_box(planted) == (2, 3, 5, 7)
    with pytest.raises(mm.InputError, match="no numbers"):
        lenses.grounding_box(torch.full((2, 2), torch.nan))


def test_the_iou_of_boxes_is_that_of_their_masks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        boxes = []
        for _ in range(2):
            top, left = rng.integers(0, 6, 2)
            boxes.append((int(top), int(left), int(top + rng.integers(1, 4)), int(left + rng.integers(1, 4))))
        masks = np.zeros((2, 10, 10), bool)
        for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
            mask[top:bottom, left:right] = True
        expected = sklearn.metrics.jaccard_score(masks[0].ravel(), masks[1].ravel())
        assert lenses.box_iou(*boxes) == pytest.approx(expected)


# -- latent --------------------------------------------------------------------------------------------


def test_an_image_token_is_nearest_to_itself_in_an_index() -> None:
    model = mm.load("tiny-llava")
    texts = ["question: what colour is the circle? answer: red", "question: how many blue stars? answer: two"]
    batches = [model.prepare(text=texts[:1]), model.prepare(text=texts[1:])]
    index = lenses.contextual_index(model, batches, layers=[0, 2], per_word=1)
    assert set(index.words) >= {"circle", "red", "blue", "stars"}
    assert [int((index.word == index.words.index(w)).sum()) for w in ("question", "circle")] == [2, 2]
    position = model.layout(**batches[0])["language"].where("circle")[-1]
    found = lenses.latent_lens(model, batches[0], index, position=position)
    assert found.layers[1] == "layer 0"
    for layer in (1, 3):  # The layers that the index holds.
        assert found.candidates[int(found.scores[0, layer].argmax())] == "circle"
        assert float(found.scores[0, layer].max()) == pytest.approx(1, abs=1e-5)
    state = model.run(batches[0], read=["language.blocks.1.hook_resid_post"]).values
    one = unit(state["language.blocks.1.hook_resid_post"][0, position].detach())
    cosines = index.vectors @ one
    word = index.words.index("red")
    assert float(found.scores[0, 2, word]) == pytest.approx(
        float(cosines[index.word == word].max()), abs=1e-5
    )
    best, entries = index.nearest(one[None], 2)
    assert torch.equal(best[0], cosines.topk(2).values)
    assert int(entries[0, 0]) == int(cosines.argmax())


def test_an_index_is_saved_and_refused_for_other_words_and_weights(tmp_path: Path) -> None:
    model = mm.load("tiny-llava")
    batch = model.prepare(text=["question: what colour is the circle? answer: red"])
    index = lenses.contextual_index(model, [batch])
    again = lenses.ContextualIndex.load(index.save(tmp_path / "index.safetensors"))
    at: dict[str, Any] = {"position": -1, "words": ["red", "circle"], "centred": True}
    one, other = (lenses.latent_lens(model, batch, i, **at) for i in (index, again))
    assert torch.equal(one.scores, other.scores)
    with pytest.raises(mm.InputError, match="The index has no 'zebra'; it has"):
        lenses.latent_lens(model, batch, index, position=-1, words=["zebra"])
    with pytest.raises(mm.InputError, match="There is no layer 4: layers are -1"):
        lenses.contextual_index(model, [batch], layers=[4])
    with pytest.raises(mm.InputError, match="has no words"):
        lenses.contextual_index(model, [])
    with torch.no_grad():
        model.wrapped.model.language_model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(mm.InputError, match="index was made for other weights"):
        lenses.latent_lens(model, batch, index, position=-1)


# -- CLIP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_the_clip_lens_is_transformers_own_norm_and_projection(engine: Any) -> None:
    given = family("clip")
    model, pixels = given.model(engine), {"pixel_values": given.inputs["pixel_values"]}
    texts = unit(torch.randn(3, given.width(engine), generator=torch.Generator().manual_seed(0)))
    found = lenses.clip_lens(model, pixels, texts)
    whole = lenses.clip_lens(model, pixels, texts, patches=True)
    clip = given.case.model
    with torch.no_grad():
        states = clip.vision_model(**pixels, output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            joint = unit(clip.visual_projection(clip.vision_model.post_layernorm(state)))
            torch.testing.assert_close(found.scores[:, layer], joint[:, 0] @ texts.T)
            torch.testing.assert_close(whole.scores[:, layer], (joint[:, 1:] @ texts.T).flatten(0, 1))
    own = unit(embed(model, pixels["pixel_values"], "vision")) @ texts.T
    torch.testing.assert_close(found.scores[:, -1], own)
    assert found.own_gap is not None
    assert found.own_gap < 1e-6
    assert whole.mini_map(2, 1, row=1).shape == whole.grid
    with pytest.raises(mm.InputError, match="The joint space has"):
        lenses.clip_lens(model, pixels, texts[:, :3])


# -- diffusion -----------------------------------------------------------------------------------------


def test_each_layers_picture_is_that_of_its_hidden_states_given_as_embeddings() -> None:
    model = mm.load("tiny-sd")
    pipe = model.wrapped
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
    prompt = "a large red circle on a white background"
    found = lenses.diffusion_lens(model, [prompt, "a blue star"], [3, 4], options=options)
    size: dict[str, Any] = {"padding": "max_length", "max_length": pipe.tokenizer.model_max_length}
    ids, empty = (
        pipe.tokenizer([t], truncation=True, return_tensors="pt", **size).input_ids for t in (prompt, "")
    )
    encoder = pipe.text_encoder
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states
        against = encoder(empty)[0]
        for layer in (0, 2, 4):
            embeds = {
                "prompt_embeds": encoder.final_layer_norm(states[layer]),
                "negative_prompt_embeds": against,
            }
            noise = torch.Generator().manual_seed(3)
            own = pipe(**embeds, **options, generator=noise, output_type="pt").images
            torch.testing.assert_close(found.pictures[0, layer], own[0], atol=1e-4, rtol=0)
    assert not torch.equal(found.pictures[0, 1], found.pictures[0, 2])


def test_judged_pictures_are_a_reading_by_prompt_and_layer(tmp_path: Path) -> None:
    pictures = torch.rand(2, 3, 3, 4, 4)
    record = lenses.LayerPictures(pictures, ("a", "b"), (0, 1), ("embedding", "layer 0", "layer 1"))
    again = lenses.LayerPictures.load(record.save(tmp_path / "p.safetensors"))
    found = again.judged(lambda x: x.mean((-1, -2))[:, :2], ["red", "green"], "brightness")
    torch.testing.assert_close(found.scores, pictures.mean((-1, -2))[..., :2])
    with pytest.raises(mm.InputError, match=r"scores of shape \(6, 1\) for 6 pictures and 2 candidates"):
        record.judged(lambda x: x[:, :1, 0, 0], ["red", "green"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((["a"], [0, 1]), "1 prompts and 2 seeds"),
        (([], []), "0 prompts"),
        ((["a"], [0], {"prompt": "b"}), "hold prompt"),
        ((["a"], [0], {}, "denoiser"), "reads prompts"),
    ],
)
def test_a_diffusion_lens_that_cannot_be_is_refused(arguments: tuple[Any, ...], reason: str) -> None:
    prompts, seeds, *more = arguments
    options = more[0] if more else None
    tower = more[1] if len(more) > 1 else "text"
    with pytest.raises((mm.InputError, mm.MissingSiteError), match=reason):
        lenses.diffusion_lens(
            family("stable_diffusion").model("hooked"), prompts, seeds, options=options, tower=tower
        )


# -- first token ---------------------------------------------------------------------------------------


def test_first_token_logits_are_the_models_at_its_last_position() -> None:
    built = tiny.llava()
    found = lenses.first_token_logits(mm.HookedModel(built.model), [built.inputs, built.inputs])
    assert torch.equal(found[:2], built.model(**built.inputs).logits[:, -1].detach())
    assert torch.equal(found[2:], found[:2])


def test_what_can_be_told_apart_is_and_what_cannot_is_at_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    sets: list[torch.Tensor] = []
    noise: list[torch.Tensor] = []
    for n in (120, 60, 100):
        labels = torch.arange(n) % 2 == 0
        features = torch.randn(n, 5, generator=rng)
        noise += [features.clone(), labels]
        features[:, 3] += 2.0 * labels
        sets += [features, labels]
    found, nothing = lenses.separate(*sets, n_null=5), lenses.separate(*noise, n_null=5)
    assert found.auroc > 0.85
    assert found.low < found.auroc < found.high
    assert nothing.low < 0.5 < nothing.high
    assert float(found.null.mean()) == pytest.approx(0.5, abs=0.15)
    assert found.auroc == pytest.approx(sklearn.metrics.roc_auc_score(sets[5], found.scores))
    one_kind = [*sets[:5], torch.ones(100, dtype=torch.bool)]
    with pytest.raises(mm.InputError, match="All test rows are of one kind"):
        lenses.separate(*one_kind)


# -- early exit ----------------------------------------------------------------------------------------


def test_exits_written_out_by_hand() -> None:
    # Three rows; layers say token 0 or 1 with these probabilities of token 1.
    p = torch.tensor([[0.1, 0.95, 0.9], [0.8, 0.4, 0.3], [0.2, 0.6, 0.99]])
    found = lenses.early_exit(reading(torch.stack([1 - p, p], -1).log()), [1, 0, 1])
    assert found.right.tolist() == [[False, True, True], [False, True, True], [False, True, True]]
    torch.testing.assert_close(found.confidence[0], torch.tensor([0.9, 0.95, 0.9]))
    assert found.exits(0.85).tolist() == [0, 2, 2]
    assert found.exits(0.92).tolist() == [1, 2, 2]
    assert found.accuracy_at(0.85).mean == pytest.approx(2 / 3)
    assert found.mean_layers(0.92) == pytest.approx(5 / 3)
    assert found.accuracy(0).mean == 0
    threshold = found.choose_threshold()
    assert found.accuracy_at(threshold).mean == 1
    lower = found.confidence[found.confidence < threshold]
    assert all(found.accuracy_at(float(t)).mean < 1 for t in lower)
    assert lenses.best_constant(torch.tensor([1, 0, 1])) == pytest.approx(2 / 3)
    with pytest.raises(mm.InputError, match="3 entries and 2 candidates"):
        lenses.early_exit(reading(torch.zeros(3, 2, 2)), [0, 2, 1])


# -- anomalies -----------------------------------------------------------------------------------------


def test_a_trajectory_is_log_probability_entropy_and_divergence() -> None:
    scores = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    found = lenses.trajectory(reading(scores))
    p = scores.double().softmax(-1)
    for row in range(2):
        answer = int(p[row, -1].argmax())
        by_hand = [float(p[row, i, answer].log()) for i in range(3)]
        by_hand += [float(-(p[row, i] * p[row, i].log()).sum()) for i in range(3)]
        by_hand += [float((p[row, 2] * (p[row, 2] / p[row, i]).log()).sum()) for i in range(2)]
        torch.testing.assert_close(found[row].double(), torch.tensor(by_hand).double(), atol=1e-5, rtol=1e-5)
    with pytest.raises(mm.InputError, match="whole vocabulary"):
        lenses.trajectory(
            reading(scores).__class__(scores, None, "latent", "cosine", ("a",) * 3, (), (0, 1), (0, 0))
        )


@pytest.mark.parametrize("detector", ["mahalanobis", "neighbours", "forest"])
def test_planted_outliers_score_above_normal_entries(detector: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    # Of every normal row the layers agree more and more; of an outlier the middle ones say another token.
    goal = torch.randint(0, 8, (150,), generator=rng)
    hot = torch.nn.functional.one_hot(goal, 8).float()
    scores = torch.stack([i * 2.0 * hot for i in range(4)], 1) + 0.3 * torch.randn(150, 4, 8, generator=rng)
    scores[120:, 1:3] = 6.0 * hot[120:, None].roll(1, 2)
    normal, other = reading(scores[:90]), reading(scores[90:])
    found = lenses.anomaly_scores(normal, other, detector=detector)
    strange = torch.arange(60) >= 30
    assert lenses.separation(found.scores, strange, torch.zeros(0)).auroc > 0.95
    same = lenses.separation(found.scores[:30], torch.arange(30) % 2 == 0, torch.zeros(0))
    assert same.low < 0.5 < same.high
    with pytest.raises(mm.InputError, match="to be read alike"):
        lenses.anomaly_scores(reading(scores[:, :3]), other, detector=detector)


def test_logits_are_there_where_scores_are_logits_and_refused_where_they_are_not() -> None:
    scores = torch.arange(6.0).reshape(1, 2, 3)
    settings: Any = {"layers": ("a", "b"), "candidates": (), "rows": (0,), "positions": (0,)}
    logits = LensReading(scores, scores.logsumexp(-1), "logit", "logit", **settings)
    assert torch.equal(logits.logits, scores)
    with pytest.raises(mm.InputError, match="The latent lens gives a cosine, which is no logit"):
        _ = LensReading(scores, None, "latent", "cosine", **settings).logits
