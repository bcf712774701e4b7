"""Whether blocked attention is really gone after the softmax: a block that did nothing is an error."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mm_adapters import AttentionUnreachableError


class AttentionLeft:
    """The largest attention seen where it was blocked, over the calls of one pattern site."""

    def __init__(self) -> None:
        self.is_read = False
        self.most = 0.0

    def add(self, pattern: Tensor, blocked: Tensor) -> None:
        """Notes what one call's pattern holds where `blocked`, which broadcasts to it, is true."""
        left = pattern.abs().masked_fill(~blocked, 0.0)
        self.note(left.max() if left.numel() else left.new_zeros(()))

    def note(self, left: Tensor) -> None:
        """Notes the largest attention of one call."""
        self.is_read = True
        self.most = max(self.most, float(left))


def verify(left_by_site: Mapping[str, AttentionLeft]) -> None:
    """Raises: AttentionUnreachableError if any attention went where it was blocked, or nobody looked."""
    leaks = {site: left.most for site, left in left_by_site.items() if left.most > 0}
    unread = [site for site, left in left_by_site.items() if not left.is_read]
    if leaks or unread:
        what = ", ".join(f"{site} still has {most:.2g}" for site, most in leaks.items())
        raise AttentionUnreachableError(
            f"Blocked attention is not blocked: {what or ', '.join(unread) + ' was never read'}. "
            "The model computes its pattern another way; the result would mislead."
        )
