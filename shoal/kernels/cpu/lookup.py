"""Sixteen codes of at most four bits at a time: taken out of their bytes, and looked up in a table that is a register.

The steps are LLVM vectors, called from numba's loops. Where the processor has AVX-512, one instruction looks a whole
register up; elsewhere the same numbers are loaded one by one. Arrays are contiguous and nothing is checked: every
function says how far it reads and writes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shoal.kernels.cpu.registers import F32, F64, I16, I32, I64, address, joined, load, splat, store, stream

_SINGLE, _DOUBLE = ir.VectorType(F32, 16), ir.VectorType(F64, 8)
_LANES = ir.VectorType(I64, 8)
_FUNCTIONS = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx512.vpermi2var.pd.512"}


def _codes(b: Any, word: Any, bits: Any) -> list[Any]:
    """Two vectors of eight 64-bit lanes: lane l begins with code l, or 8 + l; above it stand the codes that follow."""
    steps = [b.mul(splat(b, bits, 8), ir.Constant(_LANES, [8 * g + lane for lane in range(8)])) for g in range(2)]
    return [b.lshr(splat(b, word, 8), step) for step in steps]


def _permuted(context: Any, b: Any, table: Any, index: Any) -> Any:
    """table[index mod 16] for a vector of indices, 16 of 32 bits or 8 of 64; table points to 16 numbers."""
    n, kind = index.type.count, {16: _SINGLE, 8: _DOUBLE}[index.type.count]
    if "+avx512f" in context.codegen()._tm_features:
        halves = [load(b, b.gep(table, [I64(8 * g)]), kind) for g in range(16 // n)]
        order = [*halves[:1], index, *halves[1:]]
        signature = ir.FunctionType(kind, [value.type for value in order])
        return b.call(cgutils.get_or_insert_function(b.module, signature, _FUNCTIONS[n]), order)
    out = ir.Constant(kind, ir.Undefined)
    for lane in range(n):
        place = b.and_(b.extract_element(index, I32(lane)), index.type.element(15))
        out = b.insert_element(out, b.load(b.gep(table, [place])), I32(lane))
    return out


def _looked_up(source, table, out, store):
    def emit(context, b, signature, args):
        kinds = signature.args
        word = load(b, address(context, b, kinds[0], args[0], args[1]), I64)
        index = joined(b, *(b.trunc(v, ir.VectorType(I32, 8)) for v in _codes(b, word, args[4])))
        entries = address(context, b, kinds[2], args[2], b.mul(args[3], I64(16)))
        found = _permuted(context, b, entries, index)
        store(b, found, address(context, b, kinds[5], args[5], args[6]))
        return b.icmp_unsigned("!=", b.bitcast(b.fcmp_unordered("uno", found, found), I16), I16(0))

    return types.boolean(source, types.int64, table, types.int64, types.int64, out, types.int64), emit


@intrinsic
def look_up(typing, source, at, table, row, bits, out, to):
    """out[to : to + 16] = table[row, codes], table (m, 16) float32; reads 8 bytes of `source` from `at` on. Whether one
    is a NaN."""
    return _looked_up(source, table, out, store)


@intrinsic
def far_look_up(typing, source, at, table, row, bits, out, to):
    """The same past the caches, where out[to] begins a line."""
    return _looked_up(source, table, out, stream)


def _summed(rows):
    @intrinsic
    def add(typing, source, at, stride, table, row, bits, acc, to):
        def emit(context, b, signature, args):
            kinds = signature.args
            place = address(context, b, kinds[6], args[6], args[7])
            sums = [load(b, b.gep(place, [I64(8 * g)]), _DOUBLE) for g in range(2)]
            for k in range(rows):
                first = b.add(args[1], b.mul(args[2], I64(k)))
                word = load(b, address(context, b, kinds[0], args[0], first), I64)
                entries = address(context, b, kinds[3], args[3], b.mul(b.add(args[4], I64(k)), I64(16)))
                found = [_permuted(context, b, entries, index) for index in _codes(b, word, args[5])]
                sums = [b.fadd(total, value) for total, value in zip(sums, found, strict=True)]
            for g in range(2):
                store(b, sums[g], b.gep(place, [I64(8 * g)]))
            return context.get_dummy_value()

        return types.void(source, *[types.int64] * 2, table, *[types.int64] * 2, acc, types.int64), emit

    return add


# acc[to : to + 16] += table[row, codes], table (m, 16) float64, for one row or four, `stride` bytes apart, in order.
add_one, add_four = _summed(1), _summed(4)


@intrinsic
def take_eight(typing, source, at, bits, code, to):
    """code[to : to + 8] (uint16): eight codes of b <= 15 bits from byte `at` on; reads 8 bytes there, and b/2 later."""

    def emit(context, b, signature, args):
        kinds, bits = signature.args, args[2]
        half = b.add(args[1], b.lshr(bits, I64(1)))
        low, high = (splat(b, load(b, address(context, b, kinds[0], args[0], p), I64), 4) for p in (args[1], half))
        odd = b.shl(b.and_(bits, I64(1)), I64(2))  # where b is odd, the fifth code begins in the middle of a byte
        shift = b.mul(splat(b, bits, 8), ir.Constant(_LANES, [0, 1, 2, 3] * 2))
        shift = b.add(shift, b.mul(splat(b, odd, 8), ir.Constant(_LANES, [0] * 4 + [1] * 4)))
        mask = b.sub(b.shl(I64(1), bits), I64(1))
        found = b.and_(b.lshr(joined(b, low, high), shift), splat(b, mask, 8))
        store(b, b.trunc(found, ir.VectorType(I16, 8)), address(context, b, kinds[3], args[3], args[4]))
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, code, types.int64), emit


@intrinsic
def put_word(typing, out, at, word):
    """Eight bytes of `out` from byte `at` on, which need not be a multiple of 8: a view would have to be."""

    def emit(context, b, signature, args):
        store(b, args[2], address(context, b, signature.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(out, types.int64, types.uint64), emit


@intrinsic
def take_word(typing, source, at):
    """Eight bytes of `source` from byte `at` on, which need not be a multiple of 8."""

    def emit(context, b, signature, args):
        return load(b, address(context, b, signature.args[0], args[0], args[1]), I64)

    return types.uint64(source, types.int64), emit


@intrinsic
def put_four(typing, out, at, table, start):
    """out[at : at + 4] = table[start : start + 4], float32, neither of which need be a multiple of 4."""

    def emit(context, b, signature, args):
        kinds, four = signature.args, ir.VectorType(F32, 4)
        values = load(b, address(context, b, kinds[2], args[2], args[3]), four)
        store(b, values, address(context, b, kinds[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(out, types.int64, table, types.int64), emit
