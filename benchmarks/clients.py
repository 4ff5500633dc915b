"""Gradients of many clients in one pass, against a loop over clients: the linear autoencoder on MNIST, n = 1000.

The loop is what one writes with torch: each client's pictures as a dense matrix, its loss, `backward`; on one thread,
since matrices of 60 rows gain nothing from two. All clients' pictures differ (similarity 0), so nothing can be
computed once for many. Both are timed by the wall clock, one right after the other. The folder mnist/ is looked for in
the one that SHOAL_DATA names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shoal import Autoencoder
from shoal.experiments.timing import Row

N = 1000
GOAL = 0.1  # of the loop's time


def loop(x: Tensor, pictures: list[Tensor], width: int, weight: float) -> Tensor:
    """(n, d): gradients by autograd, one client after the other."""
    rows, p = torch.empty(len(pictures), len(x)), pictures[0].shape[1]
    for i, a in enumerate(pictures):
        z = x.clone().requires_grad_()
        D, E = z[: p * width].view(p, width), z[p * width :].view(width, p)
        (weight * (a @ E.T @ D.T - a).square().sum()).backward()
        rows[i] = z.grad
    return rows


def measure(repeat: int) -> Iterator[Row]:
    """A row for one thread and one for as many as there are cores. Raises OSError where MNIST is not there."""
    folder = Path(os.environ.get("SHOAL_DATA", "")) / "mnist"
    if "SHOAL_DATA" not in os.environ or not folder.is_dir():
        raise FileNotFoundError("SHOAL_DATA names no folder with mnist/ in it")
    problem = Autoencoder.load(folder, n=N, similarity=0.0)
    x, ids, weight = problem.start(), torch.arange(N), N / problem.total_rows
    pictures = [torch.from_numpy(block.toarray().astype(np.float32)) for block in problem._blocks]
    if not torch.allclose(loop(x, pictures, problem.width, weight), problem.evaluate(x, ids)[1], rtol=1e-3, atol=1e-4):
        raise AssertionError("the two differ")
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        ours, theirs = [], []
        for _ in range(repeat):
            began = time.perf_counter()
            loop(x, pictures, problem.width, weight)
            theirs.append(time.perf_counter() - began)
            torch.set_num_threads(threads)
            began = time.perf_counter()
            problem.evaluate(x, ids)
            ours.append(time.perf_counter() - began)
            torch.set_num_threads(1)
        slower = float(np.median([a / b for a, b in zip(theirs, ours, strict=True)]))
        detail = {"loop s": float(np.median(theirs)), "times faster": slower}
        yield Row("clients", f"{threads} threads", "s", ours, None, GOAL * float(np.median(theirs)), detail)
