"""PGD-7 of fastiat, other libraries and plain loops: functions (x, y) -> x_adv for one network.

Each gets a copy of the same weights. Other libraries and plain loops run as their users run them:
fp32, PyTorch's default memory format and defaults.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from timing import DEVICE, ON_GPU, fast_arithmetic, plain_arithmetic
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat.attack import PGD
from fastiat.engine import graphs

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 7
Attack = Callable[[Tensor, Tensor], Tensor]


class AbsentError(Exception):
    """An implementation cannot run here; the message says why."""


def _fastiat(model: nn.Module, engine: str, precision: str) -> Attack:
    if engine != "eager" and not graphs.has_compiler(DEVICE):
        raise AbsentError("torch.compile needs a C++ compiler, and there is none")
    if precision == "bf16" and fast_arithmetic() != "bf16":
        raise AbsentError(f"{DEVICE} has no fast bf16")
    settings = {"eps": EPS, "alpha": ALPHA, "steps": STEPS}
    return PGD(model, engine=engine, precision=precision, **settings)  # type: ignore[arg-type]


def _torchattacks(model: nn.Module) -> Attack:
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS)


def _foolbox(model: nn.Module) -> Attack:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS)
    return lambda x, y: attack(wrapped, x, y, epsilons=EPS)[1]


def _art(model: nn.Module) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="gpu" if ON_GPU else "cpu",
    )

    def attack(x: Tensor, y: Tensor) -> Tensor:
        pgd = ProjectedGradientDescentPyTorch(
            classifier,
            eps=EPS,
            eps_step=ALPHA,
            max_iter=STEPS,
            num_random_init=1,
            batch_size=len(x),
            verbose=False,
        )
        return torch.from_numpy(pgd.generate(x.cpu().numpy(), y.cpu().numpy())).to(DEVICE)

    return attack


def _by_hand(model: nn.Module, gradient: Callable[[Tensor, Tensor], Tensor]) -> Attack:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            x_adv = x_adv.detach().requires_grad_()
            step = x_adv.detach() + ALPHA * gradient(x_adv, F.cross_entropy(model(x_adv), y)).sign()
            x_adv = torch.minimum(torch.maximum(step, x - EPS), x + EPS).clamp(0, 1)
        return x_adv

    return attack


def _backward(model: nn.Module) -> Attack:
    """The loop of many training scripts, which computes weight gradients too."""

    def gradient(x: Tensor, loss: Tensor) -> Tensor:
        loss.backward()
        assert x.grad is not None
        return x.grad

    return _by_hand(model, gradient)


def _autograd(model: nn.Module) -> Attack:
    return _by_hand(model, lambda x, loss: torch.autograd.grad(loss, x)[0])


def fastiats() -> dict[str, tuple[str, str]]:
    """Return the engine and the precision of each way to run fastiat's attack here."""
    fast = fast_arithmetic()
    names = [("eager", "fp32"), ("eager", "bf16"), ("compile", fast)]
    names += [("graph", fast)] if ON_GPU else []
    return {f"fastiat {engine} {precision}": (engine, precision) for engine, precision in names}


PEERS: dict[str, Callable[[nn.Module], Attack]] = {
    "torchattacks": _torchattacks,
    "foolbox": _foolbox,
    "ART": _art,
    "loop, loss.backward()": _backward,
    "loop, autograd.grad": _autograd,
}


def implementations() -> dict[str, Callable[[nn.Module], Attack]]:
    """Return {name: function from a network to its attack}, fastiat's first."""
    ours = {
        name: partial(_fastiat, engine=engine, precision=precision)
        for name, (engine, precision) in fastiats().items()
    }
    return {**ours, **PEERS}


def arithmetic(name: str) -> str:
    """Return the arithmetic of an implementation: "bf16", "fp32" or "tf32"."""
    ours = fastiats().get(name)
    return "bf16" if ours and ours[1] == "bf16" else plain_arithmetic()


def prepare(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Return a call of the named implementation on these pixels.

    Compiled attacks have been compiled and captured for this shape; others have run once. Raises
    `AbsentError` if the implementation cannot run.
    """
    own = copy.deepcopy(model)
    ours = fastiats().get(name)
    if ours is None:
        own, x = own.to(memory_format=torch.contiguous_format), x.contiguous()  # type: ignore[call-overload]
    try:
        attack = implementations()[name](own)
    except ImportError as error:
        raise AbsentError(f"fastiat[bench] is not installed ({error})") from None
    first = slice(None) if ON_GPU or (ours and ours[0] != "eager") else slice(2)
    attack(x[first], y[first])
    return lambda: attack(x, y)


def check(found: dict[str, Tensor], x: Tensor, y: Tensor, model: nn.Module) -> dict[str, float]:
    """Return by how much each attack's result raises the loss of `model` over that of `x`.

    Raises `AssertionError` if a result leaves the ball or raises the loss much less than the best.
    """

    def loss(pixels: Tensor) -> float:
        with torch.no_grad():
            return F.cross_entropy(model(pixels), y).item()

    before, gains = loss(x), {}
    for name, x_adv in found.items():
        assert x_adv.shape == x.shape, name
        assert (x_adv - x).abs().max() <= EPS + 1e-6, f"{name} leaves the ball"
        assert x_adv.min() >= 0 and x_adv.max() <= 1, f"{name} leaves the range of pixels"
        gains[name] = loss(x_adv) - before
    for name, gain in gains.items():
        assert gain > 0.8 * max(gains.values()) > 0, f"{name} is weak; the losses' gains: {gains}"
    return gains
