"""Settings: what every configuration shares, the checks of values, and JSON.

Nothing here imports torch, so that help is printed at once.
"""

import ast
import difflib
import inspect
import math
import os
import re
import textwrap
from collections.abc import Iterable
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fastiat.system.errors import InputError

Arch = Literal["preact18", "wrn28_10", "wrn34_10", "mlp6"]
DatasetName = Literal["cifar10", "svhn", "fashion-mnist", "digits", "folder"]
DATASETS: tuple[str, ...] = get_args(DatasetName)
LARGEST = 2**32
"""No number of ours is larger; what is would overflow further in."""
SMALLEST_SIDE = 8
"""Pixels of the smallest images that the networks take."""
MOST_STEPS = 999_999
"""No attack takes more steps."""
PATHS = {"out", "data_dir", "dataset", "runs", "run", "partner", "dir"}
"""Settings that are, or may be, paths."""


class Settings:
    """What every configuration shares: the field docstrings, readable at run time."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that are arguments of the command line, not flags."""
    bare: ClassVar[dict[str, Any]] = {}
    """Values of the fields whose flag can stand without any."""
    added: ClassVar[tuple[str, ...]] = ()
    """Fields that files of earlier versions lack; they then have their defaults."""

    def __post_init__(self) -> None:
        """Take what Python callers write for a field's type (`converted`); expand `~` in paths."""
        for name, hint in hints_of(type(self)).items():
            value = converted(getattr(self, name), hint)
            if name in PATHS and isinstance(value, tuple):
                value = tuple(expanded(path) if isinstance(path, str) else path for path in value)
            elif name in PATHS and isinstance(value, str):
                value = expanded(value)
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value of another type or outside its range."""
        check_types(self)

    @classmethod
    @cache
    def docs(cls) -> dict[str, str]:
        """Map every field to the docstring written under it."""
        found: dict[str, str] = {}
        # Bases come first, so that a subclass can document a field that it redefines.
        for kind in reversed(cls.__mro__[:-1]):
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(body, ast.ClassDef)
            for field, text in zip(body.body, body.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name)
                    assert isinstance(text.value, ast.Constant)
                    found[field.target.id] = " ".join(str(text.value.value).split())
        return found


def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Map the fields of a dataclass to their annotations."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def converted(value: Any, hint: Any) -> Any:
    """Return a value as the type that the annotation asks for, where no information is lost.

    NumPy scalars and tensors of one element become Python numbers, "8/255" and `Fraction` a float,
    paths text, lists tuples, and a single value a tuple of one. Anything else is returned as it
    is, for `check_types` to refuse.
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
    several = hint if get_origin(hint) is tuple else None
    for option in options if several is None else ():
        if get_origin(option) is tuple:
            several = option
    if several is not None:
        items = value if isinstance(value, list | tuple | range) else (value,)
        turned = tuple(converted(item, get_args(several)[0]) for item in items)
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


def number(text: str) -> float:
    """Read a number, or a fraction such as 8/255; raise `ValueError` for other text."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ArithmeticError):
        raise ValueError(f"{text!r} is not a number such as 0.03 or 8/255") from None


def check_types(config: Any) -> None:
    """Raise `InputError`, naming the flag, unless every field fits its annotation."""
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        if not fits(value, hint):
            # A positional setting, such as the runs, has no flag.
            named = name.upper() if name in config.positional else flag_of(name)
            raise InputError(f"{named} is {repr(value)[:50]}: {_wanted(value, hint)}")


def _wanted(value: Any, hint: Any) -> str:
    """Say which values an annotation allows, and which of them may be meant."""
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
    str: "text",
}
_PLURALS = {int: "whole numbers", float: "numbers such as 0.03 or 8/255", str: "texts"}


def did_you_mean(given: Any, known: Iterable[str]) -> str:
    """Return ", did you mean X?" for the known name that is most like what was given, or ""."""
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def check_ranges(config: Any, positive: set[str]) -> None:
    """Raise `InputError` unless every field fits its type, and every number is finite, at most
    `LARGEST` and at least 0; above 0 for the fields in `positive`.
    """
    check_types(config)
    for field in fields(config):
        given, flag = getattr(config, field.name), flag_of(field.name)
        if given == "":
            raise InputError(f"{flag} is empty: give it a value, or leave it out")
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
    """Return a path as text, with `~` or `~user` at its head expanded; anything else as it is."""
    return os.path.expanduser(os.fspath(path)) if isinstance(path, str | os.PathLike) else path


def is_beton(path: object) -> bool:
    """Whether a data set is named by its .beton."""
    return str(path or "").endswith(".beton")


def check_dataset(name: str | None) -> None:
    """Raise `InputError` unless a data set is one of `DATASETS`, a path to a .beton, or None."""
    if name is not None and name not in DATASETS and not is_beton(name):
        names = ", ".join(map(repr, DATASETS))
        close = did_you_mean(name, DATASETS)
        raise InputError(f"--dataset {name!r}: choose from {names}, or name a .beton file{close}")


def check_once(runs: tuple[str, ...]) -> None:
    """Raise `InputError` for a run that is named twice, however it is spelled."""
    places = [os.path.realpath(run) for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{run} is named twice: name different runs")


def check_unit(config: Any) -> None:
    """Raise `InputError` for an eps or alpha that looks like one for pixels of 0 to 255."""
    for name in ("eps", "alpha"):
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and value > 1:
                raise InputError(
                    f"--{name} is {value:g}, but pixels are in 0 to 1: give, say, {value:g}/255"
                )


def steps_of(attack: str) -> int:
    """Return the gradient steps of an attack's name: none 0, fgsm 1, pgd-K K.

    Raises `InputError` for any other name.
    """
    if attack in ("none", "fgsm"):
        return ("none", "fgsm").index(attack)
    if re.fullmatch("pgd-[1-9][0-9]{0,5}", attack):
        return int(attack.removeprefix("pgd-"))
    close = did_you_mean(attack, ("none", "fgsm"))
    raise InputError(
        f"unknown attack {attack[:50]!r}: choose from none, fgsm, pgd-K such as pgd-20{close}"
    )


def flag_of(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def from_json(kind: type[Any], values: dict[str, Any]) -> Any:
    """Rebuild a configuration written as JSON, refusing fields it does not know and wrong types.

    Raises `InputError` that names the field.
    """
    hints = hints_of(kind)
    for name in values:
        if name not in hints:
            raise InputError(f"unknown setting {name[:50]!r}; was it written by another version?")
    turned = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in turned.items():
        if not fits(value, hints[name]):
            raise InputError(f"setting {name!r} cannot be {repr(value)[:50]}")
    return kind(**turned)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is one that the annotation allows."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if get_args(hint):
        return any(fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint
