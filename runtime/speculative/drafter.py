"""What guesses tokens: the interface of Medusa heads and prompt lookup."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from apar.runtime.booking import StepReport
from apar.runtime.branch import Branch
from apar.runtime.speculative.options import MAX_NODES
from apar.runtime.speculative.tree import DraftTree
from apar.runtime.step import Int32Array, IntArray


class Drafter(ABC):
    """Guesses what comes after the paths of branches.

    Attributes:
        tree: the largest draft of a row.
    """

    tree: DraftTree
    model_seconds: float = 0.0
    """Time spent in the executor."""
    most: int = MAX_NODES
    """Nodes that the next draft of a branch will not exceed."""

    @abstractmethod
    def available(self, slots: IntArray) -> Int32Array:
        """[R] nodes, a prefix of the tree, for which there are guesses behind each branch's path."""

    @abstractmethod
    def tokens(self, slots: IntArray, sizes: Int32Array) -> Int32Array:
        """[sum of sizes] the guesses for the first nodes of each row, row after row."""

    @abstractmethod
    def learn(self, report: StepReport, slots: IntArray, wanted: IntArray, children: Sequence[Branch]) -> None:
        """A step is booked.

        Args:
            report: all that came of it.
            slots: [n] branches that go on and sampled in it.
            wanted: [n] for each the place, among the step's logits, that its last token was sampled from.
            children: branches born in it that live; their parents are among `slots`, unless they have ended.
        """

    @abstractmethod
    def rest(self, report: StepReport) -> None:
        """A step is booked that neither had drafts nor is followed by one that may: nothing need be kept up to date.

        What `learn` finds missing afterwards it makes anew.
        """
