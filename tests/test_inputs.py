"""Any finite input: 200 examples a compressor, of any shape, stride, scale and mixture of special values.

What comes out is finite, float32 and of the shape that went in, the argument is untouched, and what is too large for
float32 is a NonFiniteError that says so. The fixed matrix of special values is in test_compressors.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import COMPRESSORS, fits, round_of

from shoal.errors import NonFiniteError

EDGES = [0.0, -0.0, 1.4e-45, -1.4e-45, 1.1754944e-38, -1e-40, 1e-30, 1.0, -1.0, 1e30, -3e38, 3.4028234663852886e38]
entries = st.one_of(st.sampled_from(EDGES), st.floats(width=32, allow_nan=False, allow_infinity=False))


@st.composite
def rows(draw) -> torch.Tensor:
    """(m, d) float32 rows: a plain tensor, a transpose, every second column, or one row shown m times."""
    n, d = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 5, 8, 13, 33]))
    scale = np.float32(2.0 ** draw(st.sampled_from([-140, -60, 0, 0, 0, 60])))
    seed = draw(st.integers(0, 2**32 - 1))
    numbers = np.random.default_rng(seed).standard_cauchy((n, d)).astype(np.float32) * scale
    for at in draw(st.lists(st.integers(0, n * d - 1), max_size=6)):
        numbers.flat[at] = draw(entries)
    u, kind = torch.from_numpy(np.nan_to_num(numbers)), draw(st.sampled_from(["plain", "transposed", "strided", "one"]))
    if kind == "transposed":
        return u.T.contiguous().T
    if kind == "strided":
        return torch.stack([u, -u], 2).reshape(n, 2 * d)[:, ::2]
    return u[:1].expand(n, d) if kind == "one" else u


@pytest.mark.slow
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@settings(max_examples=200)
@given(rows(), st.integers(0, 2**31))
def test_any_finite_input(compressor, u, index):
    n, d = u.shape
    if not fits(compressor, n, d):
        return
    before = u.clone()
    try:
        rnd = round_of(compressor, u, index)
        msgs = compressor.encode(u, rnd)
    except NonFiniteError as error:
        assert "overflows" in str(error) and before.abs().max() > 1e30, "only what is large overflows"  # noqa: PT017, PT018
        return
    finally:
        assert u.equal(before)
    assert int(msgs.nbytes.max()) <= compressor.capacity(n, d)
    for out, shape in ((compressor.decode(msgs, rnd), (n, d)), (compressor.aggregate(msgs, rnd), (d,))):
        assert (out.dtype, tuple(out.shape)) == (torch.float32, shape)
        assert torch.isfinite(out).all()
        assert u.any() or not out.any()
