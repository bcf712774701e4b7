"""Which classes of transformers go into a TransformerBridge by their record, and why others do not."""

from __future__ import annotations

from functools import cache

from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

from mm_adapters.records import ModelRecord, Stack, Tower, records

_KINDS = {
    "contrastive": "it is two towers and a bridge is one: bridge model.vision_model or model.text_model",
    "diffusion": "a pipeline is no module that a bridge can call",
}
_STAGES = "its blocks are in stages of different widths, and a bridge has one stack of one width"
_CLASSES = {
    "BartEncoder": "TransformerLens has the whole model",
    "BlipForImageTextRetrieval": "it has no language tower, and a bridge calls it with tokens",
    "BlipForQuestionAnswering": "it answers with a loss and the image's states, in which no word is",
    "ResNetForImageClassification": "it has no stack of blocks with heads",
    "SwinForImageClassification": _STAGES,
    "Swinv2ForImageClassification": _STAGES,
    "TimmWrapperModel": "timm calls its blocks as one nn.Sequential, of which a bridge makes a list",
}
_ROLES = {
    "projector": "it is a part of a model",
    "qformer": "it is a part of a model",
    "language": "TransformerLens has the whole model with its unembedding, or it is a part of one",
    "denoiser": "a bridge calls a model with tokens or pixels, not with a noise level",
    "vae": "it has no stack of blocks with heads",
}


@cache
def architectures() -> tuple[str, ...]:
    """The classes of transformers that this package bridges and TransformerLens does not."""
    return tuple(name for name, reason in _reasons().items() if reason is None)


@cache
def cannot() -> dict[str, str]:
    """The other classes that this package has a record of, each with the reason."""
    return {name: reason for name, reason in _reasons().items() if reason is not None}


def _reasons() -> dict[str, str | None]:
    """Each class that this package has a record of, and why a bridge cannot have it; None if it can."""
    reasons: dict[str, str | None] = {}
    for record in records():
        for library, _, name in (c.partition(":") for c in record.classes):
            reason = _reason(record, library, name)
            # A class may have a record of its towers and one of itself.
            if name not in reasons or reason is None:
                reasons[name] = reason
    return dict(sorted(reasons.items()))


def _reason(record: Tower | ModelRecord, library: str, name: str) -> str | None:
    if name in SUPPORTED_ARCHITECTURES:
        return "TransformerLens has it"
    if isinstance(record, ModelRecord) and record.kind in _KINDS:
        return _KINDS[record.kind]
    if isinstance(record, Tower) and record.role in _ROLES:
        return _ROLES[record.role]
    if isinstance(record, Tower) and not _has_one_stack(record):
        return "it has no stack of blocks with heads, all of one width"
    if library != "transformers":
        return f"a bridge looks a class up by its bare name, which {library} shares with other libraries"
    return _CLASSES.get(name)


def _has_one_stack(tower: Tower) -> bool:
    stack = tower.stacks.get("blocks")
    return stack is not None and "attn.hook_pattern" in stack.parts and is_list(stack)


def is_list(stack: Stack) -> bool:
    """Whether a stack's blocks are one list of modules, which is what a bridge puts its own in place of."""
    return len(stack.paths) == 1 and stack.paths[0].count("*") == 1 and stack.paths[0].endswith(".*")
