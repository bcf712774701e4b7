"""The layouts of one batch by tower, and by part of a tower whose positions change on the way."""

from __future__ import annotations

from mm_adapters._errors import MissingSiteError
from mm_adapters.tokens.layout import TokenLayout


class Layouts(dict[str, TokenLayout]):
    """The layout of each tower, by its name.

    A tower whose positions change on the way has none of its own: it has one for each of its parts, by
    the beginning of their sites' names ("vision.blocks.3", "vision.blocks.3.attn"). `at` knows both.
    """

    def at(self, site: str) -> TokenLayout:
        """The layout of the positions at one site ("vision.blocks.3.attn.hook_pattern").

        Raises: MissingSiteError if it is not known what they are.
        """
        layout = self.find(site)
        if layout is None:
            raise MissingSiteError(f"There is no layout of the positions of {site}, but of {self._known()}.")
        return layout

    def find(self, site: str) -> TokenLayout | None:
        """As `at`; None if it is not known what the positions are."""
        steps = site.split(".")
        beginnings = (".".join(steps[:n]) for n in range(len(steps), 0, -1))
        return next((self[name] for name in beginnings if name in self), None)

    def __missing__(self, name: str) -> TokenLayout:
        if any(part.startswith(f"{name}.") for part in self):
            raise MissingSiteError(
                f"The positions of {name} change on the way, so it has no one layout. Ask for a site's: "
                f'layout.at("{name}...hook_resid_post"). There is {self._known()}.'
            )
        raise MissingSiteError(f"There is no layout of {name}, but of {self._known()}.")

    def _known(self) -> str:
        return ", ".join(self) or "none"
