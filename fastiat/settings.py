"""Settings: what every configuration shares, the checks of values, and JSON.

Nothing here imports torch, so that help is printed at once.
"""

import ast
import inspect
import math
import os
import re
import textwrap
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fastiat.errors import InputError

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
    groups: ClassVar[dict[str, str]] = {}
    """The headings of `--help`, each keyed by the first field under it."""
    bare: ClassVar[dict[str, Any]] = {}
    """Values of the fields whose flag can stand without any."""
    added: ClassVar[tuple[str, ...]] = ()
    """Fields that files of earlier versions lack; they then have their defaults."""

    def __post_init__(self) -> None:
        """Write every path as text, with `~` for the home folder expanded."""
        for name in PATHS & self.__dict__.keys():
            given = self.__dict__[name]
            if isinstance(given, tuple):
                given = tuple(expanded(path) for path in given)
            elif isinstance(given, str | os.PathLike):
                given = expanded(given)
            self.__dict__[name] = given  # the dataclasses are frozen

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""

    @classmethod
    @cache
    def docs(cls) -> dict[str, str]:
        """Map every field to the docstring written under it."""
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        shared = cls.__bases__[0]
        found = dict(shared.docs()) if issubclass(shared, Settings) else {}
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
                found[field.target.id] = " ".join(str(text.value.value).split())
        return found


def check_ranges(config: Any, positive: set[str]) -> None:
    """Raise `InputError` unless every number is finite, sane and at least 0, or above it."""
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
        raise InputError(f"--dataset {name!r}: choose from {names}, or name a .beton file")


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
    raise InputError(f"unknown attack {attack!r}: choose from none, fgsm, pgd-K such as pgd-20")


def flag_of(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def from_json(kind: type[Any], values: dict[str, Any]) -> Any:
    """Rebuild a configuration written as JSON, refusing fields it does not know and wrong types.

    Raises `InputError` that names the field.
    """
    known = {field.name for field in fields(kind)}
    for name in values:
        if name not in known:
            raise InputError(f"unknown setting {name[:50]!r}; was it written by another version?")
    hints = get_type_hints(kind)
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
