"""Models of other libraries with their attention replaced by ours: the same step, and a faster one.

Where the libraries are not installed (requirements/peers.txt) these tests skip.
"""

import statistics
import time

import pytest
import torch
from peer_models import deepctr_batch, deepctr_din, fuxictr_batch, fuxictr_model
from torch import nn
from torch.nn.functional import binary_cross_entropy, pad

from livrec_fast import ExtractUnit, SearchUnit, TargetAttention, din_attention
from livrec_fast._native import MISSING


def jagged(history, mask):
    """Drop the padding."""
    kept = mask.flatten().nonzero()[:, 0]
    return history.flatten(0, 1).index_select(0, kept), pad(mask.sum(1).cumsum(0), (1, 0))


class Attention(nn.Module):
    """For FuxiCTR's MultiHeadTargetAttention: its parameters, TargetAttention's computation."""

    def __init__(self, theirs):
        super().__init__()
        dim, heads = theirs.W_q.in_features, theirs.num_heads
        self.unit = TargetAttention(dim, heads, head_dim=theirs.head_dim, out_dim=dim)
        self.unit.query, self.unit.key = theirs.W_q, theirs.W_k
        self.unit.value, self.unit.out = theirs.W_v, theirs.W_o

    def forward(self, target, history, mask):
        """Attend as the layer does that this replaces."""
        return self.unit(target, history, mask=mask.bool())


class TopK(nn.Module):
    """For FuxiCTR's MultiHeadTopKAttention: a search per head, then attention, as in TWIN."""

    def __init__(self, theirs):
        super().__init__()
        dim, heads = theirs.W_q.in_features, theirs.num_heads
        self.unit = ExtractUnit(dim, heads, head_dim=theirs.head_dim, out_dim=dim)
        self.unit.query, self.unit.key = theirs.W_q, theirs.W_h
        self.unit.value, self.unit.out = theirs.W_v, theirs.W_o
        self.search = SearchUnit("dot_product", theirs.topk)

    def forward(self, target, history, mask):
        """Attend as the layer does that this replaces."""
        rows, offsets = jagged(history, mask.bool())
        positions = self.search(offsets, query=self.unit.search_query(target), keys=rows)
        return self.unit(target, rows, offsets, positions=positions)


class Unit(nn.Module):
    """For the attention unit of DIN, FuxiCTR's or DeepCTR-Torch's."""

    def __init__(self, theirs, activation):
        super().__init__()
        self.layers = nn.ModuleList(m for m in theirs.modules() if isinstance(m, nn.Linear))
        self.activation = activation

    def forward(self, target, history, mask):
        """Attend as the layer does that this replaces."""
        if target.dim() == 3:  # DeepCTR-Torch's, which gives lengths
            mask = torch.arange(history.shape[1]) < mask.view(-1, 1)
        weights = [layer.weight.T for layer in self.layers]
        biases = [layer.bias for layer in self.layers]
        q, (rows, offsets) = target.view(len(target), 1, -1), jagged(history, mask.bool())
        out = din_attention(q, rows, offsets, weights, biases, activation=self.activation)
        return out if target.dim() == 3 else out[:, 0]


def sim(users=12, length=80, dim=16):
    """SIM as FuxiCTR has it. Padding may win its search, so that there is less than topk of it."""
    model = fuxictr_model("SIM", dim, short_seq_len=30, topk=40, attention_dim=dim, num_heads=2)
    batch = fuxictr_batch(users, length, max(1, length - 39))
    swap = {"short_attention": Attention, "long_attention": Attention}
    return model, swap, lambda: model.compute_loss(model(batch), model.get_labels(batch))


def twin(users=12, length=80, dim=16):
    model = fuxictr_model("TWIN", dim, short_seq_len=30, topk=20, attention_dim=dim, num_heads=2)
    batch = fuxictr_batch(users, length, 1)
    swap = {"short_attention": Attention, "long_attention": TopK}
    return model, swap, lambda: model.compute_loss(model(batch), model.get_labels(batch))


def fuxictr_din(users=12, length=80, dim=16):
    settings = {"attention_hidden_units": [32, 16], "attention_hidden_activations": "ReLU"}
    model, batch = fuxictr_model("DIN", dim, **settings), fuxictr_batch(users, length, 0)
    swap = {"attention_layers": lambda theirs: Unit(theirs, "relu")}
    return model, swap, lambda: model.compute_loss(model(batch), model.get_labels(batch))


def deepctr_torch_din(users=12, length=80, dim=16):
    model = deepctr_din(length, dim, att_activation="sigmoid", att_hidden_size=(32, 16))
    x, labels = deepctr_batch(model, users, length)
    swap = {"attention": lambda theirs: Unit(theirs, "sigmoid")}
    return model, swap, lambda: binary_cross_entropy(model(x), labels)


MODELS = {"SIM": sim, "TWIN": twin, "DIN": fuxictr_din, "DIN of DeepCTR-Torch": deepctr_torch_din}


def swapped(model, swap):
    """Replace the layers, and return how to put them back."""
    theirs = {name: getattr(model, name) for name in swap}
    for name, make in swap.items():
        setattr(model, name, make(theirs[name]))
    return theirs


def stepped(model, loss):
    """Return the loss and all parameters' gradients."""
    model.zero_grad()
    value = loss()
    value.backward()
    return value.detach(), {id(p): p.grad for p in model.parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_same_step(name):
    model, swap, loss = MODELS[name]()
    wanted, theirs = stepped(model, loss)
    seen = []
    layers = [id(p) for layer in swap for p in getattr(model, layer).parameters()]
    swapped(model, swap)
    for layer in swap:
        getattr(model, layer).register_forward_hook(lambda *args: seen.append(args[2]))
    value, ours = stepped(model, loss)
    assert len(seen) == len(swap) and all(out.abs().max() > 1e-3 for out in seen)
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys() and set(layers) <= ours.keys()
    for key, grad in ours.items():
        assert theirs[key].any()
        close = 1e-5 * theirs[key].abs().max().item()
        torch.testing.assert_close(grad, theirs[key], rtol=1e-4, atol=close)


def step_ratio(name, users, length, dim, repeats=7):
    """Return how many of our steps one of theirs takes: medians of steps by turns."""
    model, swap, loss = MODELS[name](users, length, dim)
    theirs = {layer: getattr(model, layer) for layer in swap}
    swapped(model, swap)
    ours = {layer: getattr(model, layer) for layer in swap}
    times = {id(theirs): [], id(ours): []}
    for _ in range(repeats + 1):
        for layers in (theirs, ours):
            for layer, module in layers.items():
                setattr(model, layer, module)
            start = time.perf_counter()
            stepped(model, loss)
            times[id(layers)].append(time.perf_counter() - start)
    return statistics.median(times[id(theirs)][1:]) / statistics.median(times[id(ours)][1:])


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}")
@pytest.mark.parametrize(
    ("name", "length", "dim"),
    [("TWIN", 1000, 64), ("DIN", 200, 32), ("DIN of DeepCTR-Torch", 200, 32)],
)
def test_faster_step(name, length, dim):
    """Whole steps of the model, with embeddings, other layers and all gradients."""
    assert max(step_ratio(name, 64, length, dim) for _ in range(3)) > 1
