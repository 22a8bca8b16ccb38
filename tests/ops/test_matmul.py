"""The matrix products in C++, which `rssm_observe` and `linear` share, against float64."""

import itertools

import pytest
import torch

from phyxdream.ops.backend import extension

pytestmark = pytest.mark.skipif(extension is None, reason="the compiled extension is not built")

# Few rows (to 32), then more: around the edges of what is summed at once (half a group or a group of 16; 8 x 32), of a
# chunk (128 rows) and of a stretch of the sum (256).
SIZES = [
    (1, 1, 1), (7, 5, 17), (8, 256, 32), (9, 257, 33), (16, 40, 100), (31, 600, 48), (3, 2500, 5),
    (39, 5, 17), (40, 256, 32), (129, 3, 47), (131, 600, 31), (33, 2500, 5),
]  # fmt: skip


def row_major(rows, terms):
    return torch.randn(rows, terms)


def transposed(rows, terms):
    return torch.randn(terms, rows).t()


def part_of_a_wider_one(rows, terms):
    return torch.randn(rows + 2, 2 * terms + 3)[1:-1, 3 : 3 + terms]


def every_other(rows, terms):
    return torch.randn(2 * rows, 2 * terms)[::2, ::2]


LAYOUTS = [row_major, transposed, part_of_a_wider_one, every_other]


def multiply(a, b, c, bias=None, accumulate=False, threads=1):
    extension.matmul(
        (a.data_ptr(), a.shape[0], *a.stride()), (b.data_ptr(), b.shape[0], *b.stride()), a.shape[1],
        (c.data_ptr(), c.stride(0)), 0 if bias is None else bias.data_ptr(), accumulate, threads,
    )  # fmt: skip
    return c


def assert_close(found, a, b, before=0.0):
    """Errors are those of K float32 sums, whatever their result."""
    exact = a.double() @ b.double().t() + before
    bound = 1e-6 * (a.double().abs() @ b.double().abs().t() + torch.as_tensor(before).abs()) + 1e-30
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    "layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids=lambda pair: "-".join(f.__name__ for f in pair)
)
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(size, layouts):
    torch.manual_seed(0)
    M, K, N = size
    a, b = layouts[0](M, K), layouts[1](N, K)
    outside = torch.full((M + 1, N + 5), 7.0)
    assert_close(multiply(a, b, outside[:M, 2 : N + 2]), a, b)
    outside[:M, 2 : N + 2] = 7.0
    assert (outside == 7).all()  # nothing around C was written


@pytest.mark.parametrize("size", SIZES)
def test_bias_and_accumulation(size):
    torch.manual_seed(0)
    M, K, N = size
    a, b, bias, c = torch.randn(M, K), torch.randn(N, K), torch.randn(N), torch.randn(M, N)
    assert_close(multiply(a, b, torch.full((M, N), torch.nan), bias), a, b, bias.double())
    assert_close(multiply(a, b, c.clone(), accumulate=True), a, b, c.double())


def test_no_terms_leave_the_bias():
    bias = torch.randn(40)
    c = multiply(torch.empty(9, 0), torch.empty(40, 0), torch.full((9, 40), torch.nan), bias)
    assert torch.equal(c, bias.expand(9, 40))


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0)])
def test_nothing_to_write(rows, columns):
    multiply(torch.randn(rows, 3), torch.randn(columns, 3), torch.empty(rows, columns))


@pytest.mark.parametrize("layout", [row_major, transposed])
@pytest.mark.parametrize("size", [(1000, 300, 200), (16, 512, 1500), (40, 512, 1500), (300, 2600, 700)])
def test_the_number_of_threads_changes_no_bit(size, layout):
    torch.manual_seed(0)
    M, K, N = size
    a, b = layout(M, K), layout(N, K)
    one, *others = (multiply(a, b, torch.empty(M, N), threads=threads) for threads in (1, 2, 3, 8))
    assert all(torch.equal(one, other) for other in others)
