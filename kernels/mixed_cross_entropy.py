"""Two-label cross-entropy: the mean of lam * CE(logits, y_a) + (1 - lam) * CE(logits, y_b).

(Zhang et al. 2018, section 2; the loss of section 3 of the IAT paper.) With p = softmax(logits) and
e_y the one-hot vector of class y, the gradient of one sample's loss is

    dlogits = (lam + (1 - lam)) * p - lam * e_{y_a} - (1 - lam) * e_{y_b}

where the first factor is 1, except for rounding. Labels may also be distributions over the classes,
as after label smoothing or distillation: their rows take the place of the one-hot vectors,

    loss = -sum_k t_k log p_k,  dlogits = (sum_k t_k) * p - t,  t = lam * y_a + (1 - lam) * y_b

and a class with t_k = 0 adds nothing, even if its logit is -inf. The loss of half-precision logits
is computed and returned in fp32: bf16 has three digits, which are too few for the sum of the
exponentials. The loss of fp64 logits is computed in fp64.
"""

# Kernel arguments are Triton values, for which there are no annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import (
    blocks,
    check_floating,
    check_lam_values,
    check_like,
    check_vector,
    compute_dtype,
    lam_tensor,
    on_device_of,
    power_of_two,
    refuse_gradient,
    register,
    tl,
    triton,
)

# PyTorch skips samples whose label is `ignore_index`, by default -100. Here -100 is a wrong label,
# so `ignore_index` is set to a label that no data set has.
_NO_CLASS = -(2**63)


def _distribution(y_a: Tensor, y_b: Tensor, lam: Tensor, dtype: torch.dtype) -> Tensor:
    """Return lam * y_a + (1 - lam) * y_b, (B, K), for labels that are distributions."""
    own, other = (w.to(dtype).expand(len(y_a))[:, None] for w in (lam, 1 - lam))
    return own * y_a.to(dtype) + other * y_b.to(dtype)


def mixed_cross_entropy_reference(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Tensor) -> Tensor:
    """The formula in PyTorch: the CPU implementation, and the reference of the tests."""
    log_p = F.log_softmax(logits.to(compute_dtype(logits.dtype)), 1)
    if y_a.dim() == 2:
        target = _distribution(y_a, y_b, lam, log_p.dtype)
        log_p = log_p.masked_fill((target == 0) & (log_p == -torch.inf), 0)
        return -(target * log_p).sum(1).mean()
    own, other = lam.to(log_p.dtype), (1 - lam).to(log_p.dtype)
    loss_a = F.nll_loss(log_p, y_a, reduction="none", ignore_index=_NO_CLASS)
    loss_b = F.nll_loss(log_p, y_b, reduction="none", ignore_index=_NO_CLASS)
    return (own * loss_a + other * loss_b).mean()


def mixed_cross_entropy_backward_reference(
    grad: Tensor, logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Tensor
) -> Tensor:
    """The gradient in PyTorch code, which autograd can differentiate again."""
    p = F.softmax(logits.to(compute_dtype(logits.dtype)), 1)
    if y_a.dim() == 2:
        target = _distribution(y_a, y_b, lam, p.dtype)
        d = target.sum(1, keepdim=True) * p - target
        return (d * (grad / max(len(p), 1))).to(logits.dtype)
    own = lam.to(p.dtype).expand(len(p))[:, None]
    other = (1 - lam).to(p.dtype).expand(len(p))[:, None]
    d = p.scatter_add(1, y_a[:, None], -own).scatter_add(1, y_b[:, None], -other)
    return (d * (grad / max(len(p), 1))).to(logits.dtype)


def _cpu(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Tensor) -> Tensor:
    check_lam_values(lam)
    classes = logits.shape[1]
    for name, y in (("y_a", y_a), ("y_b", y_b)):
        if y.dim() == 1 and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(
                f"{name} holds a class outside 0..{classes - 1}: give logits of more classes, or "
                f"number the classes from 0"
            )
    return mixed_cross_entropy_reference(logits, y_a, y_b, lam)


@triton.jit
def _top_and_total(row, valid, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the maximum and sum(exp(logits - maximum)) of ROWS rows, in one pass over the classes.

    This is the online softmax (Milakov & Gimelshein 2018): a block with a larger maximum rescales
    the sum of the blocks before it.
    """
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, CLASSES, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = valid[:, None] & (k < CLASSES)[None, :]
        s = tl.load(row[:, None] + k[None, :], mask, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(s, 1))
        # If all logits so far are -inf, -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = new_top
    return tl.where(top == float("-inf"), 0.0, top), total


@triton.jit
def _weights(lam, i, valid, PER_SAMPLE: tl.constexpr):
    # `lam + i * 0` reads the single lambda for every row, so that both cases have the same shape.
    own = tl.load(lam + i, valid, other=0) if PER_SAMPLE else tl.load(lam + i * 0)
    return own.to(tl.float32), (1.0 - own).to(tl.float32)


@triton.jit
def _target(y_a, y_b, i, k, own, other, mask, CLASSES: tl.constexpr):
    """Return lam * y_a + (1 - lam) * y_b for the samples `i` and the classes `k`."""
    offset = i[:, None] * CLASSES + k
    a = tl.load(y_a + offset, mask, other=0).to(tl.float32)
    b = tl.load(y_b + offset, mask, other=0).to(tl.float32)
    return own[:, None] * a + other[:, None] * b


@triton.jit
def _mixed_cross_entropy_kernel(
    logits,
    y_a,
    y_b,
    lam,
    loss,
    batch,
    stride,
    CLASSES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    SOFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program has ROWS samples: a single sample of ten classes would leave most threads idle.
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = i < batch
    row = logits + i * stride
    top, total = _top_and_total(row, valid, CLASSES, ROWS, BLOCK)
    own, other = _weights(lam, i, valid, PER_SAMPLE)
    # The kernel stores the loss of each sample, and PyTorch computes the mean: atomic additions
    # would sum in a different order in every run.
    if SOFT:
        log_total = tl.log(total)
        value = tl.zeros([ROWS], tl.float32)
        for start in range(0, CLASSES, BLOCK):
            k = (start + tl.arange(0, BLOCK))[None, :]
            mask = valid[:, None] & (k < CLASSES)
            s = tl.load(row[:, None] + k, mask, other=float("-inf")).to(tl.float32)
            t = _target(y_a, y_b, i, k, own, other, mask, CLASSES)
            absent = (t == 0) & (s == float("-inf"))
            minus_log_p = tl.where(absent, 0.0, top[:, None] - s + log_total[:, None])
            value += tl.sum(t * minus_log_p, 1)
    else:
        a = tl.load(y_a + i, valid, other=0)
        b = tl.load(y_b + i, valid, other=0)
        # A label outside the classes makes the loss NaN, which shows the error without a
        # synchronization.
        nan = float("nan")
        a_score = tl.load(row + a, valid & (a >= 0) & (a < CLASSES), other=nan).to(tl.float32)
        b_score = tl.load(row + b, valid & (b >= 0) & (b < CLASSES), other=nan).to(tl.float32)
        log_total = tl.log(total)
        value = own * (top - a_score + log_total) + other * (top - b_score + log_total)
    tl.store(loss + i, value, valid)


@triton.jit
def _mixed_cross_entropy_backward_kernel(
    grad,
    logits,
    y_a,
    y_b,
    lam,
    out,
    batch,
    stride,
    CLASSES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    SOFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = i < batch
    row = logits + i * stride
    top, total = _top_and_total(row, valid, CLASSES, ROWS, BLOCK)
    own, other = _weights(lam, i, valid, PER_SAMPLE)
    if SOFT:
        mass = tl.zeros([ROWS], tl.float32)
        for start in range(0, CLASSES, BLOCK):
            k = (start + tl.arange(0, BLOCK))[None, :]
            mask = valid[:, None] & (k < CLASSES)
            mass += tl.sum(_target(y_a, y_b, i, k, own, other, mask, CLASSES), 1)
    else:
        a = tl.load(y_a + i, valid, other=0)[:, None]
        b = tl.load(y_b + i, valid, other=0)[:, None]
    # The softmax is computed again, which costs less than saving it in the forward pass.
    upstream = tl.load(grad).to(tl.float32) / batch
    for start in range(0, CLASSES, BLOCK):
        k = (start + tl.arange(0, BLOCK))[None, :]
        mask = valid[:, None] & (k < CLASSES)
        s = tl.load(row[:, None] + k, mask, other=float("-inf")).to(tl.float32)
        if SOFT:
            t = _target(y_a, y_b, i, k, own, other, mask, CLASSES)
        else:
            t = tl.where(k == a, own[:, None], 0.0) + tl.where(k == b, other[:, None], 0.0)
        # Not exp(s - log(total)): the rounding of the logarithm would dominate the error.
        p = tl.exp(s - top[:, None]) / total[:, None]
        if SOFT:
            p *= mass[:, None]
        d = (p - t) * upstream
        tl.store(out + i[:, None] * CLASSES + k, d.to(out.dtype.element_ty), mask)


def _tile(classes: int) -> dict[str, int]:
    """Return the shape of a program's block: ROWS samples and BLOCK classes, num_warps warps.

    A block has 512 logits, or up to 1024 logits of one sample if there are many classes.
    """
    block = min(max(power_of_two(classes), 16), 1024)
    return {"ROWS": max(512 // block, 1), "BLOCK": block, "num_warps": 4}


def _unit_columns(logits: Tensor) -> Tensor:
    """Return logits whose rows are contiguous; the stride of the rows may be any, as in a slice."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _mixed_cross_entropy_triton(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Tensor) -> Tensor:
    logits = _unit_columns(logits)
    batch, classes = logits.shape
    loss = torch.empty(batch, dtype=torch.float32, device=logits.device)
    if batch:
        tile = _tile(classes)
        with on_device_of(logits):
            _mixed_cross_entropy_kernel[(blocks(batch, tile["ROWS"]),)](
                logits, y_a.contiguous(), y_b.contiguous(), lam.contiguous(), loss,
                batch, logits.stride(0), CLASSES=classes, PER_SAMPLE=lam.dim() == 1,
                SOFT=y_a.dim() == 2, enable_fp_fusion=True, **tile,
            )  # fmt: skip
    return loss.mean()


def _backward_triton(grad: Tensor, logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Tensor) -> Tensor:
    logits = _unit_columns(logits)
    batch, classes = logits.shape
    out = torch.empty((batch, classes), dtype=logits.dtype, device=logits.device)
    if batch:
        tile = _tile(classes)
        with on_device_of(logits):
            _mixed_cross_entropy_backward_kernel[(blocks(batch, tile["ROWS"]),)](
                grad, logits, y_a.contiguous(), y_b.contiguous(), lam.contiguous(), out,
                batch, logits.stride(0), CLASSES=classes, PER_SAMPLE=lam.dim() == 1,
                SOFT=y_a.dim() == 2, enable_fp_fusion=True, **tile,
            )  # fmt: skip
    return out


_backward_op = register(
    "mixed_cross_entropy_backward",
    _backward_triton,
    cpu=mixed_cross_entropy_backward_reference,
    fake=lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    formula=mixed_cross_entropy_backward_reference,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    for name, needed in zip(("y_a", "y_b", "lam"), ctx.needs_input_grad[1:4], strict=True):
        refuse_gradient(name, needed)
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    # Gradient mode is enabled only under create_graph=True. Autograd then needs PyTorch code that
    # it can differentiate.
    twice = torch.is_grad_enabled()
    backward = mixed_cross_entropy_backward_reference if twice else _backward_op
    return backward(grad, *ctx.saved_tensors), None, None, None


_op = register(
    "mixed_cross_entropy",
    _mixed_cross_entropy_triton,
    cpu=_cpu,
    fake=lambda logits, *_: logits.new_empty((), dtype=compute_dtype(logits.dtype)),
    formula=mixed_cross_entropy_reference,
    backward=_backward,
    setup_context=_save,
)


def mixed_cross_entropy(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: Tensor | float) -> Tensor:
    """Return the batch mean, a scalar, of the lambda-weighted two-label cross-entropy.

    logits: (B, K) floating point.
    y_a, y_b: class numbers in [0, K), (B,) int64, or both distributions over the classes, (B, K)
        floating point, such as smoothed labels. The rows of a distribution may have any sum.
    lam: weight of `y_a` in [0, 1]: a number, a scalar tensor or a tensor with a value for each
        image, (B,).

    Tensors are on one device. The loss is float32 (float64 for float64 logits), and NaN for an
    empty batch, as in PyTorch. It is twice differentiable in `logits`; torch.func also
    differentiates it in `lam`. Raises `ValueError` or `TypeError` for wrong arguments. The values
    of the labels and of a `lam` tensor are checked on the CPU only. On CUDA, reading them would
    synchronize with the GPU, so a label outside the classes makes the loss NaN.
    """
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, K) with K > 0, not {tuple(logits.shape)}")
    soft = isinstance(y_a, Tensor) and y_a.is_floating_point() and y_a.dim() == 2
    for name, y in (("y_a", y_a), ("y_b", y_b)):
        if soft:
            check_floating(name, y)
            check_like(name, y, "logits", logits)
        else:
            check_vector(name, y, logits.shape[0], torch.int64, "logits", logits)
    lam = lam_tensor(lam, "logits", logits)
    return _op(logits, y_a, y_b, lam)
