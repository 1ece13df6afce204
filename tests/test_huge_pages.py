"""Tables in huge pages: what is asked of the system, and by whom."""

from pathlib import Path

import pytest
import torch
from test_prefix_ngram_memory import needs_native
from torch._subclasses import FakeTensorMode

from livrec_fast import PrefixNgramEmbedding, RowAdagrad
from livrec_fast.modules import _huge_pages

SUPPORTED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _flags_at(address):
    """Return what Linux says of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


@needs_native
@pytest.mark.skipif(not SUPPORTED.exists(), reason="this system has no transparent huge pages")
def test_the_system_is_asked():
    rows = _huge_pages.empty_rows((2**20, 16), torch.float32, None)
    assert "hg" in _flags_at(rows.data_ptr() + rows.nbytes // 2)


def test_tables_states_and_loaded_ones_ask(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(_huge_pages, "ask_for_huge_pages", lambda *given: asked.append(given))
    module = PrefixNgramEmbedding((4, 5), 3, optimizer=RowAdagrad(0.1), dtype=torch.float16)
    module.save(tmp_path / "tables")
    for found in (module, PrefixNgramEmbedding.load(tmp_path / "tables")):
        held = [*found.tables, found.state_0, found.state_1]
        assert {(tensor.data_ptr(), tensor.nbytes) for tensor in held} <= set(asked)


def test_what_is_in_no_memory_does_not_ask(monkeypatch):
    monkeypatch.setattr(_huge_pages, "ask_for_huge_pages", lambda *given: 1 / 0)
    PrefixNgramEmbedding((4, 5), 3, device="meta")
    with FakeTensorMode():
        assert PrefixNgramEmbedding((4, 5), 3).tables[1].shape == (20, 3)
