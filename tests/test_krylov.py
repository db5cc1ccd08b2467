"""Operators, conjugate gradients and exact solves, over what a chapter has no room for."""
import math

import numpy as np
import pytest
import torch

from diffusion_lit.krylov import (Blocks, Dense, LinearOperator, Woodbury, conjugate_gradient, discrepancy, dot_test,
                                  inner, matrix_of, minus, norm, operator_norm, parts, proximal, real_inner, stack)

NAN, INF = float("nan"), float("inf")
TYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
BOUND = dict(zip(TYPES, [1e-5, 1e-12, 1e-5, 1e-12]))
TRIALS = pytest.mark.parametrize("trial", range(5))


def seed(s=0): return torch.Generator().manual_seed(s)
def draw(*shape, s=0, dtype=torch.complex128): return torch.randn(shape, dtype=dtype, generator=seed(s))
def like(a, s): return tuple(like(u, s + i) for i, u in enumerate(a)) if isinstance(a, tuple) else draw(*a.shape, s=s, dtype=a.dtype)
def integers(low, high, n, g): return torch.randint(low, high, (n,), generator=g).tolist()


class Masked(LinearOperator):
    "Some of an orthonormal Fourier transform, seen through one field or several."
    def __init__(self, fields, mask): self.fields, self.mask = fields, mask
    def forward(self, x): return self.mask * torch.fft.fft2(self.fields * x, norm="ortho")
    def adjoint(self, y): return (self.fields.conj() * torch.fft.ifft2(self.mask * y, norm="ortho")).sum(1, keepdim=True)


class Filter(LinearOperator):
    "A circular filter for each item, of products and sums only, which no batch changes."
    def __init__(self, taps): self.taps = [t[..., None] for t in taps.unbind(-1)]
    def forward(self, x): return sum(t * x.roll(i, -1) for i, t in enumerate(self.taps))
    def adjoint(self, y): return sum(t * y.roll(-i, -1) for i, t in enumerate(self.taps))


# adjoints

@pytest.mark.parametrize("dtype", TYPES, ids=str)
@TRIALS
def test_adjoints_of_compositions_stacks_and_multiples(dtype, trial):
    g = seed(trial)
    shape = tuple(integers(1, 7, 1 + trial % 3, g))
    n, (m, k, l, batch) = math.prod(shape), integers(1, 20, 4, g)
    c = 2 - 3j if dtype.is_complex else -.7
    A, B, C = (Dense(draw(*size, s=trial, dtype=dtype), item) for size, item in (((m, n), shape), ((k, m), None), ((l, n), shape)))
    x = draw(batch, *shape, s=100, dtype=dtype)
    for op in (A, c * A, B @ A, (c * B) @ (c * A), A.H @ A, stack(A, c * C), stack(B @ A, stack(A, C)), stack(C) @ A.H @ A, stack(A, C).H @ stack(A, C)):
        y = like(op.forward(x), 200)
        assert dot_test(op, x, y).shape == (batch,)
        assert dot_test(op, x, y).max() < BOUND[dtype] and dot_test(op.H, y, x).max() < BOUND[dtype]
        torch.testing.assert_close(op.normal(x), op.adjoint(op.forward(x)), rtol=1e-3 if BOUND[dtype] > 1e-9 else 1e-10, atol=1e-2 if BOUND[dtype] > 1e-9 else 1e-8)
        assert op.normal(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@TRIALS
def test_adjoints_of_masked_transforms(dtype, trial):
    coils, batch, h, w = integers(1, 9, 4, seed(trial))
    h, w = h + 2, w + 2
    mask = (torch.rand(1, 1, h, w, generator=seed(trial)) < .4).to(dtype)
    op = Masked(draw(1, coils, h, w, s=trial, dtype=dtype), mask)
    x, y = draw(batch, 1, h, w, s=1, dtype=dtype), draw(batch, coils, h, w, s=2, dtype=dtype)
    assert dot_test(op, x, y).max() < BOUND[dtype]
    assert dot_test(Masked(op.fields, 0 * mask), x, y).max() == 0


def test_a_wrong_adjoint_is_found_in_any_single_precision():
    class Shifted(Filter):
        def adjoint(self, y): return super().adjoint(y).roll(1, -1)
    for dtype in (torch.float32, torch.float64):
        x, y = draw(3, 50, dtype=dtype), draw(3, 50, s=1, dtype=dtype)
        assert dot_test(Shifted(torch.tensor([[1., -.5]], dtype=dtype)), x, y).min() > 1e-3


def test_the_norm_of_an_operator_comes_from_below():
    A = Dense(draw(6, 30, 20))                                         # a matrix for each item
    exact = torch.linalg.matrix_norm(A.matrix, 2)
    estimates = [operator_norm(A, draw(6, 20, s=1), k) for k in (1, 5, 300)]
    assert all((a <= b + 1e-12).all() for a, b in zip(estimates, [*estimates[1:], exact]))
    torch.testing.assert_close(estimates[-1], exact, rtol=1e-4, atol=0)


# inner products

@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_inner_products_do_not_depend_on_the_batch_nor_on_threads(dtype, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape in ((8, 7), (8, 50), (5, 1, 33, 17), (4, 1, 200, 210), (3, 100_003), (5,)):
            a, b = draw(*shape, dtype=dtype), draw(*shape, s=1, dtype=dtype)
            assert torch.equal(inner(a, b), torch.cat([inner(u, v) for u, v in zip(a.split(1), b.split(1))]))
    finally: torch.set_num_threads(before)


def test_inner_products_against_numpy_with_mixed_types():
    a, b = draw(2, 3, 4), draw(2, 3, 4, s=1, dtype=torch.float32)
    expected = [np.vdot(u.numpy(), v.numpy()) for u, v in zip(a, b)]
    np.testing.assert_allclose(inner(a, b).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(inner(b, a).numpy(), np.conj(expected), rtol=1e-12)
    torch.testing.assert_close(inner(a.mT.conj(), b.mT), inner(a.conj(), b))          # lazy conjugates, strides
    torch.testing.assert_close(norm((a, b.double()))**2, norm(a)**2 + norm(b.double())**2)


# conjugate gradients

@pytest.mark.parametrize("dtype", TYPES, ids=str)
@TRIALS
def test_conjugate_gradients_against_a_dense_solve(dtype, trial):
    batch, n = integers(1, 12, 2, seed(trial))
    A = draw(batch, n + 20, n, s=trial, dtype=dtype)
    b, x0 = draw(batch, n, s=1, dtype=dtype), draw(batch, n, s=2, dtype=dtype)
    exact = torch.linalg.solve(A.mH @ A, b)
    for start in (None, x0):
        x = conjugate_gradient(Dense(A).normal, b, start, 400)
        assert x.dtype == dtype and (norm(x - exact) <= {1e-5: 1e-4, 1e-12: 1e-10}[BOUND[dtype]] * norm(exact)).all()


@TRIALS
def test_a_batch_is_its_items(trial):
    g = seed(trial)
    batch, n = integers(2, 9, 1, g)[0], integers(5, 200, 1, g)[0]
    op = Filter(torch.rand(batch, 5, dtype=torch.float64, generator=g) - .5)
    b = op.adjoint(draw(batch, n, s=trial, dtype=torch.float64)) * torch.logspace(-9, 9, batch, dtype=torch.float64)[:, None]
    γ = torch.logspace(-2, 5, batch, dtype=torch.float64)
    for how in (dict(iterations=5), dict(iterations=500), dict(iterations=60, tol=1e-4)):
        whole, close = conjugate_gradient(op.normal, b, **how), proximal(op, b, b, γ, **how)
        for i in range(batch):
            one = Filter(torch.cat([t[i] for t in op.taps], -1)[None])
            assert torch.equal(whole[i:i + 1], conjugate_gradient(one.normal, b[i:i + 1], **how))
            assert torch.equal(close[i:i + 1], proximal(one, b[i:i + 1], b[i:i + 1], γ[i].item(), **how))


def test_done_items_do_not_move_while_others_go_on():
    G = Dense(torch.stack([torch.eye(30), torch.diag(torch.logspace(0, 2, 30))]).double())
    b, xs = draw(2, 30, dtype=torch.float64), []
    conjugate_gradient(G.forward, b, iterations=20, tol=1e-6, callback=lambda k, x, r: xs.append(x.clone()))
    assert len(xs) > 10 and all(torch.equal(x[0], xs[1][0]) for x in xs[1:]) and not torch.equal(xs[-1][1], xs[-2][1])


def test_tolerance_is_relative_and_history_is_complete():
    G, b = Dense(torch.diag(torch.logspace(0, 3, 50)).double()), draw(3, 50, dtype=torch.float64)
    for scale in (1e-6, 1., 1e6):
        history = []
        x = conjugate_gradient(G.forward, scale * b, iterations=500, tol=1e-3, callback=lambda k, x, r: history.append((k, r)))
        assert [k for k, _ in history] == list(range(len(history))) and len(history) < 300
        left = norm(scale * b - G.forward(x)) / norm(scale * b)
        assert (left <= 1.001e-3).all() and (left > 1e-4).any()
        torch.testing.assert_close(history[0][1], norm(scale * b))


def test_going_on_after_convergence_does_no_harm_even_with_null_directions():
    for dtype in (torch.complex64, torch.complex128):
        mask = (torch.rand(1, 1, 16, 16, generator=seed()) < .3).to(dtype)
        op = Masked(torch.ones(1, 1, 16, 16, dtype=dtype), mask)        # its normal operator is a projection
        x = draw(4, 1, 16, 16, dtype=dtype)
        b = op.normal(x)
        for k in (1, 2, 50, 2000): assert norm(conjugate_gradient(op.normal, b, iterations=k) - b).max() < BOUND[dtype] * norm(b).max()
        singular = Dense(draw(5, 40, dtype=dtype))                      # rank 5 in 40 dimensions
        b = singular.adjoint(draw(3, 5, s=1, dtype=dtype))
        x = conjugate_gradient(singular.normal, b, iterations=3000)
        least = (torch.linalg.pinv(singular.matrix.mH @ singular.matrix) @ b.mT).mT
        assert (norm(x - least) < (1e-3 if dtype == torch.complex64 else 1e-9) * norm(least)).all()


def test_what_cannot_be_seen_stays_where_it_was():
    G = Dense(torch.diag(torch.tensor([1., 0.])))
    x = conjugate_gradient(G.forward, torch.tensor([[0., 1.], [2., 0.], [0., 0.]]), torch.tensor([[3., 4.], [3., 4.], [0., 5.]]), 10)
    assert torch.isfinite(x).all() and x[1].tolist() == [2., 4.] and x[2].tolist() == [0., 5.]


def test_a_flaw_in_one_item_is_never_passed_on():
    maps = torch.ones(2, 1, 8, 8, dtype=torch.complex128)
    maps[1] = NAN
    op, b = Masked(maps, torch.ones(8)), draw(2, 1, 8, 8)
    for rhs in (b, b * torch.tensor([1., 0.])[:, None, None, None]):    # the second is done before it begins
        with pytest.raises(ValueError, match="not finite"): conjugate_gradient(op.normal, rhs)


def test_zero_is_solved_and_the_start_may_be_the_solution():
    G = Dense(torch.diag(torch.logspace(0, 2, 9)).double())
    zero = torch.zeros(2, 9, dtype=torch.float64)
    assert torch.equal(conjugate_gradient(G.forward, zero), zero)
    x = draw(2, 9, dtype=torch.float64)
    torch.testing.assert_close(conjugate_gradient(G.forward, zero, x, 100), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(conjugate_gradient(G.forward, G.forward(x), x, 100), x, rtol=0, atol=0)
    torch.testing.assert_close(conjugate_gradient(G.forward, G.forward(x), x, 0), x, rtol=0, atol=0)


def test_a_stop_rule_ends_items_one_by_one():
    G, b = Dense(torch.diag(torch.logspace(0, 3, 60)).double()), draw(3, 60, dtype=torch.float64)
    noise = torch.tensor([1., .1, .001], dtype=torch.float64)
    rule = discrepancy(G, b, noise)
    residuals = norm(b - G.forward(conjugate_gradient(G.forward, b, iterations=800, stop=rule)))
    assert (residuals <= noise * 60**.5).all() and (residuals > .05 * noise * 60**.5).all()
    assert torch.equal(conjugate_gradient(G.forward, b, stop=lambda x: torch.ones(3, dtype=torch.bool)), 0 * b)
    loose = dict(iterations=300, tol=1e-2)
    never = conjugate_gradient(G.forward, b, **loose, stop=lambda x: torch.zeros(3, dtype=torch.bool))
    assert torch.equal(never, conjugate_gradient(G.forward, b, **loose))


def test_the_identity_takes_one_step_and_preconditioning_does_not_change_the_answer():
    A, b = draw(40, 30), draw(2, 30, s=1)
    G = Dense(A.mH @ A)
    exact = torch.linalg.solve(G.matrix, b.mT).mT
    for M in (lambda r: 7. * r, lambda r: r / G.matrix.diagonal().real, lambda r: torch.linalg.solve(G.matrix, r.mT).mT):
        ks = []
        x = conjugate_gradient(G.forward, b, iterations=500, tol=1e-13, preconditioner=M, callback=lambda k, x, r: ks.append(k))
        assert (norm(x - exact) < 1e-10 * norm(exact)).all()
    assert ks[-1] <= 3                                                  # the last one was the inverse
    assert torch.allclose(conjugate_gradient(lambda v: v, b, iterations=1), b)


def test_gradients_flow_through_the_iteration():
    A = draw(6, 4, dtype=torch.float64)
    b = draw(1, 4, s=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: conjugate_gradient(Dense(A).normal, b, iterations=3), b)


# exact solves

@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@TRIALS
def test_blocks_and_woodbury_are_long_conjugate_gradients(dtype, trial):
    batch, rows, n, m = (i + 1 for i in integers(1, 6, 4, seed(trial)))
    A = draw(rows, m, n, s=trial, dtype=dtype)
    class Rows(LinearOperator):
        def forward(self, x): return torch.einsum("rmn,bcrn->bcrm", A, x)
        def adjoint(self, y): return torch.einsum("rmn,bcrm->bcrn", A.conj(), y)
    op, x, y = Rows(), draw(batch, 2, rows, n, s=1, dtype=dtype), draw(batch, 2, rows, m, s=2, dtype=dtype)
    γ = torch.logspace(-3, 3, batch, dtype=torch.float64)
    long = proximal(op, x, y, γ, 5000)
    for exact in (Blocks(A.mH @ A), Blocks((A.mH @ A)[None, None]), Blocks((A.mH @ A).expand(batch, 2, -1, -1, -1)), Woodbury(op, y)):
        torch.testing.assert_close(proximal(op, x, y, γ, solver=exact), long, rtol=1e-8, atol=1e-8)
    dense = matrix_of(op, x)
    solved = [torch.linalg.solve(torch.eye(dense.shape[1], dtype=dtype) + g * dense.mH @ dense, u.flatten() + g * dense.mH @ v.flatten()) for g, u, v in zip(γ, x, y)]
    torch.testing.assert_close(long.flatten(1), torch.stack(solved), rtol=1e-8, atol=1e-8)


def test_blocks_in_single_precision_on_another_axis_with_extreme_weights():
    G = draw(3, 8, 5, dtype=torch.complex64)
    blocks = Blocks(G.mH @ G, axis=1)
    b = draw(2, 5, 3, s=1, dtype=torch.complex64)                       # axis 1 has the 5, axis 2 the blocks
    for γ in (0., 1e-8, 1., 1e8):
        solved = torch.linalg.solve((torch.eye(5) + γ * (G.mH @ G)).to(torch.complex128), b.movedim(1, -1)[..., None].to(torch.complex128))
        torch.testing.assert_close(blocks.solve(b, γ).movedim(1, -1), solved[..., 0].to(torch.complex64), rtol=1e-3, atol=1e-4 if γ < 10 else 1e-8)
    flat = torch.linalg.qr(draw(3, 50, 2, dtype=torch.complex64))[0]    # rank two: what is not seen stays, the rest goes
    u, seen = draw(2, 3, 50, s=1, dtype=torch.complex64), flat @ flat.mH
    torch.testing.assert_close(Blocks(seen).solve(u, 1e8), u - (seen @ u[..., None])[..., 0], rtol=0, atol=1e-4)


def test_a_large_weight_makes_the_exact_step_fit_the_measurement():
    A = Dense(draw(4, 30))
    x, y = draw(2, 30, s=1), draw(2, 4, s=2)
    u = proximal(A, x, y, 1e12, solver=Woodbury(A, y))
    assert norm(A.forward(u) - y).max() < 1e-9 and inner(u - x, A.adjoint(y)).isfinite().all()
    null = torch.eye(30) - torch.linalg.pinv(A.matrix) @ A.matrix
    torch.testing.assert_close((u - x) @ null.mT, torch.zeros_like(x), rtol=0, atol=1e-10)      # no step where nothing was seen


def test_a_stack_measures_with_two_weights():
    A, B = Dense(draw(9, 6)), Dense(draw(3, 6, s=1))
    x, y = draw(2, 6, s=2), (draw(2, 9, s=3), draw(2, 3, s=4))
    both = torch.cat([A.matrix, 2 * B.matrix])
    expected = proximal(Dense(both), x, torch.cat(y, 1), 3., 200)
    torch.testing.assert_close(proximal(stack(A, 2 * B), x, y, 3., 200), expected)
    assert norm(minus(y, y)).tolist() == [0., 0.] and [v.shape for v in parts(y)] == [(2, 9), (2, 3)]


# input that makes no sense

A, X, Y = Dense(draw(4, 6)), draw(2, 6), draw(2, 4, s=1)
CASES = {  # what is wrong: (error, what is called, words that the answer must have)
    "a list for a vector": (TypeError, lambda: inner([1.], X), "tensor or a tuple"),
    "a batch of another size": (ValueError, lambda: inner(X, X[:1]), "same shapes"),
    "a pair for a triple": (ValueError, lambda: real_inner((X, X), (X, X, X)), "same shapes"),
    "a number without a batch": (ValueError, lambda: norm(torch.tensor(1.)), "batch first"),
    "a vector for a matrix": (ValueError, lambda: Dense(torch.ones(3)), "matrix must be [m, n]"),
    "an item of the wrong size": (ValueError, lambda: A.forward(Y), "x must have 6 numbers"),
    "a measurement of the wrong size": (ValueError, lambda: A.adjoint(X), "y must have 4 numbers"),
    "a shape that holds another number": (ValueError, lambda: Dense(A.matrix, (2, 2)), "shape must hold 6"),
    "a matrix that would not fit": (ValueError, lambda: matrix_of(A, X, limit=5), "6 columns is too large"),
    "composition with a tensor": (TypeError, lambda: A @ X, "got Tensor"),
    "a multiple by several numbers": (ValueError, lambda: torch.ones(2) * A, "one number"),
    "a multiple by infinity": (ValueError, lambda: INF * A, "c must be finite"),
    "a multiple by a word": ((TypeError, ValueError), lambda: "two" * A, ""),
    "a stack of nothing": (TypeError, lambda: stack(), "stack needs operators"),
    "a stack of functions": (TypeError, lambda: stack(A, abs), "builtin_function"),
    "one measurement for two operators": (ValueError, lambda: stack(A, A).adjoint(Y), "tuple of 2"),
    "a dot test of the wrong y": (ValueError, lambda: dot_test(Dense(draw(4, 6)), X, Y[:1]), "forward(x) has shape"),
    "a norm from zero": (ValueError, lambda: operator_norm(A, 0 * X), "x must not be zero"),
    "a norm from NaN": (ValueError, lambda: operator_norm(A, NAN * X), "NaN"),
    "a norm in no steps": (ValueError, lambda: operator_norm(A, X, 0), "iterations must be at least 1"),
    "an operator for its normal function": (TypeError, lambda: conjugate_gradient(A, X), "op.normal"),
    "whole numbers for b": (TypeError, lambda: conjugate_gradient(A.normal, torch.ones(2, 6, dtype=int)), "b must be a floating-point"),
    "NaN in b": (ValueError, lambda: conjugate_gradient(A.normal, NAN * X), "b must be finite"),
    "infinity in x0": (ValueError, lambda: conjugate_gradient(A.normal, X, INF * X), "x0 must be finite"),
    "steps in the place of x0": (TypeError, lambda: conjugate_gradient(A.normal, X, 5), "(steps are iterations=5)"),
    "x0 of another batch": (ValueError, lambda: conjugate_gradient(A.normal, X, X[:1]), "x0 must be like b"),
    "x0 of another type": (ValueError, lambda: conjugate_gradient(A.normal, X, X.to(torch.complex64)), "x0 must be like b"),
    "an empty batch": (ValueError, lambda: conjugate_gradient(A.normal, X[:0]), "b must be [batch, ...]"),
    "half a step": (ValueError, lambda: conjugate_gradient(A.normal, X, None, .5), "iterations must be a whole number"),
    "a negative tolerance": (ValueError, lambda: conjugate_gradient(A.normal, X, tol=-1.), "tol must be"),
    "an operator with a negative direction": (ValueError, lambda: conjugate_gradient(lambda v: v * torch.tensor([1, 1, 1, 1, 1, -1]), X, iterations=9), "positive semidefinite"),
    "an operator that is not Hermitian": (ValueError, lambda: conjugate_gradient(lambda v: v * (1 + .1j), X), "Hermitian"),
    "an operator that overflows": (ValueError, lambda: conjugate_gradient(lambda v: v * INF, X), "not finite"),
    "an operator that overflows at the start": (ValueError, lambda: conjugate_gradient(lambda v: v * INF, X, X), "normal(x0) must be finite"),
    "a preconditioner of the wrong sign": (ValueError, lambda: conjugate_gradient(A.normal, X, preconditioner=lambda r: -r), "preconditioner must be"),
    "γ below zero": (ValueError, lambda: proximal(A, X, Y, -1.), "gamma must be finite and not negative"),
    "γ that is NaN": (ValueError, lambda: proximal(A, X, Y, NAN), "gamma must be finite"),
    "γ for another batch": (ValueError, lambda: proximal(A, X, Y, [1., 2., 3.]), "one an item (2,)"),
    "a real guess for a complex picture": (ValueError, lambda: proximal(A, X.real, Y, 1.), "adjoint(y) must be like x"),
    "a guess of another batch": (ValueError, lambda: proximal(A, X[:1], Y, 1.), "adjoint(y) must be like x"),
    "a measurement of another batch, exactly": (ValueError, lambda: proximal(A, X, Y[:1], 1., solver=Woodbury(A, Y)), "same shapes"),
    "a tolerance for an exact solve": (TypeError, lambda: proximal(A, X, Y, 1., solver=Woodbury(A, Y), tol=.1), "takes no options"),
    "blocks that are not square": (ValueError, lambda: Blocks(torch.ones(2, 3)), "[..., n, n]"),
    "blocks with NaN": (ValueError, lambda: Blocks(NAN * torch.eye(3)), "finite"),
    "blocks that are not Hermitian": (ValueError, lambda: Blocks(1j * torch.eye(3)), "Hermitian"),
    "blocks that are negative": (ValueError, lambda: Blocks(-torch.eye(3)), "semidefinite"),
    "blocks of another size": (ValueError, lambda: Blocks(torch.eye(3)).solve(X, 1.), "b must have 3 numbers"),
    "too many measurements": (ValueError, lambda: Woodbury(A, torch.ones(1, 30_000)), "too large to write out"),
    "noise below zero": (ValueError, lambda: discrepancy(A, Y, -1.), "sigma must be finite and not negative"),
    "noise for another batch": (ValueError, lambda: discrepancy(A, Y, torch.ones(3)), "sigma must be a number or one an item (2,)"),
    "no trust in the noise": (ValueError, lambda: discrepancy(A, Y, 1., tau=0.), "tau must be positive"),
}


@pytest.mark.parametrize("what", CASES)
def test_input_that_makes_no_sense_is_refused_by_name(what):
    error, call, words = CASES[what]
    with pytest.raises(error) as said: call()
    assert words in str(said.value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("rows", [20, 40])
def test_what_a_measurement_cannot_see_stays_however_long_one_waits(rows, dtype):
    "Steps after convergence must not carry rounding into the null space."
    g = torch.Generator().manual_seed(0)
    op = Dense(torch.randn(rows, 144, generator=g, dtype=dtype) / 12)
    x, start = (torch.randn(3, 144, generator=g, dtype=dtype) for _ in range(2))
    found = conjugate_gradient(op.normal, op.normal(x), start, 200)
    null = torch.eye(144, dtype=dtype) - torch.linalg.pinv(op.matrix) @ op.matrix
    assert ((found - start) @ null.mT).norm() < 1e4 * torch.finfo(dtype).eps * start.norm()
    assert op.forward(found - x).norm() < 1e4 * torch.finfo(dtype).eps * op.forward(x).norm()
