"""What an entry in RobustBench (Croce et al. 2021) needs: the network's code and its metadata."""

import inspect
import json
import shlex
import textwrap
from pathlib import Path
from typing import Any

from fastiat.config import RobustBenchConfig
from fastiat.engine.device import own_defaults
from fastiat.models import ARCHS, ModelCard
from fastiat.networks import builtin, normalise
from fastiat.networks.sources import torchvision_options
from fastiat.runs.directory import MODEL, Run, load_with_card
from fastiat.runs.results import read_results
from fastiat.system.errors import InputError
from fastiat.system.settings import is_own_arch, number_text

THREATS = {"linf": "Linf", "l2": "L2"}

HEAD = """\
import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
"""
ACTIVATIONS = '\nACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}\n'
METADATA = """\
# Some networks read the version of their modules from it.
weights._metadata = model.state_dict()._metadata
"""
STANDARDIZE = """
class StandardizeImage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _standardize(x)
"""


@own_defaults()
def robustbench(config: RobustBenchConfig) -> tuple[str, dict[str, Any]]:
    """Print and return the code that rebuilds a run's network without fastiat, and the metadata.

    The code defines `model`, which takes pixels in [0, 1] and loads model.safetensors from the
    current directory. The metadata is the JSON file of RobustBench's `model_info`; figures that
    have not been measured, and facts that fastiat does not know, are null. Raises `InputError` for
    a path that is no run.
    """
    config.check()
    path = Path(config.run)
    if path.is_file():
        raise InputError(f"{path} is a model without its run: name the run directory")
    _, card = load_with_card(path, arch=config.arch)
    run, code = Run.open(path), definition(card)
    settings = run.config
    measured = {entry["attack"]: entry for entry in read_results(path) if _counts(entry, run)}
    clean, strong = (_accuracy(measured.get(name)) for name in ("none", "autoattack"))
    further = f" Uses further images, {Path(settings.extra).name}." if settings.extra else ""
    metadata = {
        "link": None,
        "name": None,
        "authors": None,
        # RobustBench counts real images, not generated ones; a run does not know which it had.
        "additional_data": None if settings.extra else False,
        "number_forward_passes": 1,
        "dataset": settings.dataset,
        "venue": None,
        "architecture": card.arch,
        "norm": THREATS[settings.norm],
        "eps": number_text(settings.eps, "g"),
        "clean_acc": clean,
        "reported": strong,
        "autoattack_acc": strong,
        "footnote": f"Interpolated Adversarial Training ({settings.mix}), fastiat.{further}",
    }
    print(f"# The network; its weights are {path / MODEL}\n{code}")
    print(f"# model_info/{metadata['dataset']}/{metadata['norm']}/NAME.json")
    print(json.dumps(metadata, indent=2))
    for key, name in (("clean_acc", "none"), ("autoattack_acc", "autoattack")):
        flag = "--autoattack" if name == "autoattack" else "--attacks none"
        how = f"is not measured: fastiat evaluate {shlex.quote(config.run)} {flag}"
        if name in measured:
            how = f"is measured on {measured[name]['n']} test images; RobustBench wants all"
        print(f"# {key} {how}")
    return code, metadata


def _counts(entry: dict[str, Any], run: Run) -> bool:
    """Whether an entry is of the test images of the run's data set, at its eps and norm."""
    config = run.config
    same = entry["dataset"] == config.dataset and entry["split"] == "test"
    if entry["attack"] == "none":
        return same
    return same and (entry["eps"], entry["norm"]) == (config.eps, config.norm)


def _accuracy(entry: dict[str, Any] | None) -> str | None:
    """Return an accuracy in percent as RobustBench writes it, for an entry of evaluation.json."""
    return None if entry is None else f"{100 * (1 - entry['errors'] / entry['n']):.2f}"


def definition(card: ModelCard) -> str:
    """Return Python code, without fastiat, that defines and loads the network of `card`.

    Raises `InputError` for a network of the user's own, whose code fastiat does not have.
    """
    if is_own_arch(card.arch):
        raise InputError(
            f"{card.arch} is a network of your own: its code is yours to give; load its weights "
            f"with safetensors.torch.load_file('{MODEL}')"
        )
    parts: list[Any] = [normalise._standardize, STANDARDIZE, normalise.NormalizeChannels]
    if card.arch not in ARCHS:
        parts.append(normalise.Normalised)
        library, _, name = card.arch.partition(":")
        options = "".join(f", {k}={v}" for k, v in torchvision_options(name).items())
        network = (
            f'torchvision.models.get_model("{name}", weights=None, '
            f"num_classes={card.num_classes}{options})"
            if library == "torchvision"
            else f'timm.create_model("{name}", num_classes={card.num_classes}, '
            f"in_chans={card.in_channels})"
        )
        parts.append(f"\nmodel = Normalised({network}, {_first(card)})\n")
        if library == "timm":
            parts.insert(0, "import timm\n")
    else:
        kind = {"preact18": builtin.PreActResNet18, "mlp6": builtin.MLP6}.get(
            card.arch, builtin.WideResNet
        )
        blocks: list[Any] = [builtin.PreActBlock, builtin._group, builtin.AuthorsWideBlock]
        parts += [ACTIVATIONS, "\nShortcut = nn.Conv2d\n", builtin.Network]
        parts += [] if kind is builtin.MLP6 else blocks
        authors = card.variant == "authors"
        sizes = f"{card.num_classes}, {card.in_channels}"
        arguments = {
            "preact18": f"{sizes}, {card.width}, {not authors}, {card.activation!r}",
            "mlp6": f"{sizes}, {card.image_size}, {card.width}",
        }.get(card.arch, f"{card.arch[3:5]}, {sizes}, {card.width}, {authors}, {card.activation!r}")
        parts += [
            kind,
            f"\nmodel = {kind.__name__}({arguments})\nmodel.normalise = {_first(card)}\n",
        ]
    parts.append(f'weights = OrderedDict(load_file("{MODEL}"))\n{METADATA}')
    parts.append("model.load_state_dict(weights)\nmodel.eval()\n")
    texts = [part if isinstance(part, str) else "\n" + inspect.getsource(part) for part in parts]
    return HEAD + textwrap.dedent("\n".join(texts))


def _first(card: ModelCard) -> str:
    """Return the code of the first layer of a network."""
    layer = normalise.make_normalise(card.normalise, card.in_channels)
    if isinstance(layer, normalise.NormalizeChannels):
        mean, std = (getattr(layer, name).flatten().tolist() for name in ("mean", "std"))
        return f"NormalizeChannels({mean}, {std})"
    return "nn.Identity()" if card.normalise == ("none",) else "StandardizeImage()"
