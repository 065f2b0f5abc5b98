"""Whether drafts pay: tokens a second with and without them, as steps were measured.

What a step with drafts costs beyond one without (more tokens, the heads, choosing and verifying) depends on the model,
the machine and the executor, so it is not predicted but measured, for each number of rows apart: first some steps
without drafts, then some with them; from then on the better way is taken, and the other one is tried again now and
then. A trial of drafts that loses ends after a few steps, and the next one comes later each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BASELINE = 24
"""Steps without drafts that are measured first; the very first steps of an engine are slow,"""
TRIAL = 16
"""and steps with them that then decide: how many tokens they give varies."""
GLIMPSE = 3
"""Steps after which a trial of drafts is given up that goes badly,"""
BADLY = 0.65
"""that is, has this part of the other way's tokens a second."""
MARGIN = 1.1
"""How much better than plain steps drafts must be to be taken; to be kept they must be no worse."""
AGAIN = 512
"""Steps until drafts that lost are tried again, and twice as many after every further trial that they lose,"""
LATEST = 1 << 14
"""up to this."""
CHECK = 256
"""Steps with drafts until the plain way is measured again,"""
CHECKED = 8
"""for so many steps."""
_WEIGHT = 1 / 16
_OUTLIER = 3.0


@dataclass(slots=True)
class _Way:
    """Running means of the steps of one way."""

    steps: int = 0
    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        """A step; one that took far longer than usual (another process, a page fault) counts as less."""
        if self.steps >= GLIMPSE:
            seconds = min(seconds, _OUTLIER * self.seconds)
        self.steps += 1
        weight = max(_WEIGHT, 1 / self.steps)
        self.seconds += weight * (seconds - self.seconds)
        self.tokens += weight * (tokens - self.tokens)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def forget(self) -> None:
        """Begin anew, so that the next steps weigh most."""
        self.steps = 0


@dataclass(slots=True)
class _Class:
    """What is known of steps with about so many rows."""

    plain: _Way = field(default_factory=_Way)
    drafted: _Way = field(default_factory=_Way)
    drafts: bool = False
    """Whether drafts were found to pay."""
    judged: bool = False
    trying: bool = True
    """Whether the way that was not taken is being measured."""
    since: int = 0
    """Steps since that was last done."""
    again: int = AGAIN


class Pace:
    """Chooses before each step whether it drafts.

    Args:
        measures: False: it always does.
    """

    def __init__(self, measures: bool) -> None:
        self.measures = measures
        self.drafting = True
        """Whether the next step drafts."""
        self._classes: dict[int, _Class] = {}

    def choose(self, rows: int) -> bool:
        """Whether a step of so many rows is to draft."""
        if self.measures and rows:
            found = self._of(rows)
            # Measuring begins with the plain way; later a trial takes the way that is not in use.
            plain_first = not found.judged and found.plain.steps < BASELINE
            self.drafting = not plain_first if not found.judged else found.drafts != found.trying
        return self.drafting

    def observe(self, rows: int, tokens: int, seconds: float, drafted: bool) -> None:
        """A step ran that only decoded: `rows` sampled, `tokens` came of it."""
        if not self.measures or not rows:
            return
        found = self._of(rows)
        (found.drafted if drafted else found.plain).add(seconds, tokens)
        found.since += 1
        if not found.trying:
            found.trying = found.since >= (CHECK if found.drafts else found.again)
            if found.trying:
                found.since = 0
                (found.plain if found.drafts else found.drafted).forget()
            return
        self._judge(found)

    def _judge(self, found: _Class) -> None:
        """End a trial that has seen enough."""
        plain, drafted = found.plain, found.drafted
        if found.judged and found.drafts:
            if plain.steps < CHECKED:
                return
            found.drafts = drafted.rate >= plain.rate
        else:
            badly = drafted.steps >= GLIMPSE and drafted.rate < BADLY * plain.rate
            if drafted.steps < TRIAL and not badly:
                return
            found.drafts = drafted.rate > MARGIN * plain.rate
            found.again = AGAIN if found.drafts or not found.judged else min(2 * found.again, LATEST)
        found.judged, found.trying, found.since = True, False, 0

    def _of(self, rows: int) -> _Class:
        """The class of steps with so many rows: up to four each number, then half octaves."""
        size = rows if rows <= 4 else 2 * rows.bit_length() + (rows >> (rows.bit_length() - 2) & 1)
        found = self._classes.get(size)
        if found is None:
            found = self._classes[size] = _Class()
            # More rows leave less room for drafts: where fewer lost, these are tried later.
            fewer = [key for key in self._classes if key < size and self._classes[key].judged]
            if fewer and not self._classes[max(fewer)].drafts:
                found.judged, found.trying = True, False
        return found
