"""The text that is judged and laid out is the text that each text encoder is given."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import tiny
import tiny_diffusion as td
import torch

import mm_adapters as mm
from mm_adapters.sites.prompt_encoders import prompt_encoders

ENGINES = ("hooked", "nnsight")
DRAWING = (
    "stable_diffusion", "stable_diffusion_xl", "flux", "stable_diffusion_3", "pixart", "deepfloyd_if",
    "kandinsky_3", "kandinsky_2_1", "qwen_image",
)  # fmt: skip
LONG = "a big red circle on a white background"  # 33 tokens of a letter each, with start and end.


@cache
def model(name: str, engine: str = "hooked") -> Any:
    return mm.wrap(tiny.CASES[name]().model, engine=engine)


def inputs_of(name: str) -> dict[str, Any]:
    one = {"num_inference_steps": 1, "seed": 0, "output_type": "latent"}
    return {k: v for k, v in tiny.CASES[name]().inputs.items() if "prompt" not in k} | one


def own_output(wrapped: Any, inputs: dict[str, Any]) -> Any:
    given = {k: v for k, v in inputs.items() if k != "seed"}
    return wrapped(**given, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "clips"), [("flux", "text_encoder"), ("stable_diffusion_3", "text_encoder")]
)
def test_what_t5_reads_whole_is_drawn_and_what_clip_cuts_is_said(name: str, clips: str, engine: str) -> None:
    traced = model(name, engine)
    inputs = inputs_of(name) | {"prompt": [LONG], "max_sequence_length": 48}
    with pytest.warns(
        UserWarning, match=rf"text\[0\] is cut: {clips} reads 16 of its 33 tokens.*reads it whole"
    ):
        drawn = traced.run(inputs).output.images
    right = own_output(traced.wrapped, inputs)
    assert torch.equal(torch.as_tensor(drawn), right)
    cut = own_output(traced.wrapped, inputs | {"prompt": [LONG[:14]]})
    assert not torch.equal(cut, right)  # T5 reads what CLIP does not.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux", "stable_diffusion_3"])
def test_a_prompt_that_every_encoder_cuts_is_refused(name: str, engine: str) -> None:
    inputs = inputs_of(name) | {"prompt": LONG}
    inputs |= {"max_sequence_length": 20} if name in ("flux", "stable_diffusion_3") else {}
    most = 20 if "max_sequence_length" in inputs else 16
    with pytest.raises(mm.InputError, match=rf"text\[0\] is 33 tokens long.*reads at most {most}"):
        model(name, engine).run(inputs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_negative_prompt_that_is_cut_is_drawn_and_said(name: str, engine: str) -> None:
    drawing = model(name, engine)
    inputs = inputs_of(name) | {"prompt": "a cat", "negative_prompt": LONG}
    with pytest.warns(UserWarning, match=r"negative_prompt\[0\] is cut: text_encoder reads 16 of its 33"):
        drawn = drawing.run(inputs).output.images
    assert torch.equal(torch.as_tensor(drawn), own_output(drawing.wrapped, inputs))


def test_each_encoder_is_judged_by_its_own_prompt() -> None:
    drawing = model("stable_diffusion_3")
    inputs = inputs_of("stable_diffusion_3") | {
        "prompt": "a cat",
        "prompt_3": LONG,
        "max_sequence_length": 48,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = drawing.run(inputs).output.images
    assert torch.equal(torch.as_tensor(drawn), own_output(drawing.wrapped, inputs))
    short = drawing.layout(text="a cat", prompt_3="a red dog", height=8, width=8, max_sequence_length=12)
    assert [w.text for w in short["text"].words[0]] == ["a", "cat"]
    assert [w.text for w in short["text_3"].words[0]] == ["a", "red", "dog"]


@pytest.mark.parametrize("name", DRAWING)
def test_an_encoder_is_given_the_tokens_that_are_judged_and_laid_out(name: str) -> None:
    """As many tokens, and the same, as its module sees: caught by a plain hook."""
    drawing, inputs = model(name), inputs_of(name)
    text = {"prompt": ["A Cat "] * 2}
    options = {k: v for k, v in inputs.items() if k in ("height", "width", "max_sequence_length")}
    layouts = drawing.layout(text=text["prompt"], **options)
    limits = {e.part: e.limit(inputs) for e in prompt_encoders(drawing.wrapped, drawing.record)}
    seen: dict[str, list[Any]] = {}
    handles = []
    for part in limits:

        def keep(module: Any, args: Any, kwargs: Any, part: str = part) -> None:
            seen.setdefault(part, []).append(args[0] if args else kwargs["input_ids"])

        handles.append(getattr(drawing.wrapped, part).register_forward_pre_hook(keep, with_kwargs=True))
    try:
        drawing.wrapped(**text, **{k: v for k, v in inputs.items() if k != "seed"} | {"output_type": "pt"})
    finally:
        for handle in handles:
            handle.remove()
    for tower in drawing.towers.values():
        part = tower.path.partition(".")[0]
        if part not in limits:
            continue
        ids = seen[part][0]
        layout = layouts[tower.name]
        assert layout.n_pos == ids.shape[1]
        assert drawing.record.template is not None or ids.shape[1] == limits[part]
        letters = [tiny.letter_tokenizer(16).convert_ids_to_tokens(int(i)) for i in ids[0]]
        for word in layout.words[0]:
            if name in ("kandinsky_2_1", "qwen_image"):  # Of other tokenizers.
                continue
            spelt = "".join(letters[p].removesuffix("</w>") for p in word.positions)
            assert spelt.casefold() == word.text.casefold()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_token_of_many_vectors_is_one_word_at_all_of_them(engine: str) -> None:
    """Textual inversion: the pipeline spells the token out, one for each vector."""
    pipe = tiny.stable_diffusion().model
    pipe.tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    drawing = mm.wrap(pipe, engine=engine)
    layout = drawing.layout(text=["a <toy> on it"])["text"]
    seen: list[Any] = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    inputs = {k: v for k, v in inputs_of("stable_diffusion").items() if k != "seed"}
    pipe("a <toy> on it", **inputs)
    handle.remove()
    names = pipe.tokenizer.convert_ids_to_tokens(seen[0][0].tolist())
    at = [i for i, name in enumerate(names) if name.startswith("<toy>")]
    assert len(at) == 3
    assert layout.where("<toy>") == at == layout.where("toy")
    assert [w.text for w in layout.words[0]] == ["a", "toy", "on", "it"]
    assert names[layout.where("it")[0]] == "i"
    assert layout.texts == ("a <toy> on it",)
    # Spelt out it is too long, though it is short as it is written.
    with pytest.raises(mm.InputError, match="tokens long"):
        drawing.run(inputs_of("stable_diffusion") | {"prompt": "a <toy> on the big bed"})


def test_pixart_reads_a_prompt_without_capitals() -> None:
    """T5 tells letters apart, and the pipeline writes them small."""
    encoder = prompt_encoders(model("pixart").wrapped, model("pixart").record)[0]
    assert encoder.converted([" A Cat "], {"clean_caption": False}) == ["a cat"]


def test_the_words_of_sd3_without_t5_are_where_they_are_attended_to() -> None:
    pipe = td.stable_diffusion_3().model
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    drawing = mm.wrap(pipe)
    inputs = inputs_of("stable_diffusion_3") | {"prompt": "a cat"}
    site = "denoiser.blocks.0.attn.hook_pattern"
    pattern = drawing.run(inputs, read=[site])[site]
    layout = drawing.layout(text="a cat", height=8, width=8, max_sequence_length=6)["denoiser"]
    assert layout.n_pos == pattern.shape[-1]
    assert [w.text for w in layout.words[0]] == ["a", "cat"]
    assert len(layout.positions("pad")) >= 6  # Zeros stand for what T5 would have said.
