"""A uniform start in the L-infinity ball: clip(x + eps * (2 u - 1), low, high), u ~ U[0, 1).

(Madry et al. 2018, section 4.) u comes from the counter-based generator Philox4x32-10 (Salmon et
al. 2011) with the key `seed`, which computes four 32-bit words from a counter. The offset e of a
value in memory determines its counter and its word:

    counter = 1024 * (e // 4096) + e % 1024,    word = e // 1024 % 4

So the CPU and CUDA give the same start bit for bit, with any number of threads. `first` is added
to e: if a batch is split and `first` is the number of values before each part, the parts have the
same starts as the whole batch. The seed is a tensor on the device, so that a captured CUDA graph
reads a new seed at every replay.
"""

# Kernel arguments are Triton values, for which there are no annotations.
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from ._common import (
    blocks,
    check_clip,
    check_floating,
    check_radius,
    check_same_device,
    compute_dtype,
    dense,
    empty_like,
    image_rows,
    on_device_of,
    register,
    tl,
    triton,
)
from .pgd_step import clamp

_BLOCK = 1024  # part of the formula above: another value changes every start
_GROUP = 4 * _BLOCK
_WORD = 0xFFFFFFFF
_TO_UNIT = 4.6566127342e-10  # a little less than 2^-31, so that u < 1, as in tl.rand


def philox_uniform(seed: int, first: int, groups: int) -> Tensor:
    """Return u of `groups` groups of 4096 values, from group `first` on, (groups * 4096,) fp32.

    The ten rounds of Philox4x32 use int64 tensors: PyTorch has few operations on unsigned tensors.
    """
    counter = torch.arange(first * _BLOCK, (first + groups) * _BLOCK, device="cpu")
    c0, c1 = counter & _WORD, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # A product overflows int64, but its 64 bits are right: the high and the low word.
        b, a = c2.mul_(0xCD9E8D57), c0.mul_(0xD2511F53)
        c0 = (b >> 32).bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (a >> 32).bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = b.bitwise_and_(_WORD), a.bitwise_and_(_WORD)
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    # The smaller of a word and its complement, which is what `_store_start` computes.
    words = torch.stack([c.view(groups, _BLOCK) for c in (c0, c1, c2, c3)], 1).view(-1)
    return torch.minimum(words, _WORD - words).to(torch.float32).mul_(_TO_UNIT)


def random_start_reference(
    x: Tensor, seed: Tensor, eps: float, low: float, high: float, first: int = 0
) -> Tensor:
    """The formula in PyTorch: the CPU implementation, and the reference of the tests."""
    x = dense(x)
    start = empty_like(x, compute_dtype(x.dtype))
    flat, x_flat = image_rows(start).view(-1), image_rows(x).view(-1)
    key, n = int(seed), x.numel()
    group, before = divmod(first, _GROUP)
    for i in range(-before, n, 8 * _GROUP):  # the counters of 8 groups fit into the cache
        part = slice(max(i, 0), min(i + 8 * _GROUP, n))
        noise = philox_uniform(key, group + (i + before) // _GROUP, blocks(part.stop - i, _GROUP))
        noise = noise[part.start - i : part.stop - i].mul_(2).sub_(1).mul_(eps)
        torch.add(x_flat[part].to(start.dtype), noise, out=flat[part])
    return start.clamp_(low, high).to(x.dtype)


@triton.jit
def _store_start(x, out, offset, n, bits, eps, low, high):
    # uint32 to [0, 1), as in tl.rand: a negative int32 is replaced by its complement, which leaves
    # 31 bits. Triton cannot read the module's constant _TO_UNIT, so its value is written out here.
    word = bits.to(tl.int32, bitcast=True)
    u = tl.where(word < 0, ~word, word).to(tl.float32) * 4.6566127342e-10
    inside = (offset >= 0) & (offset < n)
    start = tl.load(x + offset, inside, other=0).to(tl.float32) + (2.0 * u - 1.0) * eps
    tl.store(out + offset, clamp(start, low, high).to(out.dtype.element_ty), inside)


@triton.jit
def _random_start_kernel(x, seed, out, n, eps, low, high, first, before, BLOCK: tl.constexpr):
    # One program computes the four words of BLOCK counters, which are 4 * BLOCK values.
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    counter = (first + group) * BLOCK + lane
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    # Words 2 and 3 of the counter are zero: 2^64 counters are enough.
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c0 * 0, c0 * 0)
    # Word k belongs to values 1024 apart, not to neighbours, so that each store is contiguous.
    offset = group * (4 * BLOCK) + lane - before
    _store_start(x, out, offset, n, w0, eps, low, high)
    _store_start(x, out, offset + BLOCK, n, w1, eps, low, high)
    _store_start(x, out, offset + 2 * BLOCK, n, w2, eps, low, high)
    _store_start(x, out, offset + 3 * BLOCK, n, w3, eps, low, high)


def _random_start_triton(
    x: Tensor, seed: Tensor, eps: float, low: float, high: float, first: int = 0
) -> Tensor:
    x = dense(x)
    out = empty_like(x)
    n = x.numel()
    # The first program starts at the first value of a group, and masks the values before `x`.
    group, before = divmod(first, _GROUP)
    if n:
        with on_device_of(x):
            _random_start_kernel[(blocks(before + n, _GROUP),)](
                x, seed, out, n, eps, low, high, group, before,
                BLOCK=_BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
    return out


_op = register(
    "random_start",
    _random_start_triton,
    cpu=random_start_reference,
    fake=lambda x, *_: empty_like(x),
)


def random_start(
    x: Tensor,
    eps: float,
    seed: Tensor,
    clip: tuple[float, float] = (0.0, 1.0),
    first: int = 0,
) -> Tensor:
    """Return independent values, uniform in [x - eps, x + eps], clamped to `clip`.

    x: floating-point tensor of any shape.
    eps, clip: radius of the ball and pixel range, numbers in the units of `x`.
    seed: int64 tensor of one element on the device of `x`. The op does not change the seed: add to
        it for another draw. The same seed, shape and memory format give the same start on every
        device.
    first: if `x` is a part of a larger batch, the number of values before `x`, 0 or more.

    The result has the dtype and the memory format of `x`. The op has no derivative: if torch.func
    or forward-mode AD differentiates `x`, a `RuntimeError` asks for `x.detach()`. Raises
    `ValueError` or `TypeError` for other arguments.
    """
    check_floating("x", x)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError("seed must be an int64 tensor of one element, such as torch.tensor(0)")
    if seed.shape not in ((), (1,)):
        raise ValueError(f"seed must have one element, not the shape {tuple(seed.shape)}")
    check_same_device("seed", seed, "x", x)
    sizes = check_radius("eps", eps), *check_clip(clip)
    if first < 0:
        raise ValueError(f"first must be zero or more, not {first}")
    return _op(x, seed, *sizes, first)
