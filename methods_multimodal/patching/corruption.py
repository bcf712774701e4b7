"""Ways to corrupt an input for causal tracing, each of one thing only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from methods_multimodal.core.generators import Seed, generator
from methods_multimodal.core.model import check_sites, prepared_once
from mm_adapters import Edit, InputError, Model, Read


@dataclass(frozen=True)
class Corruption:
    """A corrupted run: its own inputs, edits, or both. `what` says how it came about.

    `positions` [row, pos] are those of the tower `tower` that differ; None where pictures do.
    """

    inputs: Mapping[str, Any]
    edits: tuple[Edit, ...] = ()
    what: str = ""
    positions: Bool[Tensor, "row pos"] | None = None
    tower: str = ""


def noised(
    model: Model,
    inputs: Mapping[str, Any],
    where: Bool[Tensor, "row pos"],
    *,
    site: str,
    scale: float = 3.0,
    seed: Seed = 0,
) -> Corruption:
    """Adds Gaussian noise to a site at some positions: `scale` times the deviation of its values there.

    Source: Meng et al. 2022, arXiv 2202.05262, section 2.1; Palit et al. 2023, arXiv 2308.14179 (of images).
    Raises: MissingSiteError; InputError if the mask does not fit, or is empty.
    """
    value = _value(model, inputs, where, site)
    spread = value[where.to(value.device)].float().std()
    noise = torch.randn(value.shape, generator=generator(seed)).to(value.device) * spread * scale
    moved = (value.float() + noise).to(value.dtype)
    return _put(inputs, site, where, moved, f"noise of {scale:g} deviations")


def averaged(
    model: Model,
    inputs: Mapping[str, Any],
    where: Bool[Tensor, "row pos"],
    *,
    site: str,
    reference: tuple[Mapping[str, Any], Bool[Tensor, "_ _"]] | None = None,
) -> Corruption:
    """Puts a mean in place of a site's values at some positions: of a reference's, or of these themselves.

    `reference` are inputs and the positions that are averaged, of pictures that have nothing to do with
    these.

    Source: Neo et al. 2024, arXiv 2410.07149 (the mean image token).
    Raises: MissingSiteError; InputError if a mask does not fit, or is empty.
    """
    value = _value(model, inputs, where, site)
    source, among = (value, where) if reference is None else (_value(model, *reference, site), reference[1])
    mean = source[among.to(source.device)].float().mean(0).to(value)
    return _put(inputs, site, where, mean.expand_as(value).clone(), "the mean value")


def resampled(
    model: Model,
    inputs: Mapping[str, Any],
    where: Bool[Tensor, "row pos"],
    *,
    site: str,
    seed: Seed = 0,
) -> Corruption:
    """Puts another row's values in place of each row's, position by position; no row keeps its own.

    Source: Chan et al. 2022, causal scrubbing; Zhang and Nanda 2024, arXiv 2309.16042.
    Raises: MissingSiteError; InputError if there is one row, or rows differ in how many positions they have.
    """
    counts = sorted(set(where.sum(1).tolist()))
    if len(where) < 2 or len(counts) > 1:
        what = "there is one row" if len(where) < 2 else f"the rows have {counts} positions"
        raise InputError(
            f"Another row's values take its place, and {what}. Give rows with as many positions."
        )
    value = _value(model, inputs, where, site)
    # A turn of all rows by as many places leaves none where it was.
    order = torch.randperm(len(where), generator=(rng := generator(seed)))
    turn = int(torch.randint(1, len(where), (), generator=rng))
    new = value.clone()
    for row, other in zip(order.tolist(), order.roll(turn).tolist(), strict=True):
        new[row, where[row].to(value.device)] = value[other, where[other].to(value.device)]
    return _put(inputs, site, where, new, "another row's values")


def other_pictures(model: Model, clean: Mapping[str, Any], corrupted: Mapping[str, Any]) -> Corruption:
    """The run of inputs with other pictures and the same text, such as semantic image pairs.

    Source: Golovanevsky et al. 2024, arXiv 2406.16320 (NOTICE).
    Raises: InputError if the text differs, no picture does, or sizes, tiles or positions do.
    """
    changed = _changed(model, clean, corrupted)
    if changed["text"] or not changed["pictures"]:
        raise InputError(_differs(changed, "pictures", "other_words"))
    return Corruption(dict(corrupted), (), "another picture")


def other_words(
    model: Model, clean: Mapping[str, Any], corrupted: Mapping[str, Any], *, tower: str = "language"
) -> Corruption:
    """The run of inputs with one word or phrase of each text replaced, and the same pictures.

    The words that take each other's place have as many tokens. A wrong constraint in place of a right one
    ("Paris" for "this place") is such a pair, as are two words that are asked about by turns.

    Source: Zhang and Nanda 2024, arXiv 2309.16042 (symmetric token replacement); Basu et al. 2024, arXiv
        2406.04236 (constraints).
    Raises: InputError if pictures differ, no text does, a text differs in more than one place, or lengths do.
    """
    name = model.check_tower(tower).input_name
    changed = _changed(model, clean, corrupted)
    if changed["pictures"] or not changed["text"]:
        raise InputError(_differs(changed, "text", "other_pictures"))
    one, two = (prepared_once(model, inputs)[name] for inputs in (clean, corrupted))
    positions = (one != two).cpu()
    for row, differs in enumerate(positions):
        at = differs.nonzero()[:, 0].tolist()
        if not at or at[-1] - at[0] + 1 != len(at):
            places = f"at the positions {at}" if at else "nowhere"
            raise InputError(
                f"Row {row}'s texts differ {places}. One word or phrase is replaced, by one of as many "
                "tokens."
            )
    return Corruption(dict(corrupted), (), "another word", positions, tower)


def _changed(model: Model, clean: Mapping[str, Any], corrupted: Mapping[str, Any]) -> dict[str, list[str]]:
    """Which arguments hold other text, and which other pictures.

    Raises: InputError if the two differ in size, in what says what stands where, or in anything else.
    """
    one, two = prepared_once(model, clean), prepared_once(model, corrupted)
    if one.keys() != two.keys():
        raise InputError(
            f"The two inputs have other arguments: {sorted(one.keys() ^ two.keys())} is in one only."
        )
    texts = {t.input_name for t in model.towers.values() if t.role in ("text", "language")}
    changed: dict[str, list[str]] = {"text": [], "pictures": []}
    for name, value in one.items():
        other = two[name]
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            if value != other:
                raise InputError(f"The two inputs differ in {name}: {value!r:.40} and {other!r:.40}.")
            continue
        if value.shape != other.shape:
            raise InputError(
                f"The two inputs differ in size: {name} is {tuple(value.shape)} and {tuple(other.shape)}. "
                "Positions would shift: give pictures of one size and as many tiles, and texts of as many "
                "tokens."
            )
        if not torch.equal(value, other):
            kind = "text" if name in texts else "pictures" if value.is_floating_point() else ""
            if not kind:
                raise InputError(
                    f"The two inputs differ in {name}, which says what stands where: give pictures of one "
                    "size, and texts padded alike."
                )
            changed[kind].append(name)
    return changed


def _differs(changed: Mapping[str, Sequence[str]], only: str, instead: str) -> str:
    names = [name for kind in changed.values() for name in kind]
    if not names:
        return f"The two inputs are the same: the {only} should differ."
    return (
        f"The two inputs differ in {' and '.join(names)}, and here only the {only} should: what an effect "
        f"is due to could not be told. Change one thing ({instead} is for the other)."
    )


def _value(
    model: Model, inputs: Mapping[str, Any], where: Bool[Tensor, "row pos"], site: str
) -> Float[Tensor, "row pos ..."]:
    check_sites(model, [site])
    if not bool(where.any(-1).all()):
        raise InputError(
            f"{site}: a row has no position to corrupt. Give a mask [row, pos] with one in each."
        )
    value = model.run(inputs, read=[Read(site)])[site]
    if value.shape[:2] != where.shape:
        raise InputError(
            f"{site} is [{value.shape[0]}, {value.shape[1]}, ...]; the mask is {list(where.shape)}."
        )
    return value


def _put(inputs: Mapping[str, Any], site: str, where: Tensor, new: Tensor, what: str) -> Corruption:
    def put(value: Tensor) -> Tensor:
        mask = where.to(value.device).reshape(*where.shape, *(1,) * (value.ndim - 2))
        return torch.where(mask, new.to(value), value)

    return Corruption(dict(inputs), (Edit(site, put),), f"{what} at {site}", where, site.partition(".")[0])
