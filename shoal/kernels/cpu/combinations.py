"""Linear combinations of a few short rows, summed up in registers, for numba's loops to call.

numba keeps such a sum in an array, and loads and stores it at every term. Here it is one of LLVM's vectors, as in
`lanes`. Terms are added one after the other in float64, whatever the type of the rows, and nothing is reassociated
beyond what a function says. `unit` is a tuple of r numbers: its length is known when the loops are compiled.

Rows are contiguous; nothing is checked.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shoal.kernels.cpu.registers import address, load, part, splat, store

BLOCK, AHEAD = 16, 2  # columns that are transposed at once; so many blocks ahead their place is announced

_F32, _F64, _I32, _I64 = ir.FloatType(), ir.DoubleType(), ir.IntType(32), ir.IntType(64)


def padded(r: int) -> int:
    """The next multiple of BLOCK."""
    return -(-r // BLOCK) * BLOCK


def _wide(context, b, kind, pointer, count):
    """`count` numbers of this type from the pointer on, as float64; a number alone where count is None."""
    element = context.get_value_type(kind)
    value = load(b, pointer, element if count is None else ir.VectorType(element, count))
    if element == _F64:
        return value
    return b.fpext(value, _F64 if count is None else ir.VectorType(_F64, count))


def _gathered(context, b, kinds, args, width, count):
    """For each q < count the sum over lo <= k < hi of values[count k + q] table[index[k]], one after the other; args =
    (values, index, lo, hi, table), and the table has `width` columns."""
    sums = [cgutils.alloca_once_value(b, _zeros(width)) for _ in range(count)]
    at = cgutils.alloca_once_value(b, args[2])
    start = address(context, b, kinds[4], args[4], _I64(0))
    head, body, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
    b.branch(head)
    b.position_at_end(head)
    k = b.load(at)
    b.cbranch(b.icmp_signed("<", k, args[3]), body, end)
    b.position_at_end(body)
    place = b.zext(b.load(address(context, b, kinds[1], args[1], k)), _I64)
    term = _wide(context, b, kinds[4].dtype, b.gep(start, [b.mul(place, _I64(width))]), width)
    first = address(context, b, kinds[0], args[0], b.mul(k, _I64(count)))
    for q, total in enumerate(sums):
        value = _wide(context, b, kinds[0].dtype, b.gep(first, [_I64(q)]), None)
        b.store(b.fadd(b.load(total), b.fmul(splat(b, value, width), term)), total)
    # Assembly of no instructions: an end that LLVM cannot foresee. It would unroll the loop, and these are so short
    # that the processor waits at the end of every one whose remainder it did not guess.
    b.store(b.asm(ir.FunctionType(_I64, [_I64]), "", "=r,0", [b.add(k, _I64(1))], False), at)
    b.branch(head)
    b.position_at_end(end)
    return [b.load(total) for total in sums]


def _times(context, b, kinds, args, places, r):
    """For each place the r numbers there times the square args[1]: even terms one after the other, odd ones beside."""
    start = address(context, b, kinds[1], args[1], _I64(0))
    sums = [[_zeros(r)] * 2 for _ in places]
    for a in range(r):
        term = _wide(context, b, kinds[1].dtype, b.gep(start, [_I64(a * r)]), r)
        for place, parts in zip(places, sums, strict=True):
            value = _wide(context, b, kinds[0].dtype, b.gep(place, [_I64(a)]), None)
            parts[a % 2] = b.fadd(parts[a % 2], b.fmul(splat(b, value, r), term))
    return [b.fadd(*parts) for parts in sums]


def _zeros(count):
    return ir.Constant(ir.VectorType(_F64, count), [0.0] * count)


@intrinsic
def gathered(_, values, index, lo, hi, table, out, unit):
    """out[c] = the sum over lo <= k < hi of values[k] table[index[k], c] for c < 2 r; table has 2 r columns."""
    width = 2 * len(unit)

    def build(context, b, signature, args):
        (sums,) = _gathered(context, b, signature.args, args, width, 1)
        store(b, sums, address(context, b, signature.args[5], args[5], _I64(0)))
        return context.get_dummy_value()

    return types.void(values, index, types.int64, types.int64, table, out, unit), build


@intrinsic
def gathered_two(_, values, index, lo, hi, table, out, unit):
    """out[2 r q + c] = the sum over lo <= k < hi of values[2 k + q] table[index[k], c] for q < 2, c < 2 r."""
    width = 2 * len(unit)

    def build(context, b, signature, args):
        place = address(context, b, signature.args[5], args[5], _I64(0))
        for q, sums in enumerate(_gathered(context, b, signature.args, args, width, 2)):
            store(b, sums, place, width * q)
        return context.get_dummy_value()

    return types.void(values, index, types.int64, types.int64, table, out, unit), build


@intrinsic
def times(_, row, at, square, out, unit):
    """out (r,) = row[at : at + r] @ square: the even terms one after the other, the odd ones beside them."""
    r = len(unit)

    def build(context, b, signature, args):
        kinds = signature.args
        place = address(context, b, kinds[0], args[0], args[1])
        product = _times(context, b, (kinds[0], kinds[2]), (args[0], args[2]), [place], r)
        store(b, *product, address(context, b, kinds[3], args[3], _I64(0)))
        return context.get_dummy_value()

    return types.void(row, types.int64, square, out, unit), build


@intrinsic
def squared(_, row, square, unit):
    """square[a] += row[a] row[:r] for a < r, all float64."""
    r = len(unit)

    def build(context, b, signature, args):
        row, square = (address(context, b, signature.args[k], args[k], _I64(0)) for k in (0, 1))
        kind = ir.VectorType(_F64, r)
        whole = load(b, row, kind)
        for a in range(r):
            product = b.fmul(splat(b, b.extract_element(whole, _I32(a)), r), whole)
            store(b, b.fadd(load(b, square, kind, a * r), product), square, a * r)
        return context.get_dummy_value()

    return types.void(row, square, unit), build


@intrinsic
def columns_two(_, values, index, lo, hi, table, rows, square, factor, shared, out, at, side, unit):
    """With the sums of `gathered_two`, q < 2 and float32 results: out[at + r q :] = factor (rows[q] @ square - sums[q,
    :r]) + shared[q, :r], and side[q, :r] = factor sums[q, r:] + shared[q, r:], side's rows being `padded(r)` long."""
    r = len(unit)

    def build(context, b, signature, args):
        kinds, half, single = signature.args, ir.VectorType(_F64, r), ir.VectorType(_F32, r)
        sums = _gathered(context, b, kinds, args, 2 * r, 2)
        scale, more = splat(b, args[7], r), address(context, b, kinds[8], args[8], _I64(0))
        to, beside = address(context, b, kinds[9], args[9], args[10]), address(context, b, kinds[11], args[11], _I64(0))
        place = address(context, b, kinds[5], args[5], _I64(0))
        products = _times(context, b, kinds[5:7], args[5:7], [place, b.gep(place, [_I64(r)])], r)
        for q in range(2):
            first = b.fmul(scale, b.fsub(products[q], part(b, sums[q], 0, r)))
            second = b.fmul(scale, part(b, sums[q], r, r))
            first, second = (b.fadd(v, load(b, more, half, k + 2 * r * q)) for v, k in ((first, 0), (second, r)))
            store(b, b.fptrunc(first, single), to, r * q)
            store(b, b.fptrunc(second, single), beside, padded(r) * q)
        return context.get_dummy_value()

    whole = types.int64
    takes = (values, index, whole, whole, table, rows, square, types.float64, shared, out, whole, side, unit)
    return types.void(*takes), build


@intrinsic
def turned(_, block, out, at, stride, unit):
    """out[at + c stride + k] = block[k, c] for k < BLOCK, c < r: block is float32, its rows `padded(r)` long."""
    r = len(unit)

    def build(context, b, signature, args):
        kind = ir.VectorType(_F32, BLOCK)
        start = address(context, b, signature.args[0], args[0], _I64(0))
        for first in range(0, r, BLOCK):
            rows = _transposed(b, [load(b, start, kind, k * padded(r) + first) for k in range(BLOCK)])
            for c in range(first, min(r, first + BLOCK)):
                place = b.add(args[2], b.mul(args[3], _I64(c)))
                to = address(context, b, signature.args[1], args[1], place)
                store(b, rows[c - first], to)
                _announce(b, b.gep(to, [_I64(AHEAD * BLOCK)]))
        return context.get_dummy_value()

    return types.void(block, out, types.int64, types.int64, unit), build


def _announce(b, pointer):
    """Begin to bring the pointer's line of the cache here, to be written: no prefetcher follows so many rows."""
    place = b.bitcast(pointer, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type, *[_I32] * 3])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(function, [place, _I32(1), _I32(3), _I32(1)])  # to be written, soon, as data


def _transposed(b, rows):
    """The columns of as many vectors as each has lanes: squares of 1, 2, 4, ... change places."""
    rows, count = list(rows), len(rows)
    kind, s = ir.VectorType(_I32, count), 1
    while s < count:
        upper = kind([count + lane - s if lane & s else lane for lane in range(count)])
        lower = kind([count + lane if lane & s else lane + s for lane in range(count)])
        for i in range(count):
            if not i & s:
                one, other = rows[i], rows[i + s]
                rows[i], rows[i + s] = b.shuffle_vector(one, other, upper), b.shuffle_vector(one, other, lower)
        s *= 2
    return rows
