"""What threads under the kernels say to each other without the interpreter: atomic words of an array, and a compiled
function with its arguments as two addresses that any thread may call.

Words are int64; every access here is sequentially consistent. A task is a record on its caller's stack, which must not
return before the last call of it has ended: {whether a call returned True, the exception of one, the arguments}.
"""

from __future__ import annotations

import time
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.callconv import RETCODE_USEREXC
from numba.extending import intrinsic

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_PLACE = _I8.as_pointer()
_CALL = ir.FunctionType(ir.VoidType(), [_PLACE, _I64, _I64])  # a task's record, lo, hi
_ORDER = "seq_cst"


def _word(context: Any, b: Any, kinds: Any, args: Any) -> Any:
    """A pointer to words[at], the first two arguments."""
    return b.gep(context.make_array(kinds[0])(context, b, args[0]).data, [args[1]])


@intrinsic
def load(typing, words, at):
    """words[at]."""

    def emit(context, b, signature, args):
        return b.load_atomic(_word(context, b, signature.args, args), _ORDER, 8)

    return types.int64(words, types.int64), emit


@intrinsic
def store(typing, words, at, value):
    """words[at] = value."""

    def emit(context, b, signature, args):
        b.store_atomic(args[2], _word(context, b, signature.args, args), _ORDER, 8)
        return context.get_dummy_value()

    return types.void(words, types.int64, types.int64), emit


@intrinsic
def add(typing, words, at, value):
    """words[at] += value, and what it was before."""

    def emit(context, b, signature, args):
        return b.atomic_rmw("add", _word(context, b, signature.args, args), args[2], _ORDER)

    return types.int64(words, types.int64, types.int64), emit


@intrinsic
def take(typing, words, at):
    """words[at] = 1 if it is 0, and whether it was."""

    def emit(context, b, signature, args):
        found = b.cmpxchg(_word(context, b, signature.args, args), _I64(0), _I64(1), _ORDER, _ORDER)
        return b.extract_value(found, 1)

    return types.boolean(words, types.int64), emit


@intrinsic
def pause(typing):
    """A moment's rest of a loop that waits: the processor's own word for it on x86, else nothing."""

    def emit(context, b, signature, args):
        if b.module.triple.startswith(("x86_64", "i686")):
            nothing = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, nothing, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def clock(typing):
    """Nanoseconds of a clock that never goes back."""

    def emit(context, b, signature, args):
        moment = cgutils.alloca_once(b, ir.LiteralStructType([_I64, _I64]))
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), _PLACE])
        read = cgutils.get_or_insert_function(b.module, kind, "clock_gettime")
        b.call(read, [ir.IntType(32)(time.CLOCK_MONOTONIC), b.bitcast(moment, _PLACE)])
        seconds, rest = (b.load(cgutils.gep_inbounds(b, moment, 0, field)) for field in range(2))
        return b.add(b.mul(seconds, _I64(10**9)), rest)

    return types.int64(), emit


@intrinsic
def call(typing, function, record, lo, hi):
    """What `task` made, for lo..hi-1."""

    def emit(context, b, signature, args):
        function, record = b.inttoptr(args[0], _CALL.as_pointer()), b.inttoptr(args[1], _PLACE)
        b.call(function, [record, args[2], args[3]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@intrinsic
def task(typing, kernel, args):
    """(function, record) of kernel(*args, lo, hi) for a compiled kernel that returns nothing, or a bool."""
    kinds = (*args.types, types.int64, types.int64)
    kernel.get_call_type(typing, kinds, {})  # compiles it

    def emit(context, b, signature, given):
        compiled = kernel.dispatcher.overloads[kinds]
        context.add_linking_libs([compiled.library])
        arguments = given[1]
        head = [_I64, _PLACE]
        record = cgutils.alloca_once(b, ir.LiteralStructType([*head, arguments.type]))
        for field, value in enumerate((_I64(0), _PLACE(None), arguments)):
            b.store(value, cgutils.gep_inbounds(b, record, 0, field))
        function = _caller(context, b.module, compiled.fndesc, record.type, args.types)
        return context.make_tuple(b, signature.return_type, [b.ptrtoint(p, _I64) for p in (function, record)])

    return types.UniTuple(types.int64, 2)(kernel, args), emit


def _caller(context: Any, module: Any, described: Any, record: Any, kinds: Any) -> Any:
    """A function of the module that calls the kernel with a record's arguments, and notes there what comes of it."""
    function = ir.Function(module, _CALL, module.get_unique_name(f"{described.llvm_func_name}.task"))
    function.linkage = "internal"
    b = ir.IRBuilder(function.append_basic_block())
    found, error, arguments = (
        cgutils.gep_inbounds(b, b.bitcast(function.args[0], record), 0, field) for field in range(3)
    )
    held = b.load(arguments)
    values = [*(b.extract_value(held, k) for k in range(len(kinds))), *function.args[1:]]
    kernel = context.declare_function(module, described)
    status, value = context.call_conv.call_function(b, kernel, described.restype, described.argtypes, values)
    with b.if_then(status.is_error):
        b.store_atomic(status.excinfoptr, b.bitcast(error, status.excinfoptr.type.as_pointer()), _ORDER, 8)
    if described.restype == types.boolean:
        b.atomic_rmw("or", found, b.zext(value, _I64), _ORDER)
    b.ret_void()
    return function


@intrinsic
def outcome(typing, record):
    """Whether a call of the task returned True. Raises what one of them raised."""

    def emit(context, b, signature, args):
        whole = b.inttoptr(args[0], ir.LiteralStructType([_I64, _PLACE]).as_pointer())
        error = b.load(cgutils.gep_inbounds(b, whole, 0, 1))
        with b.if_then(cgutils.is_not_null(b, error), likely=False):
            convention = context.call_conv
            kind = convention._get_excinfo_argument(b.function).type.pointee
            status = convention._get_return_status(b, RETCODE_USEREXC, b.bitcast(error, kind))
            convention.return_status_propagate(b, status)
        return b.icmp_signed("!=", b.load(cgutils.gep_inbounds(b, whole, 0, 0)), _I64(0))

    return types.boolean(types.int64), emit
