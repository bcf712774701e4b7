"""The checkpoints that nnsight's own tests name, as small ones made here: the zoo's, and tiny random ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tiny
import tiny_diffusion
import tiny_vision
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from mm_adapters import zoo


def make(folder: Path) -> dict[str, str]:
    """A folder for each repository of the hub that the tests ask for."""
    writers = {
        "trl-internal-testing/tiny-LlavaForConditionalGeneration": _llava,
        "hf-internal-testing/tiny-random-ViTForImageClassification": _vit,
        "hf-internal-testing/tiny-stable-diffusion-torch": _stable_diffusion,
        "hf-internal-testing/tiny-sdxl-pipe": lambda at: tiny.stable_diffusion_xl().model.save_pretrained(at),
        "hf-internal-testing/tiny-sd3-pipe": lambda at: (
            tiny_diffusion.stable_diffusion_3().model.save_pretrained(at)
        ),
        "hf-internal-testing/tiny-flux-pipe": lambda at: tiny_diffusion.flux().model.save_pretrained(at),
    }
    for name, write in writers.items():
        write(folder / name.partition("/")[2])
    return {name: str(folder / name.partition("/")[2]) for name in writers}


def _llava(folder: Path) -> None:
    """tiny-llava with random weights, so large that every layer changes the next token, and no end token."""
    _copy("tiny-llava", folder)
    torch.manual_seed(0)
    config = LlavaConfig.from_pretrained(folder)
    config.text_config.initializer_range = 0.3
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    _change(folder / "generation_config.json", eos_token_id=None)


def _stable_diffusion(folder: Path) -> None:
    """tiny-sd, which here draws as large as the tests expect: 128 pixels."""
    _copy("tiny-sd", folder)
    _change(folder / "unet/config.json", sample_size=32)


def _vit(folder: Path) -> None:
    from transformers import ViTImageProcessor

    model = tiny_vision.vit_classifier().model
    model.save_pretrained(folder)
    side = model.config.image_size
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)


def _copy(name: str, folder: Path) -> None:
    shutil.copytree(zoo.path(name), folder)


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def fill_hub(folder: Path) -> None:
    """The hub's cache with the language models that the tests name, as large as they say, random."""
    gpt2 = folder / "gpt2"
    _gpt2(gpt2)
    for name in ("gpt2", "openai-community/gpt2"):
        _cached(folder, name, gpt2)
    llama = folder / "llama"
    _llama(llama)
    _cached(folder, "hf-internal-testing/tiny-random-LlamaForCausalLM", llama)


def _cached(hub: Path, name: str, files: Path) -> None:
    """As huggingface_hub lays a repository out."""
    at = hub / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    (at / "snapshots").mkdir(parents=True)
    (at / "refs").mkdir()
    (at / "refs/main").write_text(commit, encoding="utf-8")
    (at / "snapshots" / commit).symlink_to(files, target_is_directory=True)


def _gpt2(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"],
    )  # fmt: skip
    made.train_from_iterator(["Madison Square Garden is located in the city of New York City"] * 3, trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=end, eos_token=end, unk_token=end, model_max_length=256
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(made.get_vocab()), n_positions=256, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)


def _llama(folder: Path) -> None:
    import tiny_tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizers.llama()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
