"""A uniform start in the L-infinity ball: clip(x + eps * (2 u - 1), low, high), u ~ U[0, 1).

(Madry et al. 2018, section 4.) u comes from the counter-based generator Philox4x32-10 (Salmon et
al. 2011) under the key `seed`, four words to a counter. With e the place of a value in memory,

    counter = 1024 * (e // 4096) + e % 1024,    word = e // 1024 % 4

so the CPU and CUDA give the same start bit for bit, whatever their number of threads. `first` is
added to e: a batch cut into parts has the starts of the whole, if each part says how many values
come before it. The seed is
a tensor on the device: a captured CUDA graph that adds to it draws anew at every replay.
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

_BLOCK = 1024  # changing it changes every start
_GROUP = 4 * _BLOCK
_WORD = 0xFFFFFFFF
_TO_UNIT = 4.6566127342e-10  # just under 2^-31, so that u < 1


def philox_uniform(seed: int, first: int, groups: int) -> Tensor:
    """u of `groups` groups of 4096 values, from group `first` on, as a (groups * 4096,) tensor."""
    counter = torch.arange(first * _BLOCK, (first + groups) * _BLOCK, device="cpu")
    c0, c1 = counter & _WORD, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # int64 products wrap, which leaves the right 64 bits, to be read as two unsigned words.
        b, a = c2.mul_(0xCD9E8D57), c0.mul_(0xD2511F53)
        c0 = (b >> 32).bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (a >> 32).bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = b.bitwise_and_(_WORD), a.bitwise_and_(_WORD)
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    words = torch.stack([c.view(groups, _BLOCK) for c in (c0, c1, c2, c3)], 1).view(-1)
    return torch.minimum(words, _WORD - words).to(torch.float32).mul_(_TO_UNIT)


def random_start_reference(
    x: Tensor, seed: Tensor, eps: float, low: float, high: float, first: int = 0
) -> Tensor:
    """The formula in torch: the truth of the tests and the CPU path."""
    x = dense(x)
    start = empty_like(x, compute_dtype(x.dtype))
    flat, x_flat = image_rows(start).view(-1), image_rows(x).view(-1)
    key, n = int(seed), x.numel()
    group, before = divmod(first, _GROUP)
    for i in range(-before, n, 8 * _GROUP):  # a stretch whose counters stay in cache
        part = slice(max(i, 0), min(i + 8 * _GROUP, n))
        noise = philox_uniform(key, group + (i + before) // _GROUP, blocks(part.stop - i, _GROUP))
        noise = noise[part.start - i : part.stop - i].mul_(2).sub_(1).mul_(eps)
        torch.add(x_flat[part].to(start.dtype), noise, out=flat[part])
    return start.clamp_(low, high).to(x.dtype)


@triton.jit
def _store_start(x, out, offset, n, bits, eps, low, high):
    # uint32 to [0, 1): the sign bit folds over, as in tl.rand.
    word = bits.to(tl.int32, bitcast=True)
    u = tl.where(word < 0, ~word, word).to(tl.float32) * 4.6566127342e-10
    inside = (offset >= 0) & (offset < n)
    start = tl.load(x + offset, inside, other=0).to(tl.float32) + (2.0 * u - 1.0) * eps
    tl.store(out + offset, clamp(start, low, high).to(out.dtype.element_ty), inside)


@triton.jit
def _random_start_kernel(x, seed, out, n, eps, low, high, first, before, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    counter = (first + group) * BLOCK + lane
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c0 * 0, c0 * 0)
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
    """Return a uniformly drawn point of the ball around every value of `x`, clamped to `clip`.

    `x` is any floating-point tensor; `eps` and `clip` are numbers in its units; `seed` is an int64
    tensor of one element on the device of `x`, which is read, not advanced: add to it for another
    draw. The same seed, shape and memory format give the same start on every device. `first` is how
    many values come before those of `x` where it is a part of a larger batch, 0 or more: the parts
    then have the starts of the whole. The result has the dtype and the memory format of `x` and
    carries no gradient; inside of torch.func and forward-mode AD a `RuntimeError` asks for
    `x.detach()`. Raises `ValueError` or `TypeError` for anything else.
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
