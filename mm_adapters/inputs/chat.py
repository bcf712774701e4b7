"""Conversations as transformers writes them, as the text and the images that a model's processor takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_adapters._errors import InputError

_NO_TEMPLATE = "This model has no chat template, so it cannot take messages. Pass text= and images=."


def is_chat(value: Any) -> bool:
    """Whether this is one conversation: a list of messages, each with a role and a content."""
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)
    )


def is_chats(value: Any) -> bool:
    """Whether these are several conversations."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(map(is_chat, value))
    )


def spoken(processor: Any, chats: Sequence[Any]) -> dict[str, Any]:
    """`text` and `images` of conversations, one row each, ready for an answer to be written.

    Images stand in their messages: `{"type": "image", "image": picture or path}`.

    Raises: InputError without a chat template, or for an image that would have to be fetched.
    """
    if getattr(processor, "chat_template", None) is None:
        raise InputError(_NO_TEMPLATE)
    texts = [
        processor.apply_chat_template(_bare(c), add_generation_prompt=True, tokenize=False) for c in chats
    ]
    images = [[_picture(part) for part in _parts(chat) if part.get("type") == "image"] for chat in chats]
    return {"text": texts, "images": images} if any(images) else {"text": texts}


def _parts(chat: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [part for m in chat for part in _as_parts(m["content"])]


def _bare(chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with plain strings as parts, which templates go through."""
    return [{**m, "content": _as_parts(m["content"])} for m in chat]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _picture(part: Mapping[str, Any]) -> Any:
    for key in ("image", "path"):
        if part.get(key) is not None:
            return part[key]
    raise InputError(f"An image of a message is {dict(part)}. Give the picture or its path, as image=...")
