"""What the device code of bn_act's kernels shares: who owns what, and the formulas of an element.

Blocks are [positions, channels] in either layout; `triton_tiling.py` says what a program owns. With
POOL a position is a 2x2 window of four cells, else one pixel, one cell.
"""

import triton
import triton.language as tl

NO_MASK = tl.constexpr(0)  # no ReLU
OUTPUT_MASK = tl.constexpr(1)  # the ReLU's mask from the stored result
INPUT_MASK = tl.constexpr(2)  # the same mask computed again from x
NO_RESIDUAL = tl.constexpr(0)
PLAIN_RESIDUAL = tl.constexpr(1)
NORMALISED_RESIDUAL = tl.constexpr(2)


@triton.jit
def program(C, spans, steps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Tile, run and first position of this program, and its channels [BLOCK_C] with their mask."""
    blocks = tl.cdiv(C, BLOCK_C)
    i_tile = tl.program_id(0) // blocks
    i_c = tl.program_id(0) % blocks
    i_run = (i_tile // spans).to(tl.int64)
    first = (i_tile % spans).to(tl.int64) * steps * BLOCK_P
    b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return i_tile.to(tl.int64), i_run, first, b_c, b_c < C


@triton.jit
def innermost(C, pixels, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The same sizes, the innermost of which the compiler then knows to be a multiple of UNIT."""
    if CHANNELS_LAST:
        return C // UNIT * UNIT, pixels
    return C, pixels // UNIT * UNIT


@triton.jit
def cell(
    i_run,
    b_p,
    b_c,
    m_c,
    C,
    pixels,
    positions,
    H,
    W,
    K: tl.constexpr,
    POOL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Offsets of cell K of every position, and which exist: [BLOCK_P, BLOCK_C] each."""
    m_p = b_p < pixels
    if POOL:
        m_p = b_p < positions
        columns = (W + 1) // 2
        b_row = b_p.to(tl.int32) // columns * 2 + K // 2
        b_column = b_p.to(tl.int32) % columns * 2 + K % 2
        m_p &= (b_row < H) & (b_column < W)
        b_p = b_row.to(tl.int64) * W + b_column
    return offsets(i_run, b_p, b_c, C, pixels, CHANNELS_LAST), m_p[:, None] & m_c[None, :]


@triton.jit
def window(i_run, b_p, b_c, m_c, C, positions, H, W, CHANNELS_LAST: tl.constexpr):
    """Offsets of every window in the pooled image, and which have all their cells."""
    columns = (W + 1) // 2
    b_row = b_p.to(tl.int32) // columns
    b_column = b_p.to(tl.int32) % columns
    m_p = (b_p < positions) & (b_row < H // 2) & (b_column < W // 2)
    b_pixel = b_row.to(tl.int64) * (W // 2) + b_column
    pixels = tl.cast(H // 2, tl.int64) * (W // 2)
    o = offsets(i_run, b_pixel, b_c, C, pixels, CHANNELS_LAST)
    return o, m_p[:, None] & m_c[None, :]


@triton.jit
def offsets(i_run, b_pixel, b_c, C, pixels, CHANNELS_LAST: tl.constexpr):
    """Offsets [BLOCK_P, BLOCK_C] of pixels of a run."""
    if CHANNELS_LAST:
        return (i_run * pixels + b_pixel)[:, None] * C + b_c[None, :]
    return (i_run * C + b_c)[None, :] * pixels + b_pixel[:, None]


@triton.jit
def vector(p, b_c, m_c, default, PRESENT: tl.constexpr, ACC: tl.constexpr):
    """The channels' values [BLOCK_C] of a vector, or `default` where there is none."""
    if PRESENT:
        return tl.load(p + b_c, mask=m_c, other=0.0).to(ACC)  # [BLOCK_C]
    return tl.full(b_c.shape, default, ACC)


@triton.jit
def affine(
    p_mean,
    p_var,
    p_weight,
    p_bias,
    eps,
    b_c,
    m_c,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The vectors [BLOCK_C] of v = (x - mean) * scale + bias."""
    b_mean = tl.load(p_mean + b_c, mask=m_c, other=0.0).to(ACC)
    b_var = tl.load(p_var + b_c, mask=m_c, other=1.0).to(ACC)
    b_scale = tl.rsqrt((b_var + eps).to(ACC)) * vector(p_weight, b_c, m_c, 1.0, HAS_WEIGHT, ACC)
    return b_mean, b_scale, vector(p_bias, b_c, m_c, 0.0, HAS_BIAS, ACC)


@triton.jit
def normalise(b_x, b_mean, b_scale, b_bias):
    """(x - mean) * scale + bias: [BLOCK_P, BLOCK_C]."""
    # An explicit fma: forward and backward must round alike, or their masks differ.
    shape: tl.constexpr = b_x.shape
    b_scale = tl.broadcast_to(b_scale[None, :], shape)
    return tl.fma(b_x - b_mean[None, :], b_scale, tl.broadcast_to(b_bias[None, :], shape))


@triton.jit
def replaces(b_candidate, b_best):
    """Whether a later cell replaces a window's maximum: ties keep the first, NaN always wins."""
    return (b_candidate > b_best) | (b_candidate != b_candidate)
