"""Recipes as files: read from TOML, inherited (`extends`), overridden (`section.key=value`) and checked as a whole."""

import difflib
import json
import tomllib
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orthrus.errors import ConfigError
from orthrus.train.peer_sections import BlocksRecipe, DFlashRecipe, DraftRecipe, Eagle3Recipe
from orthrus.train.sections import BackboneRecipe, Recipe, ViewRecipe

KINDS: typing.Final[Mapping[str, type[Recipe]]] = {
    "backbone": BackboneRecipe,
    "view": ViewRecipe,
    "eagle3": Eagle3Recipe,
    "draft": DraftRecipe,
    "blocks": BlocksRecipe,
    "dflash": DFlashRecipe,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with everything it `extends`, apply `section.key=value` overrides and check it.

    Raises ConfigError with all faults at once; warns of a dtype that this CPU does not multiply in.
    """
    raw = _read_with_parents(Path(path), seen=())
    for override in overrides:
        raw = _merge(raw, _parse_override(override))
    recipe = recipe_from_mapping(raw, origin=str(path))
    if recipe.run.device == "cpu" and recipe.run.dtype == "bfloat16":
        _warn_of_bfloat16()
    return recipe


def _warn_of_bfloat16() -> None:
    import torch

    from orthrus.kernels.native import multiplies

    if not multiplies(torch.bfloat16):
        warnings.warn(
            "run.dtype is bfloat16, found a CPU without products in bfloat16: steps and answers take many times as "
            "long as in float32; train with --set run.dtype=float32",
            stacklevel=3,
        )


def recipe_from_mapping(raw: Mapping[str, Any], *, origin: str = "recipe") -> Recipe:
    """Check a recipe given as plain tables. Raises ConfigError as `load_recipe` does."""
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{origin}: kind: expected one of {', '.join(map(repr, KINDS))}, found {kind!r}")
    recipe_class = KINDS[kind]
    try:
        # Strict JSON mode takes lists for tuples, which is all that TOML can write.
        return recipe_class.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault, raw, recipe_class)}" for fault in error.errors())
        raise ConfigError(f"{origin}: the recipe does not fit:\n{faults}") from None


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two recipes dumped as plain tables, sorted."""
    old, new = dict(flat(before)), dict(flat(after))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested tables with their values."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: recipes extend each other in a circle; remove one `extends`")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: a recipe file is required; {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: expected a path, found {parent!r}")
    return _merge(_read_with_parents(path.parent / parent, (*seen, path.resolve())), raw)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merge key by key; every other value, lists included, is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare string
    for part in reversed(parts):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def _explain(fault: ErrorDetails, raw: Mapping[str, Any], recipe_class: type[Recipe]) -> str:
    key = _dotted(fault["loc"], raw)
    if fault["type"] == "extra_forbidden":
        valid = [name for name in _valid_keys(recipe_class) if name != "kind"]
        bare = ".".join(part for part in key.split(".") if not part.isdigit())
        nearest = difflib.get_close_matches(bare, valid, n=1, cutoff=0.0)[0]
        return f"{key}: unknown key; the nearest valid key is {nearest}"
    if fault["type"] == "missing":
        return f"{key}: required, but not given"
    if fault["type"] == "value_error":  # of a section's own: it says what it found
        return f"{key}: {fault['msg'].removeprefix('Value error, ')}"
    value = fault["input"] if isinstance(fault["input"], str | int | float | bool | list) else "a table"
    return f"{key}: {fault['msg']}; found {value!r} ({type(fault['input']).__name__})"


def _dotted(loc: tuple[int | str, ...], raw: Any) -> str:
    """The key as the recipe writes it: tags of unions, which pydantic adds to the location, are left out."""
    parts: list[str] = []
    here = raw
    for depth, part in enumerate(loc):
        present = part in here if isinstance(here, Mapping) else isinstance(part, int)
        if present:
            here = here[part]
        elif depth < len(loc) - 1 or not isinstance(here, Mapping):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _valid_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for child in _sections_in(field.annotation):
            yield from _valid_keys(child, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)
