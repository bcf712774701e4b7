"""What SAELens' HookedSAETransformer does, a function each: it takes a model and a site, and returns what it
saw. SAELens ships no tests; these are the promises of its docstrings and docs, in our words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from foreign.sae_lens.pair import ROWS, sae_at, transcoder
from torch import Tensor

Behaviour = TypeVar("Behaviour", bound=Callable[..., Any])
EVERYWHERE: dict[str, Callable[[Any, str], Any]] = {}
OF_TRANSCODERS: dict[str, Callable[[Any, str, bool], Any]] = {}
POINTS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


def everywhere(behaviour: Behaviour) -> Behaviour:
    EVERYWHERE[behaviour.__name__] = behaviour
    return behaviour


def of_transcoders(behaviour: Behaviour) -> Behaviour:
    OF_TRANSCODERS[behaviour.__name__] = behaviour
    return behaviour


def point(site: str, name: str = "acts_post") -> str:
    return f"blocks.0.{site}.hook_sae_{name}"


def local(name: str) -> str:
    """A point of a tower bears its full name."""
    return name.removeprefix("language.")


def of_saes(cache: Any) -> dict[str, Tensor]:
    """What a cache holds of SAEs."""
    return {name: cache[name] for name in cache if ".hook_sae_" in name}


def twice(value: Tensor, hook: Any) -> Tensor:
    return 2 * value


def zero_latents(value: Tensor, hook: Any) -> Tensor:
    return torch.where(torch.arange(value.shape[-1]) % 3 == 0, 0.0, value)


# ---- attaching and taking off --------------------------------------------------------------------


@everywhere
def without_saes_it_is_the_model(model: Any, site: str) -> Any:
    return model.acts_to_saes, model(ROWS)


@everywhere
def an_added_sae_stays(model: Any, site: str) -> Any:
    sae = sae_at(site)
    model.add_sae(sae)
    return [name for name, at in model.acts_to_saes.items() if at is sae], model(ROWS), model(ROWS)


@everywhere
def a_second_sae_replaces_the_first(model: Any, site: str) -> Any:
    second = sae_at(site, seed=1)
    model.add_sae(sae_at(site))
    model.add_sae(second)
    return len(model.acts_to_saes), model.acts_to_saes[f"blocks.0.{site}"] is second, model(ROWS)


@everywhere
def reset_takes_all_off(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site))
    model.add_sae(sae_at(site, layer=1))
    model.reset_saes()
    return model.acts_to_saes, model(ROWS)


@everywhere
def reset_takes_one_off_by_name(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site))
    model.add_sae(sae_at(site, layer=1))
    model.reset_saes(f"blocks.0.{site}")
    return list(model.acts_to_saes), model(ROWS)


@everywhere
def reset_takes_a_list(model: Any, site: str) -> Any:
    for layer in (0, 1):
        model.add_sae(sae_at(site, layer=layer))
    model.reset_saes([f"blocks.1.{site}"])
    return list(model.acts_to_saes), model(ROWS)


@everywhere
def reset_of_nothing_is_nothing(model: Any, site: str) -> Any:
    model.reset_saes()
    return model(ROWS)


@everywhere
def the_points_are_there_while_it_is(model: Any, site: str) -> Any:
    names = [point(site, name) for name in POINTS]
    model.add_sae(sae_at(site))
    there = [name in model.hook_dict for name in names]
    model.reset_saes()
    return there, [name in model.hook_dict for name in names]


@everywhere
def the_site_is_a_point_again_after_it(model: Any, site: str) -> Any:
    model.run_with_saes(ROWS, saes=[sae_at(site)])
    return model.run_with_cache(ROWS)[1][f"blocks.0.{site}"]


# ---- the context ---------------------------------------------------------------------------------


@everywhere
def the_context_attaches_inside(model: Any, site: str) -> Any:
    with model.saes([sae_at(site)]) as inside:
        return inside is model, list(model.acts_to_saes), model(ROWS)


@everywhere
def the_context_leaves_nothing(model: Any, site: str) -> Any:
    with model.saes([sae_at(site), sae_at(site, layer=1)]):
        pass
    return model.acts_to_saes, model(ROWS)


@everywhere
def the_context_takes_one_sae(model: Any, site: str) -> Any:
    with model.saes(sae_at(site)):
        return model(ROWS)


@everywhere
def the_context_puts_back_what_was_there(model: Any, site: str) -> Any:
    before = sae_at(site)
    model.add_sae(before, use_error_term=False)
    with model.saes([sae_at(site, seed=1)], use_error_term=True):
        inside = model(ROWS)
    return model.acts_to_saes[f"blocks.0.{site}"] is before, inside, model(ROWS)


@everywhere
def the_context_keeps_others(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site, layer=1))
    with model.saes([sae_at(site)]):
        inside = model(ROWS)
    return inside, list(model.acts_to_saes), model(ROWS)


@everywhere
def the_context_may_keep_its_own(model: Any, site: str) -> Any:
    with model.saes([sae_at(site)], reset_saes_end=False):
        pass
    return list(model.acts_to_saes), model(ROWS)


@everywhere
def an_exception_leaves_nothing(model: Any, site: str) -> Any:
    try:
        with model.saes([sae_at(site)]):
            raise KeyError(site)
    except KeyError:
        return model.acts_to_saes, model(ROWS)


# ---- runs ----------------------------------------------------------------------------------------


@everywhere
def a_run(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, saes=[sae_at(site)]), model.acts_to_saes, model(ROWS)


@everywhere
def a_run_with_one_sae(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, saes=sae_at(site))


@everywhere
def a_run_with_saes_of_two_layers(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, saes=[sae_at(site), sae_at(site, layer=1, seed=2)])


@everywhere
def a_run_that_keeps_its_saes(model: Any, site: str) -> Any:
    first = model.run_with_saes(ROWS, saes=[sae_at(site)], reset_saes_end=False)
    return first, list(model.acts_to_saes), model(ROWS)


@everywhere
def a_run_returns_the_loss(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, return_type="loss", saes=[sae_at(site)])


@everywhere
def a_run_returns_both(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, return_type="both", saes=[sae_at(site)])


@everywhere
def a_run_returns_nothing(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, return_type=None, saes=[sae_at(site)])


@everywhere
def a_run_on_a_string(model: Any, site: str) -> Any:
    return model.run_with_saes("a red circle on white", saes=[sae_at(site)])


# ---- the error term ------------------------------------------------------------------------------


@everywhere
def the_error_term_gives_the_model_back(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, saes=[sae_at(site)], use_error_term=True)


@everywhere
def an_sae_says_itself_whether(model: Any, site: str) -> Any:
    sae = sae_at(site)
    sae.use_error_term = True
    return model.run_with_saes(ROWS, saes=[sae])


@everywhere
def a_run_says_otherwise(model: Any, site: str) -> Any:
    sae = sae_at(site)
    sae.use_error_term = True
    return model.run_with_saes(ROWS, saes=[sae], use_error_term=False), sae.use_error_term


@everywhere
def added_with_the_error_term(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site), use_error_term=True)
    return of_saes(model.run_with_cache(ROWS)[1])


@everywhere
def the_error_is_that_of_unchanged_latents(model: Any, site: str) -> Any:
    hooks = [(point(site), zero_latents)]
    model.add_sae(sae_at(site), use_error_term=True)
    return model.run_with_hooks(ROWS, fwd_hooks=hooks)


@everywhere
def the_error_takes_a_hook(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site), use_error_term=True)
    return model.run_with_hooks(ROWS, fwd_hooks=[(point(site, "error"), lambda value, hook: 0 * value)])


# ---- caches --------------------------------------------------------------------------------------


@everywhere
def a_cache_after_add_holds_every_point(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site))
    logits, cache = model.run_with_cache(ROWS)
    return logits, of_saes(cache)


@everywhere
def a_cache_with_saes(model: Any, site: str) -> Any:
    logits, cache = model.run_with_cache_with_saes(ROWS, saes=[sae_at(site)])
    later = {name: cache[name] for name in ("blocks.1.hook_resid_pre", "ln_final.hook_normalized")}
    return logits, of_saes(cache), later, model.acts_to_saes


@everywhere
def a_cache_with_the_error_term(model: Any, site: str) -> Any:
    return of_saes(model.run_with_cache_with_saes(ROWS, saes=[sae_at(site)], use_error_term=True)[1])


@everywhere
def a_cache_as_a_dict(model: Any, site: str) -> Any:
    _, cache = model.run_with_cache_with_saes(ROWS, saes=[sae_at(site)], return_cache_object=False)
    return type(cache), of_saes(cache)


@everywhere
def a_cache_without_batch(model: Any, site: str) -> Any:
    _, cache = model.run_with_cache_with_saes(ROWS[:1], saes=[sae_at(site)], remove_batch_dim=True)
    return of_saes(cache), cache["blocks.1.hook_resid_pre"]


@everywhere
def a_cache_of_one_name(model: Any, site: str) -> Any:
    names = point(site)
    return dict(model.run_with_cache_with_saes(ROWS, saes=[sae_at(site)], names_filter=names)[1])


@everywhere
def a_cache_of_a_list(model: Any, site: str) -> Any:
    names = [point(site), point(site, "recons"), "blocks.1.hook_resid_post"]
    return dict(model.run_with_cache_with_saes(ROWS, saes=[sae_at(site)], names_filter=names)[1])


@everywhere
def a_cache_by_a_function(model: Any, site: str) -> Any:
    names = lambda name: name.endswith("hook_sae_acts_post")  # noqa: E731
    saes = [sae_at(site), sae_at(site, layer=1)]
    return dict(model.run_with_cache_with_saes(ROWS, saes=saes, names_filter=names)[1])


@everywhere
def a_cache_of_some_positions(model: Any, site: str) -> Any:
    names = point(site)
    saes = [sae_at(site)]
    return dict(model.run_with_cache_with_saes(ROWS, saes=saes, names_filter=names, pos_slice=-1)[1])


@everywhere
def a_cache_with_gradients(model: Any, site: str) -> Any:
    names = lambda name: ".hook_sae_acts_" in name  # noqa: E731
    saes = [sae_at(site)]
    _, cache = model.run_with_cache_with_saes(
        ROWS, saes=saes, names_filter=names, incl_bwd=True, return_type="loss"
    )
    return of_saes(cache)


@everywhere
def caching_hooks(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site))
    cache, forward, backward = model.get_caching_hooks(lambda name: ".hook_sae_" in name)
    model.run_with_hooks(ROWS, fwd_hooks=[pair for pair in forward if "error" not in pair[0]])
    return {local(name): value for name, value in cache.items()}, backward


# ---- hooks ---------------------------------------------------------------------------------------


@everywhere
def a_hook_changes_latents(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site))
    return model.run_with_hooks(ROWS, fwd_hooks=[(point(site), zero_latents)]), list(model.acts_to_saes)


def hooks_with_saes(name: str, model: Any, site: str) -> Any:
    saes = [sae_at(site)]
    edited = model.run_with_hooks_with_saes(ROWS, saes=saes, fwd_hooks=[(point(site, name), twice)])
    return edited, model.acts_to_saes, model(ROWS)


@everywhere
def a_hook_that_looks(model: Any, site: str) -> Any:
    seen = []
    hooks = [(point(site), lambda value, hook: seen.append((local(hook.name), value.clone())))]
    logits = model.run_with_hooks_with_saes(ROWS, saes=[sae_at(site)], fwd_hooks=hooks)
    return logits, seen


@everywhere
def hooks_by_a_function_of_names(model: Any, site: str) -> Any:
    hooks = [(lambda name: name.endswith("hook_sae_acts_post"), zero_latents)]
    saes = [sae_at(site), sae_at(site, layer=1)]
    return model.run_with_hooks_with_saes(ROWS, saes=saes, fwd_hooks=hooks)


@everywhere
def hooks_on_an_sae_and_on_a_site(model: Any, site: str) -> Any:
    hooks = [(point(site), twice), ("blocks.1.hook_mlp_out", twice)]
    return model.run_with_hooks_with_saes(ROWS, saes=[sae_at(site)], fwd_hooks=hooks)


@everywhere
def a_hook_may_stay_after_the_run(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site))
    model.run_with_hooks(ROWS, fwd_hooks=[(point(site), twice)], reset_hooks_end=False)
    kept = model(ROWS)
    model.reset_hooks()
    return kept, model(ROWS)


@everywhere
def a_permanent_hook(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site))
    model.add_hook(point(site), twice, is_permanent=True)
    model.reset_hooks()
    kept = model(ROWS)
    model.reset_hooks(including_permanent=True)
    return kept, model(ROWS)


@everywhere
def a_hook_in_the_context_of_hooks(model: Any, site: str) -> Any:
    with model.saes([sae_at(site)]), model.hooks(fwd_hooks=[(point(site), zero_latents)]):
        inside = model(ROWS)
    return inside, model(ROWS)


@everywhere
def two_hooks_in_their_order(model: Any, site: str) -> Any:
    add = lambda value, hook: value + 1  # noqa: E731
    hooks = [(point(site), twice), (point(site), add)]
    return model.run_with_hooks_with_saes(ROWS, saes=[sae_at(site)], fwd_hooks=hooks)


@everywhere
def a_hook_notes_in_its_context(model: Any, site: str) -> Any:
    def note(value: Tensor, hook: Any) -> None:
        hook.ctx["mean"] = value.mean()

    model.add_sae(sae_at(site))
    model.run_with_hooks(ROWS, fwd_hooks=[(point(site), note)])
    held = dict(model.hook_dict[point(site)].ctx)
    model.reset_hooks()
    return held, model.hook_dict[point(site)].ctx


@everywhere
def backward_hooks(model: Any, site: str) -> Any:
    seen = {}
    hooks = [(point(site), lambda grad, hook: seen.update({local(hook.name): grad.clone()}))]
    loss = model.run_with_hooks_with_saes(
        ROWS, return_type="loss", saes=[sae_at(site)], bwd_hooks=hooks, reset_hooks_end=False
    )
    loss.backward()
    return loss, seen


@everywhere
def gradients_reach_the_saes_weights(model: Any, site: str) -> Any:
    sae = sae_at(site)
    model.run_with_saes(ROWS, return_type="loss", saes=[sae]).backward()
    return {name: p.grad for name, p in sae.named_parameters()}


@everywhere
def gradients_with_the_error_term(model: Any, site: str) -> Any:
    sae = sae_at(site)
    model.run_with_saes(ROWS, return_type="loss", saes=[sae], use_error_term=True).backward()
    return {name: p.grad for name, p in sae.named_parameters()}


# ---- special tokens ------------------------------------------------------------------------------


@everywhere
def tokens_of_a_list_are_left_out(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, saes=[sae_at(site)], exclude_special_tokens=[2, 11])


@everywhere
def the_tokenizers_special_tokens_are_left_out(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, saes=[sae_at(site)], exclude_special_tokens=True)


@everywhere
def left_out_of_a_string(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site), exclude_special_tokens=True)
    return model("a red circle"), model("a red circle on white")


@everywhere
def the_cache_of_what_is_left_out(model: Any, site: str) -> Any:
    given = {"use_error_term": True, "exclude_special_tokens": [2, 11]}
    return of_saes(model.run_with_cache_with_saes(ROWS, saes=[sae_at(site)], **given)[1])


@everywhere
def hooks_where_tokens_are_left_out(model: Any, site: str) -> Any:
    given = {"exclude_special_tokens": [2], "fwd_hooks": [(point(site), zero_latents)]}
    return model.run_with_hooks_with_saes(ROWS, saes=[sae_at(site)], **given)


@everywhere
def what_is_left_out_is_put_back(model: Any, site: str) -> Any:
    model.add_sae(sae_at(site), exclude_special_tokens=[7])
    with model.saes([sae_at(site, seed=1)]):
        inside = model(ROWS)
    return inside, model(ROWS)


# ---- kinds of SAEs -------------------------------------------------------------------------------


def of_kind(kind: str, model: Any, site: str) -> Any:
    saes = [sae_at(site, kind=kind)]
    logits, cache = model.run_with_cache_with_saes(ROWS, saes=saes, use_error_term=True)
    return logits, of_saes(cache)


@everywhere
def with_normalized_input(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, saes=[sae_at(site, normalize_activations="layer_norm")])


@everywhere
def without_the_decoders_bias_in_the_input(model: Any, site: str) -> Any:
    return model.run_with_saes(ROWS, saes=[sae_at(site, apply_b_dec_to_input=False)])


@everywhere
def with_folded_decoder_norms(model: Any, site: str) -> Any:
    sae = sae_at(site)
    sae.fold_W_dec_norm()
    return of_saes(model.run_with_cache_with_saes(ROWS, saes=[sae])[1])


@everywhere
def an_sae_is_its_own_after_it(model: Any, site: str) -> Any:
    sae, value = sae_at(site), model.run_with_cache(ROWS)[1][f"blocks.0.{site}"]
    model.run_with_saes(ROWS, saes=[sae])
    return sae(value), sae.encode(value)


for _name in ("input", "acts_pre", "recons", "output"):
    EVERYWHERE[f"a_hook_at_{_name}"] = partial(hooks_with_saes, _name)
for _kind in ("gated", "jumprelu", "topk"):
    EVERYWHERE[f"a_{_kind}_sae"] = partial(of_kind, _kind)


# ---- transcoders ---------------------------------------------------------------------------------


@of_transcoders
def a_transcoder_runs(model: Any, read: str, skip: bool) -> Any:
    return model.run_with_saes(ROWS, saes=[transcoder(read, skip)]), model.acts_to_saes, model(ROWS)


@of_transcoders
def a_transcoder_with_its_error(model: Any, read: str, skip: bool) -> Any:
    given = {"saes": [transcoder(read, skip)], "use_error_term": True}
    logits, cache = model.run_with_cache_with_saes(ROWS, **given)
    return logits, of_saes(cache)


@of_transcoders
def a_transcoder_takes_hooks(model: Any, read: str, skip: bool) -> Any:
    hooks = [("blocks.0.hook_mlp_out.hook_sae_acts_post", zero_latents)]
    return model.run_with_hooks_with_saes(ROWS, saes=[transcoder(read, skip)], fwd_hooks=hooks)


@of_transcoders
def a_transcoder_is_taken_off(model: Any, read: str, skip: bool) -> Any:
    model.add_sae(transcoder(read, skip))
    attached = model(ROWS)
    model.reset_saes(f"blocks.0.{read}")
    return attached, model.acts_to_saes, model(ROWS)


@of_transcoders
def a_transcoder_and_an_sae(model: Any, read: str, skip: bool) -> Any:
    return model.run_with_saes(ROWS, saes=[transcoder(read, skip), sae_at("hook_resid_pre", layer=1)])
