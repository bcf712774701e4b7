"""SAELens' verbs for a whole model and for each of its towers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sae_lens import SAE
from torch import Tensor
from transformer_lens import HookedRootModule

from integrations.sae_lens._attach import attach, attached_to, check_attached, detach
from integrations.sae_lens._sites import Tokens
from integrations.sae_lens.splice import check_fit, in_tower, written_site
from mm_adapters import HookedModel, HookedTower

SAEs = SAE[Any] | Sequence[SAE[Any]]
Hooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]


class SAEVerbs:
    """The methods of SAELens' HookedSAETransformer, under their names and with their arguments.

    `add_verbs` gives them to HookedModel and HookedTower: they are called on those. A site is named as the
    model or tower names it. While an SAE is attached, its points stand in `hook_dict` under the site that it
    writes: "SITE.hook_sae_input", "...acts_pre", "...acts_post", "...recons", "...error", "...output"; hooks,
    caches and filters take these names. SITE itself stays, and holds what the SAE makes of it.
    """

    @property
    def acts_to_saes(self) -> dict[str, SAE[Any]]:
        """The attached SAEs by the site they read."""
        root, tower = _root(self)
        prefix = f"{tower}." if tower else ""
        return {
            name.removeprefix(prefix): one.sae
            for name, one in attached_to(root).items()
            if name.startswith(prefix)
        }

    def get_sae_hook_name(self, sae: SAE[Any], internal: str = "hook_sae_acts_post") -> str:
        """The name of an SAE's point while it is attached: "SITE.hook_sae_acts_post".

        Raises: MissingSiteError for an unknown site.
        """
        root, tower = _root(self)
        out = written_site(root, sae, tower).site.name
        return f"{out.removeprefix(f'{tower}.') if tower else out}.{internal}"

    def add_sae(
        self,
        sae: SAE[Any],
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
        tokens: Tokens = "all",
    ) -> None:
        """Attaches an SAE until `reset_saes`, instead of one that is attached there.

        `use_error_term`: keeps what the SAE does not explain; None: as the SAE says.
        `exclude_special_tokens`: the tokenizer's special tokens, or these ids, stay as they are.
        `tokens`: the roles of the positions it replaces; the rest stays as it is.

        Raises: MissingSiteError for an unknown site; InputError for an SAE or options that do not fit it, for
        a wrong width at the first run.
        """
        root, tower = _root(self)
        attach(root, sae, use_error_term, exclude_special_tokens, tokens, tower)

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Takes off the SAEs of these sites, or all of them.

        Raises: MissingSiteError for a site that has no SAE; then all stay.
        """
        root, tower = _root(self)
        names = SAEVerbs.acts_to_saes.fget(self) if act_names is None else act_names  # type: ignore[misc]
        full = [in_tower(name, tower) for name in ([names] if isinstance(names, str) else names)]
        check_attached(root, full)
        detach(root, full)

    @contextmanager
    def saes(
        self,
        saes: SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
        tokens: Tokens = "all",
    ) -> Iterator[Any]:
        """The model with these SAEs attached, and afterwards (unless `reset_saes_end` is False) as it was."""
        root, tower = _root(self)
        each = [saes] if isinstance(saes, SAE) else list(saes)
        names = [check_fit(root, sae, tower).name for sae in each]
        before = {name: attached_to(root).get(name) for name in names}
        try:
            for sae in each:
                attach(root, sae, use_error_term, exclude_special_tokens, tokens, tower)
            yield self
        finally:
            if reset_saes_end:
                detach(root, names)
                for old in before.values():
                    if old is not None:
                        attach(root, old.sae, old.use_error_term, old.special, old.tokens, tower)

    def run_with_saes(
        self,
        *args: Any,
        saes: SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
        tokens: Tokens = "all",
        **kwargs: Any,
    ) -> Any:
        """The output with the SAEs spliced in. The other arguments are the model's or the tower's.

        Args:
            saes: Attached for this run; those that are attached already stay.
            reset_saes_end: False leaves them attached.
            use_error_term, exclude_special_tokens, tokens: As in `add_sae`.
        """
        with (
            _attached(self, saes, reset_saes_end, use_error_term, exclude_special_tokens, tokens),
            _inputs(self, args, kwargs),
        ):
            run: Any = self
            return run(*args, **kwargs)

    def run_with_cache_with_saes(
        self,
        *args: Any,
        saes: SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
        tokens: Tokens = "all",
        **kwargs: Any,
    ) -> Any:
        """The output and a cache, the SAEs' points in it. The other arguments are `run_with_cache`'s.

        Args:
            saes, reset_saes_end: As in `run_with_saes`.
            use_error_term, exclude_special_tokens, tokens: As in `add_sae`.
        """
        with (
            _attached(self, saes, reset_saes_end, use_error_term, exclude_special_tokens, tokens),
            _inputs(self, args, kwargs),
        ):
            run: Any = self
            return run.run_with_cache(*args, **kwargs)

    def run_with_hooks_with_saes(
        self,
        *args: Any,
        saes: SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | list[int] = False,
        tokens: Tokens = "all",
        **kwargs: Any,
    ) -> Any:
        """The output, with hooks on sites and on SAEs' points. The other arguments are `run_with_hooks`'.

        Args:
            saes, reset_saes_end: As in `run_with_saes`.
            use_error_term, exclude_special_tokens, tokens: As in `add_sae`.
        """
        with (
            _attached(self, saes, reset_saes_end, use_error_term, exclude_special_tokens, tokens),
            _inputs(self, args, kwargs),
        ):
            run: Any = self
            return run.run_with_hooks(*args, **kwargs)


_attached = SAEVerbs.saes
# Options of run_with_cache and run_with_hooks, which are no inputs.
_OF_RUNS = {"return_cache_object"}.union(
    inspect.signature(HookedRootModule.run_with_cache).parameters,
    inspect.signature(HookedRootModule.run_with_hooks).parameters,
)


def add_verbs() -> None:
    """Gives every HookedModel and HookedTower the verbs: `model.run_with_saes(...)`."""
    for name, verb in vars(SAEVerbs).items():
        if name.startswith("_"):
            continue
        for kind in (HookedModel, HookedTower):
            if getattr(kind, name, verb) is not verb:
                raise AttributeError(f"{kind.__name__}.{name} is there already.")
            setattr(kind, name, verb)


def _root(verbs: Any) -> tuple[HookedModel, str]:
    """The whole model and the tower's name; "" of the whole model."""
    return (verbs, "") if isinstance(verbs, HookedModel) else (verbs.root, verbs.name)


@contextmanager
def _inputs(verbs: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Remembers what the model is called with, for the roles of its positions."""
    root, tower = _root(verbs)
    given = {name: value for name, value in kwargs.items() if name not in _OF_RUNS}
    if tower and args:
        first = args[0] if isinstance(args[0], Tensor) else verbs.to_tokens(args[0])
        mask = {name: kwargs[name] for name in ("attention_mask",) if name in kwargs}
        given = {root.towers[tower].input_name: first, **mask}
    root.__dict__["_saes_inputs"] = given
    try:
        yield
    finally:
        root.__dict__.pop("_saes_inputs", None)
