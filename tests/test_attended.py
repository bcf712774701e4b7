"""Where one position of each row stands, against a walk over each row's mask."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from mm_adapters.tokens.attended import attended_of, attended_position

MASK = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1],  # Padded on the left,
        [1, 1, 1, 0, 0, 0],  # on the right,
        [0, 1, 0, 1, 1, 0],  # with a hole,
        [1, 1, 1, 1, 1, 1],  # and not at all.
    ]
).bool()


@pytest.mark.parametrize("position", range(-3, 6))
def test_a_position_is_counted_back_over_what_is_attended_and_forward_over_everything(position: int) -> None:
    want = [[i for i, seen in enumerate(row) if seen][position] if position < 0 else position for row in MASK]
    assert attended_position(MASK, position).tolist() == want


def test_a_row_has_as_many_positions_as_it_attends_to() -> None:
    for row in MASK:
        n = int(row.sum())
        assert attended_position(row[None], -n).tolist() == [int(row.nonzero()[0])]
        with pytest.raises(mm.InputError, match=f"row 0 attends to {n} positions"):
            attended_position(row[None], -n - 1)
    with pytest.raises(mm.InputError, match="row 1 attends to 3"):
        attended_position(MASK, -4)
    with pytest.raises(mm.InputError, match="positions 0 to 5"):
        attended_position(MASK, 6)


def test_the_mask_is_that_of_the_towers_own_tokens() -> None:
    ids, own = torch.ones(2, 3).long(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    states, other = torch.zeros(2, 3, 8), torch.tensor([[1, 1, 1, 0]] * 2)
    for arguments, tokens, want in (
        ({"input_ids": ids, "attention_mask": own}, "input_ids", own),
        ({"input_ids": ids}, "input_ids", torch.ones(2, 3)),
        ({"inputs_embeds": states, "attention_mask": own}, "input_ids", own),
        ({"decoder_input_ids": ids, "attention_mask": other}, "decoder_input_ids", torch.ones(2, 3)),
        ({"decoder_input_ids": ids, "decoder_attention_mask": own}, "decoder_input_ids", own),
        ({"text": ids, "attention_mask": other}, "text", torch.ones(2, 3)),  # open_clip's tokens.
    ):
        assert torch.equal(attended_of(arguments, tokens), want.bool())
    for bad in (other, own[0], own.tolist(), torch.ones(2, 1, 3, 3)):
        with pytest.raises(mm.InputError, match="where a row ends is read off"):
            attended_of({"input_ids": ids, "attention_mask": bad}, "input_ids")


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
@pytest.mark.parametrize(
    ("name", "tower"), [("clip", "text"), ("llava", "language"), ("florence2", "language")]
)
def test_a_model_says_it_of_its_prepared_inputs(name: str, tower: str, engine: Any) -> None:
    case = tiny.CASES[name]()
    model = mm.wrap(case.model, engine=engine)
    tokens = model.check_tower(tower).input_name
    mask = case.inputs.get(
        tokens.replace("input_ids", "attention_mask"), torch.ones_like(case.inputs[tokens])
    )
    want = [int(row.nonzero().max()) for row in mask]
    assert model.row_positions(case.inputs, tower=tower).tolist() == want
    assert model.row_positions(case.inputs, 1, tower).tolist() == [1, 1]
    with pytest.raises(mm.InputError, match="vision tower reads no text"):
        model.row_positions(case.inputs, tower="vision")


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_a_model_says_it_of_raw_inputs_as_of_what_they_become(engine: Any) -> None:
    model = mm.load("tiny-llava", engine=engine)
    texts = ["what is it?", "is there a red circle on the left of it?"]
    ready = model.prepare(text=texts)
    assert len(set(ready["attention_mask"].sum(1).tolist())) == 2
    want = [int(row.nonzero().max()) for row in ready["attention_mask"]]
    assert model.row_positions({"text": texts}).tolist() == want
    assert model.row_positions({"text": texts}, -2).tolist() == [n - 1 for n in want]
