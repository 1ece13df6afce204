"""Rows and codebooks that are hard to search: what the tests of exact codes share.

`whole_*` draw whole numbers so small that every float32 score is exact in any order of adding:
there is one right code, the lowest of the nearest. `family_*` draw floats, held to the rule.
"""

import zlib

import torch

from livrec_fast._native import isa, isa_levels, use_isa
from livrec_fast.testing import subjects, targets


def kernels_of(op):
    """Return what can compute an op here: "reference", "triton" or "native <level>"."""
    return [str(target) for target in targets(subjects()[op]) if target.device == "cpu"]


def run(op, kernel, *args, **kwargs):
    name, _, level = kernel.partition(" ")
    with use_isa(level or isa()) if isa_levels() else torch.no_grad():
        return op(*args, **kwargs, backend=name)


class Draw:
    """Random numbers of one seed."""

    def __init__(self, *seed):
        self._generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))

    def normal(self, *shape):
        """Draw from the normal distribution."""
        return torch.randn(shape, generator=self._generator)

    def whole(self, most, *shape):
        """Draw whole numbers from -most to most."""
        return torch.randint(-most, most + 1, shape, generator=self._generator).float()

    def uniform(self, *shape):
        """Draw from 0 to 1."""
        return torch.rand(shape, generator=self._generator)

    def permutation(self, count):
        """Draw an order."""
        return torch.randperm(count, generator=self._generator)

    def below(self, most, *shape):
        """Draw whole numbers from 0 to most - 1, int64."""
        return torch.randint(most, shape, generator=self._generator)


def exact_codes(x, books):
    """Return the right codes of whole numbers, in whole numbers."""
    residual, codes = x.long(), []
    for book in (book.long() for book in books):
        distance = book.square().sum(1) - 2 * (residual @ book.T)
        nearest = distance == distance.min(1, keepdim=True).values
        codes.append(nearest.int().argmax(1))
        residual = residual - book[codes[-1]]
    return torch.stack(codes, 1)


def _most(dim, room=2**22):
    """Return the greatest size of `dim` numbers whose squares add up to `room` at most."""
    return max(1, int((room / dim) ** 0.5))


def whole_crowd(draw, rows, dim, size):
    """Codewords a unit or two apart, far from 0: scores near 2^21 that differ by 1/2 to 64."""
    centre = draw.whole(_most(dim), dim)
    book = centre + draw.whole(1, size, dim) * (draw.below(dim, size, dim) < 3)
    return centre + draw.whole(1, rows, dim), [book]


def whole_crowds(draw, rows, dim, size):
    """Several such crowds; rows in all of them."""
    centres = draw.whole(_most(dim, 2**20), 5, dim)
    book = centres[draw.below(5, size)] + draw.whole(1, size, dim)
    return centres[draw.below(5, rows)] + draw.whole(2, rows, dim), [book]


def whole_plain(draw, rows, dim, size):
    """Small numbers, so that ties abound; the second level repeats the first."""
    book = draw.whole(3, size, dim)
    return draw.whole(4, rows, dim), [book, book]


def whole_repeats(draw, rows, dim, size):
    """Every codeword many times over, every row a codeword."""
    few = draw.whole(_most(dim, 2**20), max(1, size // 9), dim)
    book = few[draw.below(len(few), size)]
    return few[draw.below(len(few), rows)], [book, 0 * book, book]


def whole_spike(draw, rows, dim, size):
    """One coordinate of each row is 2^20; no codeword has anything there."""
    x, book = draw.whole(2, rows, dim), draw.whole(2, size, dim)
    at = int(draw.below(dim, 1))
    x[:, at], book[:, at] = 2.0**20, 0
    return x, [book]


def whole_giant(draw, rows, dim, size):
    """One codeword is 2^30 long, the others are small, and so are the rows."""
    x, book = draw.whole(5, rows, dim), draw.whole(5, size, dim)
    book[int(draw.below(size, 1)), 0] = 2.0**30 if size > 1 else 1.0
    return x, [book]


def whole_flat(draw, rows, dim, size):
    """Rows and codewords whose coordinates are all the same number."""
    most = _most(dim)
    return draw.whole(most, rows, 1).expand(rows, dim), [draw.whole(most, size, 1).expand(-1, dim)]


def whole_same(draw, rows, dim, size):
    """All codewords equal, at the first level; nearly equal at the second."""
    one = draw.whole(_most(dim, 2**20), dim)
    book = torch.zeros(size, dim)
    book[-1, -1] = 1
    return one + draw.whole(3, rows, dim), [one.expand(size, dim), book]


def whole_axes(draw, rows, dim, size):
    """Codewords along the axes, with both signs of 0."""
    book = torch.zeros(size, dim) * -1.0
    book[torch.arange(size), draw.below(dim, size)] = draw.whole(6, size)
    return draw.whole(1, rows, dim) * draw.below(2, rows, 1) * -1.0, [book, -book]


def whole_signs(draw, rows, dim, size):
    """1 and -1 only: bytes lose nothing, and a fixed length leaves a tie at every turn."""
    return _signs(draw, rows, dim), [_signs(draw, size, dim), 2 * _signs(draw, size, dim)]


def whole_bytes(draw, rows, dim, size):
    """Numbers that are bytes, around 0, with 127 among them: as bytes they lose nothing at all."""
    x, book = draw.whole(127, rows, dim), draw.whole(127, size, dim)
    x[:, 0], book[:, -1] = 127, 127
    return x, [torch.cat([book, -book])[draw.permutation(2 * size)]]


def _misleading(draw, count, signs):
    """Vectors v, one per row of `signs`, that rounding to tens turns the wrong way.

    v.s > 0, but round(v / 10).s < 0: the parts of v along s are 4, which goes to 0, and -6, which
    goes to -10. In bytes v / 10 is what is left, as the first number is 1,270.
    """
    dim = signs.shape[1]
    of = draw.below(len(signs), count)
    fours = 0.6 * dim + 1.3 * dim**0.5  # v.s is 13 sqrt(dim), more than chance gives to others
    v = torch.where(draw.uniform(count, dim).argsort(1).argsort(1) < fours, 4.0, -6.0) * signs[of]
    v[:, 0] = 1270
    return v


def _signs(draw, count, dim):
    signs = 2.0 * draw.below(2, count, dim) - 1
    signs[:, 0] = 1
    return signs


def _opposites(v):
    """Return each vector, its mirror image but for the first number, and the negatives of both."""
    mirrored = torch.cat([v[:, :1], -v[:, 1:]], 1)
    return torch.cat([v, mirrored, -v, -mirrored])


def whole_rounded_rows(draw, rows, dim, size):
    """What bytes lose of a row lies along the codewords: no bound on it can be any smaller."""
    signs = _signs(draw, max(1, min(size, 32) // 4), dim)
    book = torch.cat([_opposites(signs), torch.zeros(max(0, size - 4 * len(signs)), dim)])[:size]
    return _misleading(draw, rows, signs), [book[draw.permutation(size)]]


def whole_rounded_codewords(draw, rows, dim, size):
    """What bytes lose of a codeword lies along the rows."""
    signs = _signs(draw, max(1, min(rows, 8)), dim)
    book = _opposites(_misleading(draw, (size + 3) // 4, signs))[:size]
    return signs[draw.below(len(signs), rows)], [book[draw.permutation(size)]]


WHOLE = {name[6:]: f for name, f in list(globals().items()) if name.startswith("whole_")}


def family_random(draw, rows, dim, size):
    return draw.normal(rows, dim), [draw.normal(size, dim) / 2**level for level in range(8)]


def family_clustered(draw, rows, dim, size):
    """Tight clusters of codewords; from level to level all shrinks thirtyfold, then more."""
    centres = draw.normal(6, dim)
    book = centres[draw.below(6, size)] + 0.03 * draw.normal(size, dim)
    x = centres[draw.below(6, rows)] + 0.03 * draw.normal(rows, dim)
    return x, [book, 0.03 * draw.normal(size, dim), 1e-6 * draw.normal(size, dim)]


def family_near_ties(draw, rows, dim, size):
    """Each codeword has a twin, nearer or farther by 1 to 64 ulp of a score, or of the bound."""
    x, book = draw.normal(rows, dim), draw.normal(size, dim)
    ulps = 1.0 + draw.below(64, size, 1) * (1 + (dim + 1) * draw.below(2, size, 1))
    twin = book * (1 + ulps * 2**-23 * draw.normal(size, 1).sign())
    return x + book[draw.below(size, rows)], [torch.cat([book, twin])]


def family_crowd(draw, rows, dim, size):
    """All codewords within a hundredth of one another: none falls to a coarse look."""
    centre = draw.normal(dim)
    return centre + draw.normal(rows, dim), [centre + 0.01 * draw.normal(size, dim)]


def family_shells(draw, rows, dim, size):
    """Distances to the row that grow from 1e-7 to 1 of the distance itself."""
    x = draw.normal(rows, dim)
    way = draw.normal(size, dim)
    way = way / way.norm(dim=1, keepdim=True)
    return 1e-3 * x, [way * (1 + 10.0 ** (-7 * draw.uniform(size, 1)))]


def family_heavy(draw, rows, dim, size):
    """One coordinate of each row is 1,000 to a million times the others."""
    x = draw.normal(rows, dim)
    x[torch.arange(rows), draw.below(dim, rows)] *= 10.0 ** (3 + draw.below(4, rows))
    book = draw.normal(size, dim)
    book[::3, 0] *= 1e4
    return x, [book, draw.normal(size, dim)]


def family_cauchy(draw, rows, dim, size):
    def ratios(count):
        return (draw.normal(count, dim) / draw.normal(count, dim)).clamp(-1e6, 1e6)

    return ratios(rows), [ratios(size), ratios(size)]


def family_scales(draw, rows, dim, size):
    """Rows of lengths from 1e-20 to 1e4 beside one another, and codewords, too."""
    x = draw.normal(rows, dim) * torch.logspace(-20, 4, rows)[:, None]
    return x, [draw.normal(size, dim) * torch.logspace(-20, 4, size)[:, None]]


def family_drift(draw, rows, dim, size):
    """A second level that leaves no more than what the first one's subtraction rounded away."""
    x, first = 100 * draw.normal(rows, dim), 1e-3 * draw.normal(size, dim)
    score = x @ first.T - first.square().sum(1) / 2
    second = (x - first[score.argmax(1)]) + 1e-4 * draw.normal(rows, dim)
    return x, [first, second, 1e-4 * draw.normal(size, dim)]


def family_far(draw, rows, dim, size):
    """A mean of 10,000, a spread of 0.01."""
    x, book = draw.normal(rows, dim), draw.normal(size, dim)
    return 1e4 + 0.01 * x, [1e4 + 0.01 * book, 0.01 * draw.normal(size, dim)]


def family_tiny(draw, rows, dim, size):
    """Products that are no normal numbers, and rows that are none themselves."""
    x = draw.normal(rows, dim) * torch.tensor([1e-20, 1e-30, 1e-38, 1e-42])[draw.below(4, rows, 1)]
    return x, [1e-20 * draw.normal(size, dim), 1e-38 * draw.normal(size, dim)]


def family_tiny_rows(draw, rows, dim, size):
    """Rows of almost nothing among codewords of ordinary and of huge length."""
    book = draw.normal(size, dim)
    book[::5] *= 1e12
    return 1e-40 * draw.normal(rows, dim), [book, draw.normal(size, dim)]


def family_huge(draw, rows, dim, size):
    """Scores up to 10^37."""
    return 3e17 * draw.normal(rows, dim), [3e17 * draw.normal(size, dim), draw.normal(size, dim)]


FAMILIES = {name[7:]: f for name, f in list(globals().items()) if name.startswith("family_")}
