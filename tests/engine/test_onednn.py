"""Strided 1x1 convolutions of few channels on the CPU: right gradients, in their own memory."""

import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import narrow_networks
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastiat import models
from fastiat.attack import fgsm, pgd
from fastiat.engine import onednn

aten = torch.ops.aten
CHECKED = {"GLIBC_TUNABLES": "glibc.malloc.check=3", "LD_PRELOAD": "libc_malloc_debug.so.0"}


def _checked(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a child process whose malloc checks its blocks."""
    environment = {**os.environ, **CHECKED, "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [None, "AVX2"])
def test_narrow_networks_train_within_their_memory_and_with_the_gradients_of_float64(isa):
    more = {} if isa is None else {"ONEDNN_MAX_CPU_ISA": isa}
    done = _checked(str(Path(narrow_networks.__file__)), **more)
    assert done.returncode == 0, (done.returncode, done.stdout[-200:], done.stderr[-2000:])
    assert done.stdout.count("trained") > 20 and done.stdout.count("compared") == 9


def test_the_check_notices_a_write_past_a_block():
    # Python's own call of malloc, as the check is not what `dlsym` finds.
    overrun = """
import ctypes
api = ctypes.pythonapi
api.PyMem_RawMalloc.restype = ctypes.c_void_p
block = api.PyMem_RawMalloc(ctypes.c_size_t(100))
ctypes.memset(block, 1, {})
api.PyMem_RawFree(ctypes.c_void_p(block))
"""
    assert _checked("-c", overrun.format(100)).returncode == 0
    assert _checked("-c", overrun.format(101)).returncode == -signal.SIGABRT


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [1, 2])
@pytest.mark.parametrize(
    ("form", "groups", "padding"),
    [((2, 2), 1, 0), ((2, 1), 1, 0), ((1, 3), 1, 0), ((2, 2), 2, 0), ((2, 2), 1, 1), ((2,), 1, 0)],
)
@pytest.mark.parametrize("size", [6, 7])
def test_gradients_of_few_channels_are_those_of_float64(
    transposed, kernel, form, groups, padding, size
):
    onednn.replace_weight_gradient()
    torch.manual_seed(0)
    dimensions, inner = len(form), 4
    layout = {2: torch.channels_last}.get(dimensions, torch.contiguous_format)
    x = torch.randn(3, inner, *[size] * dimensions).contiguous(memory_format=layout)
    shape = (inner, 6 // groups) if transposed else (6, inner // groups)
    weight = torch.randn(*shape, *[kernel] * dimensions)
    after = [step - 1 if transposed else 0 for step in form]
    rest = (list(form), [padding] * dimensions, [1] * dimensions, transposed, after, groups)
    out = aten.convolution(x, weight, None, *rest)
    grad = torch.randn_like(out)
    # Convolution is linear in each operand: <gradient, v> is <grad, the convolution of v>, whose
    # forward pass in float64 is the truth.
    x_, weight_, grad_ = x.double(), weight.double(), grad.double()
    directions = [torch.randn_like(t) for t in (x_, weight_, torch.zeros(6).double())]
    sums = [
        (grad_ * aten.convolution(directions[0], weight_, None, *rest)).sum(),
        (grad_ * aten.convolution(x_, directions[1], None, *rest)).sum(),
        (grad_.transpose(1, -1) @ directions[2]).sum(),
    ]
    for mask in product((True, False), repeat=3):
        found = aten.convolution_backward(grad, x, weight, [6], *rest, list(mask))
        for asked, one, direction, value in zip(mask, found, directions, sums, strict=True):
            if asked:
                assert one.dtype == torch.float32 and one.shape == direction.shape
                torch.testing.assert_close((one * direction).sum(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "size", "stride"), [(1, 8, 2), (4, 9, 2), (15, 7, 3), (16, 8, 2)]
)
def test_a_shortcut_is_the_convolution_in_every_derivative(layout, dtype, channels, size, stride):
    torch.manual_seed(0)
    shortcut = models.Shortcut(channels, 5, 1, stride, bias=False).to(dtype)
    assert list(shortcut.state_dict()) == ["weight"]
    x = torch.randn(2, channels, size, size).to(dtype).contiguous(memory_format=layout)
    tangent = torch.randn_like(x)
    weight = shortcut.weight.detach()

    def value(x, weight):
        return torch.func.functional_call(shortcut, {"weight": weight}, (x,))

    def plain(x, weight):
        """The sum over input channels, in float64."""
        picked = x.double()[:, None, :, ::stride, ::stride]
        return (picked * weight.double().squeeze((2, 3))[None, :, :, None, None]).sum(2)

    bound = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 5e-2}[dtype]
    close = {"rtol": bound, "atol": bound}
    functions = [value]
    if dtype == torch.float32:
        torch._dynamo.reset()  # keeps eight programs of a function
        functions.append(torch.compile(value, backend="aot_eager", fullgraph=True))
    right = torch.func.grad(lambda *a: plain(*a).square().sum(), (0, 1))(x, weight)
    for function in functions:
        out = function(x, weight)
        torch.testing.assert_close(out.double(), plain(x, weight), **close)
        x_, weight_ = x.clone().requires_grad_(), weight.clone().requires_grad_()
        grads = torch.autograd.grad(function(x_, weight_).square().sum(), (x_, weight_))
        for one, other in zip(grads, right, strict=True):
            error = (one.double() - other).abs().max() / other.abs().max()
            assert error < bound
    _, forward = torch.func.jvp(lambda x: value(x, weight), (x,), (tangent,))
    torch.testing.assert_close(forward.double(), plain(tangent, weight), **close)
    per_image = torch.func.vmap(lambda one: value(one[None], weight)[0])(x)
    torch.testing.assert_close(per_image.double(), plain(x, weight), **close)


class _Masks(TorchDispatchMode):
    """Keeps what every convolution's backward pass was asked for: input, weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.convolution_backward.default:
            self.seen.append(list(args[10]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bn", ["eval", "batch", "update"])
def test_an_attack_on_any_network_asks_for_no_weight_gradient(bn):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1, 2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip
    x, y = torch.rand(3, 3, 8, 8).to(memory_format=torch.channels_last), torch.arange(3)
    with _Masks() as masks:
        pgd(model, x, y, steps=2, bn=bn)
        fgsm(model, x, y)
    assert masks.seen == [[True, False, False]] * (2 * 3)
