"""Random words in wide registers: blocks of 16 counters of Philox4x32-10, for numba's loops to call.

Arrays are contiguous along their last axis; nothing is checked, and every function names how far it reads and writes.
"""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from shoal.kernels.cpu.registers import I16, I32, I64, address, joined, part, splat, store, vector

_ROUNDS, _MULTIPLIERS, _WEYL = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
DRAW = types.UniTuple(types.uint64, 5)  # slot, round, stream, key low, key high


def _upper(b, v):
    """The upper half of every 64-bit lane, in both halves: on some processors a shuffle has more ports than a shift."""
    v32 = b.bitcast(v, vector(I32, 16))
    return b.bitcast(b.shuffle_vector(v32, v32, vector(I32, 16)([k | 1 for k in range(16)])), v.type)


def philox(b, counter, draw, blocks):
    """A list of blocks of 16 counters, words[w][g] (8 x i64) each: word w of counters counter + 8 g + lane, in the low
    halves; above them stands anything.

    A 64-bit lane a counter: one multiplication gives both halves of Philox's 32 x 32 product. A chain of ten rounds
    has to wait for each product, so two blocks side by side take little longer than one.
    """
    slot, index, stream, k0, k1 = (b.extract_value(draw, i) for i in range(5))
    lane = vector(I64, 8)
    low = lane([0xFFFFFFFF] * 8)
    rest, groups = [splat(b, c, 8) for c in (slot, index, stream)], range(2 * blocks)
    first = splat(b, counter, 8)
    state = [(b.add(first, lane(list(range(8 * g, 8 * g + 8)))), *rest) for g in groups]
    for _ in range(_ROUNDS):
        keys = [splat(b, k, 8) for k in (k0, k1)]
        for g, (c0, c1, c2, c3) in enumerate(state):
            p0 = b.mul(b.and_(c0, low), lane([_MULTIPLIERS[0]] * 8))
            p1 = b.mul(b.and_(c2, low), lane([_MULTIPLIERS[1]] * 8))
            state[g] = (b.xor(b.xor(_upper(b, p1), c1), keys[0]), p1, b.xor(b.xor(_upper(b, p0), c3), keys[1]), p0)
        k0, k1 = (b.and_(b.add(k, I64(w)), I64(0xFFFFFFFF)) for k, w in zip((k0, k1), _WEYL, strict=True))
    return [[[state[2 * q][w], state[2 * q + 1][w]] for w in range(4)] for q in range(blocks)]


def _narrow(b, pair):
    """16 x i32: the low halves of two times 8 lanes."""
    return joined(b, *(b.trunc(v, vector(I32, 8)) for v in pair))


def halves(b, pair):
    """32 x i16: the low halves of the words of 16 counters, then the high ones."""
    low, high = (b.bitcast(v, vector(I16, 32)) for v in pair)
    order = [32 * (lane // 8) + 4 * (lane % 8) + half for half in range(2) for lane in range(16)]
    return b.shuffle_vector(low, high, vector(I32, 32)(order))


def _drawn(store, *more):
    """The typing and the building of an intrinsic that stores what `store` makes of each word of 16 counters."""

    def sign(out, blocks):
        def build(context, b, signature, args):
            place = address(context, b, signature.args[0], args[0], args[1])
            for q, words in enumerate(philox(b, args[2], args[3], blocks)):
                for w, pair in enumerate(words):
                    store(b, pair, place, 4 * q + w, *args[4:])
            return context.get_dummy_value()

        return types.void(out, types.int64, types.uint64, DRAW, *more), build

    return sign


def _store_words(b, pair, place, k):
    store(b, _narrow(b, pair), place, 16 * k)


def _store_halves(b, pair, place, k):
    h = halves(b, pair)
    for half in range(2):
        store(b, b.zext(part(b, h, 16 * half, 16), vector(I32, 16)), place, 32 * k + 16 * half)


def _store_below(b, pair, place, k, n):
    low = vector(I64, 8)([0xFFFFFFFF] * 8)
    store(b, _narrow(b, [_upper(b, b.mul(b.and_(v, low), splat(b, n, 8))) for v in pair]), place, 16 * k)


_words, _halved, _below = _drawn(_store_words), _drawn(_store_halves), _drawn(_store_below, types.uint64)


@intrinsic
def words_64(_, out, at, counter, draw):
    """out[at:at+64] uint32: the words of 16 counters from `counter` on."""
    return _words(out, 1)


@intrinsic
def words_128(_, out, at, counter, draw):
    """out[at:at+128] uint32: the words of 32 counters."""
    return _words(out, 2)


@intrinsic
def halves_128(_, out, at, counter, draw):
    """out[at:at+128] int32: the 16-bit halves of 16 counters."""
    return _halved(out, 1)


@intrinsic
def halves_256(_, out, at, counter, draw):
    """out[at:at+256] int32: the 16-bit halves of 32 counters."""
    return _halved(out, 2)


@intrinsic
def below_64(_, out, at, counter, draw, n):
    """out[at:at+64] int32: floor(word n / 2^32) of 16 counters, n < 2^31."""
    return _below(out, 1)


@intrinsic
def below_128(_, out, at, counter, draw, n):
    """out[at:at+128] int32: floor(word n / 2^32) of 32 counters, n < 2^31."""
    return _below(out, 2)


@intrinsic
def shifts_256(_, out, at, counter, draw, n, ties):
    """out[at:at+256] int32: (h n) >> 16 of the halves h of 32 counters, n < 2^16. True if one may be too small by one:
    those with a bit in ties uint32[8]."""

    def build(context, b, signature, args):
        place, wide = address(context, b, signature.args[0], args[0], args[1]), vector(I32, 32)
        ties, n, some = address(context, b, signature.args[5], args[5], I64(0)), splat(b, args[4], 32), I32(0)
        for w, pair in enumerate(pair for block in philox(b, args[2], args[3], 2) for pair in block):
            h = halves(b, pair)
            # Processors have a multiplication of 16 bits for either half of the product.
            upper = b.trunc(b.lshr(b.mul(b.zext(h, wide), b.zext(n, wide)), wide([16] * 32)), h.type)
            over = b.bitcast(b.icmp_unsigned(">", b.mul(h, n), b.neg(n)), I32)
            some = b.or_(some, over)
            store(b, over, ties, w)
            store(b, b.zext(upper, wide), place, 32 * w)
        return b.icmp_unsigned("!=", some, I32(0))

    return types.boolean(out, types.int64, types.uint64, DRAW, types.uint16, ties), build
