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

from shoal.kernels.cpu.drawn import DRAW, halves, philox
from shoal.kernels.cpu.registers import (
    F32,
    F64,
    I1,
    I8,
    I16,
    I32,
    I64,
    address,
    joined,
    load,
    part,
    splat,
    store,
    stream,
    vector,
)


# ------------------------------------------------------------------------------------------------ rounding to a bit
def _floor(b, v):
    name = f"llvm.floor.v{v.type.count}f32"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(v.type, [v.type]), name)
    return b.call(function, [v])


def _threshold(b, x, s, shift=None, spot=None, strata=None):
    """16 x i32: t - 2^15 for the t of `reference.encode_bits`; shift is 16 x i32 where there are strata."""
    cell = b.fptosi(_floor(b, b.fmul(x, s)), vector(I32, 16))
    if shift is None:
        return cell
    p = b.add(shift, splat(b, spot, 16))
    wrapped = b.sub(p, splat(b, strata, 16))
    p = b.select(b.icmp_unsigned("<", wrapped, p), wrapped, p)
    base = splat(b, b.mul(b.sub(strata, I32(1)), I32(32768)), 16)
    return b.sub(b.add(cell, base), b.shl(p, vector(I32, 16)([16] * 16)))


def _saturated(b, v):
    """Signed 16 bits: what lies outside becomes the end of the range."""
    low, high = (v.type([end] * v.type.count) for end in (-(2**15), 2**15 - 1))
    v = b.select(b.icmp_signed("<", v, high), v, high)
    v = b.select(b.icmp_signed(">", v, low), v, low)
    return b.trunc(v, vector(I16, v.type.count))


def _bits_256(context, b, signature, args, strata):
    """Eight times 32 coordinates, whose halves and thresholds are compared as signed 16 bits, both less 2^15.

    Thresholds outside the range are moved to its ends, where h < t still answers for all h but one: that one looks
    like a tie, and whoever calls looks again.
    """
    x, s = address(context, b, signature.args[0], args[0], args[1]), splat(b, args[2], 16)
    out = address(context, b, signature.args[3], args[3], args[4])
    middle = vector(I16, 32)([-(2**15)] * 32)
    tied = None
    words = [pair for block in philox(b, args[5], args[6], 2) for pair in block]
    for w, pair in enumerate(words):
        h = b.xor(halves(b, pair), middle)
        thresholds = []
        for half in range(2):
            offset, more = 32 * w + 16 * half, ()
            if strata:
                shift = address(context, b, signature.args[7], args[7], args[8])
                more = (load(b, shift, vector(I32, 16), offset), args[9], args[10])
            thresholds.append(_threshold(b, load(b, x, vector(F32, 16), offset), s, *more))
        t = _saturated(b, joined(b, *thresholds))
        store(b, b.bitcast(b.icmp_signed("<", h, t), I32), out, 4 * w)
        same = b.icmp_signed("==", h, t)
        tied = same if tied is None else b.or_(tied, same)
    return b.icmp_unsigned("!=", b.bitcast(tied, I32), I32(0))


@intrinsic
def bits_256(_, x, at, s, out, byte, counter, draw):
    """out[byte:byte+32] = the bits of x[at:at+256] with one stratum. True if one may be a tie, and may be wrong."""

    def build(context, b, signature, args):
        return _bits_256(context, b, signature, args, strata=False)

    return types.boolean(x, types.int64, types.float32, out, types.int64, types.uint64, DRAW), build


@intrinsic
def strata_256(_, x, at, s, out, byte, counter, draw, shift, first, spot, strata):
    """The same in stratum (spot + shift[first + j]) mod strata of at most MOST_STRATA, for 256 int32 shifts."""

    def build(context, b, signature, args):
        return _bits_256(context, b, signature, args, strata=True)

    drawn = (types.float32, out, types.int64, types.uint64, DRAW)
    return types.boolean(x, types.int64, *drawn, shift, types.int64, types.int32, types.int32), build


@intrinsic
def cells_256(_, x, at, lift, s, reach, code, to, counter, draw):
    """code[to:to+256] uint16 = (floor(z) + reach + 65535 - h) >> 16: z = x lift s within ±reach, h the halves.

    z and `reach`, a multiple of 2^15 up to 2^30, are in units of 2^-16 of an interval. True if one ties with its half.
    """

    def build(context, b, signature, args):
        source = address(context, b, signature.args[0], args[0], args[1])
        place = address(context, b, signature.args[5], args[5], args[6])
        lift, s, reach = (splat(b, v, 16) for v in args[2:5])
        wide, tied = vector(I32, 16), None
        low, base = wide([65535] * 16), b.add(b.fptosi(reach, wide), wide([65535] * 16))
        for w, pair in enumerate(pair for block in philox(b, args[7], args[8], 2) for pair in block):
            drawn = halves(b, pair)
            for half in range(2):
                z = b.fmul(b.fmul(load(b, source, vector(F32, 16), 32 * w + 16 * half), lift), s)
                z = b.select(b.fcmp_ordered("<", z, b.fneg(reach)), b.fneg(reach), z)
                z = b.select(b.fcmp_ordered(">", z, reach), reach, z)
                q = b.sub(b.add(b.fptosi(_floor(b, z), wide), base), b.zext(part(b, drawn, 16 * half, 16), wide))
                same = b.icmp_unsigned("==", b.and_(q, low), low)
                tied = same if tied is None else b.or_(tied, same)
                store(b, b.trunc(b.lshr(q, wide([16] * 16)), vector(I16, 16)), place, 32 * w + 16 * half)
        return b.icmp_unsigned("!=", b.bitcast(tied, I16), I16(0))

    single, whole = types.float32, types.int64
    return types.boolean(x, whole, single, single, single, code, whole, types.uint64, DRAW), build


MOST_STRATA = 1 << 14  # thresholds are at most 2^16 strata in magnitude, and 32 bits hold them


# ------------------------------------------------------------------------------------------------ bits to numbers
def _signs(payload, out, store):
    def build(context, b, signature, args):
        bits = address(context, b, signature.args[0], args[0], args[1])
        place = address(context, b, signature.args[3], args[3], args[4])
        plus, minus = splat(b, args[2], 16), splat(b, b.fneg(args[2]), 16)
        for k in range(4):
            store(b, b.select(load(b, bits, vector(I1, 16), 2 * k), plus, minus), place, 16 * k)
        return context.get_dummy_value()

    return types.void(payload, types.int64, types.float32, out, types.int64), build


@intrinsic
def signs_64(_, payload, byte, r, out, at):
    """out[at:at+64] float32 = r where a bit of payload[byte:byte+8] is set, -r where not."""
    return _signs(payload, out, store)


@intrinsic
def far_signs_64(_, payload, byte, r, out, at):
    """The same past the caches, where out[at] begins a line."""
    return _signs(payload, out, stream)


@intrinsic
def add_signs_64(_, payload, byte, r, out, at):
    """out[at:at+64] float64 += r where a bit of payload[byte:byte+8] is set, and -= r where not."""

    def build(context, b, signature, args):
        bits = address(context, b, signature.args[0], args[0], args[1])
        place, kind = address(context, b, signature.args[3], args[3], args[4]), vector(F64, 8)
        plus, minus = splat(b, args[2], 8), splat(b, b.fneg(args[2]), 8)
        for k in range(8):
            signed = b.select(load(b, bits, vector(I1, 8), k), plus, minus)
            store(b, b.fadd(load(b, place, kind, 8 * k), signed), place, 8 * k)
        return context.get_dummy_value()

    return types.void(payload, types.int64, types.float64, out, types.int64), build


@intrinsic
def count_512(_, payload, byte, counts):
    """counts[:512] uint8 += the bits of payload[byte:byte+64]."""

    def build(context, b, signature, args):
        bits = address(context, b, signature.args[0], args[0], args[1])
        place, kind = address(context, b, signature.args[2], args[2], I64(0)), vector(I8, 64)
        for k in range(8):
            more = b.zext(load(b, bits, vector(I1, 64), 8 * k), kind)
            store(b, b.add(load(b, place, kind, 64 * k), more), place, 64 * k)
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
        kind, wide = signature.args[0], vector(I64, 8)
        array = context.make_array(kind)(context, b, args[0])
        stride = b.extract_value(array.strides, 0)
        place = address(context, b, signature.args[3], args[3], I64(0))
        starts = [b.add(b.mul(b.add(args[1], I64(k)), stride), args[2]) for k in range(count)]
        rows = [load(b, b.gep(array.data, [start]), wide) for start in starts]
        counts = _counted(b, [load(b, place, wide, 8 * w) for w in range(PLANES)], rows)
        for w, plane in enumerate(counts):
            store(b, plane, place, 8 * w)
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
        first = address(context, b, signature.args[0], args[0], I64(0))
        bits, entries = b.bitcast(first, I8.as_pointer()), address(context, b, signature.args[1], args[1], I64(0))
        place, narrow = address(context, b, signature.args[2], args[2], args[3]), vector(I8, 64)
        registers = [load(b, entries, vector(F32, 16), 16 * half) for half in range(2)]
        for g in range(8):
            count = narrow([0] * 64)
            for w in range(PLANES):
                mask = load(b, bits, vector(I1, 64), 64 * w + 8 * g)
                count = b.select(mask, b.add(count, narrow([1 << w] * 64)), count)
            for q in range(4):
                index = b.zext(part(b, count, 16 * q, 16), vector(I32, 16))
                store(b, _looked_up(context, b, entries, registers, index), place, 64 * g + 16 * q)
        return context.get_dummy_value()

    return types.void(planes, table, out, types.int64), build


def _looked_up(context, b, entries, registers, index):
    """table[index], 32 numbers in two registers; one by one where there is no such instruction."""
    kind = registers[0].type
    if "+avx512f" in context.codegen()._tm_features:
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        function = b.module.globals.get(name) or ir.Function(
            b.module, ir.FunctionType(kind, [kind, index.type, kind]), name
        )
        return b.call(function, [registers[0], index, registers[1]])
    out = kind(ir.Undefined)
    for lane in range(16):
        out = b.insert_element(out, b.load(b.gep(entries, [b.extract_element(index, I32(lane))])), I32(lane))
    return out


# ------------------------------------------------------------------------------------------------ sums
def _squared(row, lanes, steps):
    def build(context, b, signature, args):
        x = address(context, b, signature.args[0], args[0], args[1])
        place, kind = address(context, b, signature.args[2], args[2], I64(0)), vector(F64, 8)
        single = signature.args[0].dtype == types.float32
        for half in range(2):
            total = load(b, place, kind, 8 * half)
            for k in range(steps):
                v = load(b, x, vector(F32 if single else F64, 8), 16 * k + 8 * half)
                v = b.fpext(v, kind) if single else v
                total = b.fadd(total, b.fmul(v, v))
            store(b, total, place, 8 * half)
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
