"""How an engine drafts: what users set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apar.export.errors import RequestError

METHODS = ("none", "medusa", "ngram")
ACCEPTANCES = ("exact", "typical")
DEFAULT_WIDTHS = (1, 7, 6)
MAX_NODES = 256
MAX_DEPTH = 16
MAX_NGRAM = 16


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """Speculative decoding of an engine. Names are those of vLLM and TensorRT-LLM where they have one.

    Raises RequestError for values that mean nothing.
    """

    method: str = "none"
    """`medusa` needs an engine with Medusa heads; `ngram` (prompt lookup) needs nothing; `none`."""
    num_speculative_tokens: int | None = None
    """Most draft tokens of a row in a step; default: the whole tree, or 8 with `ngram`."""
    medusa_choices: Sequence[Sequence[int]] | None = None
    """Medusa: the tree's nodes as paths of ranks, `[[0], [0, 0], [1]]`; missing ancestors are added."""
    medusa_widths: Sequence[int] | None = None
    """Medusa, without choices: 1, then how many guesses of each head follow every node before. Default: 1, 7, 6, and
    behind the likeliest of these nodes the likeliest guess of every further head."""
    prompt_lookup_max: int = 4
    """N-gram: longest run of last tokens that is looked up."""
    prompt_lookup_min: int = 2
    """N-gram: shortest one."""
    draft_budget: int | None = None
    """Draft tokens of a whole step; default: what keeps this executor's steps bound by memory."""
    adaptive: bool = True
    """Hand the budget out by expected gain; False: every row gets its largest draft while the budget lasts."""
    measured: bool = True
    """Draft only where, and only as much as, steps that were measured say that it saves time; False: use the budget,
    whatever it takes, which is the same on every machine. Without effect where `draft_budget` is given or `adaptive`
    is false."""
    acceptance: str = "exact"
    """`exact`: the same tokens as without drafts, sampled ones too. `typical`: rows that sample take drafts that the
    model finds typical, which is another distribution."""
    posterior_threshold: float = 0.09
    """Typical acceptance: a draft at least this likely is taken,"""
    posterior_alpha: float = 0.3
    """or one more likely than this times exp(-entropy), if that is less."""

    def __post_init__(self) -> None:
        _one_of("draft method", self.method, METHODS)
        _one_of("acceptance", self.acceptance, ACCEPTANCES)
        for name, high in (("num_speculative_tokens", MAX_NODES), ("draft_budget", 1 << 20)):
            value = getattr(self, name)
            if value is not None:
                _whole(name, value, 1, high)
        _whole("prompt_lookup_max", self.prompt_lookup_max, 1, MAX_NGRAM)
        _whole("prompt_lookup_min", self.prompt_lookup_min, 1, self.prompt_lookup_max)
        for name in ("posterior_threshold", "posterior_alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise RequestError(f"{name} is {value!r}, it must be a number above 0 and at most 1")
        for name in ("adaptive", "measured"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}, it must be true or false")
        if self.medusa_widths is not None:
            _list("medusa_widths", self.medusa_widths)
        for choice in _list("medusa_choices", [] if self.medusa_choices is None else self.medusa_choices):
            _list("a path of medusa_choices", choice)
        self.paths()

    @property
    def enabled(self) -> bool:
        """Whether anything is drafted."""
        return self.method != "none"

    @classmethod
    def of(cls, draft: DraftOptions | str | None) -> DraftOptions:
        """Options from what an API takes: options, a method's name, or nothing."""
        if draft is None:
            return cls()
        return draft if isinstance(draft, DraftOptions) else cls(method=draft)

    def paths(self, heads: int = 0) -> list[tuple[int, ...]]:
        """The tree's nodes as paths of ranks, ancestors included; heads: that an engine has. Raises RequestError."""
        if self.method == "ngram":
            return [(0,) * depth for depth in range(1, 1 + min(self.num_speculative_tokens or 8, MAX_DEPTH))]
        if self.medusa_choices is None:
            chosen = _product(DEFAULT_WIDTHS if self.medusa_widths is None else self.medusa_widths)
            if self.medusa_widths is None:
                chosen += [(0,) * depth for depth in range(len(DEFAULT_WIDTHS), min(heads, MAX_DEPTH) + 1)]
        else:
            chosen = [_path(choice) for choice in self.medusa_choices]
        nodes = dict.fromkeys(path[:depth] for path in chosen for depth in range(1, len(path) + 1))
        if not 1 <= len(nodes) <= MAX_NODES:
            raise RequestError(f"a draft tree has 1 to {MAX_NODES} nodes, this one has {len(nodes)}")
        return list(nodes)


def _product(widths: Sequence[int]) -> list[tuple[int, ...]]:
    if len(widths) < 2 or widths[0] != 1:
        raise RequestError(f"medusa_widths are {list(widths)}; they begin with 1, then one width for each head used")
    paths: list[tuple[int, ...]] = [()]
    nodes: list[tuple[int, ...]] = []
    for width in widths[1:]:
        _whole("a width of medusa_widths", width, 1, MAX_NODES)
        paths = [(*path, rank) for path in paths for rank in range(width)]
        nodes += paths
        if len(nodes) > MAX_NODES:
            raise RequestError(f"medusa_widths {list(widths)} make more than {MAX_NODES} nodes")
    return nodes


def _path(choice: Sequence[int]) -> tuple[int, ...]:
    if not 1 <= len(choice) <= MAX_DEPTH:
        raise RequestError(f"a path of medusa_choices has 1 to {MAX_DEPTH} ranks, not {len(choice)}")
    for rank in choice:
        _whole("a rank in medusa_choices", rank, 0, MAX_NODES - 1)
    return tuple(choice)


def _list(name: str, values: object) -> Sequence[object]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise RequestError(f"{name} is {values!r}, it must be a list")
    return values


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise RequestError(f"{name} is {value!r}, it must be one of {', '.join(known)}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}, it must be a whole number from {low} to {high}")
