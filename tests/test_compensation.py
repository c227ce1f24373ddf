"""Compensation is the least-squares optimum, and leaves alone what needs none."""

from __future__ import annotations

import pytest
import torch

from compress.compensation import reconstruct
from compress.errors import NumericalError


def _inputs(columns: int, rank: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(400, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)


def test_the_kept_columns_are_the_least_squares_optimum() -> None:
    inputs_NX, weight_OX = _inputs(12, 12), torch.randn(5, 12, dtype=torch.float64)
    kept_K = torch.tensor([0, 2, 3, 7, 10])
    result_OX = reconstruct(weight_OX, inputs_NX.T @ inputs_NX, kept_K, damping=0.0)
    best_KO = torch.linalg.lstsq(inputs_NX[:, kept_K], inputs_NX @ weight_OX.T).solution
    torch.testing.assert_close(result_OX[:, kept_K], best_KO.T, rtol=1e-9, atol=1e-9)
    removed_X = torch.ones(12, dtype=torch.bool).index_fill(0, kept_K, False)
    assert torch.equal(result_OX[:, removed_X], weight_OX[:, removed_X])


def test_columns_that_repeat_others_are_replaced_without_loss() -> None:
    inputs_NX = _inputs(12, 4)  # any 4 columns in general position span the others
    weight_OX = torch.randn(5, 12, dtype=torch.float64)
    kept_K = torch.arange(6)
    result_OX = reconstruct(weight_OX, inputs_NX.T @ inputs_NX, kept_K, damping=1e-12)
    torch.testing.assert_close(
        inputs_NX[:, kept_K] @ result_OX[:, kept_K].T, inputs_NX @ weight_OX.T, rtol=1e-4, atol=1e-4
    )


def test_uncorrelated_columns_and_heavy_damping_leave_the_weight_as_it_is() -> None:
    weight_OX = torch.randn(5, 8, dtype=torch.float64)
    kept_K = torch.tensor([1, 4, 6])
    torch.testing.assert_close(reconstruct(weight_OX, torch.eye(8), kept_K), weight_OX)
    inputs_NX = _inputs(8, 8)
    torch.testing.assert_close(
        reconstruct(weight_OX, inputs_NX.T @ inputs_NX, kept_K, damping=1e9), weight_OX, rtol=1e-6, atol=1e-6
    )


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        reconstruct(torch.ones(2, 3), torch.full((3, 3), float("nan")), torch.tensor([0]))
