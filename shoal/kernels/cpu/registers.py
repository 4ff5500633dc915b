"""What wide steps are built of: vectors in LLVM's portable types, which it cuts to the registers that there are.

They are called while numba compiles, with the builder `b` of the instructions.
"""

from __future__ import annotations

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()


def vector(element, n):
    return ir.VectorType(element, n)


def splat(b, value, n):
    zero = ir.Constant(vector(value.type, n), ir.Undefined)
    return b.shuffle_vector(b.insert_element(zero, value, I32(0)), zero, vector(I32, n)([0] * n))


def joined(b, low, high):
    n = low.type.count
    return b.shuffle_vector(low, high, vector(I32, 2 * n)(list(range(2 * n))))


def part(b, v, first, n):
    return b.shuffle_vector(v, v, vector(I32, n)(list(range(first, first + n))))


def address(context, b, array_type, array, index):
    """A pointer to array[index]."""
    return b.gep(context.make_array(array_type)(context, b, array).data, [index])


def load(b, pointer, kind, offset=0):
    """A value of this kind, `offset` elements of what `pointer` points to further on; aligned or not."""
    place = b.bitcast(b.gep(pointer, [I64(offset)]), kind.as_pointer())
    return b.load(place, align=1)


def store(b, value, pointer, offset=0):
    place = b.bitcast(b.gep(pointer, [I64(offset)]), value.type.as_pointer())
    b.store(value, place, align=1)


def stream(b, value, pointer, offset=0):
    """To a whole line of the cache, past the caches."""
    place = b.bitcast(b.gep(pointer, [I64(offset)]), value.type.as_pointer())
    b.store(value, place, align=64).set_metadata("nontemporal", b.module.add_metadata([I32(1)]))
