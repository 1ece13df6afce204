"""`livrec-fast codes`: files in, files out, and what it says of bad ones."""

import json

import numpy as np
import pytest
import torch

from livrec_fast import ResidualKMeans, codes, unpack_codes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from coding import column, fixed, parquet, refused, run  # noqa: E402
from conftest import DIM, LEVELS, ROWS  # noqa: E402


def test_fit_equals_the_module(npy, coder, tmp_path):
    out = tmp_path / "fitted.safetensors"
    output = run("fit", npy, "--levels", "20,8", "--iterations", 3, "--out", out)
    fitted = ResidualKMeans.load(out)
    assert fitted.version == coder.version and coder.version in output


def test_fit_draws_a_sample_by_its_seed(npy, vectors, tmp_path):
    versions = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = run(
            "fit", npy, "--levels", "20", "--sample", 100, "--seed", seed, "--out", tmp_path / name
        )
        assert "100 rows" in output
        versions.append(ResidualKMeans.load(tmp_path / name).version)
    assert versions[0] == versions[1] != versions[2]
    drawn = codes._draw(codes.open_rows(npy, ""), 100, 1).numpy()
    members = {row.tobytes() for row in vectors}
    assert len({row.tobytes() for row in drawn}) == 100 and {r.tobytes() for r in drawn} <= members


@pytest.mark.parametrize("chunk", [1, 7, 65_536])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_round_trip(npy, books, coder, vectors, tmp_path, chunk, packed, suffix):
    out, back = tmp_path / f"c.{suffix}", tmp_path / f"y.{suffix}"
    flags = ["--packed"] if packed else []
    run("encode", npy, "--codebooks", books, "--out", out, "--chunk", chunk, *flags)
    written = np.load(out) if suffix == "npy" else column(out, "codes")
    expected = coder.encode(torch.from_numpy(vectors))
    found = torch.tensor(written)
    assert torch.equal(unpack_codes(found, LEVELS) if packed else found, expected)
    assert written.dtype == np.uint8 and written.shape[1] == (1 if packed else 2)
    run("decode", out, "--codebooks", books, "--out", back, "--chunk", chunk)
    decoded = np.load(back) if suffix == "npy" else column(back, "embedding")
    assert torch.equal(torch.tensor(decoded), coder.decode(expected))
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_other_columns_travel_along(vectors, books, coder, tmp_path):
    ids, names = np.arange(ROWS), [f"room {i}" if i % 3 else None for i in range(ROWS)]
    given = parquet(tmp_path / "x.parquet", id=ids, vector=fixed(vectors), name=names)
    run(
        "encode",
        given,
        "--codebooks",
        books,
        "--out",
        tmp_path / "c.parquet",
        "--column",
        "vector",
        "--chunk",
        64,
    )
    table = pq.read_table(tmp_path / "c.parquet")
    assert table.column_names == ["id", "name", "codes"]
    assert table["id"].to_pylist() == ids.tolist() and table["name"].to_pylist() == names
    assert table["codes"].to_pylist() == coder.encode(torch.from_numpy(vectors)).tolist()
    run("decode", tmp_path / "c.parquet", "--codebooks", books, "--out", tmp_path / "y.parquet")
    assert pq.read_table(tmp_path / "y.parquet").column_names == ["id", "name", "embedding"]


def test_lists_and_half_precision(vectors, books, coder, tmp_path):
    halves = vectors.astype(np.float16)
    expected = coder.encode(torch.from_numpy(halves)).tolist()
    np.save(tmp_path / "h.npy", np.asfortranarray(halves))
    lists = pa.array(vectors.tolist(), pa.list_(pa.float32()))
    run("encode", tmp_path / "h.npy", "--codebooks", books, "--out", tmp_path / "h.parquet")
    assert column(tmp_path / "h.parquet", "codes").tolist() == expected
    run(
        "encode",
        parquet(tmp_path / "l.parquet", embedding=lists),
        "--codebooks",
        books,
        "--out",
        tmp_path / "l.npy",
    )
    assert np.load(tmp_path / "l.npy").tolist() == coder.encode(torch.from_numpy(vectors)).tolist()


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_no_rows(books, tmp_path, suffix):
    given, out = tmp_path / f"x.{suffix}", tmp_path / f"c.{suffix}"
    none = np.empty((0, DIM), np.float32)
    np.save(given, none) if suffix == "npy" else parquet(given, embedding=fixed(none))
    run("encode", given, "--codebooks", books, "--out", out)
    run("decode", out, "--codebooks", books, "--out", tmp_path / "y.npy")
    assert np.load(tmp_path / "y.npy").shape == (0, DIM)


def test_decode_refuses_codes_of_other_codebooks(npy, books, coder, vectors, tmp_path):
    other = ResidualKMeans(LEVELS, iterations=1, seed=7).fit(torch.from_numpy(vectors))
    other.save(tmp_path / "other")
    for name in ("c.npy", "c.parquet"):
        run("encode", npy, "--codebooks", books, "--out", tmp_path / name)
        message = f"{name}: codes of codebooks {coder.version}, not of {other.version}"
        refused(
            message,
            "decode",
            tmp_path / name,
            "--codebooks",
            tmp_path / "other",
            "--out",
            tmp_path / "y.npy",
        )
    assert not (tmp_path / "y.npy").exists()


def test_decode_refuses_codes_that_say_nothing(npy, books, tmp_path):
    run("encode", npy, "--codebooks", books, "--out", tmp_path / "c.npy")
    arguments = ["decode", tmp_path / "c.npy", "--codebooks", books, "--out", tmp_path / "y.npy"]
    beside = tmp_path / "c.npy.json"
    tag = json.loads(beside.read_text())
    for text, message in (
        ("{", "the tag is not JSON"),
        ("[]", "the tag must be a JSON object"),
        ("{}", "does not say of which codebooks it is"),
        (json.dumps({**tag, "packed": True}), "2 values a row, its codes have 1"),
    ):
        beside.write_text(text)
        refused(message, *arguments)
    beside.unlink()
    refused("does not say of which codebooks it is", *arguments)


def test_vectors_written_over_codes_leave_no_tag(npy, books, tmp_path):
    run("encode", npy, "--codebooks", books, "--out", tmp_path / "c.npy")
    run("encode", npy, "--codebooks", books, "--out", tmp_path / "d.parquet")
    run("decode", tmp_path / "d.parquet", "--codebooks", books, "--out", tmp_path / "c.npy")
    assert not (tmp_path / "c.npy.json").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_is_named_by_its_place_in_the_file(npy, vectors, books, tmp_path, bad):
    vectors[123, 4] = bad
    np.save(npy, vectors)
    given = parquet(tmp_path / "x.parquet", embedding=fixed(vectors))
    for path in (npy, given):
        message = f"{path}: row 123 is not finite"
        out = tmp_path / "c.npy"
        refused(message, "encode", path, "--codebooks", books, "--out", out, "--chunk", 50)
        refused(message, "fit", path, "--levels", 4, "--out", tmp_path / "new")
        assert not out.exists() and not (tmp_path / "new").exists()


def test_a_bad_code_is_named_by_its_place_in_the_file(npy, books, tmp_path):
    out, back = tmp_path / "c.npy", tmp_path / "y.npy"
    for flags, value, message in (
        ([], 9, "row 250: codes: codes[1] = 9 is outside [0, 8)"),
        (["--packed"], 255, "row 250: holds 31 at level 0, outside [0, 20)"),
    ):
        run("encode", npy, "--codebooks", books, "--out", out, *flags)
        written = np.load(out)
        written[250, -1] = value
        np.save(out, written)
        refused(message, "decode", out, "--codebooks", books, "--out", back, "--chunk", 40)
        assert not back.exists()


def test_rows_too_large_are_named(npy, vectors, books, tmp_path):
    vectors[77] = 3e38
    np.save(npy, vectors)
    arguments = ["encode", npy, "--codebooks", books, "--out", tmp_path / "c.npy", "--chunk", 50]
    refused("row 77: is too large", *arguments)


def test_bad_inputs_are_told_in_a_line(npy, vectors, books, tmp_path):
    out = tmp_path / "c.npy"
    encode = lambda path, *more: ("encode", path, "--codebooks", books, "--out", out, *more)  # noqa: E731
    np.save(tmp_path / "wide.npy", vectors[:, :5])
    np.save(tmp_path / "long.npy", vectors[0])
    np.save(tmp_path / "double.npy", vectors.astype(np.float64))
    (tmp_path / "junk.npy").write_bytes(b"junk")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    ragged = pa.array([*vectors.tolist()[:99], [1.0]], pa.list_(pa.float32()))
    nulls = pa.array([*vectors.tolist()[:80], None], pa.list_(pa.float32()))
    holes = pa.array([*vectors.tolist()[:90], [None] * DIM], pa.list_(pa.float32()))
    given = parquet(tmp_path / "x.parquet", id=np.arange(ROWS), embedding=fixed(vectors))
    taken = parquet(tmp_path / "t.parquet", codes=np.arange(ROWS), embedding=fixed(vectors))
    for message, arguments in (
        ("absent.npy: no such file", encode(tmp_path / "absent.npy")),
        ("must end in .npy or .parquet", encode(books)),
        ("wide.npy: 5 values a row, the codebooks have 6", encode(tmp_path / "wide.npy")),
        ("shape must be [rows, width], got [6]", encode(tmp_path / "long.npy")),
        ("must hold float32 or float16, got float64", encode(tmp_path / "double.npy")),
        ("junk.npy: not a readable .npy file", encode(tmp_path / "junk.npy")),
        ("junk.parquet: not a readable parquet file", encode(tmp_path / "junk.parquet")),
        ("no column 'vec'; there are id, embedding", encode(given, "--column", "vec")),
        ("column 'id' must hold lists", encode(given, "--column", "id")),
        (
            "row 99 of 'embedding' does not have 6",
            encode(parquet(tmp_path / "r.parquet", embedding=ragged)),
        ),
        ("row 80 of 'embedding' is null", encode(parquet(tmp_path / "n.parquet", embedding=nulls))),
        (
            "row 90 of 'embedding' has a null",
            encode(parquet(tmp_path / "o.parquet", embedding=holes)),
        ),
        ("a column 'codes' of its own", encode(taken, "--out", tmp_path / "c.parquet")),
        ("nowhere/c.npy: no such folder", encode(npy, "--out", tmp_path / "nowhere/c.npy")),
        ("x.npy: cannot be used as codebooks", encode(npy, "--codebooks", npy)),
        ("gone: no such file", encode(npy, "--codebooks", tmp_path / "gone")),
        ("--levels 4,x:", ("fit", npy, "--levels", "4,x")),
        ("--levels 4,0:", ("fit", npy, "--levels", "4,0")),
        (f"{npy}: ", ("fit", npy, "--levels", ROWS + 1, "--out", tmp_path / "new")),
        ("no such folder", ("fit", npy, "--levels", 4, "--out", tmp_path / "nowhere/new")),
    ):
        refused(message, *arguments)
        assert not out.exists()
