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

from shoal.kernels.cpu.lanes import _at, _load, _splat, _store

_F64, _I64 = ir.DoubleType(), ir.IntType(64)


def _wide(context, b, kind, pointer, count):
    """`count` numbers of this type from the pointer on, as float64; a number alone where count is None."""
    element = context.get_value_type(kind)
    value = _load(b, pointer, element if count is None else ir.VectorType(element, count))
    if element == _F64:
        return value
    return b.fpext(value, _F64 if count is None else ir.VectorType(_F64, count))


@intrinsic
def gathered(_, values, index, lo, hi, table, out, unit):
    """out[c] = sum over lo <= k < hi of values[k] table[index[k], c] for c < 2 r; table has 2 r columns."""
    width = 2 * len(unit)

    def build(context, b, signature, args):
        kinds, row = signature.args, ir.VectorType(_F64, width)
        total = cgutils.alloca_once_value(b, ir.Constant(row, [0.0] * width))
        start = _at(context, b, kinds[4], args[4], _I64(0))
        with cgutils.for_range_slice(b, args[2], args[3], _I64(1), _I64) as (k, _):
            value = _wide(context, b, kinds[0].dtype, _at(context, b, kinds[0], args[0], k), None)
            place = b.zext(b.load(_at(context, b, kinds[1], args[1], k)), _I64)
            term = _wide(context, b, kinds[4].dtype, b.gep(start, [b.mul(place, _I64(width))]), width)
            b.store(b.fadd(b.load(total), b.fmul(_splat(b, value, width), term)), total)
        _store(b, b.load(total), _at(context, b, kinds[5], args[5], _I64(0)))
        return context.get_dummy_value()

    return types.void(values, index, types.int64, types.int64, table, out, unit), build


@intrinsic
def times(_, row, at, square, out, unit):
    """out (r,) = row[at : at + r] @ square: the even terms one after the other, the odd ones beside them."""
    r = len(unit)

    def build(context, b, signature, args):
        kinds = signature.args
        place = _at(context, b, kinds[0], args[0], args[1])
        start = _at(context, b, kinds[2], args[2], _I64(0))
        sums = [ir.Constant(ir.VectorType(_F64, r), [0.0] * r)] * 2
        for a in range(r):
            value = _wide(context, b, kinds[0].dtype, b.gep(place, [_I64(a)]), None)
            term = _wide(context, b, kinds[2].dtype, b.gep(start, [_I64(a * r)]), r)
            sums[a % 2] = b.fadd(sums[a % 2], b.fmul(_splat(b, value, r), term))
        _store(b, b.fadd(*sums), _at(context, b, kinds[3], args[3], _I64(0)))
        return context.get_dummy_value()

    return types.void(row, types.int64, square, out, unit), build
