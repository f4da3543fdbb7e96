"""How the next token of each row is chosen: by the row's own rule and seed, whatever else is served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thoughtbubbles.support.sampling import draw

COLDEST = 1e-5
"""A temperature below it takes the likeliest token."""
FEW = 1024
"""Of the likeliest tokens: they mostly have the mass that is asked for."""
MARGIN = 1e-6
"""More than rounding changes a sum of probabilities."""
LEAST_LOGPROB = -9999.0
"""What stands for a logarithm of 0, for which JSON has no number."""


@dataclass(frozen=True)
class Choosing:
    """The rule of one row.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability; 1 is all.
        top_k: only the k likeliest tokens; 0 is all.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from them as often as the answer has them.
        bias: added to the logits of some tokens.
        seed: of what is drawn.
        number: among the answers to one prompt that share a seed, from 0.
        alternatives: how many of the likeliest tokens to name with each token; None asks for no log-probabilities.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    number: int = 0
    alternatives: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < COLDEST

    @property
    def penalises(self) -> bool:
        """Whether it minds what the answer has."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def uniform(self, position: int) -> float:
        """The number in [0, 1) that decides about a token: it depends on seed, answer and position alone."""
        key = draw(self.seed, f"answer {self.number}", str(position).encode())
        return (int.from_bytes(key[:8], "big") >> 11) / 2**53


@dataclass(frozen=True)
class TokenScore:
    """A token and what the model thought of it, before temperature, penalties and bias.

    Attributes:
        token: its id.
        logprob: its log-probability in nats; None where it was not asked for or nothing precedes.
        top: the likeliest tokens with theirs, from the likeliest on.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class NotFiniteError(ValueError):
    """A model gave logits that are not finite."""


class TokenChooser:
    """Chooses tokens of rows in slots.

    Args:
        slots: how many.
    """

    def __init__(self, slots: int) -> None:
        self._rules: list[Choosing] = [Choosing()] * slots
        self._chosen = [0] * slots
        self._counts: dict[int, Tensor] = {}

    def begin(self, slot: int, rule: Choosing) -> None:
        """Start a row that has no answer yet."""
        self._rules[slot], self._chosen[slot] = rule, 0
        self._counts.pop(slot, None)

    @torch.inference_mode()
    def choose(self, logits: Tensor, slots: Sequence[int]) -> list[TokenScore | NotFiniteError]:
        """The next token of each of R rows; an error for a row whose logits are nan or infinite.

        Args:
            logits: [R, V].
            slots: of the rows.
        """
        rules = [self._rules[slot] for slot in slots]
        logits = _wide(logits)
        scores = self._adjusted(logits, slots)
        chosen = scores.argmax(-1)
        if drawn := [row for row, rule in enumerate(rules) if not rule.is_greedy]:
            chosen[drawn] = self._draw(scores[drawn], [slots[row] for row in drawn])
        finite = (logits < torch.inf).all(-1)  # nan is below nothing
        asked = [rule.alternatives for rule in rules]
        # One reading back for all there is to know.
        facts = torch.cat([finite[:, None].double(), _scored(logits, chosen, asked)], dim=1).tolist()
        return [
            self._note(slot, fact[1:], rule) if fact[0] else NotFiniteError("the model's logits are not finite")
            for slot, rule, fact in zip(slots, rules, facts, strict=True)
        ]

    def _note(self, slot: int, fact: list[float], rule: Choosing) -> TokenScore:
        score = _as_score(fact, rule.alternatives)
        self._chosen[slot] += 1
        if slot in self._counts:
            self._counts[slot][score.token] += 1
        return score

    def _adjusted(self, logits: Tensor, slots: Sequence[int]) -> Tensor:
        """Logits with bias and penalties."""
        rules = [self._rules[slot] for slot in slots]
        if not any(rule.bias or rule.penalises for rule in rules):
            return logits
        scores = logits.clone()
        for row, slot, rule in zip(scores, slots, rules, strict=True):
            if rule.bias:
                tokens = torch.tensor(list(rule.bias), device=row.device)
                row[tokens] += torch.tensor(list(rule.bias.values()), device=row.device, dtype=row.dtype)
            if rule.penalises:
                counts = self._counts.setdefault(slot, torch.zeros_like(row))
                row -= rule.frequency_penalty * counts + rule.presence_penalty * (counts > 0)
        return scores

    def _draw(self, scores: Tensor, slots: Sequence[int]) -> Tensor:
        """Tokens [R] drawn by the rows' rules, of which none is greedy."""
        rules = [self._rules[slot] for slot in slots]
        temperatures = [rule.temperature for rule in rules]
        scores = scores / torch.tensor(temperatures, device=scores.device, dtype=scores.dtype)[:, None]
        scores = _keep_likeliest(scores, [rule.top_k for rule in rules])
        shares = _keep_mass(scores.softmax(-1), [rule.top_p for rule in rules])
        uniform = [rule.uniform(self._chosen[slot]) for slot, rule in zip(slots, rules, strict=True)]
        reached = shares.double().cumsum(-1)
        goal = torch.tensor(uniform, device=scores.device, dtype=torch.float64)[:, None] * reached[:, -1:]
        found = torch.searchsorted(reached, goal, right=True)[:, 0]
        return found.clamp(max=scores.shape[-1] - 1)


def score_tokens(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenScore]:
    """What a model thought of given tokens.

    Args:
        logits: [n, V], those before each token.
        tokens: n ids.
        alternatives: how many of the likeliest to name.
    """
    ids = torch.tensor(list(tokens), device=logits.device)
    facts = _scored(_wide(logits), ids, [alternatives] * len(tokens)).tolist()
    return [_as_score(fact, alternatives) for fact in facts]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _scored(logits: Tensor, tokens: Tensor, asked: Sequence[int | None]) -> Tensor:
    """[R, 1 + 1 + 2 K] float64: tokens, their log-probabilities, the K likeliest and theirs; only what is asked for."""
    ids = tokens[:, None].double()
    if all(alternatives is None for alternatives in asked):
        return ids
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, tokens[:, None]).double()
    most = min(max(alternatives or 0 for alternatives in asked), logits.shape[-1])
    top = logprobs.topk(most, dim=-1)
    return torch.cat([ids, own, top.indices.double(), top.values.double()], dim=1)


def _as_score(fact: list[float], alternatives: int | None) -> TokenScore:
    token = int(fact[0])
    if alternatives is None:
        return TokenScore(token)
    most = (len(fact) - 2) // 2
    ids, values = fact[2 : 2 + most], fact[2 + most :]
    top = [(int(each), max(value, LEAST_LOGPROB)) for each, value in zip(ids, values, strict=True)]
    return TokenScore(token, max(fact[1], LEAST_LOGPROB), tuple(top[:alternatives]))


def _keep_likeliest(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Scores [R, V] with -inf beyond the `counts` likeliest of each row; 0 keeps all, and so do ties."""
    size = scores.shape[-1]
    if not any(0 < count < size for count in counts):
        return scores
    kept = [min(count, size) or size for count in counts]
    most = max(count for count in kept if count < size)
    ordered = scores.topk(most, dim=-1).values
    place = torch.tensor([min(count, most) - 1 for count in kept], device=scores.device)
    least = ordered.gather(1, place[:, None])
    cut = torch.tensor([count < size for count in kept], device=scores.device)[:, None]
    return scores.masked_fill(cut & (scores < least), -torch.inf)


def _keep_mass(shares: Tensor, masses: Sequence[float]) -> Tensor:
    """Probabilities [R, V], 0 beyond the likeliest that together have each row's mass; 1 keeps all, and so do ties."""
    rows = [row for row, mass in enumerate(masses) if mass < 1]
    if not rows:
        return shares
    cut = shares[rows]
    mass = torch.tensor([masses[row] for row in rows], device=shares.device, dtype=torch.float64)[:, None]
    ordered = _enough(cut, mass)
    before = ordered.double().cumsum(-1) - ordered.double()
    count = (before < mass).sum(-1, keepdim=True).clamp(min=1)
    least = ordered.gather(1, count - 1)
    shares = shares.clone()
    shares[rows] = cut.masked_fill(cut < least, 0)
    return shares


def _enough(shares: Tensor, mass: Tensor) -> Tensor:
    """The largest of the probabilities [R, V] in descending order: all of them, or enough for the mass [R, 1]."""
    if shares.device.type == "cpu" and shares.shape[-1] > FEW:  # elsewhere sorting is cheaper than asking
        largest = shares.topk(FEW, dim=-1).values
        if bool((largest.double().sum(-1, keepdim=True) >= mass + MARGIN).all()):
            return largest
    return shares.sort(descending=True).values
