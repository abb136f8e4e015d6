"""The base class of all settings, which converts and checks values; checks of values from JSON.

This module does not import torch, which takes seconds, so that `--help` is printed at once; only
the message about an unknown network does.
"""

import ast
import difflib
import inspect
import math
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fastiat.system.errors import InputError, one_line

Arch = Literal["preact18", "wrn28_10", "wrn34_10", "mlp6"]
DatasetName = Literal["cifar10", "cifar100", "svhn", "fashion-mnist", "digits", "folder"]
DATASETS: tuple[str, ...] = get_args(DatasetName)
ARCHS: tuple[str, ...] = get_args(Arch)
IN_PYTHON = "python"
"""Data set of a run whose images were given to `fastiat.fit`: only its Python program has them."""
LIBRARIES = ("torchvision", "timm")
"""Libraries whose networks `--arch LIBRARY:NAME` names."""
LARGEST = 2**32
"""The largest number in a setting or a result: larger ones could overflow in later sums."""
SMALLEST_SIDE = 8
"""Side, in pixels, of the smallest images that the networks accept."""
LARGEST_SIDE = 2048
"""Side, in pixels, of the largest images that `--image-size` gives."""
MOST_STEPS = 999_999
"""The largest number of steps of an attack."""
PATHS = {"init", "out", "data_dir", "dataset", "extra", "runs", "run", "partner", "dir"}
"""Settings that are, or may be, paths."""


class Settings:
    """Base class of all settings: frozen dataclasses with a docstring under each field."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that are positional arguments on the command line, not flags."""
    bare: ClassVar[dict[str, Any]] = {}
    """Maps each field whose flag may be given without a value to the value of the bare flag."""

    def __post_init__(self) -> None:
        """Convert each value to its field's type (see `converted`), and expand `~` in paths."""
        for name, hint in hints_of(type(self)).items():
            value = converted(getattr(self, name), hint)
            value = norm_name(value) if name == "norm" else value
            if name in PATHS and isinstance(value, tuple):
                value = tuple(expanded(path) if isinstance(path, str) else path for path in value)
            elif name in PATHS and isinstance(value, str):
                value = expanded(value)
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """Raise `InputError`, which names the flag, for a value of wrong type or out of range."""
        check_types(self)

    @classmethod
    @cache
    def docs(cls) -> dict[str, str]:
        """Map every field to the docstring written under it."""
        found: dict[str, str] = {}
        # Bases come first, so that the docstring in a subclass replaces that of the base.
        for kind in reversed(cls.__mro__[:-1]):
            body = _classes(kind.__module__)[kind.__name__]
            for field, text in zip(body.body, body.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name)
                    assert isinstance(text.value, ast.Constant)
                    found[field.target.id] = " ".join(str(text.value.value).split())
        return found


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Return the syntax trees of the classes of a module, by name."""
    # Not `inspect.getsource` of each class, which parses the whole file every time.
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Map the fields of a dataclass to their annotations."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def converted(value: Any, hint: Any) -> Any:
    """Return a value converted to its annotated type, if that loses no information.

    NumPy scalars and 0-dimensional tensors become Python numbers, "8/255" and `Fraction` become a
    float, paths become text, lists become tuples, and a single value becomes a tuple of one. Any
    other value is returned unchanged, and `check_types` refuses it.
    """
    if type(value).__module__ != "builtins" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if fits(value, hint):
        return value
    options = [option for option in get_args(hint) or (hint,) if option is not type(None)]
    if get_origin(hint) is Literal:
        return value
    several = next((option for option in (hint, *options) if get_origin(option) is tuple), None)
    if several is not None:
        items = value if isinstance(value, list | tuple | range) else (value,)
        item_type = get_args(several)[0]
        turned = tuple(converted(item, item_type) for item in items)
        # Numbers may be written among words, such as mix points.
        if item_type is str and isinstance(value, list | tuple):
            turned = tuple(str(i) if type(i) in (int, float) else i for i in turned)
        return turned if fits(turned, several) else value
    if float in options:
        if isinstance(value, Fraction | Decimal):
            return float(value)
        if isinstance(value, str):
            try:
                return number(value)
            except ValueError:
                return value
    return value


def norm_name(given: Any) -> Any:
    """Return "linf" or "l2" for its other spellings, such as "L_inf" and "Linf", else `given`."""
    bare = str(given).lower().replace("_", "").replace("-", "")
    return bare if bare in ("linf", "l2") else given


def number(text: str) -> float:
    """Read a number, or a fraction such as 8/255; raise `ValueError` for other text."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ArithmeticError):
        raise ValueError(f"{text!r} is not a number such as 0.03 or 8/255") from None


def number_text(value: float, form: str = "") -> str:
    """Return a number as text that `number` reads: k/255 if it is that exactly, else in `form`."""
    levels = round(255 * value)
    exact = 0 < levels < 255 and value == levels / 255
    return f"{levels}/255" if exact else format(value, form)


def check_types(config: Any) -> None:
    """Raise `InputError`, which names the flag, unless every field fits its annotation."""
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        if not fits(value, hint):
            flag = named(config, name)
            raise InputError(f"{flag} is {one_line(repr(value))[:50]}: {_wanted(value, hint)}")


def _wanted(value: Any, hint: Any) -> str:
    """Return which values an annotation allows, and which of them is close to `value`."""
    options = get_args(hint) if get_origin(hint) not in (Literal, tuple) else ()
    if options:
        hint = next(option for option in options if option is not type(None))
    if get_origin(hint) is Literal:
        close = did_you_mean(value, get_args(hint))
        return f"choose from {', '.join(map(repr, get_args(hint)))}{close}"
    if get_origin(hint) is tuple:
        return f"give a tuple of {_PLURALS[get_args(hint)[0]]}"
    return f"give {_SINGULARS[hint]}"


_SINGULARS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number such as 0.03 or 8/255",
    str: "a string",
}
_PLURALS = {int: "whole numbers", float: "numbers such as 0.03 or 8/255", str: "strings"}


CLOSE = 0.75
"""Similarity, from 0 to 1 (`difflib.SequenceMatcher.ratio`), from which a name is suggested.

"fgms" and "fgsm" have 0.75; "resnet18" and "preact18", which are two networks, 0.62."""


def closest(given: Any, known: Iterable[str], n: int) -> list[str]:
    """Return up to `n` of the known names that are close to the given one, the closest first.

    Upper case and the dashes of flags do not count.
    """
    bare = {name.lstrip("-").lower(): name for name in known}
    close = difflib.get_close_matches(str(given).lstrip("-").lower(), bare, n, CLOSE)
    return [bare[name] for name in close]


def did_you_mean(given: Any, known: Iterable[str]) -> str:
    """Return ", did you mean X?" for the known name closest to the given one, or ""."""
    return "".join(f", did you mean {name}?" for name in closest(given, known, 1))


def check_ranges(config: Any, positive: set[str]) -> None:
    """Raise `InputError`, which names the flag, for a value of wrong type or out of range.

    Numbers must be finite, at most `LARGEST`, and at least 0, or above 0 for the fields in
    `positive`. Text must not be empty.
    """
    check_types(config)
    for field in fields(config):
        given, flag = getattr(config, field.name), named(config, field.name)
        # A command that needs runs says so itself; settings may be checked before any is named.
        if given == "" or (given == () and field.name not in config.positional):
            raise InputError(f"{flag} is empty: give a value, or leave out the setting")
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{flag} is {value}: give a finite number")
            if value < 0 or (value == 0 and field.name in positive):
                least = "above 0" if field.name in positive else "of at least 0"
                raise InputError(f"{flag} is {value}: give a number {least}")
            if value > LARGEST:
                raise InputError(f"{flag} is {str(value)[:20]}: give a number of at most {LARGEST}")


def expanded(path: Any) -> Any:
    """Return a path as text, with `~` or `~user` expanded; any other value unchanged.

    Raises `InputError` if there is no such home folder, and nothing has that name here either.
    """
    if not isinstance(path, str | os.PathLike):
        return path
    text = os.path.expanduser(os.fspath(path))
    first = str(text).split("/")[0]
    if first.startswith("~") and not os.path.lexists(first):
        raise InputError(f"{text}: there is no home folder {first}: give the whole path")
    return text


def is_beton(path: object) -> bool:
    """Whether a data set is given as the path of a .beton file."""
    return str(path or "").endswith(".beton")


def check_dataset(name: str | None) -> None:
    """Raise `InputError` unless a data set is one of `DATASETS`, a path to a .beton, or None."""
    if name is not None and name not in (*DATASETS, IN_PYTHON) and not is_beton(name):
        if os.path.isdir(name):
            raise InputError(f"{name} is a folder: give --dataset folder --data-dir {name}")
        names = ", ".join(map(repr, DATASETS))
        close = did_you_mean(name, DATASETS)
        raise InputError(f"--dataset {name!r}: choose from {names}, or name a .beton file{close}")


def is_own_arch(arch: str) -> bool:
    """Whether `arch` names a network of the user's own, MODULE:FUNCTION."""
    return ":" in arch and arch.partition(":")[0] not in LIBRARIES


def check_arch(arch: str | None) -> None:
    """Raise `InputError` unless a network is one of `ARCHS`, LIBRARY:NAME or MODULE:FUNCTION."""
    if arch is None or arch in ARCHS:
        return
    module, _, name = arch.rpartition(":")
    if module and all(part.isidentifier() for part in name.split(".")):
        return
    raise InputError(
        f"--arch {arch[:50]!r}: choose from {', '.join(ARCHS)}, torchvision:NAME, timm:NAME, "
        f"MODULE:FUNCTION and FILE.py:FUNCTION{_in_library(arch) or did_you_mean(arch, ARCHS)}"
    )


def _in_library(name: str) -> str:
    """Return ", did you mean LIBRARY:NAME?" for a name of a library's network, else ""."""
    # These imports take seconds: they are for this message alone.
    from torchvision import models as zoo  # type: ignore[import-untyped]

    found = ["torchvision"] * (name in zoo.list_models(module=zoo))
    with suppress(ImportError):
        import timm

        found += ["timm"] * timm.is_model(name)
    names = " or ".join(f"{library}:{name}" for library in found)
    return f", did you mean {names}?" if names else ""


def check_once(runs: tuple[str, ...]) -> None:
    """Raise `InputError` for a run that is given twice, also by two spellings of its path."""
    places = [os.path.realpath(run) for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{run} is named twice: name different runs")


def check_unit(config: Any) -> None:
    """Raise `InputError` for an eps or alpha above 1, which is meant for pixels in [0, 255]."""
    for name in ("eps", "alpha"):
        given = getattr(config, name, None)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and value > 1:
                raise InputError(
                    f"--{name} is {value:g}, but pixels are in [0, 1]: give, say, {value:g}/255"
                )


def steps_of(attack: str) -> int:
    """Return the number of gradient steps of an attack: none 0, fgsm 1, pgd-K and pgd-K-targeted K.

    Raises `InputError` for any other name.
    """
    if attack in ("none", "fgsm"):
        return ("none", "fgsm").index(attack)
    if found := re.fullmatch("pgd-([1-9][0-9]{0,5})(-targeted)?", attack):
        return int(found[1])
    close = did_you_mean(attack, ("none", "fgsm"))
    raise InputError(
        f"unknown attack {attack[:50]!r}: choose from none, fgsm, pgd-K such as pgd-20, and "
        f"pgd-K-targeted{close}"
    )


def flag_of(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def check_runs(runs: tuple[str, ...]) -> None:
    """Raise `InputError` if no run is named."""
    if not runs:
        raise InputError("RUNS is empty: name at least one run directory")


def named(config: Any, name: str) -> str:
    """Return a field as messages name it: its flag, or RUNS if it is positional."""
    return name.upper() if name in config.positional else flag_of(name)


def validated(values: Any, kind: Any, name: str = "it") -> Any:
    """Return `values`, parsed from JSON, as `kind`: a dataclass, or a list or tuple of one.

    The JSON must have every field of the dataclass and no other, each of its annotated type. A JSON
    list becomes a tuple where the annotation is one, and dataclasses may be nested. Raises
    `InputError` for the first wrong value; the message uses `name` as the name of `values`.
    """
    if get_origin(kind) in (list, tuple) and isinstance(values, list):
        return get_origin(kind)(validated(value, get_args(kind)[0], name) for value in values)
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(values, dict):
            raise InputError(f"{name} is not a JSON object")
        hints = hints_of(kind)
        for field in (*values, *hints):
            if field not in hints:
                raise InputError(f"{name} has the unknown field {field[:50]!r}")
            if field not in values:
                raise InputError(f"{name} lacks the field {field!r}")
        return kind(**{f: validated(values[f], hint, repr(f)) for f, hint in hints.items()})
    # `converted` is not used here, because it accepts text such as "8/255" as a number.
    value = tuple(values) if isinstance(values, list) and fits(tuple(values), kind) else values
    if not fits(value, kind):
        raise InputError(f"{name} cannot be {one_line(repr(value))[:50]}")
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has its annotated type; an int is a float, but a bool is neither."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is dict:
        key, item = get_args(hint)
        return isinstance(value, dict) and all(
            fits(k, key) and fits(v, item) for k, v in value.items()
        )
    if get_args(hint):
        return any(fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint
