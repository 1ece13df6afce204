"""What the tests of `livrec-fast codes` share: running it, small files, and codebooks for them."""

import numpy as np
import pytest
from click.testing import CliRunner

from livrec_fast import codes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def run(*arguments, code=0):
    result = CliRunner().invoke(codes.command, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def refused(message, *arguments):
    output = run(*arguments, code=2)
    assert message in output and len(output.splitlines()) == 1, output


def fixed(values):
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=70)
    return path


def column(path, name):
    values = pq.read_table(path)[name].combine_chunks()
    return values.flatten().to_numpy().reshape(len(values), -1)
