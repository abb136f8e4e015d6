"""Pairwise interpolation of a batch: out[i] = lam[i] * x[i] + (1 - lam[i]) * x[perm[i]].

(Zhang et al. 2018, eq. 1; section 3 of the IAT paper.) With the inverse permutation inv of perm,
the gradient is

    dx[j] = lam[j] * g[j] + (1 - lam[inv[j]]) * g[inv[j]]

So each gradient value is written once, and no atomic additions are needed. The gradient is the
transpose of the linear map above, and the transpose of the gradient is that map again. So one op
with an argument `transpose` computes derivatives of any order. fp16 and bf16 are computed in fp32
and rounded once.
"""

# Kernel arguments are Triton values, for which there are no annotations.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
from torch import Tensor

from ._common import (
    blocks,
    check_floating,
    check_images,
    check_lam_values,
    check_vector,
    compute_dtype,
    dense,
    empty_like,
    from_rows,
    image_rows,
    lam_tensor,
    on_device_of,
    refuse_gradient,
    register,
    tl,
    triton,
)

# Values of one Triton program. They belong to one image, so that a program reads one entry of perm
# and lam.
_BLOCK = 1024


def mix_reference(x: Tensor, perm: Tensor, lam: Tensor, transpose: bool) -> Tensor:
    """The formulas above in PyTorch: the CPU implementation, and the reference of the tests."""
    rows = image_rows(dense(x)).to(compute_dtype(x.dtype))
    # 1 - lam is computed before the rounding to fp32: for an fp64 lambda near 1 it would lose its
    # digits otherwise.
    own, other = lam.to(rows.dtype), (1 - lam).to(rows.dtype)
    source = perm.argsort() if transpose else perm
    if lam.dim():
        own, other = own[:, None], (other[source] if transpose else other)[:, None]
    mixed = rows.index_select(0, source) * other + rows * own
    return from_rows(mixed.to(x.dtype), x)


def _mix_cpu(x: Tensor, perm: Tensor, lam: Tensor, transpose: bool) -> Tensor:
    batch = x.shape[0]
    if not torch.equal(perm.sort().values, torch.arange(batch, device=perm.device)):
        raise ValueError(f"perm is no permutation of the batch: give 0..{batch - 1} once each")
    check_lam_values(lam)
    return mix_reference(x, perm, lam, transpose)


@triton.jit
def _mix_kernel(
    x,
    source,
    lam,
    out,
    batch,
    n,
    blocks_per_image,
    PER_SAMPLE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One grid dimension for images and blocks: CUDA limits the other dimensions to 65535 programs.
    program = tl.program_id(0).to(tl.int64)
    i = program // blocks_per_image
    offset = (program % blocks_per_image) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    j = tl.load(source + i)
    # A wrong entry must not cause a read outside the tensor.
    valid = (j >= 0) & (j < batch)
    j = tl.where(valid, j, 0)
    if PER_SAMPLE:
        own = tl.load(lam + i)
        other = tl.load(lam + j) if TRANSPOSE else own
    else:
        own = tl.load(lam)
        other = own
    # 1 - lam is computed in the dtype of lam and then rounded to fp32, as in the reference.
    other = (1.0 - other).to(tl.float32)
    a = tl.load(x + i * n + offset, mask, other=0).to(tl.float32)
    b = tl.load(x + j * n + offset, mask, other=0).to(tl.float32)
    # The image of a wrong entry becomes NaN, so that the loss shows the error without a
    # synchronization.
    b = tl.where(valid, b, float("nan"))
    y = own.to(tl.float32) * a + other * b
    tl.store(out + i * n + offset, y.to(out.dtype.element_ty), mask)


@triton.jit
def _invert_kernel(perm, inverse, batch, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < batch
    j = tl.load(perm + i, mask, other=-1)
    # A scatter of row numbers is cheaper than a sort of perm.
    tl.store(inverse + j, i, mask & (j >= 0) & (j < batch))


def _mix_triton(x: Tensor, perm: Tensor, lam: Tensor, transpose: bool) -> Tensor:
    x, source, lam = dense(x), perm.contiguous(), lam.contiguous()
    out = empty_like(x)
    batch = x.shape[0]
    if x.numel() == 0:
        return out
    n = x.numel() // batch
    per_image = blocks(n, _BLOCK)
    with on_device_of(x):
        # No FMA in the kernels, so that the result equals the reference bit for bit.
        if transpose:
            # -1 marks the numbers that are missing in perm, whose rows become NaN. If perm has an
            # entry twice, another entry is missing.
            source = torch.full((batch,), -1, device=x.device)
            _invert_kernel[(blocks(batch, _BLOCK),)](
                perm.contiguous(), source, batch, BLOCK=_BLOCK, enable_fp_fusion=False
            )
        _mix_kernel[(batch * per_image,)](
            x, source, lam, out, batch, n, per_image,
            PER_SAMPLE=lam.dim() == 1, TRANSPOSE=transpose, BLOCK=_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    refuse_gradient("lam", ctx.needs_input_grad[2])
    _, perm, lam, ctx.transpose = inputs
    ctx.save_for_backward(perm, lam)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    perm, lam = ctx.saved_tensors
    return _op(grad, perm, lam, not ctx.transpose), None, None, None


_op = register(
    "mix",
    _mix_triton,
    cpu=_mix_cpu,
    fake=lambda x, *_: empty_like(x),
    formula=mix_reference,
    backward=_backward,
    setup_context=_save,
)


def mix(x: Tensor, perm: Tensor, lam: Tensor | float) -> Tensor:
    """Return `lam * x + (1 - lam) * x[perm]`, differentiable in `x`; in torch.func also in `lam`.

    x: (B, ...) floating point.
    perm: a permutation of the batch, (B,) int64.
    lam: weight of the image itself in [0, 1]: a number, a scalar tensor or a tensor with a value
        for each image, (B,). Pass a tensor in a captured CUDA graph, where a number is a constant,
        and in compiled code, which `torch.compile` may recompile for another number.

    Tensors are on one device; the result has the dtype and the memory format of `x`. Raises
    `ValueError` or `TypeError` for wrong arguments. The values of `perm` and of a `lam` tensor are
    checked on the CPU only. On CUDA, reading them would synchronize with the GPU, so an entry of
    `perm` outside the batch makes its image NaN, and a repeated entry makes gradients NaN.
    """
    check_floating("x", x)
    check_images("x", x)
    check_vector("perm", perm, x.shape[0], torch.int64, "x", x)
    lam = lam_tensor(lam, "x", x)
    return _op(x, perm, lam, False)
