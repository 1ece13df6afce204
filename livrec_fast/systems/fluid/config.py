"""The settings of the ranker and of its training, small by default."""

from __future__ import annotations

from dataclasses import dataclass

from ..._checks import check_choice, check_levels

MIXINGS = ("rsa", "tmhsa")
BOOSTS = ("swiglu", "moe")
SCHEMES = ("prefix", "levelwise")
FADES = ("linear", "dropout")
RULES = ("rowwise_adagrad", "adagrad")


@dataclass(frozen=True)
class Sizes:
    """What the data fix: counts of ids, of dense features and of tasks."""

    users: int
    rooms: int
    authors: int
    features: int = 7
    tasks: int = 3
    gaps: int = 32


@dataclass(frozen=True)
class ModelConfig:
    """The ranker.

    levels: of the codes. width: D, of a token. table_dim: of a row of an id's table and of each
    level of a code's. max_rows: of a table of prefixes, which are hashed where they are more.
    history_prefix: look the history's codes up by prefixes, too, instead of level by level.
    layers: of the backbone. mixing: "rsa" or "tmhsa". residual: the mixing adds to its input, too.
    boost: "swiglu" or "moe". hidden: of the per-token SwiGLU and of an expert. experts, active: of
    the sparse mixture. balance, z: weights of its two losses. tower: hidden width of a task's
    tower. alignment, temperature: of fusion "em3". start: standard deviation of a new table's rows,
    as a share of 1 / sqrt(width): a small one lets a room that nobody has seen say nothing.
    match: the candidate's slice code is sought in the user's history. likeness: the temperature at
    which that starts. groups: of dense features, a token each; the first holds the exposure
    counters, which the feature gate reads. backend: of all ops.
    """

    levels: tuple[int, ...] = (64, 64, 64, 64)
    scheme: str = "prefix"
    shared: bool = False
    width: int = 32
    table_dim: int = 16
    max_rows: int = 1 << 14
    history_prefix: bool = False
    layers: int = 2
    mixing: str = "rsa"
    residual: bool = True
    boost: str = "swiglu"
    heads: int = 2
    hidden: int = 64
    experts: int = 4
    active: int = 1
    balance: float = 0.01
    z: float = 0.001
    tower: int = 32
    alignment: float = 0.1
    temperature: float = 0.07
    start: float = 0.1
    match: bool = True
    likeness: float = 0.3
    groups: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3), (4, 5, 6))
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what no module would name as clearly."""
        check_levels(list(self.levels))
        check_choice("scheme", self.scheme, SCHEMES)
        check_choice("mixing", self.mixing, MIXINGS)
        check_choice("boost", self.boost, BOOSTS)
        if not 1 <= self.active <= self.experts:
            raise ValueError(f"active: must be from 1 to experts={self.experts}, got {self.active}")


@dataclass(frozen=True)
class TrainConfig:
    """Training.

    requests: in a batch. length: the most recent events of a history that are read. rate: of AdamW.
    decay: of its weights. clip: the greatest norm of its gradient. table_rate, rule: of the tables'
    optimiser, "rowwise_adagrad" or "adagrad". history_rate: of the history's tables, which start as
    what their codes stand for, and lose that at the rate of the others. fade: "linear" scales the
    id from 1 to 0 over stage 2; "dropout" takes it from a growing share of the candidates.
    fade_share: of stage 2's steps, after which the id is gone. periods: shares of the training
    requests, in order of time, of the base's training, stage 1, 2 and 3 and the streaming training
    after them; the test requests follow. stream: go on training through the test period: on clicks
    after each batch, on other labels when they are known. save_every: steps between checkpoints.
    """

    requests: int = 32
    length: int = 100
    rate: float = 1e-3
    decay: float = 1e-4
    clip: float = 1.0
    table_rate: float = 0.05
    history_rate: float = 0.005
    rule: str = "rowwise_adagrad"
    fade: str = "linear"
    fade_share: float = 0.75
    periods: tuple[float, ...] = (0.4, 0.15, 0.15, 0.15, 0.15)
    stream: bool = True
    save_every: int = 200

    def __post_init__(self) -> None:
        """Check the choices and shares."""
        check_choice("fade", self.fade, FADES)
        check_choice("rule", self.rule, RULES)
        if not 0 < self.fade_share <= 1:
            raise ValueError(f"fade_share: must be in (0, 1], got {self.fade_share}")
        if len(self.periods) != 5 or min(self.periods) <= 0 or abs(sum(self.periods) - 1) > 1e-6:
            raise ValueError(f"periods: must be 5 positive shares of 1, got {self.periods}")
