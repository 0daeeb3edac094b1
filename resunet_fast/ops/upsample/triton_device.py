"""Device code of upsampling: the map, with a skip copied behind it, and its transpose as a gather.

Blocks are [pixels, channels] in either layout. A program owns a block of an image's pixels, of the
output forward and of the input backward, and a block of channels.
"""

import triton
import triton.language as tl

from ..bn_act.triton_blocks import offsets

NEAREST = tl.constexpr(0)
BILINEAR = tl.constexpr(1)
ALIGNED = tl.constexpr(2)


@triton.jit
def quotient(a, b, ACC: tl.constexpr):
    """a / b, correctly rounded: torch's source coordinates are."""
    if tl.float32 == ACC:  # whose plain division is approximate
        return tl.div_rn(tl.cast(a, ACC), tl.cast(b, ACC))
    return tl.cast(a, ACC) / tl.cast(b, ACC)


@triton.jit
def taps(b_out, size, target, MODE: tl.constexpr, ACC: tl.constexpr):
    """Which two inputs an output reads along one axis, and the weight of the second: [BLOCK_P]."""
    if MODE == NEAREST:
        # In float32 whatever the images' dtype: in float64 other pixels would be nearest than in
        # torch.
        scale = quotient(size, target, tl.float32)
        b_first = tl.minimum((b_out.to(tl.float32) * scale).to(tl.int32), size - 1)
        return b_first, b_first, tl.zeros(b_out.shape, ACC)
    if MODE == ALIGNED:
        b_position = quotient(size - 1, tl.maximum(target - 1, 1), ACC) * b_out.to(ACC)
    else:
        b_position = quotient(size, target, ACC) * (b_out.to(ACC) + 0.5) - 0.5
        b_position = tl.where(b_position < 0.0, 0.0, b_position)
    b_first = tl.minimum(b_position.to(tl.int32), size - 1)
    b_weight = tl.minimum(b_position - b_first.to(ACC), 1.0)
    return b_first, tl.minimum(b_first + 1, size - 1), b_weight


@triton.jit
def pixels_of(i_block, width, BLOCK_P: tl.constexpr):
    """Rows and columns of a block of an image's pixels: [BLOCK_P] each."""
    first = i_block.to(tl.int64) * BLOCK_P
    b_column = (first % width).to(tl.int32) + tl.arange(0, BLOCK_P)
    return (first // width).to(tl.int32) + b_column // width, b_column % width


@triton.jit
def blend(b_low, b_high, b_weight):
    """(1 - weight) * low + weight * high: [BLOCK_P, BLOCK_C]."""
    return (1.0 - b_weight)[:, None] * b_low + b_weight[:, None] * b_high


@triton.jit
def upsample_fwd_kernel(
    p_x,
    p_skip,
    p_y,
    C,
    S,
    H,
    W,
    OH,
    OW,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MODE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Resize x [N, C, H, W] to [OH, OW] and copy the skip [N, S, OH, OW] behind its channels."""
    # The same numbers, which the compiler then knows to be multiples of UNIT.
    C = C // UNIT * UNIT
    S = S // UNIT * UNIT
    source_blocks = tl.cdiv(C, BLOCK_C)
    channel_blocks = source_blocks + tl.cdiv(S, BLOCK_C)
    pixels = tl.cast(OH, tl.int64) * OW
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    i_c = tl.program_id(0) % channel_blocks
    i_tile = tl.program_id(0) // channel_blocks
    i_n = (i_tile // pixel_blocks).to(tl.int64)
    b_row, b_column = pixels_of(i_tile % pixel_blocks, OW, BLOCK_P)
    b_pixel = b_row.to(tl.int64) * OW + b_column
    m_p = (b_row < OH)[:, None]
    if HAS_SKIP and i_c >= source_blocks:
        b_c = (i_c - source_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        m = m_p & (b_c < S)[None, :]
        o = offsets(i_n, b_pixel, b_c, S, pixels, CHANNELS_LAST)
        b_y = tl.load(p_skip + o, mask=m, other=0.0)  # [BLOCK_P, BLOCK_C], copied as it is
        b_c += C
    else:
        b_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m = m_p & (b_c < C)[None, :]
        b_top, b_bottom, b_down = taps(b_row, H, OH, MODE, ACC)
        b_left, b_right, b_across = taps(b_column, W, OW, MODE, ACC)
        source = tl.cast(H, tl.int64) * W
        b_at = b_top.to(tl.int64) * W
        o = offsets(i_n, b_at + b_left, b_c, C, source, CHANNELS_LAST)
        b_y = tl.load(p_x + o, mask=m, other=0.0)  # [BLOCK_P, BLOCK_C]
        if MODE != NEAREST:
            b_below = b_bottom.to(tl.int64) * W
            o_below = offsets(i_n, b_below + b_left, b_c, C, source, CHANNELS_LAST)
            b_lower = tl.load(p_x + o_below, mask=m, other=0.0).to(ACC)
            b_start = blend(b_y.to(ACC), b_lower, b_down)
            o = offsets(i_n, b_at + b_right, b_c, C, source, CHANNELS_LAST)
            o_below = offsets(i_n, b_below + b_right, b_c, C, source, CHANNELS_LAST)
            b_upper = tl.load(p_x + o, mask=m, other=0.0).to(ACC)
            b_lower = tl.load(p_x + o_below, mask=m, other=0.0).to(ACC)
            b_end = blend(b_upper, b_lower, b_down)
            b_y = blend(b_start, b_end, b_across).to(p_y.dtype.element_ty)
    o = offsets(i_n, b_pixel, b_c, C + S, pixels, CHANNELS_LAST)
    tl.store(p_y + o, b_y, mask=m)


@triton.jit
def share(b_out, b_in, size, target, MODE: tl.constexpr, ACC: tl.constexpr):
    """The weight with which an output reads an input along one axis: [BLOCK_P]."""
    b_first, b_second, b_weight = taps(b_out, size, target, MODE, ACC)
    b_share = tl.where(b_first == b_in, 1.0 - b_weight, 0.0)
    if MODE != NEAREST:
        b_share += tl.where(b_second == b_in, b_weight, 0.0)
    return tl.where(b_out < target, b_share, 0.0)


@triton.jit
def earliest(b_in, size, target, MODE: tl.constexpr, ACC: tl.constexpr):
    """The first output that may read an input along one axis: [BLOCK_P]."""
    b_in = b_in.to(tl.int64)
    if MODE == NEAREST:
        b_out = b_in * target // size
    elif MODE == ALIGNED:
        b_out = tl.maximum(b_in - 1, 0) * (target - 1) // tl.maximum(size - 1, 1)
    else:
        b_out = tl.maximum((2 * b_in - 1) * target - size, 0) // (2 * size)
    # The last output that does not read it, unless coordinates are clamped or rounded.
    b_share = share(b_out, b_in, size, target, MODE, ACC)
    return tl.where(b_share == 0.0, b_out + 1, b_out).to(tl.int32)


@triton.jit
def upsample_bwd_kernel(
    p_dy,
    p_dx,
    C,
    H,
    W,
    OH,
    OW,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gather the gradient of x [N, C, H, W] from that of y [N, C, OH, OW], in a fixed order."""
    C = C // UNIT * UNIT  # the same number, which the compiler then knows to be a multiple of UNIT
    channel_blocks = tl.cdiv(C, BLOCK_C)
    pixels = tl.cast(H, tl.int64) * W
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    i_tile = tl.program_id(0) // channel_blocks
    i_n = (i_tile // pixel_blocks).to(tl.int64)
    b_c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = (b_c < C)[None, :]
    b_row, b_column = pixels_of(i_tile % pixel_blocks, W, BLOCK_P)
    b_top = earliest(b_row, H, OH, MODE, ACC)
    b_left = earliest(b_column, W, OW, MODE, ACC)
    target = tl.cast(OH, tl.int64) * OW
    b_dx = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for r in range(ROWS):
        b_down = share(b_top + r, b_row, H, OH, MODE, ACC)
        b_at = (b_top + r).to(tl.int64) * OW
        for s in tl.range(0, COLUMNS, loop_unroll_factor=4):
            b_share = b_down * share(b_left + s, b_column, W, OW, MODE, ACC)  # [BLOCK_P]
            o = offsets(i_n, b_at + b_left + s, b_c, C, target, CHANNELS_LAST)
            m = ((b_share != 0.0) & (b_row < H))[:, None] & m_c
            b_dy = tl.load(p_dy + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
            b_dx += b_share[:, None] * b_dy
    o = offsets(i_n, b_row.to(tl.int64) * W + b_column, b_c, C, pixels, CHANNELS_LAST)
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=(b_row < H)[:, None] & m_c)
