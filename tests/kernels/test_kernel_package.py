"""fastiat.kernels as somebody else's dependency: what it imports, and where there is no Triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import reference_only
from torch import nn
from torch.nn import functional as F

from fastiat.kernels import mix, mixed_cross_entropy, pgd_step, random_start

pytestmark = reference_only
ROOT = Path(__file__).parents[2]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import fastiat.kernels as kernels
x, grad = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
perm = torch.arange(4)
assert torch.equal(kernels.mix(x, perm, 0.5), x)
assert kernels.pgd_step(x, grad, x, 0.1, 0.1).shape == x.shape
logits = kernels.standardize(x.requires_grad_()).mean((2, 3))
kernels.mixed_cross_entropy(logits, perm % 3, perm % 3, 0.5).backward()
from fastiat.kernels.pgd_step import _pgd_step_triton
try:
    _pgd_step_triton(x, grad, x, 0.1, 0.1, 0.0, 1.0)
except RuntimeError as error:
    print(error)
"""


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_works_on_the_cpu_without_triton_and_says_what_cuda_needs():
    result = python(WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr
    assert "_pgd_step_kernel runs on CUDA tensors through Triton" in result.stdout
    assert "install triton" in result.stdout


def test_imports_neither_the_stages_nor_torchvision():
    result = python(
        "import sys, fastiat.kernels\n"
        "print(*(m for m in sys.modules if m.split('.')[0] in ('fastiat', 'torchvision')))"
    )
    names = result.stdout.split()
    assert "fastiat.kernels" in names
    allowed = ("fastiat", "fastiat.system.errors")
    assert all(n in allowed or n.startswith("fastiat.kernels") for n in names), names


def test_import_under_the_wrong_name_is_refused_rather_than_registering_every_op_twice():
    result = python("import kernels")
    assert "import fastiat.kernels, not kernels" in result.stderr


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_drops_into_a_plain_training_loop(compiled, device):
    """PGD and mixup in a loop that knows nothing of fastiat; it learns, and matches plain torch."""

    def train(step, blend, loss_of) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 3)).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
        x = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
        y = x.mean((2, 3)).argmax(1)

        def update(x_adv, perm, lam):
            return loss_of(net(blend(x_adv, perm, lam)), y, y[perm], lam)

        if compiled:
            update = torch.compile(update, fullgraph=True, backend="aot_eager")
        losses = []
        for i in range(30):
            x_adv = random_start(x, 0.02, torch.tensor(i, device=device))
            for _ in range(2):
                x_adv.requires_grad_()
                (grad,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), x_adv)
                x_adv = step(x_adv.detach(), grad, x, 0.02, 0.01)
            perm = torch.arange(32, device=device).roll(i)
            loss = update(x_adv, perm, torch.tensor(0.8, device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, net[1].weight.detach()

    def plain_step(x_adv, grad, x, eps, alpha):
        moved = x_adv + alpha * grad.sign()
        return torch.min(torch.max(moved, x - eps), x + eps).clamp(0, 1)

    def plain_loss(logits, y_a, y_b, lam):
        return lam * F.cross_entropy(logits, y_a) + (1 - lam) * F.cross_entropy(logits, y_b)

    losses, weight = train(pgd_step, mix, mixed_cross_entropy)
    expected, expected_weight = train(
        plain_step, lambda x, perm, lam: lam * x + (1 - lam) * x[perm], plain_loss
    )
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-2, atol=1e-3)
