"""What an optimizer of shoal's refuses: parameters and rates that cannot be, and states of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ConfigError, ResumeMismatch

Groups = Sequence[dict[str, Any]]  # an optimizer's param_groups
RATES = ("lr", "weight_decay")


def check_rates(group: dict[str, Any], where: str) -> None:
    """Raise ConfigError unless lr and weight_decay are finite and not negative."""
    for name in RATES:
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise ConfigError(f"{where}{name}={value!r}: a finite number, not negative.")


def check_parameters(params: Sequence[Tensor]) -> None:
    """Raise ConfigError unless there are some, all of float32."""
    if not params:
        raise ConfigError("no parameter requires a gradient: there is nothing to train.")
    wrong = {f"{p.dtype}" for p in params if p.dtype != torch.float32}
    if wrong:
        raise ConfigError(
            f"parameters of {', '.join(sorted(wrong))}: messages are of float32. Keep float32 parameters, use autocast."
        )


def _count(params: Any) -> int | None:
    return len(params) if isinstance(params, list) else None


def check_groups(state: Any, mine: Groups) -> None:
    """Raise ResumeMismatch unless the state has this optimizer's groups, with a round and rates that can be."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        raise ResumeMismatch("this is no optimizer's state: it has no param_groups. Take what state_dict() gave.")
    found, here = ([_count(g.get("params")) for g in which] for which in (groups, mine))
    if found != here:
        raise ResumeMismatch(f"the state's groups have {found} parameters, this optimizer's {here}: group alike.")
    for group in groups:
        for name in ("seed", "world", "method"):
            if group.get(name) != mine[0][name]:
                raise ResumeMismatch(
                    f"the state's {name} is {group.get(name)!r}, this optimizer's {mine[0][name]!r}: "
                    "construct it alike, on as many ranks."
                )
        index = group.get("round")
        if type(index) is not int or not 0 <= index < 2**32 or index != groups[0]["round"]:
            raise ResumeMismatch(f"the state's round is {index!r}: one integer for all groups, not negative.")
        try:
            check_rates({name: group.get(name) for name in RATES}, "the state's ")
        except ConfigError as error:
            raise ResumeMismatch(f"{error} Take what state_dict() gave.") from None


def check_values(state: dict[str, Any], mine: Groups, wanted: Sequence[bool], keys: Sequence[str]) -> None:
    """Raise ResumeMismatch unless the parameters that are `wanted`, and no others, have tensors under these keys."""
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    every = [p for group in mine for p in group["params"]]
    held = state.get("state")
    for number, p, trained in zip(numbers, every, wanted, strict=True):
        found = held.get(number) if isinstance(held, dict) and isinstance(number, int | str) else None
        if found and not trained:
            raise ResumeMismatch(f"parameter {number} was trained, and is frozen here: freeze alike.")
        for key in keys if trained else ():
            value = found.get(key) if isinstance(found, dict) else None
            if not isinstance(value, Tensor) or value.shape != p.shape or not value.is_floating_point():
                raise ResumeMismatch(
                    f"parameter {number} has no {key} of shape {tuple(p.shape)}: this is another rank's state, or "
                    "another model's. Each rank loads what it saved."
                )
