import math

import pytest
import torch
from kernel_cases import HALVES, INTERPRETED, error, reference_only
from torch.nn import functional as F

from fastiat.kernels import mixed_cross_entropy

# One class; CIFAR-10; one row over a block of 64 rows; ImageNet; one class over a block of 1024.
SIZES = [(1, 1), (3, 10), (65, 17), (2, 1000), (3, 1025)]


def plain(logits, y_a, y_b, lam):
    loss_a = F.cross_entropy(logits, y_a, reduction="none")
    loss_b = F.cross_entropy(logits, y_b, reduction="none")
    return (lam * loss_a + (1 - lam) * loss_b).mean()


def make(batch=4, classes=10, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    logits = (5 * torch.randn(batch, classes)).to(device, dtype)
    return logits, *(torch.randint(classes, (batch,)).to(device) for _ in range(2))


def make_lam(lam, batch, device):
    if lam == "scalar":
        return torch.tensor(0.7, device=device)
    if lam == "per sample":
        return torch.rand(batch, generator=torch.Generator().manual_seed(1)).to(device)
    return lam


@pytest.mark.parametrize("lam", [0, 1, 0.3, "scalar", "per sample"])
@pytest.mark.parametrize("size", SIZES)
def test_error_is_within_twice_that_of_torch_against_float64(size, lam, device):
    logits, y_a, y_b = make(*size, device)
    lam = make_lam(lam, size[0], device)
    host_lam = lam.cpu() if torch.is_tensor(lam) else lam

    def truth(dtype):
        x = logits.detach().cpu().to(dtype).requires_grad_()
        weight = host_lam.to(dtype) if torch.is_tensor(host_lam) else host_lam
        loss = plain(x, y_a.cpu(), y_b.cpu(), weight)
        return loss, torch.autograd.grad(3 * loss, x)[0]

    (exact, exact_grad), (expected, expected_grad) = truth(torch.float64), truth(torch.float32)
    loss = mixed_cross_entropy(logits.requires_grad_(), y_a, y_b, lam)
    (grad,) = torch.autograd.grad(3 * loss, logits)
    assert loss.shape == ()
    assert error(loss, exact) <= 2 * error(expected, exact) + 2e-6
    assert error(grad, exact_grad) <= 2 * error(expected_grad, exact_grad) + 2e-7


def make_soft(batch, classes, device, dtype=torch.float32):
    """Distributions that sum to 1, to more than 1 and to 0."""
    torch.manual_seed(2)
    y_a, y_b = torch.rand(2, batch, classes)
    y_b = y_b / y_b.sum(1, keepdim=True)
    y_b[0] = y_a[0] = 0
    return y_a.to(device, dtype), y_b.to(device, dtype)


@pytest.mark.parametrize("lam", [0, 1, 0.3, "scalar", "per sample"])
@pytest.mark.parametrize("size", SIZES)
def test_distributions_as_labels_are_as_exact_as_in_torch(size, lam, device):
    logits, *_ = make(*size, device)
    y_a, y_b = make_soft(*size, device)
    lam = make_lam(lam, size[0], device)

    def truth(dtype):
        x = logits.detach().cpu().to(dtype).requires_grad_()
        weight = lam.cpu().to(dtype) if torch.is_tensor(lam) else lam
        loss = plain(x, y_a.cpu().to(dtype), y_b.cpu().to(dtype), weight)
        return loss, torch.autograd.grad(3 * loss, x)[0]

    (exact, exact_grad), (expected, expected_grad) = truth(torch.float64), truth(torch.float32)
    loss = mixed_cross_entropy(logits.requires_grad_(), y_a, y_b, lam)
    (grad,) = torch.autograd.grad(3 * loss, logits)
    assert loss.shape == ()
    # Relative: distributions that sum to 500 have losses of thousands.
    scale = 1 + exact.abs().item()
    assert error(loss, exact) <= 2 * error(expected, exact) + 2e-6 * scale
    assert error(grad, exact_grad) <= 2 * error(expected_grad, exact_grad) + 2e-7 * scale


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_one_hot_distributions_give_the_loss_of_class_numbers(dtype, device):
    logits, y_a, y_b = make(65, 17, device, dtype)
    hot_a, hot_b = (F.one_hot(y, 17).to(dtype) for y in (y_a, y_b))
    lam = make_lam("per sample", 65, device)
    found = []
    for labels in ((y_a, y_b), (hot_a, hot_b)):
        loss = mixed_cross_entropy(logits.requires_grad_(), *labels, lam)
        found.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


def test_impossible_class_without_weight_adds_nothing(device):
    logits = torch.tensor([[0.0, -math.inf, 1.0]], device=device).requires_grad_()
    y = torch.tensor([[0.5, 0.0, 0.5]], device=device)
    loss = mixed_cross_entropy(logits, y, y, 0.5)
    (grad,) = torch.autograd.grad(loss, logits)
    total = math.log(1 + math.e)
    assert loss.item() == pytest.approx(total - 0.5, rel=1e-6)
    p = 1 / (1 + math.e)
    torch.testing.assert_close(grad.cpu(), torch.tensor([[p - 0.5, 0.0, 0.5 - p]]))
    wrong = torch.tensor([[0.5, 0.1, 0.4]], device=device)
    assert mixed_cross_entropy(logits, y, wrong, 0.5).item() == math.inf


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_logits_give_an_fp32_loss_of_fp32_accuracy(dtype, device):
    logits, y_a, y_b = make(5, 17, device, dtype)
    x = logits.cpu().double().requires_grad_()
    exact = plain(x, y_a.cpu(), y_b.cpu(), 0.3)
    (exact_grad,) = torch.autograd.grad(exact, x)
    loss = mixed_cross_entropy(logits.requires_grad_(), y_a, y_b, 0.3)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32
    assert error(loss, exact) < 1e-5
    assert grad.dtype == dtype
    assert error(grad, exact_grad) <= torch.finfo(dtype).eps * exact_grad.abs().max().item()


def test_extreme_logits_neither_overflow_nor_lose_the_loss(device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-math.inf, 0.0, 0.0]], device=device)
    y_a, y_b = (torch.tensor(y, device=device) for y in ([0, 1], [2, 2]))
    loss = mixed_cross_entropy(logits.requires_grad_(), y_a, y_b, 0.5)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx((0.5 * 1e4 + math.log(2)) / 2, rel=1e-6)
    torch.testing.assert_close(
        grad.cpu(), torch.tensor([[0.25, 0.0, -0.25], [0.0, 0.0, 0.0]]), rtol=0, atol=1e-6
    )


def test_nan_logits_make_the_loss_nan(device):
    logits, y_a, y_b = make(device=device)
    logits[1, 2] = math.nan
    assert mixed_cross_entropy(logits, y_a, y_b, 0.3).isnan()


@pytest.mark.parametrize("slicing", ["columns", "rows", "transposed"])
def test_strided_logits(slicing, device):
    logits, y_a, y_b = make(4, 10, device)
    wide = torch.zeros(8, 20, device=device)
    view = {
        "columns": wide[:4, ::2],
        "rows": wide[::2, :10],
        "transposed": wide.view(20, 8)[:10, :4].t(),
    }[slicing]
    view.copy_(logits)
    x = view.requires_grad_()
    loss = mixed_cross_entropy(x, y_a, y_b, 0.3)
    expected = plain(logits.requires_grad_(), y_a, y_b, 0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, logits)[0]
    )


def test_empty_batch_is_nan_as_in_torch(device):
    logits, y_a, y_b = (t[:0] for t in make(device=device))
    loss = mixed_cross_entropy(logits.requires_grad_(), y_a, y_b, 0.3)
    assert loss.isnan()
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 10)


LOGITS, Y, _ = make()


@pytest.mark.parametrize(
    ("logits", "y_a", "y_b", "lam", "kind", "message"),
    [
        (LOGITS[0], Y, Y, 0.5, ValueError, "logits must be"),
        (LOGITS[:, :0], Y, Y, 0.5, ValueError, "logits must be"),
        (LOGITS.long(), Y, Y, 0.5, TypeError, "logits must be float32"),
        (LOGITS, Y[:3], Y, 0.5, ValueError, "y_a must have shape"),
        (LOGITS, Y, Y[:, None], 0.5, ValueError, "y_b must have shape"),
        (LOGITS, Y, Y.float(), 0.5, TypeError, "y_b must be torch.int64"),
        (LOGITS, Y.to("meta"), Y, 0.5, ValueError, "y_a is on meta"),
        (LOGITS, Y, LOGITS, 0.5, TypeError, "y_b must be torch.int64"),
        (LOGITS, LOGITS, Y, 0.5, TypeError, "y_b must be float32"),
        (LOGITS, LOGITS, LOGITS[:, :9], 0.5, ValueError, "y_b has shape"),
        (LOGITS, LOGITS.to("meta"), LOGITS, 0.5, ValueError, "y_a is on meta"),
        (LOGITS, Y, Y, 2.0, ValueError, "lam must be in"),
        (LOGITS, Y, Y, torch.zeros(3), ValueError, "lam must be a scalar"),
    ],
)
def test_wrong_arguments_are_named(logits, y_a, y_b, lam, kind, message):
    with pytest.raises(kind, match=message):
        mixed_cross_entropy(logits, y_a, y_b, lam)


def test_gradient_of_distributions_is_refused():
    y = torch.full((4, 10), 0.1, requires_grad=True)
    with pytest.raises(ValueError, match="y_a requires a gradient"):
        mixed_cross_entropy(LOGITS, y, y.detach(), 0.5)


@pytest.mark.parametrize("label", [10, -1, -100])
def test_label_outside_the_classes(label):
    on_gpu = torch.cuda.is_available() and not INTERPRETED
    logits, y_a, y_b = make(device="cuda" if on_gpu else "cpu")
    y_b[1] = label
    if INTERPRETED or on_gpu:
        assert mixed_cross_entropy(logits, y_a, y_b, 0.5).isnan()
    else:
        with pytest.raises(ValueError, match="a class outside"):
            mixed_cross_entropy(logits, y_a, y_b, 0.5)


@reference_only
def test_gradcheck_to_second_order():
    logits, y_a, y_b = make(4, 3, dtype=torch.float64)
    lam = torch.tensor([0.0, 1.0, 0.3, 0.5])
    assert torch.autograd.gradcheck(
        lambda x: mixed_cross_entropy(x, y_a, y_b, lam), logits.requires_grad_()
    )
    assert torch.autograd.gradgradcheck(lambda x: mixed_cross_entropy(x, y_a, y_b, 0.3), logits)
    soft = make_soft(4, 3, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda x: mixed_cross_entropy(x, *soft, lam), logits)
    assert torch.autograd.gradgradcheck(lambda x: mixed_cross_entropy(x, *soft, lam), logits)


@reference_only
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("lam", ["scalar", "per sample"])
def test_opcheck(lam, soft, device):
    logits, y_a, y_b = make(device=device)
    if soft:
        y_a, y_b = make_soft(4, 10, device)
    lam = make_lam(lam, 4, device)
    ops = torch.ops.fastiat
    torch.library.opcheck(
        ops.mixed_cross_entropy.default, (logits.clone().requires_grad_(), y_a, y_b, lam)
    )
    upstream = torch.tensor(2.0, device=device)
    torch.library.opcheck(
        ops.mixed_cross_entropy_backward.default, (upstream, logits, y_a, y_b, lam)
    )


@reference_only
def test_compiles_forward_and_backward_without_a_graph_break(device):
    def loss(x, y_a, y_b, lam):
        return mixed_cross_entropy(x * 2.0, y_a, y_b, lam) * 3

    logits, y_a, y_b = make(device=device)
    (expected,) = torch.autograd.grad(loss(logits.requires_grad_(), y_a, y_b, 0.3), logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(logits, y_a, y_b, 0.3), logits)
    torch.testing.assert_close(actual, expected)


@reference_only
def test_torch_func_transforms_see_through(device):
    logits, y_a, y_b = make(device=device)

    def loss(x):
        return mixed_cross_entropy(x, y_a, y_b, 0.3)

    (expected,) = torch.autograd.grad(loss(logits.requires_grad_()), logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits.detach()), expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_values():
    logits = torch.zeros(2**21 + 1, 1024, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(len(logits), dtype=torch.int64, device="cuda")
    logits[-1, 5] = 100
    y[-1] = 5
    loss = mixed_cross_entropy(logits.requires_grad_(), y, y, 0.5)
    assert loss.item() == pytest.approx(math.log(1024) * (1 - 1 / len(y)), rel=1e-4)
    (grad,) = torch.autograd.grad(loss * len(y), logits)
    assert grad[-1].abs().max() == 0
    assert grad[-2, 0].item() == pytest.approx(1 / 1024 - 1, rel=1e-2)
