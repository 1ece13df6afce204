"""ResidualKMeans: to files, to state dicts and to faiss, and back."""

import builtins

import pytest
import torch

from livrec_fast import ResidualKMeans


def rows_about_centres(rows, spread=2.0, dim=16):
    """Draw rows around twenty centres."""
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(20, dim, generator=generator)
    return centres[torch.arange(rows) % 20] + spread * torch.randn(rows, dim, generator=generator)


def same_bits(a, b):
    return all(
        x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_save_and_load(tmp_path):
    x = rows_about_centres(600)
    settings = {"iterations": 7, "init": "random", "seed": 5, "tolerance": 0.01}
    quantizer = ResidualKMeans((12, 5), **settings).fit(x)
    path = tmp_path / "codebooks.safetensors"
    path.write_bytes(b"an older file")
    quantizer.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    loaded = ResidualKMeans.load(path)
    assert same_bits(quantizer, loaded) and loaded.version == quantizer.version
    assert loaded.levels == (12, 5) and loaded.dim == 16
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.encode(x).equal(quantizer.encode(x))
    assert same_bits(loaded.partial_fit(x[:50]), quantizer.partial_fit(x[:50]))
    assert loaded.version != ResidualKMeans.load(path).version


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "codebooks.safetensors"
    quantizer = ResidualKMeans((4,)).fit(torch.randn(20, 3))
    quantizer.save(path)
    old = path.read_bytes()

    def no_space(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        quantizer.fit(torch.randn(20, 3)).save(path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_load_refuses_what_is_not_ours_or_was_changed(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "codebooks.safetensors"
    save_file({"codebook_0": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match="not written by ResidualKMeans.save"):
        ResidualKMeans.load(path)
    ResidualKMeans((4,)).fit(torch.randn(20, 3)).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="codebooks of .* are version"):
        ResidualKMeans.load(path)


def test_state_dict_and_to():
    x = rows_about_centres(300)
    fitted = ResidualKMeans((6, 3)).fit(x)
    fresh = ResidualKMeans((6, 3))
    assert [tuple(book.shape) for book in fresh.codebooks] == [(6, 0), (3, 0)]
    parent = torch.nn.ModuleDict({"codes": fresh})
    parent.load_state_dict({f"codes.{k}": v for k, v in fitted.state_dict().items()})
    assert same_bits(fitted, fresh) and fresh.encode(x).equal(fitted.encode(x))
    exact = ResidualKMeans((6, 3)).fit(x.double())
    fresh = ResidualKMeans((6, 3))
    fresh.load_state_dict(exact.state_dict())
    assert same_bits(exact, fresh)
    assert fitted.double().codebooks[1].dtype == torch.float64
    assert [book.device.type for book in fitted.to("meta").codebooks] == ["meta", "meta"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        ResidualKMeans((7, 3)).load_state_dict(exact.state_dict())


def assert_like_faiss(ours, packed, x, quantizer):
    """Equal to faiss's codes, except from a level on where the best two are a near tie."""
    faiss = pytest.importorskip("faiss")
    bits = [size.bit_length() - 1 for size in quantizer.levels]
    theirs = torch.from_numpy(faiss.unpack_bitstrings(packed, bits).astype("int64"))
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
    pytest.importorskip("faiss")
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
    faiss = pytest.importorskip("faiss")
    x = rows_about_centres(2000)
    theirs = faiss.ResidualQuantizer(16, 3, 4)
    theirs.train(x.numpy())
    theirs.max_beam_size = 1
    quantizer = ResidualKMeans.from_faiss(theirs, seed=9)
    assert quantizer.levels == (16, 16, 16) and quantizer.dim == 16 and quantizer.seed == 9
    packed = theirs.compute_codes(x.numpy())
    assert_like_faiss(quantizer.encode(x).long(), packed, x, quantizer)


def test_faiss_refusals(monkeypatch):
    faiss = pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="powers of two .* got 6 at level 1"):
        ResidualKMeans((8, 6)).fit(torch.randn(50, 4)).to_faiss()
    with pytest.raises(ValueError, match="must be trained"):
        ResidualKMeans.from_faiss(faiss.ResidualQuantizer(4, 2, 3))
    with pytest.raises(TypeError, match="faiss.ResidualQuantizer, got int"):
        ResidualKMeans.from_faiss(3)
    real = builtins.__import__

    def without_faiss(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError("no faiss")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(ImportError, match=r"pip install 'livrec-fast\[bench\]'"):
        ResidualKMeans.from_faiss(None)
