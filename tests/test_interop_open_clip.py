"""Our loss in OpenCLIP's training loop: the losses and parameters that its own gives."""

import copy
import logging
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from peer_models import imported
from torch.nn import functional as F

from livrec_fast.interop import ClipLoss

STEPS, BATCH, SIZE, WORDS = 5, 12, 16, 40


def open_clip_modules():
    """Import open_clip and its training function, without what they do not need here."""
    held = sys.modules.get("transformers")
    sys.modules["transformers"] = None  # must not ask for torchvision while that is a stand-in
    try:
        return imported("open_clip", "open_clip", "open_clip_train.train", without=("torchvision",))
    finally:
        del sys.modules["transformers"]
        if held is not None:
            sys.modules["transformers"] = held


@pytest.fixture(scope="module")
def peer():
    """Return open_clip and its training function."""
    clip, train = open_clip_modules()
    return SimpleNamespace(clip=clip, train=train)


def model_of(peer, **settings):
    """Make a small CLIP of random weights."""
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": SIZE}
    text = {"context_length": 8, "vocab_size": WORDS, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return peer.clip.CLIP(24, vision, text, output_dict=True, **settings)


class Batches(list):
    """A data loader."""

    num_batches, num_samples = STEPS, STEPS * BATCH


def batches():
    """Draw images and texts."""
    generator = torch.Generator().manual_seed(1)
    return Batches(
        (
            torch.randn(BATCH, 3, SIZE, SIZE, generator=generator),
            torch.randint(1, WORDS, (BATCH, 8), generator=generator),
        )
        for _ in range(STEPS)
    )


def trained(peer, model, loss, caplog, accum_freq=1):
    """Train a copy for an epoch by open_clip; return the losses that it logs, and the copy."""
    model = copy.deepcopy(model)
    args = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=accum_freq, skip_scheduler=True,
        grad_clip_norm=None, rank=0, local_rank=0, log_every_n_steps=1, batch_size=BATCH,
        world_size=1, wandb=False, horovod=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=0.1)
    loader = SimpleNamespace(dataloader=batches(), set_epoch=lambda epoch: None)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        peer.train.train_one_epoch(
            model, {"train": loader}, loss, 0, optimizer, None, None, None, args
        )
    logged = re.findall(r"Contrastive_loss: (\S+)", caplog.text)
    assert len(logged) == STEPS // accum_freq
    return torch.tensor([float(value) for value in logged]), model


@pytest.mark.parametrize(
    ("settings", "accum_freq"),
    [({}, 1), ({"init_logit_bias": -3.0, "nonscalar_logit_scale": True}, 1), ({}, 2)],
    ids=["plain", "bias", "accumulated"],
)
def test_trains_alike(peer, settings, accum_freq, caplog):
    model = model_of(peer, **settings)
    theirs, ours = (
        trained(peer, model, loss, caplog, accum_freq)
        for loss in (peer.clip.ClipLoss(cache_labels=True), ClipLoss(cache_labels=True))
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)  # as it was logged
    before, wanted = dict(model.named_parameters()), dict(theirs[1].named_parameters())
    for name, parameter in ours[1].named_parameters():
        step = (wanted[name] - before[name]).abs().max()
        assert step > 1e-5, name
        assert (parameter - wanted[name]).abs().max() <= 1e-3 * step + 1e-6, name
    assert (theirs[0][0] - theirs[0][-1]).abs() > 1e-3


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(9, 6, generator=generator), dim=1) for _ in range(2)]


@pytest.mark.parametrize("bias", [None, -2.5])
def test_same_loss_and_gradients(peer, bias):
    found = []
    for loss in (peer.clip.ClipLoss(), ClipLoss()):
        given = [x.clone().requires_grad_() for x in (*features(), torch.tensor(math.log(20.0)))]
        if bias is not None:
            given.append(torch.tensor(bias, requires_grad=True))
        value = loss(*given[:2], given[2].exp(), *given[3:])
        assert torch.equal(
            loss(*given[:2], given[2].exp(), output_dict=True)["contrastive_loss"],
            loss(*given[:2], given[2].exp()),
        )
        found.append([value.detach(), *torch.autograd.grad(value, given)])
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(grad.any() for grad in found[1][1:4]) and (bias is None or found[1][4] == 0)


def test_false_negatives_are_masked():
    images, texts = features()
    images[4] = images[1]
    logits = (8.0 * images @ texts.T).index_put(
        (torch.tensor([1, 4]), torch.tensor([4, 1])), torch.tensor(-torch.inf)
    )
    own = torch.arange(9)
    wanted = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    value = ClipLoss(false_negative_threshold=0.99)(images, texts, 8.0)
    torch.testing.assert_close(value, wanted)
    assert ClipLoss()(images, texts, 8.0) > value + 1e-3


def test_refuses():
    with pytest.raises(ValueError, match="use_horovod: must be False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"world_size: torch.distributed has 1 rank\(s\), got 2"):
        ClipLoss(world_size=2)(*features(), 10.0)
