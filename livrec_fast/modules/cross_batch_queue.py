"""A memory of the keys of past batches: more negatives for a contrastive loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import FLOATS, check_same, check_tensor
from ._code_items import check_count
from ._eager import eager
from ._key_rows import FIELDS, KeyRows, check_known


class CrossBatchQueue(nn.Module):
    """Keep the latest keys, first in, first out, with their ids and what else a loss asks for.

    `InBatchContrastive(queue=...)` reads and feeds it by itself. By hand, `rows` gives the keys and
    `push` takes new ones::

        rows = queue.rows()
        loss = in_batch_contrastive(query, key, extra_keys=rows.keys)
        queue.push(key)

    What is pushed is copied without its gradient, as it is: a loss that normalises does so when
    it reads. `rows` gives a copy too, so that a loss may be differentiated after a push.

    All state is in buffers: `state_dict` resumes to the bit, and `.to` moves it (and rounds keys,
    log_q and pair vectors where it changes their dtype; ids stay int64). Under
    DistributedDataParallel the ranks' queues are alike where each is pushed the keys of all ranks,
    as `InBatchContrastive(ranks="gathered")` does; broadcast_buffers=False then saves sending it.
    len(queue) is the number of keys to be seen now: keys never pushed are not. It may be 0, so
    test for a queue by `is not None`.

    Under torch.compile `push` and `rows`, whose sizes are known only as they run, break the graph;
    the rest of a loss with a queue is compiled. Each reads two numbers from the queue's device.

    Memory: capacity (D + P + 1) values and 32 bytes a key for all three ids and the age; `rows`
    copies what it returns, and `push` what it is given.

    Source: MoCo, He et al. 2020 (a queue of a momentum encoder's keys); XBM, Wang et al. 2020 (a
    memory of the learned encoder's own keys, which drift slowly).

    Example:
        >>> queue = CrossBatchQueue(65_536, 128, key_ids=True)
        >>> criterion = InBatchContrastive(temperature=0.05, queue=queue)
        >>> loss = criterion(users, rooms, key_ids=room_ids)
    """

    keys: Tensor
    born: Tensor  # the number of the push that each key came with
    pushed: Tensor  # how many keys, and how many times

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        key_ids: bool = False,
        query_ids: bool = False,
        group_ids: bool = False,
        log_q: bool = False,
        pair_dim: int | None = None,
        max_age: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """Start empty.

        Args:
            capacity: the most keys to keep.
            dim: D, of a key.
            key_ids: keep an id of each key.
            query_ids: keep the id of each key's query.
            group_ids: keep the group of each key.
            log_q: keep the log of each key's sampling probability, in float32.
            pair_dim: P, of the vector whose cosines tell false negatives, such as the query's;
                None keeps none.
            max_age: a key is seen until this many pushes, its own included, have been; None, until
                it is overwritten.
            dtype: of keys and pair vectors; torch's default where None.
            device: of the buffers.

        Raises: TypeError, ValueError: what is wrong with which setting.
        """
        super().__init__()
        needed = {"capacity": capacity, "dim": dim}
        for name, size in (needed | {"pair_dim": pair_dim, "max_age": max_age}).items():
            check_count(name, 1 if size is None and name not in needed else size)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOATS:
            raise TypeError(f"dtype: must be a floating dtype that the loss takes, got {dtype}")
        self.capacity, self.dim, self.pair_dim, self.max_age = capacity, dim, pair_dim, max_age
        flags = {"key_ids": key_ids, "query_ids": query_ids, "group_ids": group_ids, "log_q": log_q}
        self.fields = tuple(
            name for name in FIELDS if flags.get(name, pair_dim is not None and name not in flags)
        )

        def keep(name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

        keep("keys", capacity, dim, dtype=dtype)
        for name in self.fields:
            if name == "pair_vectors":
                keep(name, capacity, pair_dim or 0, dtype=dtype)
            else:
                keep(name, capacity, dtype=torch.float32 if name == "log_q" else torch.int64)
        keep("born", capacity)
        keep("pushed", 2)

    def __len__(self) -> int:
        """Count the keys to be seen."""
        return self._seen()[1]

    @eager
    def push(
        self,
        keys: Tensor,
        *,
        key_ids: Tensor | None = None,
        query_ids: Tensor | None = None,
        group_ids: Tensor | None = None,
        log_q: Tensor | None = None,
        pair_vectors: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """Keep keys, in the place of the oldest; of more than there is room for, the last.

        Args:
            keys: [M, D], of any floating dtype; rounded to the queue's.
            key_ids: int64 [M]; needed where the queue keeps them, as are the next four.
            query_ids: int64 [M].
            group_ids: int64 [M].
            log_q: [M] float32 or float64.
            pair_vectors: [M, P].
            valid: bool [M]; keys where it is False are not kept. None keeps all.

        Raises:
            TypeError: a wrong type or dtype. ValueError: a wrong shape or device; something that
            the queue keeps and did not get, or got and does not keep.
        """
        given = KeyRows(keys, key_ids, query_ids, group_ids, log_q, pair_vectors)
        self._check(given, valid)
        rows = given.detach().take(slice(None) if valid is None else valid)
        count, (total, pushes) = len(rows.keys), self.pushed.tolist()
        rows = rows.take(slice(max(0, count - self.capacity), None))
        first = total + count - len(rows.keys)
        place = (first + torch.arange(len(rows.keys), device=keys.device)) % self.capacity
        with torch.no_grad():
            for name, values in rows.known().items():
                kept = getattr(self, name)
                kept.index_copy_(0, place, values.to(kept.dtype))
            self.born.index_fill_(0, place, pushes + 1)
            self.pushed.add_(torch.tensor([count, 1], device=self.pushed.device))

    @eager
    def rows(self) -> KeyRows:
        """Return copies of the keys to be seen and of what is kept with them, the oldest first.

        A named tuple of keys [M, D], and of key_ids, query_ids, group_ids, log_q [M] and
        pair_vectors [M, P], None where not kept; M = len(queue) may be 0.
        """
        total, seen = self._seen()
        place = torch.arange(total - seen, total, device=self.keys.device) % self.capacity
        every = {name: getattr(self, name)[place] for name in ("keys", *self.fields)}
        return KeyRows(**every)

    def reset(self) -> None:
        """Forget all keys."""
        for buffer in self.buffers():
            buffer.zero_()

    def extra_repr(self) -> str:
        """Describe the queue in `print(queue)`."""
        return (
            f"capacity={self.capacity}, dim={self.dim}, keeps={('keys', *self.fields)}, "
            f"max_age={self.max_age}"
        )

    def _seen(self) -> tuple[int, int]:
        """Return how many keys there have been, and how many of the last are to be seen."""
        total, pushes = self.pushed.tolist()
        filled = min(total, self.capacity)
        if self.max_age is not None:
            filled = int((self.born[:filled] > pushes - self.max_age).sum())
        return total, filled

    def _check(self, given: KeyRows, valid: Any) -> None:
        check_tensor("keys", given.keys, ("M", self.dim), FLOATS)
        batch, known = given.keys.shape[0], given._asdict()
        for name in FIELDS:
            value = known[name]
            if (value is None) == (name in self.fields):
                verb = "needed, as the queue keeps them" if value is None else "not kept here"
                raise ValueError(f"{name}: {verb}; see the settings of CrossBatchQueue")
            if value is not None:
                check_known(name, value, (batch,))
        if given.pair_vectors is not None:
            check_tensor("pair_vectors", given.pair_vectors, (batch, self.pair_dim or 0), FLOATS)
        if valid is not None:
            check_tensor("valid", valid, (batch,), (torch.bool,))
        check_same("device", queue=self.keys, valid=valid, **given.known())
