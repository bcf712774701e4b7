"""Lists of sites, drafts of records and a prompt's limit, against what is written out here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from mm_adapters.hooks.wiring import Points
from mm_adapters.records.spec import Site
from mm_adapters.sites import draft
from mm_adapters.sites.draft_block import block_lines
from mm_adapters.sites.listing import listing
from mm_adapters.sites.prompt_encoders import PromptEncoder
from mm_adapters.sites.weights import norm_bias, norm_weight


def absent(reason: str | None, name: str = "vision.blocks.0.attn.hook_q") -> Site:
    tower, stack, _, part = name.split(".", 3)
    return Site(name, tower, stack, 0, part, None, "", ("batch", "pos"), reason)


def test_what_is_absent_is_told_with_its_reason_no_wider_than_the_window() -> None:
    reason = "it is computed inside one fused call, which gives nothing of it away"
    shown = listing([absent(None), absent(reason, "vision.blocks.0.attn.hook_k")], 50).split("\n")
    assert shown[0] == "vision.blocks.0.attn.hook_q  [batch, pos]"
    assert shown[1:] == [
        "absent: vision.blocks.0.attn.hook_k: it is",
        "    computed inside one fused call, which gives",
        "    nothing of it away",
    ]
    for width, want in ((10, 40), (40, 40), (43, 43)):  # A narrow window is taken to be 40 wide.
        lines = listing([absent("x" * 200)], width).split("\n")
        assert {len(line) for line in lines[1:-1]} == {want}
    assert "\n" not in listing([absent(reason)], 500)


def test_a_block_with_torchs_own_attention_is_drafted_as_fused() -> None:
    lines = block_lines(nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True))
    assert lines[0] == '{"hook_resid_pre": Input("")}'
    assert '| fused_attention("self_attn")' in lines
    assert '| {"hook_attn_out": Output("self_attn")}' in lines
    assert lines[-1] == '| {"hook_resid_post": Output("")},'
    plain = block_lines(nn.Sequential(nn.Linear(8, 8)))
    assert not any("fused_attention" in line or "hook_attn_out" in line for line in plain)


def test_a_pipelines_part_without_blocks_is_said() -> None:
    class Bare:
        components = {"unet": nn.Sequential(nn.Conv2d(3, 3, 1)), "other": nn.Linear(1, 1), "scheduler": 3}  # noqa: RUF012

    lines = draft._pipeline(Bare())
    assert lines[0] == "# unet has no blocks that attend."
    text = "\n".join(lines)
    assert 'TowerMount("unet")' in text
    assert "other" not in text
    Bare.components = {"other": nn.Linear(1, 1)}
    assert draft._pipeline(Bare()) == []


def test_a_norm_without_weights_multiplies_by_one_and_adds_zero() -> None:
    bare = nn.LayerNorm(3, elementwise_affine=False)
    assert norm_weight(bare).tolist() == [1.0]
    assert norm_weight(bare, 1.0).tolist() == [1.0]
    assert norm_bias(bare).tolist() == [0.0]
    gain = nn.RMSNorm(3)
    nn.init.constant_(gain.weight, 0.5)
    assert norm_weight(gain).tolist() == [0.5] * 3
    assert norm_weight(gain, 1.0).tolist() == [1.5] * 3  # As Gemma stores it.
    assert norm_bias(gain).tolist() == [0.0] * 3
    both = nn.LayerNorm(2)
    nn.init.constant_(both.bias, 0.25)
    assert norm_bias(both).tolist() == [0.25] * 2


@pytest.mark.parametrize(
    ("length", "want"),
    [(77, 77), (10**9 - 1, 10**9 - 1), (10**9, None), (int(1e30), None), (None, None), (0, None)],
)
def test_a_prompts_limit_is_the_tokenizers_where_nothing_else_says_it(length: Any, want: int | None) -> None:
    class Pipeline:
        text_encoder = SimpleNamespace(config=SimpleNamespace())

        def __call__(self, prompt: Any, max_sequence_length: int | None = None) -> None: ...

    record: Any = SimpleNamespace(template=None, prompt_length=None)
    encoder = PromptEncoder("text_encoder", SimpleNamespace(model_max_length=length), Pipeline(), record)
    assert encoder.limit({}) == want
    assert encoder.limit({"max_sequence_length": 5}) == 5
    assert PromptEncoder("text_encoder", None, Pipeline(), record).limit({}) is None
    record.prompt_length = 9
    assert encoder.limit({"max_sequence_length": 5}) == 9


def test_a_table_of_positions_limits_a_prompt_unless_positions_are_rotated() -> None:
    class Pipeline:
        def __init__(self, **config: Any) -> None:
            self.text_encoder = SimpleNamespace(config=SimpleNamespace(**config))

        def __call__(self, prompt: Any) -> None: ...

    record: Any = SimpleNamespace(template=None, prompt_length=None)

    def limit(length: int | None, **config: Any) -> int | None:
        tokenizer = SimpleNamespace(model_max_length=length)
        return PromptEncoder("text_encoder", tokenizer, Pipeline(**config), record).limit({})

    assert limit(77, max_position_embeddings=64) == 64
    assert limit(32, max_position_embeddings=64) == 32
    assert limit(None, max_position_embeddings=64) == 64
    assert limit(77, max_position_embeddings=64, rope_parameters={}) == 77


def test_a_site_without_a_location_is_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match=r"^vision.blocks.0.attn.hook_q has no location\.$"):
        Points([absent(None)], lambda site: SimpleNamespace(site=site, module_hooks=[], live=False))  # type: ignore[arg-type]
