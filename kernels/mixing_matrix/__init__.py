"""A teacher's softmax weights beside the weights of a linear student, row by row, without either matrix."""

from linearize.kernels.mixing_matrix.chunk import mixing_matrix_rows
from linearize.kernels.mixing_matrix.plan import WIDEST
from linearize.kernels.mixing_matrix.reference import (
    KINDS,
    SMALLEST,
    Kind,
    Products,
    Softmax,
    compared,
    mixing_matrix_reference,
)

__all__ = [
    "KINDS",
    "SMALLEST",
    "WIDEST",
    "Kind",
    "Products",
    "Softmax",
    "compared",
    "mixing_matrix_reference",
    "mixing_matrix_rows",
]
