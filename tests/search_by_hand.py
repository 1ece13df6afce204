"""History search in Python's integers and floats, item by item: what tests hold the ops to."""

from itertools import pairwise

import torch


def keys_of(inputs):
    """Add up the rows that codes name, one at a time."""
    keys = torch.zeros(len(inputs["codes"]), inputs["query"].shape[2], dtype=torch.float64)
    for row, codes in enumerate(inputs["codes"].tolist()):
        for table, code in zip(inputs["tables"], codes, strict=True):
            if code >= 0:
                keys[row] += table[code].double()
    return keys


def asked(inputs, name, user, candidate):
    """Return what a candidate asks for, as an int or None."""
    value = inputs.get(name)
    return int(value[user, candidate]) if isinstance(value, torch.Tensor) else value


def may_find(inputs, user, candidate, row):
    """Tell whether the masks leave an item to a candidate."""
    wanted, needed, since, until = (
        asked(inputs, name, user, candidate)
        for name in ("query_ids", "required_bits", "since", "until")
    )
    if wanted is not None and (wanted == -1 or int(inputs["item_ids"][row]) != wanted):
        return False
    if needed is not None and needed & ~int(inputs["item_bits"][row]):
        return False
    if since is not None and int(inputs["item_times"][row]) < since:
        return False
    return until is None or int(inputs["item_times"][row]) < until


def by_sorting(inputs, keys=None):
    """Sort (score, position) pairs with Python, candidate by candidate, and fill."""
    query, k = inputs["query"], inputs["k"]
    keys = (inputs["keys"] if keys is None else keys).double()
    scores, positions = [], []
    for user, (first, last) in enumerate(pairwise(inputs["offsets"].tolist())):
        for candidate, q in enumerate(query[user].double()):
            pairs = [
                (score, row - first)
                for row, score in enumerate((keys[first:last] @ q).tolist(), first)
                if may_find(inputs, user, candidate, row)
            ]
            pairs = sorted(pairs, reverse=True)[:k]
            pairs += [(float("-inf"), -1)] * (k - len(pairs))
            scores.append([s for s, _ in pairs])
            positions.append([at for _, at in pairs])
    shape = (*query.shape[:2], k)
    return torch.tensor(scores).reshape(shape), torch.tensor(positions).reshape(shape)
