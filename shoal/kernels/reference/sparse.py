"""Kept coordinates: gathered, scattered, added, and the largest found."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.reference.codes import pack, unpack


def gather(u: Tensor, index: Tensor, pointer: Tensor, width: int) -> Tensor:
    """(m, width) float32: row i holds u[i, index[pointer[i]:pointer[i+1]]], then zeros."""
    out, index_, at = np.zeros((len(u), width), np.float32), index.numpy(), pointer.tolist()
    for i in range(len(u)):
        out[i, : at[i + 1] - at[i]] = u.numpy()[i, index_[at[i] : at[i + 1]]]
    return torch.from_numpy(out)


def scatter(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float) -> Tensor:
    """(m, d) float32: scale times the values at their indices, zero elsewhere."""
    out, index_, at = np.zeros((len(values), d), np.float32), index.numpy(), pointer.tolist()
    for i in range(len(values)):
        row = values.numpy()[i, : at[i + 1] - at[i]].astype(np.float64)
        out[i, index_[at[i] : at[i + 1]]] = (row * scale).astype(np.float32)
    return torch.from_numpy(out)


def mean_sparse(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float, cohort: int) -> Tensor:
    """(d,) float64: (scale/cohort) sum_i of the rows, from row 0 to row m-1."""
    out, index_, at = np.zeros(d), index.numpy(), pointer.tolist()
    for i in range(len(values)):
        row = values.numpy()[i, : at[i + 1] - at[i]].astype(np.float64)
        np.add.at(out, index_[at[i] : at[i + 1]], row)
    return torch.from_numpy(out * scale / cohort)


def topk(u: Tensor, k: int) -> Tensor:
    """(m, k) int64, ascending: the k coordinates of largest magnitude; ties go to the lowest index."""
    order = np.argsort(-np.abs(u.numpy()), axis=1, kind="stable")[:, :k]
    return torch.from_numpy(np.sort(order, axis=1))


def encode_topk(u: Tensor, k: int) -> Tensor:
    """(m, 4 k + ceil(k b / 8)) uint8: the entries at `topk`, float32, then these coordinates in b = ceil(log2 d) bits
    each."""
    index = topk(u, k)
    return torch.cat([u.gather(1, index).view(torch.uint8), pack(index, (u.shape[1] - 1).bit_length())], 1)


def decode_topk(payload: Tensor, k: int, d: int) -> tuple[Tensor, Tensor, bool]:
    """((m, k) float32, (m k,) int64, good): what `encode_topk` wrote; good is whether the coordinates of every row
    ascend within 0..d-1, none twice."""
    values = payload[:, : 4 * k].clone(memory_format=torch.contiguous_format).view(torch.float32)
    rows = unpack(payload[:, 4 * k :].contiguous(), k, (d - 1).bit_length()).numpy()
    good = (np.diff(rows, axis=1) > 0).all() and (rows[:, -1] < d).all()
    return values, torch.from_numpy(rows).reshape(-1), bool(good)
