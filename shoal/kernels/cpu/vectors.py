"""Sixteen floats at a time: the few operations on registers that a plain loop does not compile to.

They are written in LLVM's own vectors, which any machine has; the widest registers there are take them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_F32, _F64, _I16, _I32, _I64 = ir.FloatType(), ir.DoubleType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_WIDE = ir.VectorType(_F32, 16)
FAR = 1 << 22  # coordinates from which on rows come from memory, and go there: it pays to `expect` them


def _at(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """The address of array[index]."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _load(builder: Any, address: Any, step: int = 0) -> Any:
    """The 16 floats from 16 step floats behind the address on, wherever it lies."""
    place = builder.gep(address, [ir.Constant(_I64, 16 * step)])
    out = builder.load(builder.bitcast(place, _WIDE.as_pointer()))
    out.align = 4
    return out


def _store(builder: Any, value: Any, address: Any, step: int = 0) -> None:
    place = builder.gep(address, [ir.Constant(_I64, 16 * step)])
    builder.store(value, builder.bitcast(place, _WIDE.as_pointer())).align = 4


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    none = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(none, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(_I32, 16), [0] * 16))


@intrinsic
def move(typing, source, target, at, count):
    """target[at : at + count] = source[at : at + count] by the C library, whose copies choose how they store."""

    def emit(context, builder, signature, args):
        to, origin = (_at(context, builder, signature.args[k], args[k], args[2]) for k in (1, 0))
        cgutils.raw_memcpy(builder, to, origin, args[3], context.get_abi_sizeof(origin.type.pointee))
        return context.get_dummy_value()

    return types.void(source, target, types.int64, types.int64), emit


@intrinsic
def expect(typing, array, at):
    """Begin to bring array[at] into the first-level cache. Beyond the array's end, nothing happens."""

    def emit(context, builder, signature, args):
        place = builder.bitcast(_at(context, builder, signature.args[0], *args), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, *[_I32] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, _I32(0), _I32(3), _I32(1)])  # to be read, soon and often, as data
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@intrinsic
def fence(typing):
    """What was written before this, past the caches too, is seen by whoever sees what is written after it."""

    def emit(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


@njit(inline="always")
def beyond_caches(out, row):
    """Whether the row's lines are to be written past the caches: the results are too many to be found there later, and
    the row begins with a whole line. A line that is in no cache is else read before it is written."""
    return out.size >= FAR and row.ctypes.data % 64 == 0


def _within(context: Any, builder: Any, x: Any) -> Any:
    """The butterflies with strides 1, 2, 4 and 8 inside one register: x + other in the lower lanes, other - x above.

    ±1 x is exact, so that multiplying and adding at once rounds as adding does, in one step instead of two.
    """
    none, fused = ir.Constant(_WIDE, ir.Undefined), "+fma" in context.codegen()._tm_features
    for stride in (1, 2, 4, 8):
        order = ir.Constant(ir.VectorType(_I32, 16), [lane ^ stride for lane in range(16)])
        other = builder.shuffle_vector(x, none, order)
        if fused:
            signs = ir.Constant(_WIDE, [-1.0 if lane & stride else 1.0 for lane in range(16)])
            kind = ir.FunctionType(_WIDE, [_WIDE] * 3)
            x = builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), [x, signs, other])
        else:
            upper = ir.Constant(ir.VectorType(ir.IntType(1), 16), [bool(lane & stride) for lane in range(16)])
            x = builder.select(upper, builder.fsub(other, x), builder.fadd(x, other))
    return x


def _across(builder: Any, x: list[Any]) -> list[Any]:
    """The butterflies between registers 1, 2, 4, ... apart."""
    x, stride = list(x), 1
    while stride < len(x):
        for i in range(len(x)):
            if not i & stride:
                a, b = x[i], x[i + stride]
                x[i], x[i + stride] = builder.fadd(a, b), builder.fsub(a, b)
        stride *= 2
    return x


@intrinsic
def first_256(typing: Any, u: Any, i: Any, scale: Any, words: Any, w: Any, out: Any, o: Any) -> Any:
    """out[o:o+256] = scale u[i:i+256], negated where the bits of words[w:w+8] are set, after the strides 1 to 128."""
    signature = types.void(u, types.int64, types.float32, words, types.int64, out, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = _at(context, builder, signature.args[0], args[0], args[1])
        signs = builder.bitcast(_at(context, builder, signature.args[3], args[3], args[4]), _I16.as_pointer())
        target, factor = _at(context, builder, signature.args[5], args[5], args[6]), _splat(builder, args[2], _WIDE)
        rows = []
        for r in range(16):
            mask = builder.load(builder.gep(signs, [ir.Constant(_I64, r)]))
            mask.align = 2
            negative = builder.bitcast(mask, ir.VectorType(ir.IntType(1), 16))
            x = builder.fmul(_load(builder, source, r), factor)
            rows.append(_within(context, builder, builder.select(negative, builder.fneg(x), x)))
        for r, x in enumerate(_across(builder, rows)):
            _store(builder, x, target, r)
        return context.get_dummy_value()

    return signature, generate


def _radix(count: int) -> Any:
    @intrinsic
    def radix(typing: Any, x: Any, i: Any, stride: Any) -> Any:
        """The butterflies with strides stride, 2 stride, ... of 16 columns: x[i + k stride : + 16], k < count."""
        signature = types.void(x, types.int64, types.int64)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first = _at(context, builder, signature.args[0], args[0], args[1])
            rows = [builder.gep(first, [builder.mul(args[2], ir.Constant(_I64, k))]) for k in range(count)]
            for row, value in zip(rows, _across(builder, [_load(builder, row) for row in rows]), strict=True):
                _store(builder, value, row)
            return context.get_dummy_value()

        return signature, generate

    return radix


radix_2, radix_4, radix_8, radix_16 = _radix(2), _radix(4), _radix(8), _radix(16)


def _wide(builder: Any, x: Any) -> Any:
    return builder.fpext(x, ir.VectorType(_F64, 16))


def _lanes(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    address = _at(context, builder, kind, array, ir.Constant(_I64, 0))
    return builder.bitcast(address, ir.VectorType(_F64, 16).as_pointer())


def _last(count: int) -> Any:
    @intrinsic
    def last(typing: Any, x: Any, i: Any, stride: Any, full: Any, code: Any, byte: Any, total: Any) -> Any:
        """The last butterflies of 16 columns, x[i + k stride : + 16], k < count: nothing is kept but signs and sums.

        Rows from `full` on are zeros, and not read. code[byte + k stride / 8 : + 2] = the bits [y >= 0], and
        total[16 k + l] += |y_l|, in float64.
        """
        signature = types.void(x, types.int64, types.int64, types.int64, code, types.int64, total)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds, zeros = signature.args, ir.Constant(_WIDE, [0.0] * 16)
            first, target = (_at(context, builder, kinds[a], args[a], args[a + 1]) for a in (0, 4))
            lanes = _lanes(context, builder, kinds[6], args[6])
            none = cgutils.alloca_once_value(builder, zeros)
            rows = []
            for k in range(count):
                place = builder.gep(first, [builder.mul(args[2], ir.Constant(_I64, k))])
                empty = builder.bitcast(none, place.type)
                place = builder.select(builder.icmp_signed("<", ir.Constant(_I64, k), args[3]), place, empty)
                rows.append(_load(builder, place))
            eighth = builder.lshr(args[2], ir.Constant(_I64, 3))
            for k, y in enumerate(_across(builder, rows)):
                up = builder.fcmp_ordered(">=", y, zeros)
                place = builder.gep(target, [builder.mul(eighth, ir.Constant(_I64, k))])
                builder.store(builder.bitcast(up, _I16), builder.bitcast(place, _I16.as_pointer())).align = 1
                place = builder.gep(lanes, [ir.Constant(_I64, k)])
                value = builder.load(place)
                value.align = 8
                value = builder.fadd(value, _wide(builder, builder.select(up, y, builder.fneg(y))))
                builder.store(value, place).align = 8
            return context.get_dummy_value()

        return signature, generate

    return last


last_2, last_4, last_8, last_16 = _last(2), _last(4), _last(8), _last(16)


@intrinsic
def flip_16(typing: Any, x: Any, i: Any, words: Any, half: Any, out: Any, o: Any) -> Any:
    """out[o:o+16] = x[i:i+16], negated where the bits of the given half of a word, counted from words[0], are set."""
    signature = types.void(x, types.int64, words, types.int64, out, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _load(builder, _at(context, builder, signature.args[0], args[0], args[1]))
        signs = builder.bitcast(
            _at(context, builder, signature.args[2], args[2], ir.Constant(_I64, 0)), _I16.as_pointer()
        )
        mask = builder.load(builder.gep(signs, [args[3]]))
        mask.align = 2
        negative = builder.bitcast(mask, ir.VectorType(ir.IntType(1), 16))
        target = _at(context, builder, signature.args[4], args[4], args[5])
        _store(builder, builder.select(negative, builder.fneg(value), value), target)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_products(typing: Any, u: Any, i: Any, v: Any, j: Any, total: Any) -> Any:
    """total[l] += u[i + l] v[j + l], in float64, for l < 16, then for l + 16, 32 and 48."""
    signature = types.void(u, types.int64, v, types.int64, total)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a = _at(context, builder, signature.args[0], args[0], args[1])
        b = _at(context, builder, signature.args[2], args[2], args[3])
        lanes = _lanes(context, builder, signature.args[4], args[4])
        value = builder.load(lanes)
        value.align = 8
        for r in range(4):
            product = builder.fmul(_wide(builder, _load(builder, a, r)), _wide(builder, _load(builder, b, r)))
            value = builder.fadd(value, product)
        builder.store(value, lanes).align = 8
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def split_64(typing: Any, u: Any, i: Any, total: Any) -> Any:
    """The 64 bits [u >= 0] of u[i:i+64], the first the least significant; total[l] += |u[i + l]| as in add_products."""
    signature = types.uint64(u, types.int64, total)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a = _at(context, builder, signature.args[0], args[0], args[1])
        lanes = _lanes(context, builder, signature.args[2], args[2])
        value, bits = builder.load(lanes), ir.Constant(_I64, 0)
        value.align = 8
        for r in range(4):
            x = _load(builder, a, r)
            up = builder.fcmp_ordered(">=", x, ir.Constant(_WIDE, [0.0] * 16))
            value = builder.fadd(value, _wide(builder, builder.select(up, x, builder.fneg(x))))
            some = builder.zext(builder.bitcast(up, _I16), _I64)
            bits = builder.or_(bits, builder.shl(some, ir.Constant(_I64, 16 * r)))
        builder.store(value, lanes).align = 8
        return bits

    return signature, generate


@intrinsic
def keep_16(typing: Any, bits: Any, i: Any, least: Any, out: Any, c: Any) -> Any:
    """Write those of i, ..., i + 15 (uint32) where bits without the sign are at least `least` to out[c:]: the new c."""
    signature = types.int64(bits, types.int64, types.uint32, out, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide, mask = ir.VectorType(_I32, 16), ir.VectorType(ir.IntType(1), 16)
        source = _at(context, builder, signature.args[0], args[0], args[1])
        x = builder.load(builder.bitcast(source, wide.as_pointer()))
        x.align = 4
        size = builder.and_(x, ir.Constant(wide, [0x7FFFFFFF] * 16))
        kept = builder.icmp_unsigned(">=", size, _splat(builder, args[2], wide))
        number = _splat(builder, builder.trunc(args[1], _I32), wide)
        number = builder.add(number, ir.Constant(wide, list(range(16))))
        target = _at(context, builder, signature.args[3], args[3], args[4])
        kind = ir.FunctionType(ir.VoidType(), [wide, _I32.as_pointer(), mask])
        compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.compressstore.v16i32")
        builder.call(compress, [number, target, kept])
        count = builder.ctpop(builder.bitcast(kept, _I16))
        return builder.add(args[4], builder.zext(count, _I64))

    return signature, generate


@intrinsic
def lowest(typing: Any, x: Any) -> Any:
    """The number of the lowest set bit of a uint64 that is not 0."""
    signature = types.int64(types.uint64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return signature, generate
