"""Symmetric matrices in strips, which make and store little of them twice: those of a large model fill its memory.

A strip is some rows, from the column of its first one on. Small matrices are one strip, whole.
"""

import torch
from torch import Tensor

Strips = tuple[Tensor, ...]

_STRIPS, _WIDE = 8, 1024  # 9/16 of a wide matrix


def gram(x: Tensor) -> Strips:
    """``x^T x``."""
    return tuple(x[:, rows].T @ x[:, rows.start :] for rows in _rows(x.shape[1]))


def strips_of(matrix: Tensor) -> Strips:
    """The strips of a symmetric matrix, copied."""
    return tuple(matrix[rows, rows.start :].clone() for rows in _rows(len(matrix)))


def whole(strips: Strips) -> Tensor:
    """The matrix; of one strip the strip itself, which the caller leaves as it is."""
    if len(strips) == 1:
        return strips[0]
    size = strips[0].shape[1]
    matrix = strips[0].new_empty(size, size)
    for rows, strip in zip(_rows(size), strips, strict=True):
        matrix[rows, rows.start :] = strip
        matrix[rows.stop :, rows] = strip[:, len(strip) :].T
    return matrix


def upper(matrix: Tensor) -> Tensor:
    """The upper triangle, row after row."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu()]


def mirrored(triangle: Tensor) -> Tensor:
    """The matrix of an upper triangle."""
    side = int(((8 * len(triangle) + 1) ** 0.5 - 1) / 2)
    matrix = triangle.new_zeros(side, side)
    matrix[torch.ones_like(matrix, dtype=torch.bool).triu()] = triangle
    return matrix + matrix.triu(1).T


def _rows(size: int) -> list[slice]:
    step = size if size < _WIDE else -(-size // _STRIPS)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
