"""Networks of torchvision, of timm, and of the user's own files, by the name that `--arch` gives.

torchvision:resnet50      a classifier of `torchvision.models`
timm:convnext_tiny        a model that timm registers; timm is an optional package
my_nets:make_net          a function of the user's module, or nets/mine.py:make_net of a file
"""

import importlib
import importlib.util
import inspect
import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastiat.networks.normalise import IMAGENET
from fastiat.system.errors import InputError, one_line, optional
from fastiat.system.settings import did_you_mean


def from_library(
    arch: str, num_classes: int, in_channels: int, *, pretrained: bool = False
) -> nn.Module:
    """Return the network of torchvision or timm that `arch` names, in fp32, in training mode.

    pretrained: load the library's default weights, which are downloaded to its cache. A classifier
        for another number of classes keeps its initial weights.

    Raises `InputError` for an unknown name, images that the network does not take, a missing
    package, and weights that cannot be downloaded.
    """
    library, _, name = arch.partition(":")
    make = _from_torchvision if library == "torchvision" else _from_timm
    return make(name, num_classes, in_channels, pretrained)


def _from_torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    from torchvision import models as zoo  # type: ignore[import-untyped]

    known = zoo.list_models(module=zoo)
    if name not in known:
        raise InputError(
            f"torchvision has no classifier {name!r}: choose one of "
            f"torchvision.models.list_models(){did_you_mean(name, known)}"
        )
    if in_channels != 3:
        raise InputError(
            f"torchvision:{name} takes images of 3 channels, but these have {in_channels}: choose "
            f"a network of fastiat or timm, or convert the images to colour"
        )
    options = torchvision_options(name)
    if options:
        options["init_weights"] = True  # otherwise torchvision warns of a slow initialisation
    model: nn.Module = zoo.get_model(name, weights=None, num_classes=num_classes, **options)
    if pretrained:
        weights = zoo.get_model_weights(name).DEFAULT
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            raise InputError(
                f"--pretrained: {one_line(error)[:100]}; download {weights.url} and put the file "
                f"into {folder}"
            ) from None
        load_weights(model, {k: v for k, v in state.items() if not k.startswith(("aux", "AuxLog"))})
    return model


def torchvision_options(name: str) -> dict[str, bool]:
    """Return the arguments with which a classifier of torchvision returns its logits alone."""
    return {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}


def _from_timm(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    timm = optional("timm", "timm")
    # Registered names only: timm also accepts "hf-hub:..." and downloads what that says.
    if not timm.is_model(name):
        raise InputError(
            f"timm has no network {name!r}: choose one of timm.list_models()"
            f"{did_you_mean(name, timm.list_models())}"
        )
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    try:
        # Without a network it warns a dozen times, and then raises the error below.
        hub.setLevel(logging.ERROR)
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels
        )
    except Exception as error:
        # The hub's client raises errors of many types where there is no network.
        if not pretrained:
            raise InputError(f"timm:{name}: {one_line(error)[:200]}") from error
        config = timm.get_pretrained_cfg(name)
        place = config.hf_hub_id or config.url or "its page"
        raise InputError(
            f"--pretrained: cannot download the weights of timm:{name} "
            f"({one_line(error)[:100]}); download model.safetensors of {place} on another machine "
            f"and give it with --init"
        ) from None
    finally:
        hub.setLevel(level)
    return model


def library_normalise(arch: str, in_channels: int) -> tuple[str, ...]:
    """Return the normalisation, as words for `--normalise`, that a library's weights expect."""
    library, _, name = arch.partition(":")
    if library == "torchvision":
        return ("imagenet",)
    config = optional("timm", "timm").get_pretrained_cfg(name)
    mean, std = (tuple(getattr(config, key, None) or ()) for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3:
        mean, std = IMAGENET[:3], IMAGENET[3:]
    if in_channels != 3:  # timm averages the weights of the first layer over the channels
        mean, std = (sum(mean) / 3,) * in_channels, (sum(std) / 3,) * in_channels
    if (*mean, *std) == IMAGENET:
        return ("imagenet",)
    return tuple(f"{number:g}" for number in (*mean, *std))


def library_points(network: nn.Module) -> tuple[str, ...]:
    """Return the mix points of a network of torchvision or timm: the input and two stages.

    The stages are the first two of timm's `feature_info`, `layer1` and `layer2`, `stage2` and
    `stage3`, the blocks of a transformer after a quarter and a half of them, or, in `features`, the
    last modules before the first two changes of resolution after the stem; else none.
    """
    known = dict(network.named_modules())
    info = getattr(network, "feature_info", None)
    names = [str(each["module"]) for each in info] if isinstance(info, list) else []
    stages = [n for n in names if n in known and not n.startswith(("act", "bn", "conv", "stem"))]
    for pair in (stages, ["layer1", "layer2"], ["stage2", "stage3"]):
        if len(pair) >= 2 and known.keys() >= set(pair[:2]):
            return ("input", *pair[:2])
    for name in ("trunk_output", "encoder.layers"):
        blocks = [
            n for n in known if n.startswith(f"{name}.") and n.count(".") == name.count(".") + 1
        ]
        if len(blocks) >= 4:
            return ("input", blocks[len(blocks) // 4 - 1], blocks[len(blocks) // 2 - 1])
    features = known.get("features")
    if isinstance(features, nn.Sequential):
        return ("input", *_last_of_runs(features)[:2])
    return ("input",)


def _last_of_runs(features: nn.Sequential) -> list[str]:
    """Return the names of the last modules before each change of resolution of `features`."""
    shapes: list[tuple[int, ...]] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[2:])))
        for module in features
    ]
    parameter = next(features.parameters())
    was = features.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            features.eval()(torch.zeros(1, 3, 64, 64, device=parameter.device))
    except RuntimeError:  # the network takes images of another size only
        return []
    finally:
        features.train(was)
        for hook in hooks:
            hook.remove()
    names = [name for name, _ in features.named_children()]
    ends = [i for i in range(len(shapes) - 1) if shapes[i] != shapes[i + 1]]
    # A first run of one module is the stem.
    ends = ends[1:] if ends and ends[0] == 0 else ends
    return [f"features.{names[i]}" for i in ends]


def own_network(arch: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Return the network that the user's function returns; `arch` is MODULE:FUNCTION.

    MODULE is a module that Python finds from the current directory, or the path of a .py file. The
    function is called with `num_classes`, and with `in_channels` and `image_size` where its
    signature takes them. This runs the user's code: call it only for a name that the user has
    typed, never for a name from a file. Raises `InputError` if there is no such function, if it
    fails, and if it returns no `nn.Module`.
    """
    module_name, _, function_name = arch.rpartition(":")
    module = _import(module_name, arch)
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        close = did_you_mean(function_name, names)
        raise InputError(f"--arch {arch}: {module_name} has no function {function_name}{close}")
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    try:
        parameters = inspect.signature(function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        given = {k: v for k, v in given.items() if k in parameters or takes_all}
        network = function(**{"num_classes": num_classes} | given)
    except (Exception, SystemExit) as error:
        # The user's own code may raise anything; the traceback stays with the cause.
        raise InputError(
            f"--arch {arch}: {function_name}({', '.join(f'{k}={v}' for k, v in given.items())}) "
            f"fails: {type(error).__name__}: {one_line(error)[:150]}"
        ) from error
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise InputError(f"--arch {arch}: {function_name} returns a {kind}, not an nn.Module")
    return network


def _import(name: str, arch: str) -> ModuleType:
    """Import a module from the current directory or from a .py file."""
    here = str(Path.cwd())
    try:
        if not name.endswith(".py"):
            if here not in sys.path:
                # Last: a file here must not hide a module that a library imports later.
                sys.path.append(here)
            return importlib.import_module(name)
        file = Path(name)
        if not file.is_file():
            raise InputError(f"--arch {arch}: there is no file {name}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(file.stem, module)  # pickling and dataclasses look it up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            if sys.modules.get(file.stem) is module:  # half imported
                del sys.modules[file.stem]
            raise
        return module
    except InputError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or one_line(error)[:100]
        if name.endswith(".py") or not f"{name}.".startswith(f"{missing}."):
            raise InputError(
                f"--arch {arch}: {name} needs the module {missing}, which cannot be found: install "
                f"its package"
            ) from error
        raise InputError(
            f"--arch {arch}: there is no module {name} in {here} or among the installed packages: "
            f"give torchvision:NAME, timm:NAME, MODULE:FUNCTION or FILE.py:FUNCTION"
        ) from None
    except (Exception, SystemExit) as error:  # a script may parse arguments and exit
        raise InputError(
            f"--arch {arch}: importing {name} fails: {type(error).__name__}: "
            f"{one_line(error)[:150]}"
        ) from error


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Copy `weights` into `model` by name; return the names of tensors that keep their values.

    Those are the weight and the bias of a classifier for another number of classes: tensors that
    differ in their first dimension only. Raises `InputError`, which names the first difference, for
    weights of another network.
    """
    own = model.state_dict()
    left: list[str] = []
    for name in own.keys() | weights.keys():
        if name not in weights or name not in own:
            where = "the file lacks" if name not in weights else "the network lacks"
            raise InputError(f"these are the weights of another network: {where} {name}")
    for name, tensor in own.items():
        given = weights[name]
        if given.shape == tensor.shape and given.dtype == tensor.dtype:
            continue
        same_inputs = given.dim() == tensor.dim() and given.shape[1:] == tensor.shape[1:]
        if not same_inputs or given.dtype != tensor.dtype or tensor.dim() == 0 or len(left) == 2:
            raise InputError(
                f"these are the weights of another network: {name} is {given.dtype} of shape "
                f"{tuple(given.shape)} instead of {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        left.append(name)
    put_tensors(model, {n: t for n, t in weights.items() if n not in left}, strict=False)
    return left


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], **options: bool) -> None:
    """Call `model.load_state_dict` with tensors of this version of the model's classes.

    A network such as torchvision's mnasnet reads the version of each module from `_metadata`, an
    attribute of what `state_dict` returns, which a file of tensors does not have.
    """
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, **options)
