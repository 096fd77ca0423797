"""The recurrent pass with its swapped variants, and its gradient, in Triton.

A program owns N sequences and needs no other program. It runs passes over tiles of R rows. In the first pass the rows
are the originals and V variants of each, in lock step; in the passes behind it they are the other variants, each from
its own start, dense over the tile. Where W_hh fits on chip (RESIDENT) it is loaded once and the states stay in
registers; a variant in lock step then runs the steps before its swap too, which costs nothing, as its row is there.
Otherwise blocks of W_hh stream through the cache at every step, and states go through memory, to be read by all threads
of the program behind a barrier.

A variant stores its span i..end only: row v * S + t - i of `spans`, v = b * K + k. The gradient goes the same way back,
the dense variants first. What a variant owes to its original at i is added there before the product with W_hh. All
sums are taken in a fixed order.

    forward_kernel    states, gates, penalties
    backward_kernel   gradients of the gates
    gather_kernel     adds what the variants owe to the rows of x_proj that they have read
    weight_kernel     dW_hh and db_hh, from the gradients of the gates

T steps, B sequences, K variants of each, H units, S rows kept for a variant; G gates, STATES states, KEPT blocks of
gates that the backward needs, D different blocks of gate gradients. Tuples hold h, or h and c.

    x_proj, dx, du         (T, B, G*H)
    w_hh                   (G*H, H), in a tuple; where float32 streams its halves
    b_hh                   (G*H) or None
    swaps, ends, lengths   (B, K, 2), (B, K), (B), int64
    start, last            (B, H); these and all that follow but the gates are in the dtype of states, at least float32
    tracks, ended          (T, B, H), (B, K, H)
    penalty                (B, K)
    gates                  (T*B + B*K*S, KEPT*H), the originals' first
    spans                  (B*K*S, STATES*H)
    d_spans                (B*K*S, D*H), in the dtype of gates
    d_first                (B*K, H), what a variant owes to the last state before its swap, but for the product
    carry                  (programs*R, STATES*H), the gradients of states where W_hh streams
    end_times, end_order   (B, K), the ends of a sequence's variants, latest first, and whose they are; so for starts

What a product meets is laid out over the threads as the product is; a change of layout from that of memory is two
barriers. So blocks that lie beside each other move as one tensor, with one change (AS_ONE), and what only happens where
a variant ends or starts stands behind a branch.

float32 on matrix units, "tf32x3", makes of each factor a sum of two TF32 numbers, and of a product the three larger of
four. W_hh that streams comes as such halves: split where it is loaded, it would be split at every step.

Gradients that come in are as what they are of, or None for zero. ALIGN divides H: where it is a multiple of 4, say, the
compiler may move so many neighbours at once, which Triton itself only sees of multiples of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

# which of two dimensions goes to neighbouring threads, where either would do: the last of them from Triton 3.7 on
_LAST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))


@triton.jit
def _positions(swaps, ends, v, rows, T):
    """i, j and the last step of variants; T, T and T - 1 in other rows. What a GPU is given nobody has checked: all are
    brought into the sequence, and into this order, so that no address lies outside the tensors."""
    i = tl.minimum(tl.maximum(tl.load(swaps + 2 * v, rows, T), 0), T - 1)
    j = tl.minimum(tl.maximum(tl.load(swaps + 2 * v + 1, rows, T), i), T - 1)
    stop = tl.minimum(tl.maximum(tl.load(ends + v, rows, T), j), T - 1)
    return tl.where(rows, i, T).to(tl.int32), tl.where(rows, j, T).to(tl.int32), stop.to(tl.int32)


@triton.jit
def _rows(p, N, V, swaps, ends, lengths, T, B, K, longest, R: tl.constexpr):
    """The rows of pass p: their sequence b, variant v = b * K + k, positions i and j, last step, and whether each is
    an original, a variant, or a variant that moves anything and so is run, for `longest` steps at most. Originals have
    i = j = T."""
    row = tl.arange(0, R)
    n_dense = tl.maximum(K - V, 1)
    dense = (p - 1) * R + row
    sequence = tl.where(p == 0, row // (1 + V), dense // n_dense)
    k = tl.where(p == 0, row % (1 + V) - 1, V + dense % n_dense)
    b = tl.program_id(0) * N + sequence
    valid = (sequence < N) & (b < B)
    variant = valid & (k >= 0)
    v = b * K + k
    i, j, stop = _positions(swaps, ends, v, variant, T)
    length = tl.minimum(tl.maximum(tl.load(lengths + b, valid, 1), 1), T).to(tl.int32)
    moving = variant & (i < j)
    stop = tl.where(moving, tl.minimum(stop, i + longest - 1), stop)
    return b, v, i, j, tl.where(variant, stop, length - 1), valid & (k < 0), variant, moving


@triton.jit
def _passes(N, V, K, R: tl.constexpr):
    return 1 + tl.cdiv(N * (K - V), R)


@triton.jit
def _steps(p, T, i, stop, moving):
    """Steps of pass p: all of the originals', or those of the longest span."""
    return tl.where(p == 0, T, tl.max(tl.where(moving, stop - i + 1, 0), 0))


@triton.jit
def _source(t, b, i, j, B):
    """The row of x that a row reads at step t."""
    return tl.where(t == i, j, tl.where(t == j, i, t)) * B + b


@triton.jit
def _slot(t, v, i, S, RING: tl.constexpr):
    """The row of `spans` of a variant's step t."""
    step = t - i
    if RING:
        step = step % 2
    return v * S + step


@triton.jit
def _either(rows, a, b, ALIGN: tl.constexpr):
    """Addresses a in some rows and b in the others. That both are aligned the compiler does not see by itself."""
    BYTES: tl.constexpr = ALIGN * a.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(tl.where(rows, a, b), [BYTES if BYTES < 16 else 16] * len(rows.shape))


@triton.jit
def _row(pointer, row, H):
    return pointer + row.to(tl.int64) * H


@triton.jit
def _before(n: tl.constexpr, t, b, v, i, start, tracks, spans, B, H, S, RING: tl.constexpr, ALIGN: tl.constexpr):
    """Where state n of each row before step t lies: in its span, or in the original's states, or at the start."""
    original = _either(t > 0, _row(tracks[n], (t - 1) * B + b, H), _row(start[n], b, H), ALIGN)
    own = _row(spans, _slot(t - 1, v, i, S, RING) * len(tracks) + n, H)
    return _either(t > i, own, original, ALIGN)


@triton.jit
def _load_states(
    t, b, v, i, rows, unit, start, tracks, spans, B, H, S, RING: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    s = ()
    for n in tl.static_range(len(tracks)):
        address = _before(n, t, b, v, i, start, tracks, spans, B, H, S, RING, ALIGN)
        s = s + (tl.load(address[:, None] + unit, rows[:, None] & (unit < H)[None, :], 0.0),)
    return s


@triton.jit
def _beside(blocks):
    """1 to 4 blocks as one, (1, 2 or 4, rows, units), or the rows first: what moves as one changes its layout as one.
    Rows go to neighbouring threads: a thread stores to one."""
    R: tl.constexpr = blocks[0].shape[0]
    UNITS: tl.constexpr = blocks[0].shape[1]
    if len(blocks) == 1:
        together = blocks[0][None, :, :] if _LAST else blocks[0][:, None, :]
    elif len(blocks) == 2:
        together = tl.join(blocks[0], blocks[1])
        together = together.permute(2, 0, 1) if _LAST else together.permute(0, 2, 1)
    else:
        even, odd = tl.join(blocks[0], blocks[2]), tl.join(blocks[1], blocks[len(blocks) // 4 * 3])
        together = tl.join(even, odd)
        if _LAST:
            together = together.permute(2, 3, 0, 1).reshape(4, R, UNITS)
        else:
            together = together.permute(0, 2, 3, 1).reshape(R, 4, UNITS)
    return together


@triton.jit
def _of_rows(values, FIRST: tl.constexpr):
    """Values of rows, in two dimensions with blocks: rows first or last."""
    return values[:, None] if FIRST else values[None, :]


@triton.jit
def _of_blocks(COUNT: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """The numbers of COUNT blocks, and up to a power of two."""
    n = tl.arange(0, COUNT if COUNT < 3 else 4)
    return n[None, :] if ROWS_FIRST else n[:, None]


@triton.jit
def _store_as_one(address, together, rows, unit, H):
    """What `_beside` has made one, to addresses in its order."""
    tl.store(address[:, :, None] + unit, together, rows[:, :, None] & (unit < H)[None, None, :])


@triton.jit
def _in_line(blocks):
    """1 or 2 blocks in one, (rows, 1 or 2 times the units)."""
    if len(blocks) == 1:
        line = blocks[0]
    else:
        line = tl.join(blocks[0], blocks[1]).permute(0, 2, 1).reshape(blocks[0].shape[0], 2 * blocks[0].shape[1])
    return line


@triton.jit
def _apart(loaded, COUNT: tl.constexpr, AS_ONE: tl.constexpr):
    """The blocks of what `_load_rows` has loaded."""
    if not AS_ONE:
        blocks = loaded
    else:
        loaded = loaded.permute(1, 0, 3, 2) if _LAST else loaded.permute(1, 2, 3, 0)
        R: tl.constexpr = loaded.shape[0]
        UNITS: tl.constexpr = loaded.shape[1] * loaded.shape[2]
        if COUNT == 1:
            blocks = (loaded.reshape(R, UNITS),)
        elif COUNT == 2:
            blocks = loaded.reshape(R, UNITS, 2).split()
        else:
            even, odd = loaded.reshape(R, UNITS, 2, 2).split()
            first, third = even.split()
            second, fourth = odd.split()
            blocks = (first, second, third)
            if COUNT == 4:
                blocks = blocks + (fourth,)
    return blocks


@triton.jit
def _load_as_one(address, rows, first, H, UNITS: tl.constexpr):
    """Blocks of units from `first` on: (units / C, R, 1, 2 or 4, C), or the first and third exchanged. All a thread
    loads is of one row, yet not the same units of all blocks, or each would change its layout by itself."""
    PIECE: tl.constexpr = 512 // address.dtype.element_ty.primitive_bitwidth
    C: tl.constexpr = PIECE if PIECE < UNITS else UNITS
    unit = first + tl.arange(0, UNITS // C)[:, None] * C + tl.arange(0, C)[None, :]
    if _LAST:
        address, rows, unit = address[None, :, :, None], rows[None, :, :, None], unit[:, None, None, :]
    else:
        address, rows, unit = address[:, :, None, None], rows[:, :, None, None], unit[None, None, :, :]
    return tl.load(address + unit, rows & (unit < H), 0.0)


@triton.jit
def _load_block(base, rows, first, H, UNITS: tl.constexpr):
    unit = first + tl.arange(0, UNITS)
    return tl.load(base[:, None] + unit, rows[:, None] & (unit < H)[None, :], 0.0)


@triton.jit
def _load_rows(base, rows, first, H, COUNT: tl.constexpr, UNITS: tl.constexpr, AS_ONE: tl.constexpr):
    """Blocks of units of COUNT rows of H from each base on: of what a product meets, AS_ONE, else each by itself."""
    if AS_ONE:
        n = _of_blocks(COUNT, _LAST)
        loaded = _load_as_one(_of_rows(base, _LAST) + n * H, _of_rows(rows, _LAST) & (n < COUNT), first, H, UNITS)
    else:
        loaded = ()
        for n in tl.static_range(COUNT):
            loaded = loaded + (_load_block(base + n * H, rows, first, H, UNITS),)
    return loaded


@triton.jit
def _load(base, rows, first, H, COUNT: tl.constexpr, UNITS: tl.constexpr, AS_ONE: tl.constexpr):
    return _apart(_load_rows(base, rows, first, H, COUNT, UNITS, AS_ONE), COUNT, AS_ONE)


@triton.jit
def _store(base, blocks, rows, unit, H, AS_ONE: tl.constexpr):
    """Blocks of units to as many rows of H from each base on."""
    COUNT: tl.constexpr = len(blocks)
    if AS_ONE:
        n = _of_blocks(COUNT, not _LAST)
        rows = _of_rows(rows, not _LAST) & (n < COUNT)
        _store_as_one(_of_rows(base, not _LAST) + n * H, _beside(blocks), rows, unit, H)
    else:
        for n in tl.static_range(COUNT):
            tl.store((base + n * H)[:, None] + unit, blocks[n], rows[:, None] & (unit < H)[None, :])


@triton.jit
def _store_gradients(
    of_dx, of_du, of_span, dx_last, du, original, of_variant, unit, H,
    G: tl.constexpr, D: tl.constexpr, AS_ONE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Those of a variant to its span, those of an original to dx, which has the last of D in the place of the last of
    du, and to du. The first two are one store."""
    base = _either(original, of_dx, of_span, ALIGN)
    blocks = du
    if D > G:
        blocks = blocks + (dx_last,)
    if AS_ONE:
        together = _beside(blocks)
        n = _of_blocks(D, not _LAST)
        in_original = _of_rows(original, not _LAST)
        place = _of_rows(base, not _LAST) + tl.where(in_original & (n == D - 1), G - 1, n) * H
        rows = (in_original & ((n < G - 1) | (n == D - 1))) | (_of_rows(of_variant, not _LAST) & (n < D))
        _store_as_one(place, together, rows, unit, H)
        _store_as_one(_of_rows(of_du, not _LAST) + n * H, together, in_original & (n < G), unit, H)
    else:
        for n in tl.static_range(D):
            place = base + tl.where(original, G - 1 if n == D - 1 else n, n) * H
            rows = (original & (n < G - 1 or n == D - 1)) | of_variant
            tl.store(place[:, None] + unit, blocks[n], rows[:, None] & (unit < H)[None, :])
        _store(of_du, du, original, unit, H, False)


@triton.jit
def _any(rows):
    return tl.max(rows.to(tl.int32), 0) > 0


@triton.jit
def _soon(
    t, b, v, i, original, live, stop, first, d_tracks, start, tracks, gates, spans, T, B, H, S,
    KEPT: tl.constexpr, UNITS: tl.constexpr, AS_ONE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What step t of the way back reads, each as one: the last state before it, of rows that go on to it or end before
    it, with the gradient of the first state behind it; and the gates."""
    inside = live & (t >= tl.where(original, 0, i))
    running = inside & (t <= stop)
    LAST: tl.constexpr = len(tracks) - 1
    base = _before(LAST, t, b, v, i, start, tracks, spans, B, H, S, False, ALIGN)
    if d_tracks[0] is None:
        states = _load_rows(base, inside & (t <= stop + 1), first, H, 1, UNITS, AS_ONE)
    elif AS_ONE:
        n = _of_blocks(2, _LAST)
        of_gradient = _row(d_tracks[0], t * B + b, H)
        both = _either(n == 0, _of_rows(base, _LAST), _of_rows(of_gradient, _LAST), ALIGN)
        # of arithmetic: of a choice some versions of the compiler change the layout at every step, or die
        last = tl.where(original, stop, -1)
        until = _of_rows(last, _LAST) + (1 - n) * _of_rows(stop + 1 - last, _LAST)
        states = _load_as_one(both, _of_rows(inside, _LAST) & (_of_rows(t, _LAST) <= until), first, H, UNITS)
    else:
        gradient = _load_block(_row(d_tracks[0], t * B + b, H), original & running, first, H, UNITS)
        states = (_load_block(base, inside & (t <= stop + 1), first, H, UNITS), gradient)
    kept = ()
    if KEPT:
        row = tl.where(original, t * B + b, T * B + v * S + (t - i))
        kept = _load_rows(_row(gates, row, KEPT * H), running, first, H, KEPT, UNITS, AS_ONE)
    return states, kept


@triton.jit
def _load_weights(w_hh, to, unit, H, G: tl.constexpr):
    """G blocks of W_hh, each in halves if W_hh is: rows `to`, columns `unit`, of either orientation."""
    blocks = ()
    for g in tl.static_range(G):
        halves = ()
        for n in tl.static_range(len(w_hh)):
            halves = halves + (tl.load(w_hh[n] + (g * H + to) * H + unit, (to < H) & (unit < H), 0.0),)
        blocks = blocks + (halves,)
    return blocks


@triton.jit
def _load_stack(w_hh, g: tl.constexpr, COUNT: tl.constexpr, unit, H):
    """W_hh of COUNT gates, from gate g on, below each other."""
    UNITS: tl.constexpr = unit.shape[0]
    row = tl.arange(0, COUNT * UNITS)
    to = row % UNITS
    address = w_hh[0] + ((g + row // UNITS) * H + to)[:, None] * H + unit
    return (tl.load(address, (to < H)[:, None] & (unit < H)[None, :], 0.0),)


@triton.jit
def _dot(a, w, total, PRECISION: tl.constexpr):
    """A block of rows times a block of W_hh, on top of `total`."""
    if len(w) == 1:
        total = tl.dot(a, w[0], total, input_precision=PRECISION, out_dtype=total.dtype)
    else:
        # the nearest TF32; what is left loses a bit in the product, as it would if it were rounded. The high half of
        # NaN may be 0, the low one is NaN
        high = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(a.dtype, bitcast=True)
        total = tl.dot(a - high, w[0], total, input_precision="tf32")
        total = tl.dot(high, w[1], total, input_precision="tf32")
        total = tl.dot(high, w[0], total, input_precision="tf32")
    return total


@triton.jit
def _product(a, w, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """The product of a block of rows with each of the blocks of W_hh."""
    u = ()
    for g in tl.static_range(len(w)):
        u = u + (_dot(a.to(w[g][0].dtype), w[g], tl.zeros((a.shape[0], w[g][0].shape[1]), WIDE), PRECISION),)
    return u


@triton.jit
def _zeros(COUNT: tl.constexpr, R: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr):
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros((R, UNITS), WIDE),)
    return blocks


@triton.jit
def _streamed(
    address, rows, unit, w_hh, H, G: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr
):
    """W_hh h for rows of h at an address, of the units `unit`: blocks of W_hh come through the cache."""
    u = _zeros(G, address.shape[0], unit.shape[0], WIDE)
    for block in range(tl.cdiv(H, BK)):
        column = block * BK + tl.arange(0, BK)
        h = tl.load(address[:, None] + column, rows[:, None] & (column < H)[None, :], 0.0)
        w = _load_weights(w_hh, unit[None, :], column[:, None], H, G)
        u = _add(u, _product(h, w, WIDE, PRECISION))
    return u


@triton.jit
def _cast(blocks, WIDE: tl.constexpr):
    wide = ()
    for n in tl.static_range(len(blocks)):
        wide = wide + (blocks[n].to(WIDE),)
    return wide


@triton.jit
def _add(a, b):
    total = ()
    for n in tl.static_range(len(a)):
        total = total + (a[n] + b[n],)
    return total


@triton.jit
def _keep(rows, blocks):
    """Blocks, and 0 in all other rows."""
    kept = ()
    for n in tl.static_range(len(blocks)):
        kept = kept + (tl.where(rows[:, None], blocks[n], 0),)
    return kept


@triton.jit
def _add_bias(u, b_hh, unit, H):
    if b_hh is None:
        biased = u
    else:
        biased = ()
        for g in tl.static_range(len(u)):
            biased = biased + (u[g] + tl.load(b_hh + g * H + unit, unit < H, 0.0)[None, :],)
    return biased


@triton.jit(do_not_specialize=["T", "B", "K", "S", "N", "V"])
def forward_kernel(
    x_proj, w_hh, b_hh, start, swaps, ends, lengths,
    tracks, last, ended, penalty, gates, spans,
    T, B, K, H, S, N, V,
    STEP: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, SPANS: tl.constexpr, RING: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Runs the originals and variants of N sequences.

    KEPT: blocks of gates that are kept, 0 for none. SPANS: whether the states of the spans are kept; with RING of the
    last two steps alone.
    """
    H = H // ALIGN * ALIGN
    wide: tl.constexpr = spans.dtype.element_ty
    STATES: tl.constexpr = len(tracks)
    blocks = 1 if RESIDENT else tl.cdiv(H, BH)
    if RESIDENT:
        first, unit = 0, tl.arange(0, BH)
        w = _load_weights(w_hh, unit[None, :], unit[:, None], H, G)
    for p in range(_passes(N, V, K, R)):
        longest = T if RING or not SPANS else S
        b, v, i, j, stop, original, variant, moving = _rows(p, N, V, swaps, ends, lengths, T, B, K, longest, R)
        origin = tl.where(p == 0, 0, i)
        begin = tl.where(original | RESIDENT, 0, i)
        live = original | moving
        if RESIDENT:
            s = _load_states(origin, b, v, i, live, unit, start, tracks, spans, B, H, S, RING, ALIGN)
            soon = _load_rows(_row(x_proj, _source(origin, b, i, j, B), G * H), live, first, H, G, BH, True)
        for tau in range(_steps(p, T, i, stop, moving)):
            t = origin + tau
            running = live & (t >= begin) & (t <= stop)
            own = moving & (t >= i) & (t <= stop)
            at = t * B + b
            in_span = _slot(t, v, i, S, RING)
            for block in range(blocks):
                if RESIDENT:
                    x = _apart(soon, G, True)  # what the next step reads comes during this one
                    soon = _load_rows(
                        _row(x_proj, _source(t + 1, b, i, j, B), G * H), live & (t < stop), first, H, G, BH, True
                    )
                    u = _product(s[0], w, wide, PRECISION)
                else:
                    first = block * BH
                    unit = first + tl.arange(0, BH)
                    h = _before(0, t, b, v, i, start, tracks, spans, B, H, S, RING, ALIGN)
                    u = _streamed(h, running, unit, w_hh, H, G, wide, PRECISION, BK)
                    s = _load_states(t, b, v, i, running, unit, start, tracks, spans, B, H, S, RING, ALIGN)
                    x = _load(_row(x_proj, _source(t, b, i, j, B), G * H), running, first, H, G, BH, True)
                after, kept = STEP(_cast(x, wide), _add_bias(u, b_hh, unit, H), s[STATES - 1])
                # an original's states go to its track, 0 beyond its length, a variant's to its span
                rows = original
                if SPANS:
                    rows = original | own
                address = ()  # of all states
                for n in tl.static_range(STATES):
                    track = _row(tracks[n], at, H)
                    if SPANS:
                        track = _either(original, track, _row(spans, in_span * STATES + n, H), ALIGN)
                    address = address + (_of_rows(track, not _LAST),)
                base = address[0]
                if STATES == 2:
                    base = _either(_of_blocks(2, not _LAST) == 0, base, address[1], ALIGN)
                _store_as_one(base, _beside(_keep(running, after)), _of_rows(rows, not _LAST), unit, H)
                if KEPT:
                    row = tl.where(original, at, T * B + in_span)
                    kept = _cast(kept, gates.dtype.element_ty)
                    _store(_row(gates, row, KEPT * H), kept, own | (original & running), unit, H, True)
                if RESIDENT:
                    held = ()
                    for n in tl.static_range(STATES):
                        held = held + (tl.where(running[:, None], after[n], s[n]),)
                    s = held
            if not RESIDENT:
                tl.debug_barrier()
        tl.debug_barrier()

        total = tl.zeros((R,), wide)
        for block in range(blocks):
            if not RESIDENT:
                first = block * BH
                unit = first + tl.arange(0, BH)
                s = _load_states(stop + 1, b, v, i, live, unit, start, tracks, spans, B, H, S, RING, ALIGN)
            inside = (unit < H)[None, :]
            for n in tl.static_range(STATES):
                address = _row(tracks[n], stop * B + b, H)[:, None] + unit
                base = tl.load(address, variant[:, None] & inside, 0.0)
                tl.store(_row(last[n], b, H)[:, None] + unit, s[n], original[:, None] & inside)
                # a pair that exchanges nothing is the original
                own_or_base = tl.where(moving[:, None], s[n], base)
                tl.store(_row(ended[n], v, H)[:, None] + unit, own_or_base, variant[:, None] & inside)
                if n == 0:
                    difference = own_or_base - base
                    # chosen behind the product: one that is fused with a sum of lanes leaves each of them other bits
                    total += tl.sum(tl.where(moving[:, None], difference * difference, 0), 1)
        tl.store(penalty + v, total, variant)


@triton.jit(do_not_specialize=["T", "B", "K", "S", "N", "V"])
def backward_kernel(
    d_tracks, d_last, d_ended, d_penalty,
    x_proj, w_hh, b_hh, start, swaps, ends, lengths, tracks, gates, spans,
    end_times, end_order, start_times, start_order,
    dx, du, d_spans, d_first, carry, d_start,
    T, B, K, H, S, N, V,
    STEP: tl.constexpr, GRADIENT: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr,
    RECOMPUTE: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradients of the gates of N sequences and their variants, from the last step to the first.

    An original meets its variants in the order of their ends, and of their starts: both come sorted, latest first.
    """
    H = H // ALIGN * ALIGN
    wide: tl.constexpr = spans.dtype.element_ty
    STATES: tl.constexpr = len(tracks)
    # beside what the product of recomputed gates holds it would spill
    AS_ONE: tl.constexpr = RESIDENT and not RECOMPUTE
    blocks = 1 if RESIDENT else tl.cdiv(H, BH)
    if RESIDENT:
        first, unit = 0, tl.arange(0, BH)
        # two gates in line are one change of layout; the halves of float32 would not fit the registers then
        LINE: tl.constexpr = 2 if G > 1 and w_hh[0].dtype.element_ty.primitive_bitwidth == 16 else 1
        w = ()
        for g in tl.static_range(0, G, LINE):
            w = w + (_load_stack(w_hh, g, LINE if g + LINE <= G else 1, unit, H),)
    slot = (tl.program_id(0) * R + tl.arange(0, R)) * STATES  # in `carry`
    n_passes = _passes(N, V, K, R)
    for behind in range(n_passes):
        p = n_passes - 1 - behind
        b, v, i, j, stop, original, _, moving = _rows(p, N, V, swaps, ends, lengths, T, B, K, S, R)
        origin = tl.where(p == 0, 0, i)
        begin = tl.where(original, 0, i)
        live = original | moving
        d = _zeros(STATES, R, BH, wide)
        steps = _steps(p, T, i, stop, moving)
        if RESIDENT:
            t = origin + steps - 1
            after, _ = _soon(
                t + 1, b, v, i, original, live, stop, first, d_tracks, start, tracks, gates, spans, T,
                B, H, S, 0, BH, AS_ONE, ALIGN,
            )  # fmt: skip
            after = _apart(after, 1 if d_tracks[0] is None else 2, AS_ONE)[0]
            soon_states, soon_kept = _soon(
                t, b, v, i, original, live, stop, first, d_tracks, start, tracks, gates, spans, T,
                B, H, S, KEPT, BH, AS_ONE, ALIGN,
            )  # fmt: skip
            soon_c = _second(d_tracks, STATES, t, b, original & live & (t <= stop), unit, B, H)
        else:
            for block in range(blocks):
                first = block * BH
                unit = first + tl.arange(0, BH)
                _store(_row(carry, slot, H), d, live, unit, H, AS_ONE)
            tl.debug_barrier()
        variants_of = b * K
        n_ended = tl.zeros((R,), tl.int32)
        n_started = tl.zeros((R,), tl.int32)
        end = _event(end_times, variants_of, n_ended, original, K)
        begins = _event(start_times, variants_of, n_started, original, K)
        for back in range(steps):
            t = origin + steps - 1 - back
            running = live & (t >= begin) & (t <= stop)
            at = t * B + b
            in_span = v * S + (t - i)
            # all but a variant's first step go on through W_hh
            goes_on = running & (original | (t > i))
            ended_before, end_before = n_ended, end
            started_before, begins_before = n_started, begins
            for block in range(blocks):
                if RESIDENT:
                    states, kept, d_c = soon_states, soon_kept, soon_c
                    soon_states, soon_kept = _soon(
                        t - 1, b, v, i, original, live, stop, first, d_tracks, start, tracks, gates, spans, T, B, H, S,
                        KEPT, BH, AS_ONE, ALIGN,
                    )  # fmt: skip
                    soon_c = _second(
                        d_tracks, STATES, t - 1, b, original & live & (t > 0) & (t <= stop + 1), unit, B, H
                    )
                else:
                    first = block * BH
                    unit = first + tl.arange(0, BH)
                    d = _load(_row(carry, slot, H), live, first, H, STATES, BH, AS_ONE)
                    states, kept = _soon(
                        t, b, v, i, original, live, stop, first, d_tracks, start, tracks, gates, spans, T, B, H, S,
                        KEPT, BH, AS_ONE, ALIGN,
                    )  # fmt: skip
                    after = _load_states(t + 1, b, v, i, running, unit, start, tracks, spans, B, H, S, False, ALIGN)
                    after = after[STATES - 1]
                    d_c = _second(d_tracks, STATES, t, b, original & running, unit, B, H)
                n_ended, end = ended_before, end_before
                n_started, begins = started_before, begins_before

                # what comes from outside, and from the comparisons that end here
                dafter = d
                if d_tracks[0] is not None:
                    s, d_h = _apart(states, 2, AS_ONE)
                    dafter = _replace_first(dafter, dafter[0] + d_h)
                else:
                    s = _apart(states, 1, AS_ONE)[0]
                for n in tl.static_range(1, STATES):
                    if d_tracks[n] is not None:
                        dafter = (dafter[0], dafter[n] + d_c)
                stops = running & (t == stop)
                ends_here = running & (end == t)
                if _any(stops | ends_here):
                    mask = stops[:, None] & (unit < H)[None, :]
                    with_last = ()
                    for n in tl.static_range(STATES):
                        dn = dafter[n]
                        if d_last[n] is not None:
                            dn += tl.load(_row(d_last[n], b, H)[:, None] + unit, original[:, None] & mask, 0.0)
                        if d_ended[n] is not None:
                            dn += tl.load(_row(d_ended[n], v, H)[:, None] + unit, moving[:, None] & mask, 0.0)
                        with_last = with_last + (dn,)
                    dafter = with_last
                    if d_penalty is not None:
                        pull = _pull(d_penalty, v, t, i, moving & stops, unit, tracks, spans, B, b, H, S)
                        dafter = _replace_first(dafter, dafter[0] + pull)
                    while _any(ends_here):
                        other = variants_of + tl.load(end_order + variants_of + n_ended, ends_here, 0).to(tl.int32)
                        other_i, other_j, other_stop = _positions(swaps, ends, other, ends_here, T)
                        moved = ends_here & (other_i < other_j) & (other_i <= t) & (t - other_i < S)
                        if d_penalty is not None:
                            pull = _pull(d_penalty, other, t, other_i, moved, unit, tracks, spans, B, b, H, S)
                            dafter = _replace_first(dafter, dafter[0] - pull)
                        same = ()
                        for n in tl.static_range(STATES):
                            dn = dafter[n]
                            if d_ended[n] is not None:
                                here = (ends_here & ~moved)[:, None] & (unit < H)[None, :]
                                dn += tl.load(_row(d_ended[n], other, H)[:, None] + unit, here, 0.0)
                            same = same + (dn,)
                        dafter = same
                        n_ended += ends_here.to(tl.int32)
                        end = _event(end_times, variants_of, n_ended, original, K)
                        ends_here = running & (end == t)

                if RECOMPUTE:
                    h = _before(0, t, b, v, i, start, tracks, spans, B, H, S, False, ALIGN)
                    u = _streamed(h, running, unit, w_hh, H, G, wide, PRECISION, BK)
                    x = _load(_row(x_proj, _source(t, b, i, j, B), G * H), running, first, H, G, BH, AS_ONE)
                    recomputed = STEP(_cast(x, wide), _add_bias(u, b_hh, unit, H), s)
                    kept = recomputed[1]
                elif KEPT:
                    kept = _apart(kept, KEPT, AS_ONE)
                dx_now, du_now, ds = GRADIENT(dafter, s, after, _cast(kept, wide))

                of_variant = moving & running
                # beyond a sequence's length there is nothing
                stored = _cast(_keep(running, du_now), dx.dtype.element_ty)
                last = tl.where(running[:, None], dx_now[G - 1], 0).to(dx.dtype.element_ty)
                _store_gradients(
                    _row(dx, at, G * H), _row(du, at, G * H), _row(d_spans, in_span, D * H), last, stored, original,
                    of_variant, unit, H, G, D, AS_ONE, ALIGN,
                )  # fmt: skip

                starts_here = running & (begins == t)
                starts = of_variant & (t == i)
                if _any(starts | starts_here):
                    _store(_row(d_first, v, H), (ds,), starts, unit, H, AS_ONE)
                    tl.debug_barrier()
                while _any(starts_here):
                    other = variants_of + tl.load(start_order + variants_of + n_started, starts_here, 0).to(tl.int32)
                    owed = _load(_row(d_spans, other * S, D * H), starts_here, first, H, G, BH, AS_ONE)
                    du_now = _add(du_now, _cast(owed, wide))
                    ds += _load(_row(d_first, other, H), starts_here, first, H, 1, BH, AS_ONE)[0]
                    _store(_row(du, at, G * H), _cast(du_now, du.dtype.element_ty), starts_here, unit, H, AS_ONE)
                    n_started += starts_here.to(tl.int32)
                    begins = _event(start_times, variants_of, n_started, original, K)
                    starts_here = running & (begins == t)
                ds = tl.where(goes_on[:, None], ds, 0)
                if RESIDENT:
                    d_h = ds if STATES == 1 else tl.zeros((R, BH), wide)
                    du_now = _cast(_keep(goes_on, du_now), w_hh[0].dtype.element_ty)
                    for n in tl.static_range(len(w)):
                        d_h = _dot(_in_line(du_now[n * LINE : n * LINE + LINE]), w[n], d_h, PRECISION)
                    d = (d_h,) if STATES == 1 else (d_h, ds)
                    after = s
                else:
                    _store(_row(carry, slot + STATES - 1, H), (ds,), live, unit, H, AS_ONE)

            if not RESIDENT:
                tl.debug_barrier()
                for block in range(blocks):
                    first = block * BH
                    unit = first + tl.arange(0, BH)
                    address = _either(original, _row(du, at, G * H), _row(d_spans, in_span, D * H), ALIGN)
                    # a sum for each gate: in a single one every product would wait for the one before it. But matrix
                    # units cut off what they add to: where float32 is meant, short sums are added up behind them
                    SHORT: tl.constexpr = len(w_hh) == 2
                    sums = _zeros(1 if SHORT else G, R, BH, wide)
                    for inner in range(tl.cdiv(H, BK)):
                        column = inner * BK + tl.arange(0, BK)
                        w = _load_weights(w_hh, column[:, None], unit[None, :], H, G)
                        mask = goes_on[:, None] & (column < H)[None, :]
                        longer = ()
                        for g in tl.static_range(G):
                            du_g = tl.load(address[:, None] + g * H + column, mask, 0.0)
                            if SHORT:
                                sums = (sums[0] + _dot(du_g, w[g], tl.zeros((R, BH), wide), PRECISION),)
                            else:
                                longer = longer + (_dot(du_g, w[g], sums[g], PRECISION),)
                        if not SHORT:
                            sums = longer
                    d_h = sums[0]
                    for g in tl.static_range(1, len(sums)):
                        d_h += sums[g]
                    if STATES == 1:
                        d_h += _load(_row(carry, slot, H), live, first, H, 1, BH, AS_ONE)[0]
                    _store(_row(carry, slot, H), (d_h,), live, unit, H, AS_ONE)
                tl.debug_barrier()

        for block in range(blocks):
            if not RESIDENT:
                first = block * BH
                unit = first + tl.arange(0, BH)
                d = _load(_row(carry, slot, H), live, first, H, STATES, BH, AS_ONE)
            for n in tl.static_range(STATES):
                inside = original[:, None] & (unit < H)[None, :]
                tl.store(_row(d_start[n], b, H)[:, None] + unit, d[n], inside)
        tl.debug_barrier()


@triton.jit
def _replace_first(blocks, first):
    replaced = (first,)
    for n in tl.static_range(1, len(blocks)):
        replaced = replaced + (blocks[n],)
    return replaced


@triton.jit
def _event(times, variants_of, n, rows, K):
    """When the n-th variant of each original ends, or starts; -1 if there is none."""
    return tl.load(times + variants_of + n, rows & (n < K), -1).to(tl.int32)


@triton.jit
def _second(d_tracks, STATES: tl.constexpr, t, b, rows, unit, B, H):
    """The gradient of the second state after step t, if there is one."""
    found = ()
    for n in tl.static_range(1, STATES):  # before 3.7 Triton cannot tell the length of a tuple that holds None
        if d_tracks[n] is not None:
            address = _row(d_tracks[n], t * B + b, H)[:, None] + unit
            found = tl.load(address, rows[:, None] & (unit < H)[None, :], 0.0)
    return found


@triton.jit
def _pull(d_penalty, v, t, i, rows, unit, tracks, spans, B, b, H, S):
    """The penalty's gradient in h of variants that end at t: 2 d_penalty (h_variant - h)."""
    mask = rows[:, None] & (unit < H)[None, :]
    h = tl.load(_row(tracks[0], t * B + b, H)[:, None] + unit, mask, 0.0)
    own = tl.load(_row(spans, (v * S + (t - i)) * len(tracks), H)[:, None] + unit, mask, 0.0)
    return 2 * tl.load(d_penalty + v, rows, 0.0)[:, None] * (own - h)


@triton.jit(do_not_specialize=["B", "K", "S"])
def gather_kernel(
    d_spans, swaps, ends, dx, B, K, H, S, WIDE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds to row (t, b) of dx, a program each, what the variants of b that read it owe to it."""
    row = tl.program_id(0).to(tl.int64)
    t = (row // B).to(tl.int32)
    b = (row % B).to(tl.int32)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    T = tl.num_programs(0) // B
    total = ()
    for g in tl.static_range(G):
        total = total + (tl.load(dx + (row * G + g) * H + unit, unit < H, 0.0).to(WIDE),)
    for some in range(0, K, 32):
        k = some + tl.arange(0, 32)
        i, j, stop = _positions(swaps, ends, b.to(tl.int64) * K + k, k < K, T)
        has_read = (i < j) & (i <= t) & (t <= tl.minimum(stop, i + S - 1))
        n = tl.min(tl.where(has_read, k, K), 0)
        while n < K:
            v = b.to(tl.int64) * K + n
            first, second, _ = _positions(swaps, ends, v, n < K, T)
            at = tl.minimum(tl.where(t == first, second, tl.where(t == second, first, t)) - first, S - 1)
            owed = ()
            for g in tl.static_range(G):
                kept_at = (v * S + at) * D + (g if g < G - 1 else D - 1)
                owed = owed + (tl.load(d_spans + kept_at * H + unit, unit < H, 0.0).to(WIDE),)
            total = _add(total, owed)
            n = tl.min(tl.where(has_read & (k > n), k, K), 0)
    for g in tl.static_range(G):
        tl.store(dx + (row * G + g) * H + unit, total[g], unit < H)


@triton.jit(do_not_specialize=["T", "B", "K", "S"])
def weight_kernel(
    start, tracks, spans, du, d_spans, swaps, ends, sums,
    T, B, K, H, S,
    G: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """A block (BM, BN) of dW_hh, and of db_hh, from every n-th block of BR rows; n parts, to be added up by the caller.

    A row is the gradient of its gates times the h that came in. The first step of a variant stands in its original's.
    A part of `sums` has (G*H, H) for dW_hh and (G*H) for db_hh behind it.
    """
    H = H // ALIGN * ALIGN
    wide: tl.constexpr = spans.dtype.element_ty
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    gate_blocks = tl.cdiv(H, BM)
    g = tl.program_id(0) // gate_blocks
    m = tl.program_id(0) % gate_blocks * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), wide)
    total_b = tl.zeros((BM,), wide)
    n_originals = T * B
    for block in range(part, tl.cdiv(n_originals, BR), parts):
        row = (block * BR + tl.arange(0, BR)).to(tl.int64)
        inside = row < n_originals
        h = tl.where(row < B, start[0] + row * H, tracks[0] + (row - B) * H)
        da = tl.load(du + (row * G + g)[None, :] * H + m[:, None], inside[None, :] & (m < H)[:, None], 0.0)
        h = tl.load(h[:, None] + c, inside[:, None] & (c < H)[None, :], 0.0)
        total = tl.dot(da, h.to(da.dtype), total, input_precision=PRECISION, out_dtype=wide)
        total_b += tl.sum(da.to(wide), 1)
    n_variants = B * K * S
    for block in range(part, tl.cdiv(n_variants, BR), parts):
        row = block * BR + tl.arange(0, BR)
        v = row // S
        after = row % S  # steps since i
        inside = row < n_variants
        row = row.to(tl.int64)
        i = tl.load(swaps + 2 * v, inside, 0)
        j = tl.load(swaps + 2 * v + 1, inside, 0)
        inside = (i < j) & (after > 0) & (after <= tl.load(ends + v, inside, 0) - i)
        da = tl.load(d_spans + (row * D + g)[None, :] * H + m[:, None], inside[None, :] & (m < H)[:, None], 0.0)
        h = tl.load(spans + ((row - 1) * len(tracks))[:, None] * H + c, inside[:, None] & (c < H)[None, :], 0.0)
        total = tl.dot(da, h.to(da.dtype), total, input_precision=PRECISION, out_dtype=wide)
        total_b += tl.sum(da.to(wide), 1)
    sums += part * G * H * (H + 1)
    tl.store(sums + (g * H + m)[:, None] * H + c, total, (m < H)[:, None] & (c < H)[None, :])
    if tl.program_id(1) == 0:
        tl.store(sums + G * H * H + g * H + m, total_b, m < H)
