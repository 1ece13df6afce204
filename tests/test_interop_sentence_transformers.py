"""Our losses in sentence-transformers' trainer: the losses and parameters that its own give."""

import copy
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

WORDS = [f"w{i}" for i in range(60)]
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
STEPS, BATCH = 5, 16


@pytest.fixture(scope="module")
def peer():
    """Return what the tests use of the library, and ours."""
    reason = "not installed: see requirements/peers.txt"
    for name in ("accelerate", "pandas", "datasets", "sentence_transformers"):
        pytest.importorskip(name, reason=f"{name} is {reason}")
    import datasets
    import sentence_transformers as library
    from sentence_transformers.sentence_transformer import losses, modules

    from livrec_fast.interop import sentence_transformers as ours

    return SimpleNamespace(
        datasets=datasets, library=library, losses=losses, modules=modules, ours=ours
    )


@pytest.fixture(scope="module")
def bert(peer, tmp_path_factory):
    """Return a small BERT of random weights, with dropout, over a vocabulary of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = str(tmp_path_factory.mktemp("bert"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=32, initializer_range=0.3,
        )
    ).save_pretrained(folder)  # fmt: skip
    body = peer.modules.Transformer(folder)
    pooling = peer.modules.Pooling(body.get_embedding_dimension())
    return peer.library.SentenceTransformer(modules=[body, pooling], device="cpu")


def texts(peer, columns):
    """Draw texts; those of a row share words."""
    draw = random.Random(0)
    shared = [draw.choices(WORDS, k=3) for _ in range(STEPS * BATCH)]
    rows = {
        f"column {c}": [" ".join(w + draw.choices(WORDS, k=draw.randint(1, 6))) for w in shared]
        for c in range(columns)
    }
    return peer.datasets.Dataset.from_dict(rows)


def trained(peer, model, make, columns, folder):
    """Train a copy of the model, and return the losses by step and the model."""
    model = copy.deepcopy(model)
    arguments = peer.library.SentenceTransformerTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, num_train_epochs=1, seed=3,
        optim="sgd", learning_rate=0.05, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = peer.library.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=texts(peer, columns), loss=make(model)
    )
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS
    return torch.tensor(found), model


CASES = {
    "pairs": ("MultipleNegativesRankingLoss", 2, {}),
    "hard negatives": ("MultipleNegativesRankingLoss", 4, {"scale": 10.0}),
    "both ways": ("MultipleNegativesRankingLoss", 3, SYMMETRIC),
    "cached": ("CachedMultipleNegativesRankingLoss", 3, {"mini_batch_size": 6}),
    "cached, both ways": (
        "CachedMultipleNegativesRankingLoss", 2, {"mini_batch_size": 5, **SYMMETRIC},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trains_alike(peer, bert, case, tmp_path):
    name, columns, settings = CASES[case]
    theirs, ours = (
        trained(peer, bert, lambda m, of=of: getattr(of, name)(m, **settings), columns, tmp_path)
        for of in (peer.losses, peer.ours)
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)  # logs round to 1e-4
    moved = 0
    before = dict(bert.named_parameters())
    wanted = dict(theirs[1].named_parameters())
    for key, parameter in ours[1].named_parameters():
        step = (wanted[key] - before[key]).abs().max()
        assert (parameter - wanted[key]).abs().max() <= 1e-3 * step + 1e-6, key
        moved += bool(step > 1e-4)
    assert moved > 10 and (theirs[0][0] - theirs[0][-1]).abs() > 1e-3


def test_takes_other_losses_around_it(peer, bert, tmp_path):
    def around(of):
        return lambda model: peer.losses.MatryoshkaLoss(
            model, of.MultipleNegativesRankingLoss(model), matryoshka_dims=[32, 8]
        )

    theirs, ours = (trained(peer, bert, around(of), 2, tmp_path) for of in (peer.losses, peer.ours))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)


def test_trains_a_static_embedding(peer, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    static = peer.modules.StaticEmbedding(tokenizer, embedding_dim=16)
    model = peer.library.SentenceTransformer(modules=[static], device="cpu")
    theirs, ours = (
        trained(peer, model, of.MultipleNegativesRankingLoss, 3, tmp_path)
        for of in (peer.losses, peer.ours)
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    weights = [m[0].embedding.weight for m in (ours[1], theirs[1], model)]
    assert (weights[0] - weights[1]).abs().max() <= 1e-3 * (weights[1] - weights[2]).abs().max()
    with pytest.raises(ValueError, match="StaticEmbedding"):
        peer.ours.CachedMultipleNegativesRankingLoss(model)


def embeddings(columns, rows=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 8, generator=generator, requires_grad=True) for _ in range(columns)]


@pytest.mark.parametrize("settings", [{}, SYMMETRIC], ids=["one way", "both ways"])
def test_scale_learns_and_dot_products_do(peer, settings):
    found = []
    for of in (peer.losses, peer.ours):
        scale, columns = torch.nn.Parameter(torch.tensor(0.3)), embeddings(3)
        given = {"scale": scale, "similarity_fct": peer.library.util.dot_score, **settings}
        loss = of.MultipleNegativesRankingLoss(torch.nn.Identity(), **given)
        value = loss.compute_loss_from_embeddings(columns, None)
        found.append([value.detach(), *torch.autograd.grad(value, [scale, *columns])])
    for ours, theirs in zip(*reversed(found), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_false_negatives_are_masked(peer):
    anchors, positives, negatives = embeddings(3)
    with torch.no_grad():
        anchors[5] = 2 * anchors[2] + 0.01
    make = peer.ours.MultipleNegativesRankingLoss
    loss = make(torch.nn.Identity(), false_negative_threshold=0.9)
    unit = [F.normalize(x, dim=1) for x in (anchors, positives, negatives)]
    logits = 20 * unit[0] @ torch.cat(unit[1:]).T
    logits = logits.index_put(
        (torch.tensor([2, 5]), torch.tensor([5, 2])), torch.tensor(-torch.inf)
    )
    wanted = F.cross_entropy(logits, torch.arange(12))
    value = loss.compute_loss_from_embeddings([anchors, positives, negatives])
    torch.testing.assert_close(value, wanted)
    without = make(torch.nn.Identity()).compute_loss_from_embeddings(
        [anchors, positives, negatives]
    )
    assert without > value + 1e-3


def test_settings_are_told(peer, bert):
    loss = peer.ours.CachedMultipleNegativesRankingLoss(
        bert, 30.0, mini_batch_size=7, false_negative_threshold=0.9
    )
    told = loss.get_config_dict()
    assert (told["scale"], told["mini_batch_size"]) == (30.0, 7)
    assert told["similarity_fct"] == "cos_sim" and told["false_negative_threshold"] == 0.9
    loss.scale = 5.0
    assert loss.loss.scale == 5.0 and loss.temperature == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity_fct": torch.cdist}, "similarity_fct: must be util.cos_sim or util.dot_score"),
        ({"directions": ("query_to_doc", "query_to_query")}, "directions: must be"),
        ({"directions": ("query_to_doc", "doc_to_query")}, "partition_mode='joint'"),
        ({"hardness_mode": "hard_negatives", "hardness_strength": 5.0}, "hardness_mode: must be"),
        ({"scale": 0.0}, "must be a positive value"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(peer, bert, settings, message):
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        with pytest.raises(ValueError, match=message):
            getattr(peer.ours, name)(bert, **settings)


def test_a_single_process_is_all_ranks(peer):
    make = peer.ours.MultipleNegativesRankingLoss
    loss = make(torch.nn.Identity(), gather_across_devices=True)
    wanted = make(torch.nn.Identity()).compute_loss_from_embeddings(embeddings(3))
    assert wanted > 0.1
    torch.testing.assert_close(loss.compute_loss_from_embeddings(embeddings(3)), wanted)
    with pytest.raises(ValueError, match="embeddings: at least 2 columns are needed, got 1"):
        loss.compute_loss_from_embeddings(embeddings(1))
    loss.similarity_fct = torch.cdist  # settings may be assigned
    with pytest.raises(ValueError, match="similarity_fct: must be"):
        loss.compute_loss_from_embeddings(embeddings(2))


def test_says_how_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "livrec_fast.interop.sentence_transformers", raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "sentence_transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install 'sentence-transformers"):
        import livrec_fast.interop.sentence_transformers  # noqa: F401
