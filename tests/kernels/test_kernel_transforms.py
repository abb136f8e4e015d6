"""Every torch transform of every op: the value of the plain formula, or an error that says why not.

The truth is the formula written out in plain torch code, in float64, under the same transform.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from kernel_cases import laid_out
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn import functional as F

from fastiat import kernels, models

pytestmark = pytest.mark.reference_only

torch.manual_seed(0)
PERM = torch.tensor([2, 0, 3, 1])
Y_A, Y_B = torch.tensor([0, 1, 2, 2]), torch.tensor([2, 1, 0, 1])
SOFT_A, SOFT_B = torch.rand(2, 4, 3, dtype=torch.float64)
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


def plain_cross_entropy(
    x: Tensor, lam: Tensor | float, y_a: Tensor = ONE_A, y_b: Tensor = ONE_B
) -> Tensor:
    log_p = x.log_softmax(1)
    return -(lam * (y_a * log_p).sum(1) + (1 - lam) * (y_b * log_p).sum(1)).mean()


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
    "cross-entropy of distributions": (
        lambda x: kernels.mixed_cross_entropy(x, SOFT_A, SOFT_B, LAMS),
        lambda x: plain_cross_entropy(x, LAMS, SOFT_A, SOFT_B),
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


# torch cannot differentiate the tangent of log_softmax in reverse: it changes a value it has saved.
PAIRS = [
    (case, transform)
    for case in CASES
    for transform in [*TRANSFORMS, *EAGER]
    if not (case.startswith("cross-entropy") and transform == "dual with gradients on")
]


@pytest.mark.parametrize(("case", "transform"), PAIRS)
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
@pytest.mark.parametrize("transform", ["jvp", "vmap", "hessian"])
@pytest.mark.parametrize(
    "case", ["standardize channels-last", "mix in both", "cross-entropy in both"]
)
def test_compiled_transform_gives_the_value_of_the_formula(case, transform, backend):
    op, plain, x = CASES[case]
    apply = TRANSFORMS[transform]
    torch.compiler.reset()
    actual = torch.compile(lambda z: apply(op, z), backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(actual, apply(plain, x), rtol=1e-8, atol=1e-8)


def refused_by_old_dynamo() -> AbstractContextManager[Any]:
    """What an op raises while it is traced reaches the caller in PyTorch 2.11.

    2.14 runs the code uncompiled instead.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):
        return nullcontext()
    return pytest.raises(RuntimeError, match="drops the tangents")


@pytest.mark.parametrize("transform", ["jvp", "vmap of grad", "dual"])
@pytest.mark.parametrize("case", ["standardize", "mix per sample", "cross-entropy"])
def test_transform_of_compiled_code_gives_the_value_of_the_formula(case, transform):
    op, plain, x = CASES[case]
    apply = {**TRANSFORMS, **EAGER}[transform]
    torch.compiler.reset()
    compiled = torch.compile(lambda z: 2 * op(z), backend="aot_eager")
    compiled(x)  # what was compiled for plain tensors must not be used for others
    expected = apply(lambda z: 2 * plain(z), x)
    with refused_by_old_dynamo() if transform == "dual" else nullcontext():
        torch.testing.assert_close(apply(compiled, x), expected, rtol=1e-8, atol=1e-8)


def test_code_that_inductor_compiled_does_not_drop_tangents():
    model, x = models.build("mlp6", width=8, image_size=8).eval().requires_grad_(False), IMAGES_8
    compiled = torch.compile(model)
    compiled(x)
    expected = jvp(model, (x,), (way_of(x),))[1]
    with refused_by_old_dynamo():
        torch.testing.assert_close(dual(compiled, x), expected)


def test_duals_are_refused_where_the_whole_must_be_one_graph():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: 2 * kernels.standardize(x), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(RuntimeError, match="tangent"):
        dual(compiled, IMAGES)


IMAGES_8 = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize("form", ["eager", "exported"])
@pytest.mark.parametrize("arch", ["mlp6", "preact18"])
def test_forward_mode_of_a_network(arch, form):
    torch.manual_seed(0)
    model = models.build(arch, width=8, image_size=8).eval().requires_grad_(False)
    expected = jacrev(model)(IMAGES_8)
    if form == "exported":
        model = torch.export.export(model, (IMAGES_8,)).module()
    assert expected.abs().max() > 0
    for actual in (
        jacfwd(model)(IMAGES_8),
        jacobian(model, IMAGES_8, vectorize=True, strategy="forward-mode"),
    ):
        torch.testing.assert_close(actual, expected)


def test_plain_compiled_code_holds_the_ops():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    def step(x, logits):
        mixed = kernels.mix(kernels.standardize(x), PERM, LAMS)
        return mixed.sum() + kernels.mixed_cross_entropy(logits, Y_A, Y_B, LAMS)

    torch.compile(step, backend=backend, fullgraph=True)(IMAGES, LOGITS)
    (code,) = graphs
    for name in ("standardize", "mix", "mixed_cross_entropy"):
        assert f"torch.ops.fastiat.{name}.default" in code


RADII = torch.tensor([0.1, 0.2])
GRAD = torch.randn(4, 2, 3, 2, dtype=torch.float64)
STEPS: dict[str, Function] = {
    "pgd_step": lambda a: kernels.pgd_step(a, GRAD, IMAGES, 0.1, 0.02),
    "pgd_step_": lambda a: kernels.pgd_step_(a.clone(), GRAD, IMAGES, 0.1, 0.02),
    "pgd_step_l2": lambda a: kernels.pgd_step_l2(a, GRAD, IMAGES, 0.5, 0.2),
    "pgd_step_channels": lambda a: kernels.pgd_step(a, GRAD, IMAGES, RADII, 0.02),
    "pgd_step_channels_": lambda a: kernels.pgd_step_(a.clone(), GRAD, IMAGES, RADII, 0.02),
    "pgd_step_l2_channels": lambda a: kernels.pgd_step_l2(a, GRAD, IMAGES, RADII, 0.2),
    "random_start": lambda a: kernels.random_start(a, 0.1, torch.tensor(3)),
}


@pytest.mark.parametrize("transform", ["jvp", "grad", "jacfwd", "hessian", "vmap of grad", "dual"])
@pytest.mark.parametrize("name", STEPS)
def test_derivative_of_an_op_that_has_none_is_refused(name, transform):
    with pytest.raises(RuntimeError, match=f"{name} has no derivative: pass x.detach"):
        {**TRANSFORMS, **EAGER}[transform](STEPS[name], IMAGES)


@pytest.mark.parametrize("name", STEPS)
def test_op_without_a_derivative_works_on_constants_inside_of_transforms(name):
    op = STEPS[name]
    step = op(IMAGES)
    (slope, inner) = vjp(lambda a: a * op(a.detach()), IMAGES)[1](torch.ones_like(step))[0], step
    torch.testing.assert_close(slope, inner, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(op(IMAGES.clone().requires_grad_()), step)


@pytest.mark.parametrize("name", STEPS)
def test_vmap_of_an_op_without_a_derivative_is_a_loop(name):
    many = batched(IMAGES)
    expected = torch.stack([STEPS[name](many[..., i]) for i in range(3)])
    assert torch.equal(vmap(STEPS[name], -1)(many), expected)


def test_vmap_refuses_to_write_into_what_it_does_not_batch():
    with pytest.raises(RuntimeError, match="writes into a tensor that vmap does not batch"):
        vmap(lambda g: kernels.pgd_step_(IMAGES.clone(), g, IMAGES, 0.1, 0.1))(GRAD[None])


def test_vmap_of_crop_flip_and_of_uint8():
    images = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8)
    where, zero = torch.tensor([[0, 1, 2], [2, 3, 4]]), torch.tensor([0, 1, 2])

    def crop(index):
        return kernels.crop_flip(images, index, zero, zero, zero > 1, 2)

    assert torch.equal(vmap(crop)(where), torch.stack([crop(index) for index in where]))
    expected = plain_standardize(images.double() / 255)
    actual = vmap(lambda x: kernels.standardize(x, torch.float64))(images[None])[0]
    torch.testing.assert_close(actual, expected)


def dynamic_cases():
    def standardize(a, g, x):
        return kernels.standardize(a)

    def mix(a, g, x):
        return kernels.mix(a, torch.arange(len(a)).flip(0), 0.3)

    def cross_entropy(a, g, x):
        y = torch.zeros(len(a), dtype=torch.int64)
        return kernels.mixed_cross_entropy(a.flatten(1), y, y, g[:, 0, 0, 0].sigmoid())

    def start(a, g, x):
        return kernels.random_start(a, 0.1, torch.tensor(3))

    return {
        "standardize": standardize,
        "mix": mix,
        "mixed_cross_entropy": cross_entropy,
        "random_start": start,
        "pgd_step": lambda a, g, x: kernels.pgd_step(a, g, x, 0.1, 0.02),
        "pgd_step_": lambda a, g, x: kernels.pgd_step_(a, g, x, 0.1, 0.02),
        "pgd_step_l2": lambda a, g, x: kernels.pgd_step_l2(a, g, x, 0.5, 0.2),
        "pgd_step_channels": lambda a, g, x: kernels.pgd_step(a, g, x, g[0, :, 0, 0].abs(), 0.02),
        "pgd_step_l2_channels": lambda a, g, x: kernels.pgd_step_l2(
            a, g, x, 0.5, g[:1, :, :1, :1].abs()
        ),
    }


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", dynamic_cases())
def test_one_graph_serves_other_sizes(name, dynamic):
    op = dynamic_cases()[name]
    torch.compiler.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, side in ((2, 8), (2, 10), (3, 12), (5, 7)):
        for form in ("contiguous", "channels_last"):
            x, grad = torch.rand(batch, 3, side, side), torch.randn(batch, 3, side, side)
            x = laid_out(x, form)
            start, same = x.clone(), x.clone()
            actual, expected = compiled(start, grad, x), op(same, grad, x)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(start, same)


def test_step_in_place_takes_marked_sizes():
    compiled = torch.compile(
        lambda a, g, x: kernels.pgd_step_(a, g, x, 0.1, 0.02), backend="eager", fullgraph=True
    )
    x, grad = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    start = x.clone()
    for tensor in (x, grad, start):
        torch._dynamo.mark_dynamic(tensor, (0, 2, 3))
    assert torch.equal(compiled(start, grad, x), kernels.pgd_step(x, grad, x, 0.1, 0.02))


def test_compiled_step_in_place_still_refuses_shared_memory():
    compiled = torch.compile(
        lambda a, g, x: kernels.pgd_step_(a, g, x, 0.1, 0.02), backend="eager", fullgraph=True
    )
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="x_adv shares memory with x"):
        compiled(x, torch.randn_like(x), x)
