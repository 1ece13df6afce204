"""Codes are right: residual_kmeans_encode, _details and kmeans_step on vectors made to mislead."""

from fractions import Fraction

import pytest
import torch
from hard_vectors import FAMILIES, WHOLE, Draw, exact_codes, kernels_of, run

from livrec_fast import kmeans_step, residual_kmeans_details, residual_kmeans_encode
from livrec_fast.reference import kmeans_step as step_reference
from livrec_fast.reference.residual_kmeans import (
    agree,
    agree_on_details,
    residuals,
    rounding_bound,
)

ENCODE = kernels_of("residual_kmeans_encode")
DETAILS = kernels_of("residual_kmeans_details")
STEP = kernels_of("kmeans_step")
SIZES = [(97, 64, 512), (50, 256, 130), (61, 100, 33), (14, 300, 1100), (40, 17, 48)]
DIMS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 19, 20, 31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 95, 96]
DIMS += [97, 127, 128, 129, 130, 191, 192, 193, 255, 256, 257, 300]
COUNTS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129]
COUNTS += [255, 256, 257, 511, 512, 513, 543, 544, 545, 1023, 1024, 1025, 1100]
ROWS = [1, 2, 3, 4, 5, 11, 12, 13, 47, 48, 49, 60, 97]


def encode(kernel, x, books):
    return run(residual_kmeans_encode, kernel, x, books)


def hold_each(codes, inputs):
    """Hold codes to more than the rule: each score may err by its own codeword's share.

    A huge codeword so excuses nothing among small ones. Products may lose what float32 has no
    numbers for.
    """
    eps, least = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
    levels = zip(inputs["codebooks"], residuals(codes, inputs), codes.long().T, strict=True)
    for level, (book, residual, code) in enumerate(levels):
        book, width = book.double(), book.shape[1] + 1
        score = residual @ book.T - book.square().sum(1) / 2
        length = book.norm(dim=1)
        bound = 4 * width * (eps * (residual.norm(dim=1)[:, None] + length) * length + least)
        best = score.argmax(1, keepdim=True)
        allowed = bound.gather(1, best) + bound.gather(1, code[:, None])
        short = score.gather(1, best) - score.gather(1, code[:, None])
        assert (short <= allowed).all(), (level, int((short - allowed).argmax()))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kernel", ENCODE)
def test_whole_numbers_have_one_right_code(kernel, name):
    for rows, dim, size in SIZES:
        x, books = WHOLE[name](Draw(name, dim), rows, dim, size)
        wanted = exact_codes(x, books)
        for power in (0, -30, 20 if name != "giant" else 3):  # no rounding either, times a power
            got = encode(kernel, x * 2.0**power, [book * 2.0**power for book in books])
            wrong = (got.long() != wanted).any(1).nonzero()[:, 0].tolist()
            assert not wrong, (rows, dim, size, power, wrong[:5])


@pytest.mark.parametrize("kernel", ENCODE)
def test_every_width_and_every_size(kernel):
    """Sizes around all that kernels cut work into: panels, tiles, chunks, words and vectors."""
    for at in range(3 * len(DIMS)):
        dim, size, rows = (seq[at * step % len(seq)] for seq, step in
                           ((DIMS, 1), (COUNTS, 7), (ROWS, 5)))  # fmt: skip
        for name in ("crowds", "plain"):
            x, books = WHOLE[name](Draw(name, at), rows, dim, size)
            got = encode(kernel, x, books).long()
            assert got.equal(exact_codes(x, books)), (name, rows, dim, size)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kernel", ENCODE)
def test_codes_obey_the_rule(kernel, name):
    for rows, dim, size in SIZES:
        x, books = FAMILIES[name](Draw(name, dim), rows, dim, size)
        codes = encode(kernel, x, books)
        inputs = {"x": x, "codebooks": books}
        hold_each(codes, inputs)
        if name != "tiny":  # the rule knows nothing of products too small for float32
            agree(codes, inputs)
        if kernel != "reference":  # torch's sums depend on the number of rows
            parts = [encode(kernel, part, books) for part in x.split([1, 12, rows - 13])]
            assert torch.cat(parts).equal(codes), "codes depend on the batch"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ENCODE)
def test_half_precision_obeys_the_rule(kernel, dtype):
    for name in ("random", "clustered", "near_ties", "crowd", "heavy", "shells"):
        for rows, dim, size in SIZES:
            x, books = FAMILIES[name](Draw(name, dim), rows, dim, size)
            x = x.clamp(-6e4, 6e4).to(dtype)
            for kind in (dtype, torch.float32):
                given = [book.clamp(-6e4, 6e4).to(kind) for book in books]
                agree(encode(kernel, x, given), {"x": x, "codebooks": given})
    x, books = WHOLE["plain"](Draw("half"), 97, 100, 513)
    assert encode(kernel, x.to(dtype), books).long().equal(exact_codes(x, books))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("tiny", "scales")])
@pytest.mark.parametrize("kernel", DETAILS)
def test_details_obey_the_rule(kernel, name):
    for rows, dim, size in SIZES:
        x, books = FAMILIES[name](Draw(name, dim), rows, dim, size)
        flags = {"reconstruction": True, "second": True}
        got = run(residual_kmeans_details, kernel, x, books, **flags)
        agree_on_details(got, {"x": x, "codebooks": books})
        if kernel in ENCODE:  # without second codes, the very codes of encode
            alone = run(residual_kmeans_details, kernel, x, books)
            assert alone.codes.equal(encode(kernel, x, books))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kernel", DETAILS)
def test_details_of_whole_numbers(kernel, name):
    for rows, dim, size in SIZES:
        x, books = WHOLE[name](Draw(name, dim), rows, dim, size)
        got = run(residual_kmeans_details, kernel, x, books, reconstruction=True, second=True)
        codes = exact_codes(x, books)
        assert got.codes.long().equal(codes)
        for level, book in enumerate(books):
            above = zip(books[:level], codes.T, strict=False)
            residual = x.long() - sum((b.long()[c] for b, c in above), torch.zeros(1, dim).long())
            distance = (residual[:, None] - book.long()).square().sum(2)
            best = distance.gather(1, codes[:, level, None])[:, 0]
            others = distance.scatter(1, codes[:, level, None], 2**62)
            assert got.second[:, level].long().equal(others.argmin(1)), level
            if name != "giant" or size > 2:
                assert got.gap[:, level].long().equal(others.amin(1) - best), level


@pytest.mark.parametrize("name", [*FAMILIES, *WHOLE])
@pytest.mark.parametrize("kernel", STEP)
def test_steps_obey_the_rule(kernel, name):
    for rows, dim, size in SIZES:
        draw = Draw(name, dim)
        x, books = (FAMILIES | WHOLE)[name](draw, rows, dim, size)
        book = books[0].contiguous()
        got = run(kmeans_step, kernel, x, book)
        if name in WHOLE:
            assert got.codes.long().equal(exact_codes(x, [book])[:, 0])
        inputs = {"x": x, "codebook": book}
        if name not in ("tiny", "tiny_rows", "scales"):  # errors of these are no normal numbers
            step_reference.agree(got, inputs)
        else:
            hold_each(got.codes[:, None], {"x": x, "codebooks": [book]})
        if name in ("random", "crowd", "heavy", "plain"):
            penalty = draw.normal(len(book)).abs()
            penalty[draw.below(len(book), len(book) // 3)] = torch.inf
            penalty[0] = 0
            got = run(kmeans_step, kernel, x, book, penalty=penalty)
            step_reference.agree(got, inputs | {"penalty": penalty})


def refused(kernel, x, books, row):
    """Every op that the kernel has names this row as the first bad one."""
    for op, able in ((residual_kmeans_encode, ENCODE), (residual_kmeans_details, DETAILS),
                     (lambda x, books, **how: kmeans_step(x, books[0], **how), STEP)):  # fmt: skip
        if kernel in able:
            with pytest.raises(ValueError, match=f"^x: row {row} is not finite"):
                run(op, kernel, x, books)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kernel", ENCODE)
def test_a_row_that_is_not_finite_is_named(kernel, bad):
    draw = Draw("bad")
    for rows, dim, size in ((1, 16, 16), (300, 64, 130), (5000, 33, 40), (700, 15, 8)):
        books = [draw.normal(size, dim), draw.normal(size, dim)]
        for at in {0, rows // 2, rows - 1}:
            for column in {0, dim // 2, dim - 1}:
                x = draw.normal(rows, dim)
                x[at, column] = bad
                x[min(at + 1, rows - 1) :, 0] = bad
                refused(kernel, x, books, at)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kernel", ENCODE)
def test_a_row_of_nothing_finite_is_named(kernel, bad):
    """All of it, or all but zeros; with codewords around 0, and with all of them there."""
    draw = Draw("nothing")
    for dim, size in ((16, 16), (64, 64), (33, 512), (20, 5)):
        book = draw.normal(size, dim)
        for books in ([book], [book - book], [torch.cat([book, -book])], [book, book]):
            for columns in (slice(None), slice(0, 1), slice(dim - 1, dim), slice(0, dim, 16)):
                x = draw.normal(130, dim) * draw.below(2, 130, 1)
                x[77] = 0
                x[77, columns] = bad
                refused(kernel, x, books, 77)


@pytest.mark.parametrize("kernel", ENCODE)
def test_rows_almost_too_large_are_coded(kernel):
    draw = Draw("large")
    for dim, size in ((16, 64), (100, 257), (3, 5)):
        x, book = draw.normal(40, dim), draw.normal(size, dim)
        x, book = (1.2e19 * t / t.norm(dim=1, keepdim=True) for t in (x, book))
        agree(encode(kernel, x, [book]), {"x": x, "codebooks": [book]})
        x[29] *= 20
        with pytest.raises(ValueError, match="^x: row 29 is too large"):
            encode(kernel, x, [book])


def eight_bit_codes(x, book):
    """Search by scores of 8-bit numbers, as a kernel may do to begin with, and leave it there."""
    x8, book8 = ((t / t.abs().amax() * 127).round() * t.abs().amax() / 127 for t in (x, book))
    return (x8 @ book8.T - book8.square().sum(1) / 2).argmax(1)


def test_a_search_that_rounds_to_bytes_is_found_out():
    for name in ("crowd", "crowds", "spike", "giant"):
        x, books = WHOLE[name](Draw(name), 97, 64, 512)
        assert (eight_bit_codes(x, books[0]) != exact_codes(x, books)[:, 0]).float().mean() > 0.1
    for name in ("random", "crowd", "shells", "heavy", "cauchy", "huge", "clustered", "scales"):
        x, books = FAMILIES[name](Draw(name), 97, 64, 512)
        codes = eight_bit_codes(x, books[0])[:, None].short()
        inputs = {"x": x, "codebooks": books[:1]}
        with pytest.raises(AssertionError):
            hold_each(codes, inputs)
        if name not in ("clustered", "scales"):  # there the longest codeword excuses much
            with pytest.raises(AssertionError, match="less than the best"):
                agree(codes, inputs)


def test_one_wrong_code_is_found_out():
    """Whichever row it is, at whichever level; and a right code passes."""
    x, books = FAMILIES["random"](Draw("one"), 50, 24, 200)
    inputs = {"x": x, "codebooks": books}
    details = residual_kmeans_details(x, books, second=True, backend="reference")
    agree(details.codes, inputs)
    residual, found = x.double(), 0
    for level, book in enumerate(books):
        bound = 2 * rounding_bound(residual, book.double())
        sure = (details.gap[:, level] / 2 > bound + bound).nonzero()[:, 0].tolist()
        for row in sure[:: len(sure) // 3]:
            wrong = details.codes.clone()
            wrong[row, level] = details.second[row, level]
            with pytest.raises(AssertionError, match=f"level {level}, row {row}: "):
                agree(wrong, inputs)
            found += 1
        residual = residual - book.double()[details.codes[:, level].long()]
    assert found >= 3 * len(books)


def test_the_bound_is_honest():
    """In fractions: no float32 sum errs by more, not even the worst; float64's error is nothing."""
    for name in ("random", "heavy", "far", "huge", "cauchy"):
        x, books = FAMILIES[name](Draw(name), 6, 19, 7)
        x, book = x.contiguous(), books[0]
        bound = rounding_bound(x.double(), book.double())
        in_double = x.double() @ book.double().T - book.double().square().sum(1) / 2
        for i, row in enumerate(x.tolist()):
            for j, codeword in enumerate(book.tolist()):
                r, c = list(map(Fraction, row)), list(map(Fraction, codeword))
                exact = sum(a * b for a, b in zip(r, c, strict=True)) - sum(b * b for b in c) / 2
                total = half = torch.tensor(0.0)
                for d in range(19):
                    total = total + x[i, d] * book[j, d]
                    half = half + book[j, d] * book[j, d]
                assert abs(Fraction(float(total - half / 2)) - exact) <= Fraction(float(bound[i]))
                assert abs(Fraction(float(in_double[i, j])) - exact) <= Fraction(
                    1e-6 * float(bound[i])
                )
