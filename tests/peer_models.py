"""Models of other libraries, of their own code, small enough to train a step of."""

import sys
from collections import OrderedDict
from contextlib import contextmanager
from importlib import import_module, util
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

ITEMS, USERS = 500, 20
FILES = ("h5py", "polars", "ray", "requests")  # read and fetch files, of which none is


class Values(type):
    """Has any value, such as an enumeration's."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class StandIn(ModuleType):
    """Has any name, so that what is imported and not used need not be installed."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Values(name, (), {})


class Finder(MetaPathFinder, Loader):
    """Finds stand-ins, after all others, for what is not installed."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        """Find a stand-in for a module of the packages."""
        wanted = name.split(".")[0] in self.packages
        return ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec):
        """Make one."""
        return StandIn(spec.name)

    def exec_module(self, module):
        """Leave it empty."""


@contextmanager
def stand_ins(packages=FILES):
    """Let imports in the block find stand-ins, and nothing find them afterwards."""
    finder = Finder(packages)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, module in sys.modules.items() if isinstance(module, StandIn)]:
            del sys.modules[name]


def imported(package, *modules, without=FILES):
    """Import modules of a package that may be absent: the test is then skipped, with the reason.

    without: what the package imports and does not use here, which need not be installed.
    """
    if util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: see requirements/peers.txt")
    for name in ("sklearn.preprocessing", "sklearn.metrics", "pyarrow.parquet", "pandas"):
        pytest.importorskip(name)  # they look for each other: not at a stand-in
    with stand_ins(without):
        if "requests" in without:
            sys.modules.setdefault("requests", StandIn("requests"))  # asks for newer versions
        return [import_module(name) for name in modules]


def fuxictr_model(name, dim=16, **settings):
    """Make FuxiCTR's SIM, TWIN or DIN over one field of items and one of users."""
    module, features = imported("fuxictr", f"model_zoo.LongCTR.{name}", "fuxictr.features")
    fields = features.FeatureMap("histories", "")
    for field, size, source in (("item", ITEMS, "item"), ("user", USERS, "user")):
        fields.features[field] = {"type": "categorical", "vocab_size": size, "source": source}
    fields.labels, fields.default_emb_dim = ["label"], dim
    given = {"optimizer": "adam", "loss": "binary_crossentropy", "metrics": [], "verbose": 0}
    given |= {"model_root": "", "embedding_dim": dim, "dnn_hidden_units": [32]}
    torch.manual_seed(0)
    model = getattr(module, name)(fields, **given | settings)
    for parameter in model.parameters():  # embeddings start at 1e-4: too alike for attention
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def fuxictr_batch(users, length, least):
    """Draw histories of least to length items, padded on the left as FuxiCTR does, and targets."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(least, length + 1, (users,), generator=generator)
    mask = torch.arange(length) >= length - lengths[:, None]
    items = torch.randint(1, ITEMS, (users, length + 1), generator=generator)
    items[:, :-1] *= mask
    labels = torch.randint(0, 2, (users,), generator=generator)
    user = torch.randint(1, USERS, (users,), generator=generator)
    batch = {"label": labels.float(), "user": user}
    return batch, OrderedDict(item=items.flatten()), mask.float()


def deepctr_din(length, dim=16, **settings):
    """Make DeepCTR-Torch's DIN over one field of items."""
    models, inputs = imported("deepctr_torch", "deepctr_torch.models", "deepctr_torch.inputs")
    item = inputs.SparseFeat("item", ITEMS, embedding_dim=dim)
    past = inputs.SparseFeat("hist_item", ITEMS, embedding_dim=dim, embedding_name="item")
    columns = [item, inputs.VarLenSparseFeat(past, maxlen=length, length_name="length")]
    model = models.DIN(columns, ["item"], dnn_hidden_units=(32,), init_std=0.3, **settings)
    for layer in model.attention.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    return model


def deepctr_batch(model, users, length):
    """Draw a matrix of the columns that the model looks up, and labels."""
    generator = torch.Generator().manual_seed(1)
    parts = {
        "item": torch.randint(1, ITEMS, (users, 1), generator=generator),
        "hist_item": torch.randint(1, ITEMS, (users, length), generator=generator),
        "length": torch.randint(0, length + 1, (users, 1), generator=generator),
    }
    columns = torch.cat([parts[name] for name in model.feature_index], 1)
    return columns.float(), torch.randint(0, 2, (users, 1), generator=generator).float()
