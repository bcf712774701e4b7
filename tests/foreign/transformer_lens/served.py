"""What the hub would serve to TransformerLens' tests: random OPTs of each name's depth, and one tokenizer.

TransformerLens reads OPT natively and so do we: its HookedTransformer, its bridge and our tower are the
same function on the same weights. Biases and norms are random too, so that leaving one out shows.
"""

from __future__ import annotations

import ast
import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 50257
END = VOCABULARY - 1
HEAD_WIDTH = 4  # Small, so that hundreds of tests take minutes.

# Layers, heads and context of each name (TransformerLens' official ones) that its tests ask for.
SIZES = {
    "gpt2": (12, 12, 1024),
    "distilgpt2": (6, 12, 1024),
    "gpt2-medium": (24, 16, 1024),
    "facebook/opt-125m": (12, 12, 2048),
    "EleutherAI/pythia-14m": (6, 4, 2048),
    "EleutherAI/pythia-70m": (6, 8, 2048),
    "EleutherAI/gpt-neo-125M": (12, 12, 2048),
    "roneneldan/TinyStories-1M": (8, 16, 2048),
    "NeelNanda/SoLU_1L512W_C4_Code": (1, 8, 1024),
    "NeelNanda/SoLU_2L512W_C4_Code": (2, 8, 1024),
    "NeelNanda/SoLU_3L512W_C4_Code": (3, 8, 1024),
    "NeelNanda/SoLU_4L512W_C4_Code": (4, 8, 1024),
    "NeelNanda/GELU_1L512W_C4_Code": (1, 8, 1024),
    "NeelNanda/GELU_2L512W_C4_Code": (2, 8, 1024),
    "NeelNanda/Attn_Only_1L512W_C4_Code": (1, 8, 1024),
    "NeelNanda/Attn_Only_2L512W_C4_Code": (2, 8, 1024),
    "NeelNanda/Attn_Only_3L512W_C4_Code": (3, 8, 1024),
    "ArthurConmy/redwood_attn_2l": (2, 8, 1024),
    "hyper-accel/tiny-random-gpt2": (2, 4, 512),
    "hf-internal-testing/tiny-random-gpt2": (2, 4, 512),
    "sshleifer/tiny-gpt2": (2, 2, 1024),
    "Intel/tiny-random-gpt2": (2, 4, 512),
}
ALIASES = {"openai-community/gpt2": "gpt2"}


def official(name: Any) -> str | None:
    """The name's row of `SIZES`; None if it is no name that is served."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    if not isinstance(name, str):
        return None
    name = ALIASES.get(name, name)
    if name in SIZES:
        return name
    try:
        known = get_official_model_name(name)
    except ValueError:
        return None
    return known if known in SIZES else None


def named(name: str) -> Any:
    """A fresh copy of the model of a name of `SIZES`: always the same weights."""
    return copy.deepcopy(_named(name))


@cache
def _named(name: str) -> Any:
    layers, heads, context = SIZES[name]
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        return random_opt(
            layers=layers, heads=heads, width=heads * HEAD_WIDTH, inner=heads * HEAD_WIDTH * 4,
            vocabulary=VOCABULARY, context=context,
        )  # fmt: skip


def random_opt(
    *, layers: int, heads: int, width: int, inner: int, vocabulary: int, context: int, act: str = "relu"
) -> Any:
    """A random OPT with nothing left at zero or one.

    Args:
        layers: The number of blocks.
        heads: Heads in each.
        width: Of the residual stream.
        inner: Neurons of each MLP.
        vocabulary: Tokens; the last is the start, the end and the padding.
        context: Positions.
        act: The MLP's function, in transformers' words.
    """
    config = transformers.OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=inner, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=vocabulary, max_position_embeddings=context,
        activation_function=act, bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1,
        pad_token_id=None, dropout=0.0, architectures=["OPTForCausalLM"],
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.normal_(1.0 if parameter_name.endswith("weight") else 0.0, 0.1)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(0.0, 0.5 if "embed" in parameter_name else 0.8 / parameter.shape[1] ** 0.5)
    return model.eval()


def write_tokenizer(folder: Path, tests: Path) -> None:
    """A byte-level tokenizer of GPT-2's size; its words are those of the tests' own texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=16000, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(_texts(tests), trainer)
    parts = json.loads(trained.to_str())["model"]
    vocab = {token: index for index, token in enumerate(parts["vocab"])}
    vocab |= {f"<unused{index}>": index for index in range(len(vocab), END)} | {"<|endoftext|>": END}
    merges = [tuple(merge) for merge in parts["merges"]]
    transformers.GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=1024).save_pretrained(folder)


def _texts(tests: Path) -> list[str]:
    """Every short string of the tests, alone and after a space."""
    strings = [
        node.value
        for path in sorted(tests.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 300
    ]
    return [text for string in strings for text in (string, f" {string}")]
