"""The judge: does a call, and says whether what came of it is what should."""

from __future__ import annotations

import importlib
import signal
import traceback
import warnings
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.call import Call, Expect, Mine, OneOf, Stop
from tests.fuzz.state import State, counted

SECONDS = 60
ROOMS = ("mm_adapters", "methods_multimodal", "integrations")


class Outcome(Enum):
    RIGHT = "right"
    CLEAR = "refused clearly"
    SHOWN = "refused, of what only the run shows"
    LATE = "refused late"
    FOREIGN = "foreign error"
    SILENT = "silent"
    HANG = "hang"
    STATE = "state violation"
    REFUSED = "valid call refused"


BROKEN = (Outcome.SILENT, Outcome.HANG, Outcome.STATE)


@dataclass(frozen=True)
class Verdict:
    call: Call
    outcome: Outcome
    seen: str


class StoodStill(BaseException):
    """A call took longer than it may."""


def own_classes() -> tuple[type[BaseException], ...]:
    """The error classes that the packages export."""
    classes = []
    for room in ROOMS:
        module = importlib.import_module(room)
        names = getattr(module, "__all__", [])
        classes += [getattr(module, name) for name in names if name.endswith("Error")]
    return tuple(classes)


def foreign_in(error: BaseException) -> BaseException | None:
    """The error of another library that an error shows as its cause or its context."""
    shown = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    while shown is not None:
        if type(shown).__module__.partition(".")[0] not in ROOMS and not isinstance(shown, Mine):
            return shown
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    return None


def judge(call: Call, state: State) -> Verdict:
    """Does the call; whatever happens inside is its outcome."""
    signal.signal(signal.SIGALRM, _stand_still)
    values: dict[str, Any] = {}
    error: BaseException | None = None
    torch.manual_seed(call.index)
    with warnings.catch_warnings(), counted(call.subject.model.wrapped) as ran:
        warnings.simplefilter("ignore")
        signal.alarm(SECONDS)
        try:
            values = call.perform()
        except StoodStill as stood:
            return Verdict(call, Outcome.HANG, str(stood))
        except TimeoutError as stood:
            return Verdict(call, Outcome.HANG, str(stood))
        except (Exception, SystemExit, Stop) as raised:  # noqa: BLE001
            error = raised
        finally:
            signal.alarm(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = state.changed()
        outcome, seen = _of_error(call, error, ran) if error else _of_values(call, values)
    if changed:
        return Verdict(call, Outcome.STATE, f"{'; '.join(changed)[:300]} (else: {outcome.value}, {seen})")
    return Verdict(call, outcome, seen)


def _stand_still(*_: Any) -> None:
    raise StoodStill(f"not done after {SECONDS} s")


def _of_error(call: Call, error: BaseException, ran: list[str]) -> tuple[Outcome, str]:
    text = " ".join(str(error).split())
    seen = f"{type(error).__name__}: {text[-160:] if 'Traceback' in text else text[:160]}"
    if call.expect is Expect.OWN_ERROR and isinstance(error, Mine | Stop):
        return Outcome.CLEAR, seen
    if not isinstance(error, own_classes()) or call.expect is Expect.OWN_ERROR:
        return Outcome.FOREIGN, f"{seen} {_place(error)}"
    if call.expect is Expect.VALUE:
        return Outcome.REFUSED, seen
    foreign = foreign_in(error)
    if foreign is not None:
        return Outcome.FOREIGN, f"{seen} (shows {type(foreign).__name__} of {type(foreign).__module__})"
    if not ran:
        return Outcome.CLEAR, seen
    if call.only_run_shows:
        return Outcome.SHOWN, seen
    return Outcome.LATE, f"{seen} (after {ran[0]})"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    return f"[{'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno}]"


def _of_values(call: Call, values: dict[str, Any]) -> tuple[Outcome, str]:
    if call.expect in (Expect.REFUSAL, Expect.OWN_ERROR):
        if not values:
            return Outcome.CLEAR, "told in the run"
        return Outcome.SILENT, "no error; " + ", ".join(f"{k} {shown(v)}" for k, v in values.items())[:200]
    try:
        right = call.right()
    except Exception as error:
        raise AssertionError(f"The oracle has no answer to call {call.index}, {call.line()}") from error
    for name in right:
        if name not in values:
            return Outcome.SILENT, f"{name} is missing"
        wrong = difference(values[name], right[name])
        if wrong:
            return Outcome.SILENT, f"{name}: {wrong}"
    return Outcome.RIGHT, ""


def difference(seen: Any, right: Any) -> str:
    """How what was seen is not what is right; empty if it is."""
    if isinstance(right, OneOf):
        wrong = [difference(seen, one) for one in right.answers]
        return "" if "" in wrong else wrong[0]
    if isinstance(right, list) and right and isinstance(right[0], Tensor):
        if not isinstance(seen, list | tuple) or len(seen) != len(right):
            return f"{shown(seen)}, right: {len(right)} tensors"
        return next((d for a, b in zip(seen, right, strict=True) if (d := difference(a, b))), "")
    if isinstance(right, Tensor):
        if not isinstance(seen, Tensor) or seen.shape != right.shape:
            return f"{shown(seen)}, right: {shown(right)}"
        a, b = seen.detach().double(), right.detach().double()
        # The same arithmetic by another road: what a fused kernel rounds, and no more.
        scale = float(b.nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
        if torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(scale, 1e-2), equal_nan=True):
            return ""
        return f"{shown(seen)}, off by {float((a - b).abs().max()):.3g} of {scale:.3g}"
    if isinstance(right, float) and isinstance(seen, int | float):
        return "" if abs(seen - right) <= 1e-3 * max(1.0, abs(right)) else f"{seen:.6g}, right: {right:.6g}"
    return "" if seen == right else f"{shown(seen)}, right: {shown(right)}"


def shown(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)[:80]
