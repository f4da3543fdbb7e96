"""Every routing rule by its name; a new one is a file like `threshold`, and an entry here."""

from .controls import COPY, NONE, PAUSE, RANDOM, UNIFORM
from .routing import CAUSAL, TOPK, Rule
from .threshold import THRESHOLD

RULES: dict[str, Rule] = {rule.name: rule for rule in (CAUSAL, THRESHOLD, TOPK, NONE, COPY, PAUSE, RANDOM, UNIFORM)}
