"""Small random models of pyvene's own kinds, none of which a family of ours covers but OPT and Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from pyvene.models.gru.modelings_gru import GRUConfig, GRUForClassification
from pyvene.models.mlp.modelings_mlp import MLPConfig, MLPForClassification


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def gpt2() -> Any:
    config = hf.GPT2Config(
        n_embd=24, n_layer=3, n_head=4, vocab_size=40, n_positions=16, n_inner=32, initializer_range=0.3,
        pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return seeded(lambda: hf.GPT2LMHeadModel(config))


def llama() -> Any:
    config = hf.LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
        max_position_embeddings=16, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return seeded(lambda: hf.LlamaForCausalLM(config))


def mlp() -> Any:
    config = MLPConfig(h_dim=8, n_layer=3, num_classes=5, pdrop=0.0, activation_function="gelu")
    return seeded(lambda: MLPForClassification(config))


def gru() -> Any:
    config = GRUConfig(h_dim=8, n_layer=2, n_labels=5, pdrop=0.0, vocab_size=20)
    return seeded(lambda: GRUForClassification(config))


BASE = {"input_ids": torch.tensor([[1, 5, 7, 9, 11], [1, 8, 11, 12, 3]])}
SOURCE = {"input_ids": torch.tensor([[1, 4, 2, 13, 21], [1, 17, 6, 30, 33]])}
OTHER = {"input_ids": torch.tensor([[1, 14, 22, 3, 31], [1, 27, 16, 20, 13]])}


def vectors(seed: int, *shape: int) -> dict[str, torch.Tensor]:
    return {"inputs_embeds": torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}
