"""Every public member of SAELens' two model classes works or says why not; a new one fails here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from foreign.sae_lens import test_verbs
from foreign.sae_lens.behaviours import EVERYWHERE
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

import integrations.sae_lens  # noqa: F401  (gives models the verbs)
from integrations.sae_lens._members import MEMBERS
from mm_adapters import HookedModel, HookedTower

HOSTS = (HookedSAETransformer, SAETransformerBridge)
# The behaviour that shows each of those that work.
SHOWN = {
    "acts_to_saes": "an_added_sae_stays",
    "add_sae": "a_second_sae_replaces_the_first",
    "forward": "without_saes_it_is_the_model",
    "get_sae_hook_name": "test_the_name_of_a_point_is_that_of_saelens_bridge",
    "hook_dict": "the_points_are_there_while_it_is",
    "reset_saes": "reset_takes_all_off",
    "run_with_cache_with_saes": "a_cache_with_saes",
    "run_with_hooks_with_saes": "hooks_on_an_sae_and_on_a_site",
    "run_with_saes": "a_run",
    "saes": "the_context_puts_back_what_was_there",
}


def own(kind: type) -> dict[str, Any]:
    return {name: member for name, member in vars(kind).items() if not name.startswith("_")}


def test_the_table_has_every_member_of_the_installed_version() -> None:
    assert set(MEMBERS) == {name for kind in HOSTS for name in own(kind)}


def test_what_works_is_shown_and_what_does_not_is_not_there() -> None:
    works = {name for name, reason in MEMBERS.items() if not reason}
    assert works == set(SHOWN)
    assert set(SHOWN.values()) <= {*EVERYWHERE, *vars(test_verbs)}
    for name, reason in MEMBERS.items():
        for kind in (HookedModel, HookedTower):
            # hook_dict is made for each object.
            assert hasattr(kind, name) == (not reason and name != "hook_dict"), name


@pytest.mark.parametrize("host", HOSTS)
def test_a_verb_takes_what_theirs_takes(host: Any) -> None:
    for name, theirs in own(host).items():
        ours = getattr(HookedTower, name, None)
        # forward is the tower's own, and what follows * goes on to it, or to run_with_hooks.
        if not inspect.isfunction(ours) or name == "forward":
            continue
        takes = inspect.signature(ours).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            assert set(inspect.signature(theirs).parameters) <= set(takes), name
        known = [p for p in inspect.signature(theirs).parameters if p in takes]
        assert known == [p for p in takes if p in known], name
