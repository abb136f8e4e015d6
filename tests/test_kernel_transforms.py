"""Every torch transform of every op: the value of the plain formula, or an error that says why not.

The truth is the formula written out in plain torch code, in float64, under the same transform.
"""

from collections.abc import Callable

import pytest
import torch
from kernel_cases import laid_out
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn import functional as F

from fastiat import kernels

pytestmark = pytest.mark.reference_only

torch.manual_seed(0)
PERM = torch.tensor([2, 0, 3, 1])
Y_A, Y_B = torch.tensor([0, 1, 2, 2]), torch.tensor([2, 1, 0, 1])
ONE_A, ONE_B = F.one_hot(Y_A, 3), F.one_hot(Y_B, 3)
LAMS = torch.rand(4, dtype=torch.float64)
FLAT = 0.5 + 1e-5 * torch.rand(4, 2, 3, 2, dtype=torch.float64)  # under the floor of the deviation


def plain_standardize(x: Tensor) -> Tensor:
    rows = x.reshape(len(x), -1)
    centred = rows - rows.mean(1, keepdim=True)
    floor = 1 / (255**2 * rows.shape[1])
    return (centred / centred.square().mean(1, keepdim=True).clamp_min(floor).sqrt()).reshape(
        x.shape
    )


def plain_mix(x: Tensor, lam: Tensor | float) -> Tensor:
    lam = torch.as_tensor(lam, dtype=x.dtype)
    lam = lam.reshape(lam.shape + (1,) * (x.dim() - 1)) if lam.dim() else lam
    return lam * x + (1 - lam) * x.index_select(0, PERM)


def plain_cross_entropy(x: Tensor, lam: Tensor | float) -> Tensor:
    log_p = x.log_softmax(1)
    return -(lam * (ONE_A * log_p).sum(1) + (1 - lam) * (ONE_B * log_p).sum(1)).mean()


IMAGES = torch.rand(4, 2, 3, 2, dtype=torch.float64)
LOGITS = 3 * torch.randn(4, 3, dtype=torch.float64)
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = {
    "standardize": (kernels.standardize, plain_standardize, IMAGES),
    "standardize under the floor": (kernels.standardize, plain_standardize, FLAT),
    "standardize channels-last": (
        kernels.standardize,
        plain_standardize,
        laid_out(IMAGES, "channels_last"),
    ),
    "mix": (lambda x: kernels.mix(x, PERM, 0.3), lambda x: plain_mix(x, 0.3), IMAGES),
    "mix per sample": (
        lambda x: kernels.mix(x, PERM, LAMS),
        lambda x: plain_mix(x, LAMS),
        laid_out(IMAGES, "channels_last"),
    ),
    "mix in lam": (
        lambda lam: kernels.mix(IMAGES, PERM, lam),
        lambda lam: plain_mix(IMAGES, lam),
        torch.tensor(0.3, dtype=torch.float64),
    ),
    "mix in lam per sample": (
        lambda lam: kernels.mix(IMAGES, PERM, lam),
        lambda lam: plain_mix(IMAGES, lam),
        LAMS,
    ),
    "mix in both": (
        lambda x: kernels.mix(x, PERM, x[:, 0, 0, 0]),
        lambda x: plain_mix(x, x[:, 0, 0, 0]),
        IMAGES,
    ),
    "cross-entropy": (
        lambda x: kernels.mixed_cross_entropy(x, Y_A, Y_B, 0.3),
        lambda x: plain_cross_entropy(x, 0.3),
        LOGITS,
    ),
    "cross-entropy per sample": (
        lambda x: kernels.mixed_cross_entropy(x, Y_A, Y_B, LAMS),
        lambda x: plain_cross_entropy(x, LAMS),
        LOGITS,
    ),
    "cross-entropy in lam": (
        lambda lam: kernels.mixed_cross_entropy(LOGITS, Y_A, Y_B, lam),
        lambda lam: plain_cross_entropy(LOGITS, lam),
        LAMS,
    ),
    "cross-entropy in both": (
        lambda x: kernels.mixed_cross_entropy(x, Y_A, Y_B, x[:, 0].sigmoid()),
        lambda x: plain_cross_entropy(x, x[:, 0].sigmoid()),
        LOGITS,
    ),
}

Function = Callable[[Tensor], Tensor]


def way_of(x: Tensor) -> Tensor:
    return torch.sin(torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape) + 1)


def cubed(f: Function) -> Function:
    return lambda x: f(x).pow(3).sum()


def batched(x: Tensor) -> Tensor:
    return torch.stack([x, 0.9 * x, 0.8 * x], -1)


TRANSFORMS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "grad": lambda f, x: grad(cubed(f))(x),
    "vjp": lambda f, x: vjp(cubed(f), x)[1](torch.tensor(2, dtype=x.dtype))[0],
    "jvp": lambda f, x: jvp(f, (x,), (way_of(x),))[1],
    "vmap": lambda f, x: vmap(f, in_dims=-1)(batched(x)),
    "vmap of vmap": lambda f, x: vmap(vmap(f, in_dims=-1))(
        torch.stack([batched(x), 0.7 * batched(x)])
    ),
    "vmap of grad": lambda f, x: vmap(grad(cubed(f)), in_dims=-1)(batched(x)),
    "vmap of jvp": lambda f, x: vmap(lambda a, t: jvp(f, (a,), (t,))[1], in_dims=(-1, None))(
        batched(x), way_of(x)
    ),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(cubed(f))(x),
    "jacrev of jacfwd": lambda f, x: jacrev(jacfwd(cubed(f)))(x),
    "jvp of grad": lambda f, x: jvp(grad(cubed(f)), (x,), (way_of(x),))[1],
    "jvp of jvp": lambda f, x: jvp(
        lambda z: jvp(f, (z,), (way_of(x),))[1], (x,), (way_of(x).flip(0),)
    )[1],
    "grad of grad": lambda f, x: grad(lambda z: grad(cubed(f))(z).square().sum())(x),
    "grad of jvp": lambda f, x: grad(lambda z: jvp(cubed(f), (z,), (way_of(z),))[1])(x),
    "grad beside a constant": lambda f, x: grad(lambda s: (s * f(x)).pow(3).sum())(
        torch.ones((), dtype=x.dtype)
    ),
    "functionalised": lambda f, x: torch.func.functionalize(f)(x),
    "functionalised grad": lambda f, x: torch.func.functionalize(grad(cubed(f)))(x),
}


def dual(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, way_of(x)))).tangent


def dual_with_gradients_on(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        x = x.detach().requires_grad_()
        tangent = forward_ad.unpack_dual(cubed(f)(forward_ad.make_dual(x, way_of(x)))).tangent
        return torch.autograd.grad(tangent, x)[0]


def dual_upstream(f: Function, x: Tensor) -> Tensor:
    """The tangent of a backward whose upstream gradient is dual."""
    x = x.detach().requires_grad_()
    out = f(x)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), way_of(out))
        return forward_ad.unpack_dual(torch.autograd.grad(out, x, upstream)[0]).tangent


def twice(f: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(cubed(f)(x), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), x)[0]


# Ways without torch.func; those in reverse mode give no derivative in lam.
EAGER: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "dual": dual,
    "dual with gradients on": dual_with_gradients_on,
    "vectorized forward jacobian": lambda f, x: jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "linearize": lambda f, x: linearize(f, x)[1](way_of(x)),
    "vectorized jacobian": lambda f, x: jacobian(f, x, vectorize=True),
    "jacobian": jacobian,
    "dual upstream": dual_upstream,
    "create_graph": twice,
    "functional hessian": lambda f, x: torch.autograd.functional.hessian(cubed(f), x),
    "forward hessian": lambda f, x: torch.autograd.functional.hessian(
        cubed(f), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}
REVERSE = {"vectorized jacobian", "jacobian", "dual upstream", "create_graph"} | {
    "functional hessian",
    "forward hessian",
    "dual with gradients on",
}


@pytest.mark.parametrize("transform", [*TRANSFORMS, *EAGER])
@pytest.mark.parametrize("case", CASES)
def test_transform_gives_the_value_of_the_formula(case, transform):
    op, plain, x = CASES[case]
    apply = {**TRANSFORMS, **EAGER}[transform]
    expected = apply(plain, x)
    if transform in REVERSE and case.endswith(("in lam", "in lam per sample", "in both")):
        try:
            actual = apply(op, x)
        except ValueError as error:
            assert "lam requires a gradient" in str(error)
            return
    else:
        actual = apply(op, x)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "case", ["standardize channels-last", "mix in both", "cross-entropy in both"]
)
def test_compiled_transform_gives_the_value_of_the_formula(case, transform, backend):
    op, plain, x = CASES[case]
    apply = TRANSFORMS[transform]
    torch.compiler.reset()
    actual = torch.compile(lambda z: apply(op, z), backend=backend)(x)
    torch.testing.assert_close(actual, apply(plain, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", ["standardize", "mix per sample", "cross-entropy"])
def test_transform_of_compiled_code_gives_the_value_of_the_formula(case, transform):
    op, plain, x = CASES[case]
    apply = TRANSFORMS[transform]
    torch.compiler.reset()
    compiled = torch.compile(op, backend="aot_eager")
    compiled(x)
    torch.testing.assert_close(apply(compiled, x), apply(plain, x), rtol=1e-8, atol=1e-8)
