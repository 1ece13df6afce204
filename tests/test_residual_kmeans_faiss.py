"""ResidualKMeans and faiss.ResidualQuantizer: codebooks, packed codes and norms, both ways."""

import builtins
import random

import numpy as np
import pytest
import torch
from test_residual_kmeans_exchange import rows_about_centres

from livrec_fast import ResidualKMeans, pack_codes, unpack_codes
from livrec_fast.reference.pack_codes import packed_bytes

faiss = pytest.importorskip("faiss")
KEEPS_NORMS = ["ST_norm_float", "ST_norm_qint8", "ST_norm_qint4", "ST_norm_cqint8"]
KEEPS_NORMS += ["ST_norm_cqint4", "ST_norm_lsq2x4", "ST_norm_rq2x4"]
KEEPS_NONE = ["ST_decompress", "ST_LUT_nonorm", "ST_norm_from_LUT"]


def drawn(bits, dim=4, seed=0):
    """Draw codebooks of 2^bits codewords."""
    generator = torch.Generator().manual_seed(seed)
    books = [torch.randn(2**width, dim, generator=generator) for width in bits]
    return ResidualKMeans.from_codebooks(books)


def trained(search, bits=(4, 5, 3), dim=16):
    """Train one in faiss."""
    sizes = faiss.UInt64Vector()
    for width in bits:
        sizes.push_back(width)
    theirs = faiss.ResidualQuantizer(dim, sizes, getattr(faiss.AdditiveQuantizer, search))
    theirs.max_beam_size = 1
    theirs.train(rows_about_centres(2000, dim=dim).numpy())
    return theirs


def assert_like_faiss(ours, packed, x, quantizer):
    """Equal to faiss's codes, except from a level on where the best two are a near tie."""
    theirs = quantizer.codes_from_faiss(torch.from_numpy(packed)).long()
    first = (ours != theirs).long().argmax(1)
    for row in (ours != theirs).any(1).nonzero()[:, 0].tolist():
        level = int(first[row])
        residual = x[row].double()
        for above in range(level):
            residual = residual - quantizer.codebooks[above][ours[row, above]].double()
        book = quantizer.codebooks[level].double()
        a, b = ((residual - book[codes[row, level]]).square().sum() for codes in (ours, theirs))
        assert abs(a - b) < 1e-4 * (a + b), (row, level)
    assert (ours == theirs).all(1).double().mean() > 0.99


def test_faiss_codes_with_our_codebooks():
    x = rows_about_centres(2000)
    quantizer = ResidualKMeans((32, 8, 16)).fit(x)
    theirs = quantizer.to_faiss()
    packed = theirs.compute_codes(x.numpy())
    assert_like_faiss(quantizer.encode(x).long(), packed, x, quantizer)
    decoded = torch.from_numpy(theirs.decode(packed))
    torch.testing.assert_close(decoded, quantizer.decode(quantizer.encode(x)), rtol=1e-4, atol=1e-4)
    back = ResidualKMeans.from_faiss(theirs)
    assert back.levels == quantizer.levels and back.version == quantizer.version


def test_our_codes_with_faiss_codebooks():
    x = rows_about_centres(2000)
    theirs = trained("ST_decompress", (4, 4, 4))
    quantizer = ResidualKMeans.from_faiss(theirs, seed=9)
    assert quantizer.levels == (16, 16, 16) and quantizer.dim == 16 and quantizer.seed == 9
    assert_like_faiss(quantizer.encode(x).long(), theirs.compute_codes(x.numpy()), x, quantizer)
    index = faiss.IndexResidualQuantizer(16, 3, 4)
    index.train(x.numpy())
    held = ResidualKMeans.from_faiss(index)
    assert held.version == ResidualKMeans.from_faiss(index.rq).version != quantizer.version


WIDTHS = [[width] for width in range(1, 17)]
WIDTHS += [random.Random(seed).choices(range(1, 12), k=2 + seed % 9) for seed in range(20)]
WIDTHS += [[9, 8, 7], [6] * 4, [13, 3, 16], [1] * 8, [1] * 9, [16, 1, 15], [7] * 9, [3, 5, 8, 16]]


@pytest.mark.parametrize("bits", WIDTHS, ids=lambda bits: "-".join(map(str, bits)))
def test_packed_codes_are_faiss_codes(bits):
    """Bit for bit, whichever side packs; and faiss decodes ours to the rows that they stand for."""
    coder, levels = drawn(bits), [2**width for width in bits]
    generator = torch.Generator().manual_seed(sum(bits))
    codes = torch.stack([torch.randint(n, (50,), generator=generator) for n in levels], 1)
    codes[0], codes[1] = 0, torch.tensor(levels) - 1
    packed = pack_codes(codes, levels)
    assert packed.numpy().tobytes() == faiss.pack_bitstrings(codes.int().numpy(), bits).tobytes()
    assert faiss.unpack_bitstrings(packed.numpy(), bits).tolist() == codes.tolist()
    theirs = coder.to_faiss()
    assert theirs.code_size == packed_bytes(levels) == packed.shape[1]
    decoded = torch.from_numpy(theirs.decode(packed.numpy()))
    torch.testing.assert_close(decoded, coder.decode(codes), rtol=1e-6, atol=1e-6)
    x = coder.decode(codes).numpy()
    theirs_of_x = torch.from_numpy(theirs.compute_codes(x))
    unpacked = unpack_codes(theirs_of_x, levels)
    assert unpacked.tolist() == faiss.unpack_bitstrings(theirs_of_x.numpy(), bits).tolist()
    assert coder.codes_from_faiss(theirs_of_x).equal(unpacked)
    assert coder.codes_to_faiss(unpacked).equal(theirs_of_x)


@pytest.mark.parametrize("search", KEEPS_NORMS + KEEPS_NONE)
@pytest.mark.parametrize("bits", [(4, 5, 3), (4, 4, 3), (8, 8), (9,), (1, 8)], ids=str)
def test_norms_behind_the_codes(search, bits):
    """faiss puts the bits of a norm right behind those of the codes, not at the next byte."""
    x, theirs = rows_about_centres(300), trained(search, bits)
    coder = ResidualKMeans.from_faiss(theirs)
    packed = torch.from_numpy(theirs.compute_codes(x.numpy()))
    assert (theirs.norm_bits > 0) == (search in KEEPS_NORMS)
    codes = coder.codes_from_faiss(packed, theirs)
    decoded = torch.from_numpy(theirs.decode(packed.numpy()))
    torch.testing.assert_close(coder.decode(codes), decoded, rtol=1e-5, atol=1e-5)
    again = coder.codes_to_faiss(codes, theirs)
    assert again.shape == packed.shape and coder.codes_from_faiss(again, theirs).equal(codes)
    same = (again == packed).all(1).double().mean()
    if search != "ST_norm_float":  # faiss takes the norm of x - residual or of the decoded row
        assert same > 0.9
    else:
        width = sum(bits)
        a, b = (np.unpackbits(t.numpy(), axis=1, bitorder="little")[:, width : width + 32]
                for t in (again, packed))  # fmt: skip
        a, b = (np.packbits(t, axis=1, bitorder="little").view(np.float32) for t in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-5)
        np.testing.assert_allclose(a[:, 0], decoded.square().sum(1), rtol=1e-4)
    none = coder.codes_to_faiss(codes[:0], theirs)
    assert none.shape == (0, theirs.code_size) and coder.codes_from_faiss(none, theirs).numel() == 0


@pytest.mark.parametrize("search", KEEPS_NORMS + KEEPS_NONE)
def test_there_and_back_is_the_same_quantizer(search):
    x, theirs = rows_about_centres(500), trained(search)
    theirs.max_beam_size = 3
    coder = ResidualKMeans.from_faiss(theirs)
    back = coder.to_faiss(like=theirs)
    for name in ("d", "M", "code_size", "norm_bits", "tot_bits", "search_type", "max_beam_size"):
        assert getattr(back, name) == getattr(theirs, name), name
    for name in ("codebooks", "nbits", "codebook_offsets", "centroid_norms", "norm_tabs"):
        ours, own = (faiss.vector_to_array(getattr(q, name)) for q in (back, theirs))
        assert ours.tobytes() == own.tobytes(), name
    assert back.compute_codes(x.numpy()).tobytes() == theirs.compute_codes(x.numpy()).tobytes()
    assert ResidualKMeans.from_faiss(back).version == coder.version
    assert coder.to_faiss().max_beam_size == 1 and coder.to_faiss().norm_bits == 0


def test_wide_levels_make_no_tables():
    coder = ResidualKMeans.from_codebooks([torch.randn(2**16, 2), torch.randn(2**16, 2)])
    theirs = coder.to_faiss()  # the products of all codewords would take 16 GB
    x = torch.randn(20, 2)
    assert coder.codes_from_faiss(torch.from_numpy(theirs.compute_codes(x.numpy()))).shape == (
        20,
        2,
    )


def test_widths_and_quantizers_that_do_not_fit():
    theirs = trained("ST_norm_qint8")
    coder = ResidualKMeans.from_faiss(theirs)
    packed = torch.from_numpy(theirs.compute_codes(rows_about_centres(9).numpy()))
    message = "packed: a row must have 2 bytes, for 12 bits of codes and 0 of norm, got 3"
    with pytest.raises(ValueError, match=message):
        coder.codes_from_faiss(packed)
    message = "packed: a row must have 3 bytes, for 12 bits of codes and 8 of norm, got 2"
    with pytest.raises(ValueError, match=message):
        coder.codes_from_faiss(packed[:, :2], theirs)
    with pytest.raises(TypeError, match="^packed: dtype must be one of uint8, got int32"):
        coder.codes_from_faiss(packed.int(), theirs)
    with pytest.raises(ValueError, match=r"shapes \[\[16, 16\], \[32, 16\], \[8, 16\]\], got "):
        coder.codes_from_faiss(packed, trained("ST_norm_qint8", (4, 4)))
    other = ResidualKMeans.from_codebooks([*coder.codebooks[:2], coder.codebooks[2] + 1])
    with pytest.raises(ValueError, match="must have these codebooks, level 2 differs"):
        other.codes_to_faiss(other.encode(rows_about_centres(9)), theirs)
    with pytest.raises(ValueError, match=r"like: must have levels of \[4, 5, 3\] bits, got \[4\]"):
        coder.to_faiss(like=trained("ST_norm_qint8", (4,)))
    with pytest.raises(IndexError, match=r"^codes: codes\[0, 1\] = 32 is outside \[0, 32\)"):
        coder.codes_to_faiss(torch.tensor([[0, 32, 0]]), theirs)
    with pytest.raises(ValueError, match=r"^codes: shape must be \[M, 3\], got \[1, 2\]"):
        coder.codes_to_faiss(torch.tensor([[0, 32]]), theirs)


def test_faiss_refusals(monkeypatch):
    with pytest.raises(ValueError, match="powers of two .* got 6 at level 1"):
        ResidualKMeans((8, 6)).fit(torch.randn(50, 4)).to_faiss()
    with pytest.raises(ValueError, match="must be trained"):
        ResidualKMeans.from_faiss(faiss.ResidualQuantizer(4, 2, 3))
    with pytest.raises(TypeError, match="faiss.ResidualQuantizer, got int"):
        ResidualKMeans.from_faiss(3)
    with pytest.raises(RuntimeError, match="none yet"):
        ResidualKMeans((4,)).to_faiss()
    real = builtins.__import__

    def without_faiss(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError("no faiss")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(ImportError, match=r"pip install 'livrec-fast\[bench\]'"):
        ResidualKMeans.from_faiss(None)
