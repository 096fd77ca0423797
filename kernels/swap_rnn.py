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
    w_hh, b_hh             (G*H, H), (G*H) or None
    swaps, ends, lengths   (B, K, 2), (B, K), (B), int64
    start, last            (B, H); these and all that follow but the gates are in the dtype of states, at least float32
    tracks, ended          (T, B, H), (B, K, H)
    penalty                (B, K)
    gates                  (T*B + B*K*S, KEPT*H), the originals' first
    spans                  (B*K*S, STATES*H)
    d_spans                (B*K*S, D*H), in the dtype of gates
    d_first                (B*K, STATES*H), what a variant owes to the states before its swap, but for the product
    carry                  (programs*R, STATES*H), the gradients of states where W_hh streams
    end_times, end_order   (B, K), the ends of a sequence's variants, latest first, and whose they are; so for starts

Gradients that come in are as what they are of, or None for zero. ALIGN divides H: where it is a multiple of 4, say, the
compiler may move so many neighbours at once, which Triton itself only sees of multiples of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _positions(swaps, ends, v, rows, T):
    """i, j and the last step of variants; T, T and T - 1 in other rows. What a GPU is given nobody has checked: all are
    brought into the sequence, and into this order, so that no address lies outside the tensors."""
    i = tl.minimum(tl.maximum(tl.load(swaps + 2 * v, rows, T), 0), T - 1)
    j = tl.minimum(tl.maximum(tl.load(swaps + 2 * v + 1, rows, T), i), T - 1)
    stop = tl.minimum(tl.maximum(tl.load(ends + v, rows, T), j), T - 1)
    return tl.where(rows, i, T).to(tl.int32), tl.where(rows, j, T).to(tl.int32), stop.to(tl.int32)


@triton.jit
def _rows(p, N, V, swaps, ends, lengths, T, B, K, R: tl.constexpr):
    """The rows of pass p: their sequence b, variant v = b * K + k, positions i and j, last step, and whether each is
    an original, a variant, or a variant that moves anything and so is run. Originals have i = j = T."""
    row = tl.arange(0, R)
    n_dense = tl.maximum(K - V, 1)
    dense = (p - 1) * R + row
    sequence = tl.where(p == 0, row // (1 + V), dense // n_dense)
    k = tl.where(p == 0, row % (1 + V) - 1, V + dense % n_dense)
    b = tl.program_id(0) * N + sequence
    valid = (sequence < N) & (b < B)
    variant = valid & (k >= 0)
    v = (b * K + k).to(tl.int64)
    i, j, stop = _positions(swaps, ends, v, variant, T)
    length = tl.minimum(tl.maximum(tl.load(lengths + b, valid, 1), 1), T).to(tl.int32)
    return b, v, i, j, tl.where(variant, stop, length - 1), valid & (k < 0), variant, variant & (i < j)


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
    return tl.where(t == i, j, tl.where(t == j, i, t)).to(tl.int64) * B + b


@triton.jit
def _before(n: tl.constexpr, t, b, v, i, start, tracks, spans, B, H, S):
    """Where state n of each row before step t lies: in its span, or in the original's states, or at the start."""
    original = tl.where(t > 0, tracks[n] + ((t - 1).to(tl.int64) * B + b) * H, start[n] + b.to(tl.int64) * H)
    own = spans + ((v * S + (t - 1 - i) % S) * len(tracks) + n) * H
    return tl.where(t > i, own, original)


@triton.jit
def _load_states(t, b, v, i, rows, unit, start, tracks, spans, B, H, S):
    s = ()
    for n in tl.static_range(len(tracks)):
        address = _before(n, t, b, v, i, start, tracks, spans, B, H, S)
        s = s + (tl.load(address[:, None] + unit, rows[:, None] & (unit < H)[None, :], 0.0),)
    return s


@triton.jit
def _store(pointer, row, blocks, rows, unit, H):
    """Blocks of units at `row`, `row` + 1, ... of rows of H."""
    for n in tl.static_range(len(blocks)):
        tl.store(pointer + (row + n)[:, None] * H + unit, blocks[n], rows[:, None] & (unit < H)[None, :])


@triton.jit
def _load(pointer, row, rows, unit, H, COUNT: tl.constexpr):
    blocks = ()
    for n in tl.static_range(COUNT):
        address = pointer + (row + n)[:, None] * H + unit
        blocks = blocks + (tl.load(address, rows[:, None] & (unit < H)[None, :], 0.0),)
    return blocks


@triton.jit
def _kept(t, b, v, i, original, rows, stop, unit, start, tracks, gates, spans, T, B, H, S, KEPT: tl.constexpr):
    """The states before step t, for rows that go on to it or end before it, and the gates of step t."""
    begins = tl.where(original, 0, i)
    inside = rows & (t >= begins)
    s = _load_states(t, b, v, i, inside & (t <= stop + 1), unit, start, tracks, spans, B, H, S)
    row = tl.where(original, t.to(tl.int64) * B + b, T.to(tl.int64) * B + v * S + (t - i) % S)
    return s, _load(gates, row * KEPT, inside & (t <= stop), unit, H, KEPT)


@triton.jit
def _load_weights(w_hh, to, unit, H, G: tl.constexpr):
    """G blocks of W_hh: rows `to`, columns `unit`, of either orientation."""
    blocks = ()
    for g in tl.static_range(G):
        blocks = blocks + (tl.load(w_hh + (g * H + to) * H + unit, (to < H) & (unit < H), 0.0),)
    return blocks


@triton.jit
def _product(a, w, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """The product of a block of rows with each of the blocks of W_hh."""
    u = ()
    for g in tl.static_range(len(w)):
        u = u + (tl.dot(a.to(w[g].dtype), w[g], input_precision=PRECISION, out_dtype=WIDE),)
    return u


@triton.jit
def _streamed(
    address, rows, unit, w_hh, H, G: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr
):
    """W_hh h for rows of h at an address, of the units `unit`: blocks of W_hh come through the cache."""
    u = ()
    for _ in tl.static_range(G):
        u = u + (tl.zeros((address.shape[0], unit.shape[0]), WIDE),)
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
    STEP: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, SPANS: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Runs the originals and variants of N sequences.

    KEPT: blocks of gates that are kept, 0 for none. SPANS: whether the states of the spans are kept.
    """
    H = H // ALIGN * ALIGN
    wide: tl.constexpr = spans.dtype.element_ty
    blocks = 1 if RESIDENT else tl.cdiv(H, BH)
    if RESIDENT:
        unit = tl.arange(0, BH)
        w = _load_weights(w_hh, unit[None, :], unit[:, None], H, G)
    for p in range(_passes(N, V, K, R)):
        b, v, i, j, stop, original, variant, moving = _rows(p, N, V, swaps, ends, lengths, T, B, K, R)
        origin = tl.where(p == 0, 0, i)
        begin = tl.where(original | RESIDENT, 0, i)
        live = original | moving
        if RESIDENT:
            s = _load_states(origin, b, v, i, live, unit, start, tracks, spans, B, H, S)
            soon = _load(x_proj, _source(origin, b, i, j, B) * G, live, unit, H, G)
        for tau in range(_steps(p, T, i, stop, moving)):
            t = origin + tau
            running = live & (t >= begin) & (t <= stop)
            own = moving & (t >= i) & (t <= stop)
            at = t.to(tl.int64) * B + b
            in_span = v * S + (t - i) % S
            for block in range(blocks):
                if RESIDENT:
                    x = soon  # what the next step reads comes during this one
                    soon = _load(x_proj, _source(t + 1, b, i, j, B) * G, live & (t < stop), unit, H, G)
                    u = _product(s[0], w, wide, PRECISION)
                else:
                    unit = block * BH + tl.arange(0, BH)
                    h = _before(0, t, b, v, i, start, tracks, spans, B, H, S)
                    u = _streamed(h, running, unit, w_hh, H, G, wide, PRECISION, BK)
                    s = _load_states(t, b, v, i, running, unit, start, tracks, spans, B, H, S)
                    x = _load(x_proj, _source(t, b, i, j, B) * G, running, unit, H, G)
                inside = (unit < H)[None, :]
                after, kept = STEP(_cast(x, wide), _add_bias(u, b_hh, unit, H), s)
                for n in tl.static_range(len(tracks)):
                    # beyond a sequence's length its states are 0
                    tl.store(
                        tracks[n] + at[:, None] * H + unit,
                        tl.where(running[:, None], after[n], 0),
                        original[:, None] & inside,
                    )
                    if SPANS:
                        address = spans + (in_span * len(tracks) + n)[:, None] * H + unit
                        tl.store(address, after[n], own[:, None] & inside)
                    tl.store(ended[n] + v[:, None] * H + unit, after[n], (own & (t == stop))[:, None] & inside)
                for n in tl.static_range(KEPT):
                    row = tl.where(original, at, T.to(tl.int64) * B + in_span)
                    address = gates + (row * KEPT + n)[:, None] * H + unit
                    tl.store(address, kept[n], (own | (original & running))[:, None] & inside)
                if RESIDENT:
                    held = ()
                    for n in tl.static_range(len(tracks)):
                        held = held + (tl.where(running[:, None], after[n], s[n]),)
                    s = held
            if not RESIDENT:
                tl.debug_barrier()
        tl.debug_barrier()

        total = tl.zeros((R,), wide)
        for block in range(blocks):
            unit = block * BH + tl.arange(0, BH)
            inside = (unit < H)[None, :]
            for n in tl.static_range(len(tracks)):
                address = tracks[n] + (stop.to(tl.int64) * B + b)[:, None] * H + unit
                base = tl.load(address, (original | variant)[:, None] & inside, 0.0)
                tl.store(last[n] + b[:, None] * H + unit, base, original[:, None] & inside)
                address = ended[n] + v[:, None] * H + unit
                # a pair that exchanges nothing is the original
                tl.store(address, base, (variant & ~moving)[:, None] & inside)
                if n == 0:
                    difference = tl.load(address, moving[:, None] & inside, 0.0) - base
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
    blocks = 1 if RESIDENT else tl.cdiv(H, BH)
    if RESIDENT:
        unit = tl.arange(0, BH)
        w = _load_weights(w_hh, unit[:, None], unit[None, :], H, G)
    slot = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64) * STATES  # in `carry`
    n_passes = _passes(N, V, K, R)
    for behind in range(n_passes):
        p = n_passes - 1 - behind
        b, v, i, j, stop, original, _, moving = _rows(p, N, V, swaps, ends, lengths, T, B, K, R)
        origin = tl.where(p == 0, 0, i)
        begin = tl.where(original, 0, i)
        live = original | moving
        d = ()
        for n in tl.static_range(STATES):
            d = d + (tl.zeros((R, BH), wide),)
        steps = _steps(p, T, i, stop, moving)
        if RESIDENT:
            t = origin + steps - 1
            after = _load_states(t + 1, b, v, i, live & (t <= stop), unit, start, tracks, spans, B, H, S)
            soon_s, soon_kept = _kept(
                t, b, v, i, original, live, stop, unit, start, tracks, gates, spans, T, B, H, S, KEPT
            )
        else:
            for block in range(blocks):
                unit = block * BH + tl.arange(0, BH)
                _store(carry, slot, d, live, unit, H)
            tl.debug_barrier()
        variants_of = b.to(tl.int64) * K
        n_ended = tl.zeros((R,), tl.int32)
        n_started = tl.zeros((R,), tl.int32)
        for back in range(steps):
            t = origin + steps - 1 - back
            running = live & (t >= begin) & (t <= stop)
            at = t.to(tl.int64) * B + b
            in_span = v * S + (t - i) % S
            # all but a variant's first step go on through W_hh
            goes_on = running & (original | (t > i))
            ended_before = n_ended
            started_before = n_started
            for block in range(blocks):
                if RESIDENT:
                    s, kept = soon_s, soon_kept
                    soon_s, soon_kept = _kept(
                        t - 1, b, v, i, original, live, stop, unit, start, tracks, gates, spans, T, B, H, S, KEPT
                    )
                else:
                    unit = block * BH + tl.arange(0, BH)
                    d = _load(carry, slot, live, unit, H, STATES)
                    s, kept = _kept(
                        t, b, v, i, original, live, stop, unit, start, tracks, gates, spans, T, B, H, S, KEPT
                    )
                    after = _load_states(t + 1, b, v, i, running, unit, start, tracks, spans, B, H, S)
                n_ended = ended_before
                n_started = started_before
                mask = running[:, None] & (unit < H)[None, :]

                # what comes from outside, and from the comparisons that end here
                dafter = ()
                for n in tl.static_range(STATES):
                    dn = d[n]
                    stops = (t == stop)[:, None] & mask
                    if d_tracks[n] is not None:
                        address = d_tracks[n] + at[:, None] * H + unit
                        dn += tl.load(address, original[:, None] & mask, 0.0)
                    if d_last[n] is not None:
                        dn += tl.load(d_last[n] + b[:, None] * H + unit, original[:, None] & stops, 0.0)
                    if d_ended[n] is not None:
                        dn += tl.load(d_ended[n] + v[:, None] * H + unit, moving[:, None] & stops, 0.0)
                    dafter = dafter + (dn,)
                if d_penalty is not None:
                    pull = _pull(d_penalty, v, t, i, moving & running & (t == stop), unit, tracks, spans, B, b, H, S)
                    dafter = _replace_first(dafter, dafter[0] + pull)
                when = tl.load(end_times + variants_of + n_ended, original & running & (n_ended < K), -1)
                while tl.max((when == t).to(tl.int32), 0) > 0:
                    ends_here = when == t
                    other = variants_of + tl.load(end_order + variants_of + n_ended, ends_here, 0)
                    other_i, other_j, other_stop = _positions(swaps, ends, other, ends_here, T)
                    moved = ends_here & (other_i < other_j) & (other_i <= t)
                    if d_penalty is not None:
                        pull = _pull(d_penalty, other, t, other_i, moved, unit, tracks, spans, B, b, H, S)
                        dafter = _replace_first(dafter, dafter[0] - pull)
                    same = ()
                    for n in tl.static_range(STATES):
                        dn = dafter[n]
                        if d_ended[n] is not None:
                            here = (ends_here & ~moved)[:, None] & mask
                            dn += tl.load(d_ended[n] + other[:, None] * H + unit, here, 0.0)
                        same = same + (dn,)
                    dafter = same
                    n_ended += ends_here.to(tl.int32)
                    when = tl.load(end_times + variants_of + n_ended, original & running & (n_ended < K), -1)

                if RECOMPUTE:
                    h = _before(0, t, b, v, i, start, tracks, spans, B, H, S)
                    u = _streamed(h, running, unit, w_hh, H, G, wide, PRECISION, BK)
                    x = _load(x_proj, _source(t, b, i, j, B) * G, running, unit, H, G)
                    recomputed = STEP(_cast(x, wide), _add_bias(u, b_hh, unit, H), s)
                    kept = recomputed[1]
                dx_now, du_now, ds = GRADIENT(dafter, s, after, _cast(kept, wide))

                of_variant = moving & running
                _store(d_spans, in_span * D, du_now, of_variant, unit, H)
                if D > G:
                    address = d_spans + (in_span * D + G)[:, None] * H + unit
                    tl.store(address, dx_now[G - 1], of_variant[:, None] & mask)
                _store(d_first, v * STATES, ds, of_variant & (t == i), unit, H)
                # beyond a sequence's length there is nothing
                _store(dx, at * G, _keep(running, dx_now), original, unit, H)

                when = tl.load(start_times + variants_of + n_started, original & running & (n_started < K), -1)
                if tl.max((when == t).to(tl.int32), 0) > 0:
                    tl.debug_barrier()
                while tl.max((when == t).to(tl.int32), 0) > 0:
                    starts_here = when == t
                    other = variants_of + tl.load(start_order + variants_of + n_started, starts_here, 0)
                    owed = _load(d_spans, other * S * D, starts_here, unit, H, G)
                    du_now = _add(du_now, _cast(owed, wide))
                    ds = _add(ds, _load(d_first, other * STATES, starts_here, unit, H, STATES))
                    n_started += starts_here.to(tl.int32)
                    when = tl.load(start_times + variants_of + n_started, original & running & (n_started < K), -1)
                _store(du, at * G, _keep(running, du_now), original, unit, H)
                if RESIDENT:
                    for g in tl.static_range(G):
                        du_g = tl.where(goes_on[:, None], du_now[g], 0).to(w[g].dtype)
                        ds = _replace_first(ds, tl.dot(du_g, w[g], ds[0], input_precision=PRECISION, out_dtype=wide))
                    d = _keep(goes_on, ds)
                    after = s
                else:
                    _store(carry, slot, ds, live, unit, H)

            if not RESIDENT:
                tl.debug_barrier()
                for block in range(blocks):
                    unit = block * BH + tl.arange(0, BH)
                    ds = _load(carry, slot, goes_on, unit, H, STATES)
                    address = tl.where(original, du + at * G * H, d_spans + in_span * D * H)
                    through = tl.zeros((R, BH), wide)
                    for inner in range(tl.cdiv(H, BK)):
                        column = inner * BK + tl.arange(0, BK)
                        w = _load_weights(w_hh, column[:, None], unit[None, :], H, G)
                        mask = goes_on[:, None] & (column < H)[None, :]
                        for g in tl.static_range(G):
                            du_g = tl.load(address[:, None] + g * H + column, mask, 0.0)
                            through = tl.dot(du_g, w[g], through, input_precision=PRECISION, out_dtype=wide)
                    _store(carry, slot, _replace_first(ds, ds[0] + through), live, unit, H)
                tl.debug_barrier()

        for block in range(blocks):
            if not RESIDENT:
                unit = block * BH + tl.arange(0, BH)
                d = _load(carry, slot, live, unit, H, STATES)
            for n in tl.static_range(STATES):
                inside = original[:, None] & (unit < H)[None, :]
                tl.store(d_start[n] + b[:, None] * H + unit, d[n], inside)
        tl.debug_barrier()


@triton.jit
def _replace_first(blocks, first):
    replaced = (first,)
    for n in tl.static_range(1, len(blocks)):
        replaced = replaced + (blocks[n],)
    return replaced


@triton.jit
def _pull(d_penalty, v, t, i, rows, unit, tracks, spans, B, b, H, S):
    """The penalty's gradient in h of variants that end at t: 2 d_penalty (h_variant - h)."""
    mask = rows[:, None] & (unit < H)[None, :]
    h = tl.load(tracks[0] + (t.to(tl.int64) * B + b)[:, None] * H + unit, mask, 0.0)
    own = tl.load(spans + ((v * S + (t - i) % S) * len(tracks))[:, None] * H + unit, mask, 0.0)
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
    for k in range(K):
        v = b.to(tl.int64) * K + k
        i, j, stop = _positions(swaps, ends, v, k < K, T)
        if (i < j) & (i <= t) & (t <= stop):
            at = (tl.where(t == i, j, tl.where(t == j, i, t)) - i) % S
            owed = ()
            for g in tl.static_range(G):
                kept_at = (v * S + at) * D + (g if g < G - 1 else D - 1)
                owed = owed + (tl.load(d_spans + kept_at * H + unit, unit < H, 0.0).to(WIDE),)
            total = _add(total, owed)
    for g in tl.static_range(G):
        tl.store(dx + (row * G + g) * H + unit, total[g], unit < H)


@triton.jit(do_not_specialize=["T", "B", "K", "S"])
def weight_kernel(
    start, tracks, spans, du, d_spans, swaps, ends, dw, db,
    T, B, K, H, S,
    G: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """A block (BM, BN) of dW_hh, and of db_hh, from every n-th block of BR rows; n parts, to be added up by the caller.

    A row is the gradient of its gates times the h that came in. The first step of a variant stands in its original's.
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
        row = (block * BR + tl.arange(0, BR)).to(tl.int64)
        v = row // S
        after = row % S  # steps since i
        inside = row < n_variants
        i = tl.load(swaps + 2 * v, inside, 0)
        j = tl.load(swaps + 2 * v + 1, inside, 0)
        inside = (i < j) & (after > 0) & (after <= tl.load(ends + v, inside, 0) - i)
        da = tl.load(d_spans + (row * D + g)[None, :] * H + m[:, None], inside[None, :] & (m < H)[:, None], 0.0)
        h = tl.load(spans + ((row - 1) * len(tracks))[:, None] * H + c, inside[:, None] & (c < H)[None, :], 0.0)
        total = tl.dot(da, h.to(da.dtype), total, input_precision=PRECISION, out_dtype=wide)
        total_b += tl.sum(da.to(wide), 1)
    row = (part * G + g) * H + m
    tl.store(dw + row[:, None] * H + c, total, (m < H)[:, None] & (c < H)[None, :])
    if tl.program_id(1) == 0:
        tl.store(db + row, total_b, m < H)
