"""Wide registers: the inner steps of the kernels as vectors of 16 coordinates and more, for numba's loops to call.

numba widens 32-bit integers to 64 bits, and LLVM's own vectorizer stops at 256 bits on many processors. Here the
vectors are spelled out in LLVM's portable types, which it cuts to whatever registers the processor has. Nothing is
reassociated: every float is computed by the very operations that `reference` writes.

Arrays are contiguous along their last axis; nothing is checked, and every function names how far it reads and writes.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_ROUNDS, _MULTIPLIERS, _WEYL = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_DRAW = types.UniTuple(types.uint64, 5)  # slot, round, stream, key low, key high


def _vector(element, n):
    return ir.VectorType(element, n)


def _splat(b, value, n):
    zero = ir.Constant(_vector(value.type, n), ir.Undefined)
    return b.shuffle_vector(b.insert_element(zero, value, _I32(0)), zero, _vector(_I32, n)([0] * n))


def _joined(b, low, high):
    n = low.type.count
    return b.shuffle_vector(low, high, _vector(_I32, 2 * n)(list(range(2 * n))))


def _part(b, v, first, n):
    return b.shuffle_vector(v, v, _vector(_I32, n)(list(range(first, first + n))))


def _at(context, b, array_type, array, index):
    """A pointer to array[index]."""
    return b.gep(context.make_array(array_type)(context, b, array).data, [index])


def _load(b, pointer, kind, offset=0):
    """A value of this kind, `offset` elements of what `pointer` points to further on; aligned or not."""
    place = b.bitcast(b.gep(pointer, [_I64(offset)]), kind.as_pointer())
    return b.load(place, align=1)


def _store(b, value, pointer, offset=0):
    place = b.bitcast(b.gep(pointer, [_I64(offset)]), value.type.as_pointer())
    b.store(value, place, align=1)


def _stream(b, value, pointer, offset=0):
    """To a whole line of the cache, past the caches."""
    place = b.bitcast(b.gep(pointer, [_I64(offset)]), value.type.as_pointer())
    b.store(value, place, align=64).set_metadata("nontemporal", b.module.add_metadata([_I32(1)]))


# ------------------------------------------------------------------------------------------------ random words
def _upper(b, v):
    """The upper half of every 64-bit lane, in both halves: on some processors a shuffle has more ports than a shift."""
    v32 = b.bitcast(v, _vector(_I32, 16))
    return b.bitcast(b.shuffle_vector(v32, v32, _vector(_I32, 16)([k | 1 for k in range(16)])), v.type)


def _philox(b, counter, draw, blocks):
    """A list of blocks of 16 counters, words[w][g] (8 x i64) each: word w of counters counter + 8 g + lane, in the low
    halves; above them stands anything.

    A 64-bit lane a counter: one multiplication gives both halves of Philox's 32 x 32 product. A chain of ten rounds
    has to wait for each product, so two blocks side by side take little longer than one.
    """
    slot, index, stream, k0, k1 = (b.extract_value(draw, i) for i in range(5))
    lane = _vector(_I64, 8)
    low = lane([0xFFFFFFFF] * 8)
    rest, groups = [_splat(b, c, 8) for c in (slot, index, stream)], range(2 * blocks)
    first = _splat(b, counter, 8)
    state = [(b.add(first, lane(list(range(8 * g, 8 * g + 8)))), *rest) for g in groups]
    for _ in range(_ROUNDS):
        keys = [_splat(b, k, 8) for k in (k0, k1)]
        for g, (c0, c1, c2, c3) in enumerate(state):
            p0 = b.mul(b.and_(c0, low), lane([_MULTIPLIERS[0]] * 8))
            p1 = b.mul(b.and_(c2, low), lane([_MULTIPLIERS[1]] * 8))
            state[g] = (b.xor(b.xor(_upper(b, p1), c1), keys[0]), p1, b.xor(b.xor(_upper(b, p0), c3), keys[1]), p0)
        k0, k1 = (b.and_(b.add(k, _I64(w)), _I64(0xFFFFFFFF)) for k, w in zip((k0, k1), _WEYL, strict=True))
    return [[[state[2 * q][w], state[2 * q + 1][w]] for w in range(4)] for q in range(blocks)]


def _narrow(b, pair):
    """16 x i32: the low halves of two times 8 lanes."""
    return _joined(b, *(b.trunc(v, _vector(_I32, 8)) for v in pair))


def _halves(b, pair):
    """32 x i16: the low halves of the words of 16 counters, then the high ones."""
    low, high = (b.bitcast(v, _vector(_I16, 32)) for v in pair)
    order = [32 * (lane // 8) + 4 * (lane % 8) + half for half in range(2) for lane in range(16)]
    return b.shuffle_vector(low, high, _vector(_I32, 32)(order))


def _drawn(store, *more):
    """The typing and the building of an intrinsic that stores what `store` makes of each word of 16 counters."""

    def sign(out, blocks):
        def build(context, b, signature, args):
            place = _at(context, b, signature.args[0], args[0], args[1])
            for q, words in enumerate(_philox(b, args[2], args[3], blocks)):
                for w, pair in enumerate(words):
                    store(b, pair, place, 4 * q + w, *args[4:])
            return context.get_dummy_value()

        return types.void(out, types.int64, types.uint64, _DRAW, *more), build

    return sign


def _store_words(b, pair, place, k):
    _store(b, _narrow(b, pair), place, 16 * k)


def _store_halves(b, pair, place, k):
    h = _halves(b, pair)
    for half in range(2):
        _store(b, b.zext(_part(b, h, 16 * half, 16), _vector(_I32, 16)), place, 32 * k + 16 * half)


def _store_below(b, pair, place, k, n):
    low = _vector(_I64, 8)([0xFFFFFFFF] * 8)
    _store(b, _narrow(b, [_upper(b, b.mul(b.and_(v, low), _splat(b, n, 8))) for v in pair]), place, 16 * k)


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
        place, wide = _at(context, b, signature.args[0], args[0], args[1]), _vector(_I32, 32)
        ties, n, some = _at(context, b, signature.args[5], args[5], _I64(0)), _splat(b, args[4], 32), _I32(0)
        for w, pair in enumerate(pair for block in _philox(b, args[2], args[3], 2) for pair in block):
            h = _halves(b, pair)
            # Processors have a multiplication of 16 bits for either half of the product.
            upper = b.trunc(b.lshr(b.mul(b.zext(h, wide), b.zext(n, wide)), wide([16] * 32)), h.type)
            over = b.bitcast(b.icmp_unsigned(">", b.mul(h, n), b.neg(n)), _I32)
            some = b.or_(some, over)
            _store(b, over, ties, w)
            _store(b, b.zext(upper, wide), place, 32 * w)
        return b.icmp_unsigned("!=", some, _I32(0))

    return types.boolean(out, types.int64, types.uint64, _DRAW, types.uint16, ties), build


# ------------------------------------------------------------------------------------------------ rounding to a bit
def _floor(b, v):
    name = f"llvm.floor.v{v.type.count}f32"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(v.type, [v.type]), name)
    return b.call(function, [v])


def _threshold(b, x, s, shift=None, spot=None, strata=None):
    """16 x i32: t - 2^15 for the t of `reference.encode_bits`; shift is 16 x i32 where there are strata."""
    cell = b.fptosi(_floor(b, b.fmul(x, s)), _vector(_I32, 16))
    if shift is None:
        return cell
    p = b.add(shift, _splat(b, spot, 16))
    wrapped = b.sub(p, _splat(b, strata, 16))
    p = b.select(b.icmp_unsigned("<", wrapped, p), wrapped, p)
    base = _splat(b, b.mul(b.sub(strata, _I32(1)), _I32(32768)), 16)
    return b.sub(b.add(cell, base), b.shl(p, _vector(_I32, 16)([16] * 16)))


def _saturated(b, v):
    """Signed 16 bits: what lies outside becomes the end of the range."""
    low, high = (v.type([end] * v.type.count) for end in (-(2**15), 2**15 - 1))
    v = b.select(b.icmp_signed("<", v, high), v, high)
    v = b.select(b.icmp_signed(">", v, low), v, low)
    return b.trunc(v, _vector(_I16, v.type.count))


def _bits_256(context, b, signature, args, strata):
    """Eight times 32 coordinates, whose halves and thresholds are compared as signed 16 bits, both less 2^15.

    Thresholds outside the range are moved to its ends, where h < t still answers for all h but one: that one looks
    like a tie, and whoever calls looks again.
    """
    x, s = _at(context, b, signature.args[0], args[0], args[1]), _splat(b, args[2], 16)
    out = _at(context, b, signature.args[3], args[3], args[4])
    middle = _vector(_I16, 32)([-(2**15)] * 32)
    tied = None
    words = [pair for block in _philox(b, args[5], args[6], 2) for pair in block]
    for w, pair in enumerate(words):
        h = b.xor(_halves(b, pair), middle)
        thresholds = []
        for half in range(2):
            offset, more = 32 * w + 16 * half, ()
            if strata:
                shift = _at(context, b, signature.args[7], args[7], args[8])
                more = (_load(b, shift, _vector(_I32, 16), offset), args[9], args[10])
            thresholds.append(_threshold(b, _load(b, x, _vector(_F32, 16), offset), s, *more))
        t = _saturated(b, _joined(b, *thresholds))
        _store(b, b.bitcast(b.icmp_signed("<", h, t), _I32), out, 4 * w)
        same = b.icmp_signed("==", h, t)
        tied = same if tied is None else b.or_(tied, same)
    return b.icmp_unsigned("!=", b.bitcast(tied, _I32), _I32(0))


@intrinsic
def bits_256(_, x, at, s, out, byte, counter, draw):
    """out[byte:byte+32] = the bits of x[at:at+256] with one stratum. True if one may be a tie, and may be wrong."""

    def build(context, b, signature, args):
        return _bits_256(context, b, signature, args, strata=False)

    return types.boolean(x, types.int64, types.float32, out, types.int64, types.uint64, _DRAW), build


@intrinsic
def strata_256(_, x, at, s, out, byte, counter, draw, shift, first, spot, strata):
    """The same in stratum (spot + shift[first + j]) mod strata of at most MOST_STRATA, for 256 int32 shifts."""

    def build(context, b, signature, args):
        return _bits_256(context, b, signature, args, strata=True)

    drawn = (types.float32, out, types.int64, types.uint64, _DRAW)
    return types.boolean(x, types.int64, *drawn, shift, types.int64, types.int32, types.int32), build


@intrinsic
def cells_256(_, x, at, lift, s, reach, code, to, counter, draw):
    """code[to:to+256] uint16 = (floor(z) + reach + 65535 - h) >> 16: z = x lift s within ±reach, h the halves.

    z and `reach`, a multiple of 2^15 up to 2^30, are in units of 2^-16 of an interval. True if one ties with its half.
    """

    def build(context, b, signature, args):
        source = _at(context, b, signature.args[0], args[0], args[1])
        place = _at(context, b, signature.args[5], args[5], args[6])
        lift, s, reach = (_splat(b, v, 16) for v in args[2:5])
        wide, tied = _vector(_I32, 16), None
        low, base = wide([65535] * 16), b.add(b.fptosi(reach, wide), wide([65535] * 16))
        for w, pair in enumerate(pair for block in _philox(b, args[7], args[8], 2) for pair in block):
            halves = _halves(b, pair)
            for half in range(2):
                z = b.fmul(b.fmul(_load(b, source, _vector(_F32, 16), 32 * w + 16 * half), lift), s)
                z = b.select(b.fcmp_ordered("<", z, b.fneg(reach)), b.fneg(reach), z)
                z = b.select(b.fcmp_ordered(">", z, reach), reach, z)
                q = b.sub(b.add(b.fptosi(_floor(b, z), wide), base), b.zext(_part(b, halves, 16 * half, 16), wide))
                same = b.icmp_unsigned("==", b.and_(q, low), low)
                tied = same if tied is None else b.or_(tied, same)
                _store(b, b.trunc(b.lshr(q, wide([16] * 16)), _vector(_I16, 16)), place, 32 * w + 16 * half)
        return b.icmp_unsigned("!=", b.bitcast(tied, _I16), _I16(0))

    single, whole = types.float32, types.int64
    return types.boolean(x, whole, single, single, single, code, whole, types.uint64, _DRAW), build


MOST_STRATA = 1 << 14  # thresholds are at most 2^16 strata in magnitude, and 32 bits hold them


# ------------------------------------------------------------------------------------------------ bits to numbers
def _signs(payload, out, store):
    def build(context, b, signature, args):
        bits = _at(context, b, signature.args[0], args[0], args[1])
        place = _at(context, b, signature.args[3], args[3], args[4])
        plus, minus = _splat(b, args[2], 16), _splat(b, b.fneg(args[2]), 16)
        for k in range(4):
            store(b, b.select(_load(b, bits, _vector(_I1, 16), 2 * k), plus, minus), place, 16 * k)
        return context.get_dummy_value()

    return types.void(payload, types.int64, types.float32, out, types.int64), build


@intrinsic
def signs_64(_, payload, byte, r, out, at):
    """out[at:at+64] float32 = r where a bit of payload[byte:byte+8] is set, -r where not."""
    return _signs(payload, out, _store)


@intrinsic
def far_signs_64(_, payload, byte, r, out, at):
    """The same past the caches, where out[at] begins a line."""
    return _signs(payload, out, _stream)


@intrinsic
def add_signs_64(_, payload, byte, r, out, at):
    """out[at:at+64] float64 += r where a bit of payload[byte:byte+8] is set, and -= r where not."""

    def build(context, b, signature, args):
        bits = _at(context, b, signature.args[0], args[0], args[1])
        place, kind = _at(context, b, signature.args[3], args[3], args[4]), _vector(_F64, 8)
        plus, minus = _splat(b, args[2], 8), _splat(b, b.fneg(args[2]), 8)
        for k in range(8):
            signed = b.select(_load(b, bits, _vector(_I1, 8), k), plus, minus)
            _store(b, b.fadd(_load(b, place, kind, 8 * k), signed), place, 8 * k)
        return context.get_dummy_value()

    return types.void(payload, types.int64, types.float64, out, types.int64), build


@intrinsic
def count_512(_, payload, byte, counts):
    """counts[:512] uint8 += the bits of payload[byte:byte+64]."""

    def build(context, b, signature, args):
        bits = _at(context, b, signature.args[0], args[0], args[1])
        place, kind = _at(context, b, signature.args[2], args[2], _I64(0)), _vector(_I8, 64)
        for k in range(8):
            more = b.zext(_load(b, bits, _vector(_I1, 64), 8 * k), kind)
            _store(b, b.add(_load(b, place, kind, 64 * k), more), place, 64 * k)
        return context.get_dummy_value()

    return types.void(payload, types.int64, counts), build


PLANES = 5  # bits of a count of at most MOST_COUNTED rows: a table of that many numbers fills two registers
MOST_COUNTED = 31


def _full(b, x, y, z):
    """(sum, carry) of three bits, 512 times."""
    xy = b.xor(x, y)
    return b.xor(xy, z), b.or_(b.and_(x, y), b.and_(z, xy))


def _half(b, x, y):
    return b.xor(x, y), b.and_(x, y)


def _counted(b, planes, rows):
    """The planes of the counts with one bit of each of eight rows, or of one row, more."""
    ones, twos, fours, eights, sixteens = planes
    if len(rows) == 1:
        out, carry = [], rows[0]
        for plane in planes:
            plane, carry = _half(b, plane, carry)
            out.append(plane)
        return out
    carries, more = [], []
    for k in range(0, 8, 2):
        ones, carry = _full(b, ones, rows[k], rows[k + 1])
        carries.append(carry)
    for k in range(0, 4, 2):
        twos, carry = _full(b, twos, carries[k], carries[k + 1])
        more.append(carry)
    fours, carry = _full(b, fours, *more)
    eights, carry = _half(b, eights, carry)
    return [ones, twos, fours, eights, b.xor(sixteens, carry)]


def _counting(payload, planes, count):
    def build(context, b, signature, args):
        kind, wide = signature.args[0], _vector(_I64, 8)
        array = context.make_array(kind)(context, b, args[0])
        stride = b.extract_value(array.strides, 0)
        place = _at(context, b, signature.args[3], args[3], _I64(0))
        starts = [b.add(b.mul(b.add(args[1], _I64(k)), stride), args[2]) for k in range(count)]
        rows = [_load(b, b.gep(array.data, [start]), wide) for start in starts]
        counts = _counted(b, [_load(b, place, wide, 8 * w) for w in range(PLANES)], rows)
        for w, plane in enumerate(counts):
            _store(b, plane, place, 8 * w)
        return context.get_dummy_value()

    return types.void(payload, types.int64, types.int64, planes), build


@intrinsic
def count_8(_, payload, row, byte, planes):
    """planes uint64[PLANES * 8] += the bits of payload[row:row+8, byte:byte+64]: plane w has bit w of 512 counts."""
    return _counting(payload, planes, 8)


@intrinsic
def count_1(_, payload, row, byte, planes):
    """The same for one row."""
    return _counting(payload, planes, 1)


@intrinsic
def named_512(_, planes, table, out, at):
    """out[at:at+512] float32 = table[count] for the counts in the planes, table float32[32]."""

    def build(context, b, signature, args):
        first = _at(context, b, signature.args[0], args[0], _I64(0))
        bits, entries = b.bitcast(first, _I8.as_pointer()), _at(context, b, signature.args[1], args[1], _I64(0))
        place, narrow = _at(context, b, signature.args[2], args[2], args[3]), _vector(_I8, 64)
        halves = [_load(b, entries, _vector(_F32, 16), 16 * half) for half in range(2)]
        for g in range(8):
            count = narrow([0] * 64)
            for w in range(PLANES):
                mask = _load(b, bits, _vector(_I1, 64), 64 * w + 8 * g)
                count = b.select(mask, b.add(count, narrow([1 << w] * 64)), count)
            for q in range(4):
                index = b.zext(_part(b, count, 16 * q, 16), _vector(_I32, 16))
                _store(b, _looked_up(context, b, entries, halves, index), place, 64 * g + 16 * q)
        return context.get_dummy_value()

    return types.void(planes, table, out, types.int64), build


def _looked_up(context, b, entries, halves, index):
    """table[index], 32 numbers in two registers; one by one where there is no such instruction."""
    kind = halves[0].type
    if "+avx512f" in context.codegen()._tm_features:
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        function = b.module.globals.get(name) or ir.Function(
            b.module, ir.FunctionType(kind, [kind, index.type, kind]), name
        )
        return b.call(function, [halves[0], index, halves[1]])
    out = kind(ir.Undefined)
    for lane in range(16):
        out = b.insert_element(out, b.load(b.gep(entries, [b.extract_element(index, _I32(lane))])), _I32(lane))
    return out


# ------------------------------------------------------------------------------------------------ sums
def _squared(row, lanes, steps):
    def build(context, b, signature, args):
        x = _at(context, b, signature.args[0], args[0], args[1])
        place, kind = _at(context, b, signature.args[2], args[2], _I64(0)), _vector(_F64, 8)
        single = signature.args[0].dtype == types.float32
        for half in range(2):
            total = _load(b, place, kind, 8 * half)
            for k in range(steps):
                v = _load(b, x, _vector(_F32 if single else _F64, 8), 16 * k + 8 * half)
                v = b.fpext(v, kind) if single else v
                total = b.fadd(total, b.fmul(v, v))
            _store(b, total, place, 8 * half)
        return context.get_dummy_value()

    return types.void(row, types.int64, lanes), build


@intrinsic
def add_squares_16(_, row, at, lanes):
    """lanes[:16] float64 += row[at:at+16]^2, row float32 or float64."""
    return _squared(row, lanes, 1)


@intrinsic
def add_squares_256(_, row, at, lanes):
    """lanes[:16] float64: 16 times lanes += row[at:at+16]^2, row float32 or float64."""
    return _squared(row, lanes, 16)
