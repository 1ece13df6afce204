"""ResidualKMeans: to files and state dicts, and back."""

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
