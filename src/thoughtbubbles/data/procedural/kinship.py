"""The task `kinship`: `BsisterC;AmotherB;?AC` is answered by `aunt`.

    prompt   = fact ... "?" name name
    fact     = name relation name ";"
    name     = "A" ... "Z"
    relation = "father" | "mother" | "son" | "daughter" | "brother" | "sister" | "husband" | "wife"

`AmotherB;` says that A's mother is B. The facts, in a random order, form a chain from the first person of the question
to the second; the answer is what the second is to the first, one of the words of `RELATIONS`. The difficulty counts the
facts. As in CLUTRR (arXiv 1908.06177) every shorter chain from the first person has such a word too, so that the answer
can be found fact by fact; no fact about a sibling's sibling follows another. Names stand for different people, siblings
share both parents, spouses their children, nobody marries twice or a relative, and a spouse may be of either sex.
"""

import random
from collections.abc import Callable
from itertools import pairwise

from thoughtbubbles.data.procedural.examples import ProceduralTask

NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Couple:
    """Two parents, as far as they are known, and their children."""

    def __init__(self) -> None:
        self.spouses: list[Person] = []
        self.children: list[Person] = []


class Person:
    """Somebody, born to a couple and one half of another, which may be known by nothing else."""

    def __init__(self, woman: bool, born_to: Couple | None = None, married: Couple | None = None) -> None:
        self.woman = woman
        self.born_to = born_to or Couple()
        self.married = married or Couple()
        self.born_to.children.append(self)
        self.married.spouses.append(self)

    def leave(self) -> None:
        """Undo the making of this person."""
        self.born_to.children.remove(self)
        self.married.spouses.remove(self)

    def others(self, people: "list[Person]") -> "list[Person]":
        """Those of `people` that are somebody else."""
        return [each for each in people if each is not self]


# The relatives that one step reaches.
STEPS: dict[str, Callable[[Person], list[Person]]] = {
    "parent": lambda person: person.born_to.spouses,
    "child": lambda person: person.married.children,
    "sibling": lambda person: person.others(person.born_to.children),
    "spouse": lambda person: person.others(person.married.spouses),
}
# What a man and a woman are called who are reached by one of some ways, each a sequence of steps.
RELATIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("father", "mother"): ("parent",),
    ("son", "daughter"): ("child",),
    ("brother", "sister"): ("sibling",),
    ("husband", "wife"): ("spouse",),
    ("grandfather", "grandmother"): ("parent parent",),
    ("grandson", "granddaughter"): ("child child",),
    ("uncle", "aunt"): ("parent sibling", "parent sibling spouse"),
    ("nephew", "niece"): ("sibling child", "spouse sibling child"),
    ("cousin", "cousin"): ("parent sibling child",),
    ("father-in-law", "mother-in-law"): ("spouse parent",),
    ("son-in-law", "daughter-in-law"): ("child spouse",),
    ("brother-in-law", "sister-in-law"): ("spouse sibling", "sibling spouse", "spouse sibling spouse"),
}


def make_kinship(chooser: random.Random, difficulty: int) -> tuple[str, str]:
    """A random chain of `difficulty` facts with the question for its ends, and the answer."""
    names = chooser.sample(NAMES, difficulty + 1)
    people = None
    while people is None:
        people = _chain(chooser, difficulty)
    facts = [
        f"{name}{relation(person, relative)}{other};"
        for (name, person), (other, relative) in pairwise(zip(names, people, strict=True))
    ]
    chooser.shuffle(facts)
    return f"{''.join(facts)}?{names[0]}{names[-1]}", str(relation(people[0], people[-1]))


def _chain(chooser: random.Random, length: int) -> list[Person] | None:
    """A person and `length` more, each one step from the one before; None for one that could not go on."""
    people = [Person(chooser.random() < 0.5)]
    last = ""
    for _ in range(length):
        for step in chooser.sample(list(STEPS), len(STEPS)):
            # A sibling's sibling is a sibling: long chains would end in many of them.
            relative = None if step == last == "sibling" else _new_relative(people[-1], step, chooser.random() < 0.5)
            if relative is None:
                continue
            if relation(people[0], relative) is not None:
                people.append(relative)
                last = step
                break
            relative.leave()
        else:
            return None
    return people


def _new_relative(person: Person, step: str, woman: bool) -> Person | None:
    """A person who was not there before; None where the couple is complete."""
    couple = person.married if step in ("child", "spouse") else person.born_to
    if step in ("child", "sibling"):
        return Person(woman, born_to=couple)
    return Person(woman, married=couple) if len(couple.spouses) < 2 else None


def relation(person: Person, other: Person) -> str | None:
    """What another is to a person; None where there is no word for it."""
    for words, ways in RELATIONS.items():
        if any(other in _reached(person, way) for way in ways):
            return words[other.woman]
    return None


def _reached(person: Person, way: str) -> list[Person]:
    people = [person]
    for step in way.split():
        people = [relative for each in people for relative in STEPS[step](each)]
    return people


WORDS = dict.fromkeys(word for pair in RELATIONS for word in pair)
# Longer chains are rare, and half of those of ten facts end at a cousin.
KINSHIP = ProceduralTask("kinship", (*NAMES, *WORDS, *";?"), 8, make_kinship)
