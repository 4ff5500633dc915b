"""The algebra of constants: values by hand, minima by grid search, identities."""

from __future__ import annotations

import ast
import copy
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import theory
from shoal.theory import (
    AB,
    Constant,
    Smoothness,
    best_p,
    ef21_constants,
    independent,
    step_size,
    step_size_pl,
)


def known(value: float) -> Constant:
    return Constant(value, "exact")


L = Smoothness(minus=known(2.0), plus=known(3.0), pm=known(1.5), tilde=known(4.0), max=known(5.0))
positive = st.floats(1e-6, 1e6)
chance = st.floats(1e-4, 1.0)


def test_step_size_by_hand():
    assert step_size(2.0, 0.0, 0.1) == 0.5
    assert step_size(2.0, 9.0, 0.1) == pytest.approx(1 / (2 + 9))  # sqrt(9 * 9)
    assert step_size(2.0, 9.0, 1.0) == 0.5
    assert step_size_pl(2.0, 2.0, 0.2, 1e-3) == pytest.approx(1 / (2 + 4))  # sqrt(2 * 4 * 2)
    assert step_size_pl(2.0, 2.0, 0.2, 1.0) == pytest.approx(0.1)  # p / (2 mu)


@given(positive, positive, chance)
def test_the_lemma_is_an_equality_in_its_own_condition(L_minus, Gamma, p):
    """gamma = 1 / (L + sqrt(c)) satisfies gamma^2 c + gamma L <= 1, what the descent inequality asks for; and any
    step twice as large fails it, so that no factor is given away."""
    c = (1 - p) / p * Gamma
    for gamma, holds in ((step_size(L_minus, Gamma, p), True), (2 * step_size(L_minus, Gamma, p), False)):
        assert (gamma**2 * c + gamma * L_minus <= 1 + 1e-9) == holds


@given(positive, positive, chance, positive)
def test_a_step_under_pl_is_never_larger(L_minus, Gamma, p, mu):
    assert step_size_pl(L_minus, Gamma, p, mu) <= step_size(L_minus, Gamma, p)


def test_gamma_of_the_ab_inequality():
    """(a - b) L_+^2 + b L_±^2 + c L_max^2, and never a negative first term."""
    assert AB(3.0, 1.0, 0.5).gamma(L) == pytest.approx(2 * 9 + 2.25 + 0.5 * 25)
    assert AB(1.0, 1.0).gamma(L) == pytest.approx(2.25)
    assert AB(0.0, 0.0).gamma(L) == 0.0
    assert AB(1.0, 1.0 + 1e-15).gamma(L) == pytest.approx(2.25)
    assert independent(6.0, 4) == AB(1.5, 0.0)
    assert independent(6.0, 4).evidence == "proved"


def predicted_bits(p: float, full: float, code: float, L_minus: float, Gamma: float, mu: float | None) -> float:
    """Bits a client a round over the step size: proportional to the bits to any accuracy."""
    gamma = step_size(L_minus, Gamma, p) if mu is None else step_size_pl(L_minus, Gamma, p, mu)
    return (p * full + (1 - p) * code) / gamma


@pytest.mark.parametrize("Gamma", [0.01, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("code", [3.2, 32.0, 500.0, 3100.0])
@pytest.mark.parametrize("mu", [None, 1e-4, 0.05, 1.0])
def test_best_p_is_a_minimum(Gamma, code, mu):
    """Against 20,001 values of p between the documented floor and 1; with mu, where the cap makes a corner."""
    p, grid = best_p(3200.0, code, 2.0, Gamma, mu), np.geomspace(code / 32000.0, 1.0, 20_001)
    least = min(predicted_bits(q, 3200.0, code, 2.0, Gamma, mu) for q in grid)
    assert grid[0] * (1 - 1e-12) <= p <= 1.0
    assert predicted_bits(p, 3200.0, code, 2.0, Gamma, mu) <= least * (1 + 1e-9)


def test_best_p_at_its_ends():
    """Gamma = 0: the floor, a tenth of what compressed messages cost. A message as long as the gradient: p = 1."""
    assert best_p(3200.0, 100.0, 1.0, 0.0) == pytest.approx(100.0 / 32000.0)
    for code in (3200.0, 5000.0):
        assert best_p(3200.0, code, 1.0, 7.0) == 1.0
    assert best_p(3200.0, 100.0, 1.0, 1e12) > 0.02, "a poor compressor asks for more full rounds"


def test_the_best_of_several_inequalities():
    """Of those that hold, the one whose Gamma is least for the problem at hand; the first where they are equal."""
    wide, narrow = AB(3.0, 0.0), AB(5.0, 4.0)  # Gammas 3 L_+^2 and L_+^2 + 4 L_±^2
    both = replace(wide, other=narrow)
    for pm, chosen in ((1.5, narrow), (2.5, both)):
        there = replace(L, pm=known(pm))
        assert both.best(there) == chosen
        assert both.best(there).gamma(there) == min(wide.gamma(there), narrow.gamma(there))
    assert replace(wide, other=wide).best(L).other == wide
    assert replace(wide, other=replace(wide, other=narrow)).best(replace(L, pm=known(0.0))) == narrow


@given(st.floats(1e-6, 1.0))
def test_ef21_constants(alpha):
    """theta = 1 - sqrt(1-alpha), beta = (1-alpha)/theta, and sqrt(beta/theta) = (1 + sqrt(1-alpha))/alpha - 1."""
    theta, beta = ef21_constants(alpha)
    root = math.sqrt(1 - alpha)
    assert theta == 1 - root
    assert beta * theta == pytest.approx(1 - alpha, rel=1e-9, abs=1e-15)
    assert math.sqrt(beta / theta) == pytest.approx((1 + root) / alpha - 1, rel=1e-6, abs=1e-12)


def test_ef21_constants_without_loss():
    assert ef21_constants(1.0) == (1.0, 0.0)


def test_constants_say_how_they_are_known():
    c = Constant(0.7123456789, "estimate")
    assert repr(c) == "0.712346 (estimate)"
    assert isinstance(c, float)
    assert (c + 1, c * 2, -c, c**2) == (1.7123456789, 1.4246913578, -0.7123456789, 0.7123456789**2)
    assert type(c * 2) is float, "a sum of constants has no status of its own"
    for copied in (copy.copy(c), copy.deepcopy(c), pickle.loads(pickle.dumps(c))):
        assert (float(copied), copied.status) == (float(c), "estimate")
    assert f"{c:.3f}" == "0.712"


def test_facts_leave_out_what_is_unknown():
    facts = replace(L, mu=Constant(0.1, "bound")).facts()
    assert facts["minus"] == (2.0, "exact")
    assert facts["mu"] == (0.1, "bound")
    assert "f_inf" not in facts
    assert set(facts) == {"minus", "plus", "pm", "tilde", "max", "mu", "samples", "most", "sample", "noise"}


def test_theory_stands_alone():
    """It imports neither torch nor any other part of the package."""
    tree = ast.parse(Path(theory.__file__).read_text())
    names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert not [name for name in names if name.split(".")[0] in ("torch", "shoal")]
