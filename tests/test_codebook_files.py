"""ResidualKMeans: plain arrays, other projects' checkpoints, codes that name theirs."""

import json
import re

import numpy as np
import pytest
import torch

from livrec_fast import ResidualKMeans, pack_codes

LEVELS, DIM = (12, 300, 5), 7


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def coder():
    books = [draw(size, DIM, seed=level) for level, size in enumerate(LEVELS)]
    return ResidualKMeans.from_codebooks(books)


def says(*parts):
    return "^" + ".*".join(map(re.escape, parts))


def test_from_codebooks_copies_and_keeps_float64():
    given = [draw(8, 3), draw(4, 3, seed=1).half()]
    coder = ResidualKMeans.from_codebooks(given, seed=5, backend="reference")
    assert coder.levels == (8, 4) and coder.seed == 5 and coder.backend == "reference"
    assert [book.dtype for book in coder.codebooks] == [torch.float32] * 2
    version = coder.version
    given[0].zero_()
    assert coder.version == version and coder.encode(draw(5, 3)).shape == (5, 2)
    assert ResidualKMeans.from_codebooks(tuple(coder.codebooks)).version == version
    exact = ResidualKMeans.from_codebooks([book.double() for book in coder.codebooks])
    assert exact.codebooks[1].dtype == torch.float64 and exact.version != version
    assert [count.sum() for count in exact.counts] == [0, 0]


@pytest.mark.parametrize(
    "books, error, message",
    [
        (3, TypeError, "codebooks: must be a list"),
        ([], ValueError, "codebooks: at least one"),
        ([[1.0]], TypeError, "codebooks[0]: must be a tensor, got list"),
        ([torch.ones(2, 2).int()], TypeError, "codebooks[0]: dtype"),
        ([torch.ones(2)], ValueError, "codebooks[0]: shape must be [N, D], got [2]"),
        ([torch.ones(2, 2), torch.ones(2, 3)], ValueError, "codebooks[1]: shape must be [N, 2]"),
        ([torch.ones(2, 2), torch.ones(2, 2).to("meta")], ValueError, "codebooks[1]: device must"),
        ([torch.ones(0, 2)], ValueError, "codebooks[0]: N must be 1 to 65536"),
        ([torch.ones(65_537, 1)], ValueError, "codebooks[0]: N must be 1 to 65536"),
        ([torch.ones(2, 0)], ValueError, "codebooks[0]: N must be 1 to 65536 and D at least 1"),
        (
            [torch.ones(2, 2), torch.full((2, 2), torch.nan)],
            ValueError,
            "codebooks[1]: row 0 is not finite",
        ),
    ],
)
def test_from_codebooks_refuses(books, error, message):
    with pytest.raises(error, match=says(message)):
        ResidualKMeans.from_codebooks(books)


def test_arrays_there_and_back(coder, tmp_path):
    folder = tmp_path / "made" / "here"
    coder.to_npy(folder)
    names = [f"codebook_{level}.npy" for level in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "codebooks.json"]
    for book, name in zip(coder.codebooks, names, strict=True):
        assert np.load(folder / name).tobytes() == book.numpy().tobytes()
    back = ResidualKMeans.from_npy(folder, tolerance=0.5)
    assert back.version == coder.version and back.tolerance == 0.5
    listed = ResidualKMeans.from_npy([str(folder / name) for name in names])
    assert listed.version == coder.version
    (folder / "codebooks.json").unlink()
    assert ResidualKMeans.from_npy(str(folder)).version == coder.version
    assert ResidualKMeans.from_npy(folder / names[1]).levels == (300,)
    half = ResidualKMeans.from_codebooks(coder.codebooks).bfloat16()
    half.to_npy(tmp_path / "half")
    widened = ResidualKMeans.from_npy(tmp_path / "half")
    assert widened.codebooks[1].equal(half.codebooks[1].float())
    exact = coder.double()
    exact.to_npy(tmp_path / "double")
    assert ResidualKMeans.from_npy(tmp_path / "double").version == exact.version


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
def test_one_array_of_all_levels(tmp_path, kind):
    values = draw(3, 16, 5).numpy().astype(kind)
    np.save(tmp_path / "books.npy", np.asfortranarray(values))
    coder = ResidualKMeans.from_npy(tmp_path / "books.npy")
    assert coder.levels == (16, 16, 16)
    wanted = torch.float64 if kind is np.float64 else torch.float32
    for level, book in enumerate(coder.codebooks):
        assert book.dtype == wanted and book.tolist() == values[level].tolist()


def test_arrays_of_two_writes_are_told_apart(coder, tmp_path, monkeypatch):
    """A write that stops half way, or a file from elsewhere, does not pass for one set."""
    coder.to_npy(tmp_path)
    other = ResidualKMeans.from_codebooks([book + 1 for book in coder.codebooks])
    save, saved = np.save, []

    def stop(file, array, **kwargs):
        if saved:
            raise OSError("no space left")
        saved.append(save(file, array, **kwargs))

    monkeypatch.setattr(np, "save", stop)
    with pytest.raises(OSError, match="no space"):
        other.to_npy(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ValueError, match=says("paths: the codebooks of ", "json says ")):
        ResidualKMeans.from_npy(tmp_path)
    monkeypatch.undo()
    other.to_npy(tmp_path)
    assert ResidualKMeans.from_npy(tmp_path).version == other.version
    (tmp_path / "codebooks.json").write_text("{}")
    with pytest.raises(ValueError, match=says("paths: ", "codebooks.json names no version")):
        ResidualKMeans.from_npy(tmp_path)
    fewer = ResidualKMeans.from_codebooks(coder.codebooks[:2])
    with pytest.raises(ValueError, match=says("folder: ", "codebook_2.npy would be read as a")):
        fewer.to_npy(tmp_path)
    with pytest.raises(RuntimeError, match="none yet"):
        ResidualKMeans((4,)).to_npy(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_arrays_that_are_no_codebooks(coder, tmp_path):
    def refused(error, *message, paths):
        with pytest.raises(error, match=says("paths: ", *message)):
            ResidualKMeans.from_npy(paths)

    def npy(array, name="a.npy"):
        np.save(tmp_path / name, array)
        return tmp_path / name

    good = np.ones((4, 3), np.float32)
    broken = good.copy()
    broken[2, 1] = np.inf
    refused(ValueError, "at least one file", paths=[])
    refused(
        ValueError, "a.npy must hold one of float16, ", "int64", paths=npy(np.ones((2, 2), int))
    )
    refused(ValueError, "a.npy must be [N, D] or [L, N, D], got shape [3]", paths=npy(good[0]))
    refused(ValueError, "a.npy must be [N, D], got shape [1, 4, 3]", paths=[npy(good[None])])
    refused(ValueError, "N must be 1 to 65536 and D at least 1", "[0, 3]", paths=npy(good[:0]))
    refused(ValueError, "got shape [4, 0]", paths=npy(good[:, :0]))
    refused(ValueError, "got shape [65537, 1]", paths=npy(np.ones((65_537, 1), np.float32)))
    refused(ValueError, "codeword 2 of level 0 is not finite", paths=npy(broken))
    refused(ValueError, "codeword 2 of level 1", paths=npy(np.stack([good, broken])))
    mixed = [npy(good), npy(good[:, :2], "b.npy")]
    refused(ValueError, "b.npy must be [N, 3] like a.npy, got shape [4, 2]", paths=mixed)
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    refused(ValueError, "o.npy is not a readable .npy", "pickle", paths=tmp_path / "o.npy")
    (tmp_path / "j.npy").write_bytes(b"junk")
    refused(ValueError, "j.npy is not a readable .npy file", paths=tmp_path / "j.npy")
    coder.to_npy(tmp_path / "set")
    (tmp_path / "set" / "codebook_1.npy").unlink()
    refused(FileNotFoundError, "codebook_1.npy is missing", paths=tmp_path / "set")
    (tmp_path / "none").mkdir()
    refused(FileNotFoundError, "codebook_0.npy is missing", paths=tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        ResidualKMeans.from_npy(tmp_path / "gone.npy")


class OtherResidualKMeans(torch.nn.Module):
    """The state of OpenOneRec's module, and how it encodes: x^2 + c^2 - 2 x.c."""

    def __init__(self, books):
        super().__init__()
        self.centroids = torch.nn.ParameterList(torch.nn.Parameter(book) for book in books)

    def encode(self, x):
        """Return codes [M, L]."""
        codes = []
        for book in self.centroids:
            distance = x.pow(2).sum(1, keepdim=True) + book.pow(2).sum(1) - 2 * x @ book.T
            codes.append(distance.argmin(1))
            x = x - book[codes[-1]]
        return torch.stack(codes, 1)


def test_checkpoints_of_other_projects(coder, tmp_path):
    other = OtherResidualKMeans([draw(30, 6), draw(30, 6, seed=1)])
    torch.save(other.state_dict(), tmp_path / "model.pt")
    ours = ResidualKMeans.from_checkpoint(tmp_path / "model.pt", seed=3)
    assert ours.levels == (30, 30) and ours.seed == 3 and not ours.codebooks[0].requires_grad
    x = draw(200, 6, seed=2)
    assert ours.encode(x).long().equal(other.encode(x))
    named = {f"quantization_layer_list.{at}.centroids": b for at, b in enumerate(coder.codebooks)}
    extra = {"train_loss.mean_value": torch.ones(()), "quantization_layer_list.0.counts": x}
    held = {"state_dict": {**dict(reversed(named.items())), **extra}, "epoch": 3}
    held["hyper_parameters"] = {"normalize_residuals": False}
    torch.save(held, tmp_path / "last.ckpt")
    assert ResidualKMeans.from_checkpoint(str(tmp_path / "last.ckpt")).version == coder.version
    assert ResidualKMeans.from_checkpoint(held).version == coder.version
    held["hyper_parameters"]["normalize_residuals"] = True
    with pytest.raises(ValueError, match="^source: .* scaled to length 1"):
        ResidualKMeans.from_checkpoint(held)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (open, ("trap-was-sprung", "w"))


def test_checkpoints_that_hold_no_codebooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = draw(4, 2)
    for state, message in (
        ({}, "it has nothing"),
        ({"weight": one}, "it has weight"),
        ({"centroids.1": one}, "levels 0, 1, ..."),
        ({"centroids.0": one, "centroids.2": one}, "levels 0, 1, ..."),
    ):
        with pytest.raises(ValueError, match=says("source: no tensors centroids.<l>", message)):
            ResidualKMeans.from_checkpoint(state)
    torch.save({"centroids.0": one, "more": Trap()}, "trap.pt")
    with pytest.raises(ValueError, match=says("source: trap.pt cannot be read as tensors alone")):
        ResidualKMeans.from_checkpoint("trap.pt")
    assert not (tmp_path / "trap-was-sprung").exists()
    torch.save([one], "list.pt")
    with pytest.raises(ValueError, match="must hold a dict, got list"):
        ResidualKMeans.from_checkpoint("list.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=says("source: junk.pt cannot be read")):
        ResidualKMeans.from_checkpoint("junk.pt")
    with pytest.raises(FileNotFoundError):
        ResidualKMeans.from_checkpoint("gone.pt")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [0, 40])
def test_codes_there_and_back(coder, tmp_path, packed, rows):
    from safetensors import safe_open

    path, codes = tmp_path / "codes.safetensors", coder.encode(draw(rows, DIM, seed=9))
    coder.save_codes(path, codes.long(), packed=packed)
    assert coder.load_codes(path).equal(codes) and coder.load_codes(path).dtype == codes.dtype
    with safe_open(path, framework="pt") as file:
        kept, told = file.get_tensor("codes"), file.metadata()
    assert kept.equal(pack_codes(codes, LEVELS) if packed else codes)
    assert told == {
        "format": "livrec_fast.codes",
        "version": coder.version,
        "levels": "[12, 300, 5]",
        "packed": json.dumps(packed),
    }
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_codes_of_other_codebooks_are_refused(coder, tmp_path):
    from safetensors.torch import save_file

    path, codes = tmp_path / "codes.safetensors", coder.encode(draw(40, DIM))
    coder.save_codes(path, codes)
    moved = ResidualKMeans.from_codebooks([*coder.codebooks[:2], coder.codebooks[2] * 1.0001])
    fewer = ResidualKMeans.from_codebooks(coder.codebooks[:2])
    with pytest.raises(ValueError, match=f"of codebooks {coder.version}, not of {moved.version}"):
        moved.load_codes(path)
    with pytest.raises(ValueError, match=says("path: the codes", "[12, 300, 5]", "[12, 300], ")):
        fewer.load_codes(path)
    assert coder.decode(codes, version=coder.version).equal(coder.decode(codes))
    with pytest.raises(ValueError, match=says("version: these codes are of", moved.version)):
        coder.decode(codes, version=moved.version)
    with pytest.raises(IndexError, match=r"^codes: codes\[0, 2\] = 5 is outside \[0, 5\)"):
        coder.save_codes(path, torch.tensor([[0, 0, 5]]))
    with pytest.raises(ValueError, match="^codes: shape"):
        coder.save_codes(path, codes[:, :2])
    with pytest.raises(ValueError, match="was not written by ResidualKMeans.save$"):
        ResidualKMeans.load(path)
    coder.save(tmp_path / "books")
    with pytest.raises(ValueError, match="was not written by ResidualKMeans.save_codes"):
        coder.load_codes(tmp_path / "books")
    told = {"format": "livrec_fast.codes", "version": coder.version, "levels": "[12, 300, 5]"}
    save_file({"codes": codes + 100}, path, {**told, "packed": "false"})
    with pytest.raises(IndexError, match="^codes: .* is outside"):
        coder.load_codes(path)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=says("path: ", "is not a readable safetensors file")):
        coder.load_codes(path)
    with pytest.raises(RuntimeError, match="none yet"):
        ResidualKMeans((4,)).load_codes(path)
