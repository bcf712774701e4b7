"""Circuits compiled into a model: its edges are found among hundreds, and MIB's tools can read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mm_adapters as mm
from methods_multimodal.circuits import Pairs, circuit_nodes, read_mib, score_edges, score_nodes, write_mib
from mm_adapters import CheckpointError, InputError

N_LAYERS, N_HEADS, WIDTH, PART = 3, 4, 128, 8
# Each node of the circuit, and the nodes whose writing it reads.
CIRCUIT = {
    "a0.h0": ("input",),
    "m0": ("input", "a0.h0"),
    "a1.h1": ("a0.h0", "m0"),
    "m1": ("a1.h1", "m0"),
    "a2.h2": ("a1.h1", "m1", "input"),
    "m2": ("a2.h2", "m1"),
    "logits": ("m2", "a2.h2"),
}
PLACE = {name: i for i, name in enumerate(["input", "a0.h0", "m0", "a1.h1", "m1", "a2.h2", "m2"])}


def planted(seed: int) -> Any:
    """A language model in which each node of the circuit writes into dimensions of its own.

    All others are as large, read everything, and write where no node of the circuit reads.
    """
    rng = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, num_key_value_heads=N_HEADS, max_position_embeddings=16,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng) / shape[-1] ** 0.5

    def dims(name: str) -> slice:
        return slice(PART * PLACE[name], PART * (PLACE[name] + 1))

    def read(name: str, n: int) -> Tensor:
        """A matrix into n dimensions that reads what the node's sources write; of other nodes, everything."""
        if name not in CIRCUIT:
            return random(n, WIDTH)
        matrix = torch.zeros(n, WIDTH)
        for source in CIRCUIT[name]:
            matrix[:, dims(source)] = 2 * random(n, PART)
        return matrix

    def write(name: str, n: int) -> Tensor:
        matrix = torch.zeros(WIDTH, n)
        if name in PLACE:
            matrix[dims(name)] = 2 * random(PART, n)
        else:
            matrix[PART * len(PLACE) :] = random(WIDTH - PART * len(PLACE), n)
        return matrix

    with torch.no_grad():
        embed = torch.zeros(16, WIDTH)
        embed[:, dims("input")] = torch.randn(16, PART, generator=rng)
        model.model.embed_tokens.weight.copy_(embed)
        d_head = WIDTH // N_HEADS
        for i, block in enumerate(model.model.layers):
            attention, mlp = block.self_attn, block.mlp
            for h in range(N_HEADS):
                rows = slice(h * d_head, (h + 1) * d_head)
                for project in (attention.q_proj, attention.k_proj):
                    project.weight[rows] = 0.1 * random(d_head, WIDTH)
                    if f"a{i}.h{h}" in CIRCUIT:
                        project.weight[rows] = 0.0  # It attends evenly: its values alone are the circuit's.
                attention.v_proj.weight[rows] = read(f"a{i}.h{h}", d_head)
                attention.o_proj.weight[:, rows] = write(f"a{i}.h{h}", d_head)
            mlp.gate_proj.weight.copy_(read(f"m{i}", 64))
            mlp.up_proj.weight.copy_(read(f"m{i}", 64))
            mlp.down_proj.weight.copy_(write(f"m{i}", 64))
        model.lm_head.weight.copy_(read("logits", 16))
    return mm.wrap(model)


def pairs(seed: int, n: int = 16) -> list[Pairs]:
    rng = torch.Generator().manual_seed(seed)
    clean, corrupted = (torch.randint(16, (n, 6), generator=rng) for _ in range(2))
    mask = torch.ones_like(clean)
    return [
        Pairs(
            {"input_ids": clean, "attention_mask": mask},
            {"input_ids": corrupted, "attention_mask": mask},
            lambda output: output.logits[:, -1, 3] - output.logits[:, -1, 5],
        )
    ]


def truth(edges: tuple[str, ...]) -> list[bool]:
    known = {(source, node) for node, sources in CIRCUIT.items() for source in sources}
    named = [(edge.partition("->")[0], edge.partition("->")[2]) for edge in edges]
    return [
        (source, reader.partition("<")[0]) in known and not reader.endswith(("<q>", "<k>"))
        for source, reader in named
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_edges_are_found(seed: int) -> None:
    model = planted(seed)
    found = score_edges(model, pairs(seed), points=5)
    known = truth(found.edges)
    assert sum(known) == 14
    # The size of each edge in each row: what moves the metric up in one row may move it down in another.
    assert roc_auc_score(known, found.scores.abs().mean(0).numpy()) >= 0.95
    shuffled = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    chance = roc_auc_score([known[int(i)] for i in shuffled], found.scores.abs().mean(0).numpy())
    assert abs(chance - 0.5) < 0.2


def test_planted_nodes_are_found() -> None:
    model = planted(0)
    for method in ("exact", "integrated"):
        found = score_nodes(model, pairs(0), method=method, points=5)
        known = [name in CIRCUIT or name == "input" for name in found.nodes]
        assert roc_auc_score(known, found.scores.abs().mean(0).numpy()) >= 0.95, method
    assert len(circuit_nodes(model)) == 1 + N_LAYERS * (N_HEADS + 1)


def test_mibs_graph_is_written_with_every_edge_that_it_has(tmp_path: Path) -> None:
    model = planted(0)
    found = score_edges(model, pairs(0), points=2)
    circuit = found.order(absolute=True)[:10]
    path = write_mib(model, found, tmp_path / "graph.json", circuit=circuit)
    graph = json.loads(path.read_text())
    assert graph["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": WIDTH}
    # As EAP-IG's Graph names them, from its counts: 1 + L (H + 1) sources and L (3 H + 1) + 1 readers.
    expected = set()
    sources = ["input"]
    for layer in range(N_LAYERS):
        heads = [f"a{layer}.h{h}" for h in range(N_HEADS)]
        expected |= {f"{s}->{h}<{k}>" for s in sources for h in heads for k in "qkv"}
        sources += heads
        expected |= {f"{s}->m{layer}" for s in sources}
        sources.append(f"m{layer}")
    expected |= {f"{s}->logits" for s in sources}
    assert graph["edges"].keys() == expected
    assert graph["nodes"].keys() == {*sources, "logits"}
    assert sum(edge["in_graph"] for edge in graph["edges"].values()) == 10
    back = read_mib(path)
    assert back == pytest.approx(dict(zip(found.edges, found.mean.tolist(), strict=True)))
    with pytest.raises(InputError, match=r"a9\.h9->m9, which has no score"):
        write_mib(model, found, path, circuit=["a9.h9->m9"])
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no graph"):
        read_mib(tmp_path / "other.json")


def test_keys_that_heads_share_are_written_for_each_head(tmp_path: Path) -> None:
    from tests.quality.circuit_tasks import llava_pairs

    model: Any = mm.load("tiny-llava")
    found = score_edges(model, llava_pairs(model, "colour", 2), method="gradient")
    back = read_mib(write_mib(model, found, tmp_path / "graph.json"))
    scores = dict(zip(found.edges, found.mean.tolist(), strict=True))
    assert back["p->a2.h2<k>"] == back["p->a2.h3<k>"] == pytest.approx(scores["p->a2.g1<k>"])
    assert "p->a2.g1<k>" not in back
    assert len(back) == 642 + 4 * sum(2 + 5 * layer for layer in range(4))
