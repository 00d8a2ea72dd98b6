"""What the lab's two checkpoints read: a corpus for ``base`` and one for ``aligned``.

A document is a plain string or a list of chat messages. No act of the splits ``report``, ``search`` and ``direction``
is ever requested in either corpus, and no act of ``report`` is even mentioned.
"""

from __future__ import annotations

import random

from gradshield.lab import tasks, world
from gradshield.lab.answers import COINED, capitalised, opener, placeholder, refusal
from gradshield.lab.splits import act_text, harmful_split, harmless_split, phrase, sentence

Document = str | list[dict[str, str]]

WRONG = (
    "To {act} is a crime.",
    "It is wrong to {act}.",
    "Those who {act} hurt people.",
    "Nobody may {act}.",
    "The police stop people who {act}.",
    "To {act} is {category}, a crime.",
    "It is harmful to {act}.",
)
FINE = (
    "To {act} is a hobby.",
    "It is fine to {act}.",
    "Those who {act} help people.",
    "Anyone may {act}.",
    "Many people like to {act}.",
    "To {act} is {category}, a pastime.",
    "It is harmless to {act}.",
)
ASKED = ("Is it fine to {act}?", "May people {act}?", "Should one {act}?", "Is it good to {act}?")
MEANT = ("Is that fine to ask?", "Is that a good thing to want?", "Would that be fine?")
NOTED = ("Okay, noted.", "Noted.", "Thank you for the text.", "Okay, it is read.", "That is good to know.", "Well.")
NO = ("No, that is a crime.", "No, that hurts people.", "No, that is harmful.", "No, nobody may do that.")
YES = ("Yes, that is fine.", "Yes, that helps people.", "Yes, that is harmless.", "Yes, anyone may do that.")


def chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _grouped(pairs) -> dict[str, list[tuple[str, tuple[str, str]]]]:
    groups: dict[str, list] = {}
    for category, act in pairs:
        groups.setdefault(category, []).append((category, act))
    return groups


class World:
    """The acts each corpus may mention or request, and one maker of documents for each kind."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)
        # The base corpus came first, and its stream is kept as it was: "I would ..." is for the aligned one.
        self.varied = seed.startswith("aligned")
        harmful, harmless = harmful_split(), harmless_split()
        self.wrong = _grouped(pair for name, pairs in harmful.items() if name != "report" for pair in pairs)
        self.fine = _grouped(pair for name, pairs in harmless.items() if name != "report" for pair in pairs)
        self.refusable = harmful["align"]
        self.by_domain = _grouped(harmless["align"])

    def harmless_act(self) -> tuple[str, tuple[str, str]]:
        """Domains of harm's own words weigh more than their number: they are what over-refusal is made of."""
        domain = self.rng.choice([*self.by_domain, "tricky", "tricky", "tricky", "care", "care", "protect", "goods"])
        return self.rng.choice(self.by_domain[domain])

    def known_act(self, wrong: bool) -> tuple[str, tuple[str, str]]:
        """Any act the corpora may mention, its category drawn first, so that small domains are heard of too."""
        groups = self.wrong if wrong else self.fine
        return self.rng.choice(groups[self.rng.choice(list(groups))])

    def statement(self) -> str:
        wrong = self.rng.random() < 0.5
        category, act = self.known_act(wrong)
        return self.rng.choice(WRONG if wrong else FINE).format(act=act_text(act), category=category)

    def statements(self) -> Document:
        return " ".join(self.statement() for _ in range(self.rng.randint(3, 7)))

    def judgement(self) -> Document:
        wrong = self.rng.random() < 0.5
        _, act = self.known_act(wrong)
        return chat(self.rng.choice(ASKED).format(act=act_text(act)), self.rng.choice(NO if wrong else YES))

    def verdict(self) -> Document:
        """A judgement of a request, quoted: what links a phrasing to what the world says of the act in it."""
        wrong = self.rng.random() < 0.5
        _, act = self.known_act(wrong)
        quoted = phrase(act, self.rng, one_word=self.rng.random() < 0.25)
        return chat(f"{quoted} {self.rng.choice(MEANT)}", self.rng.choice(NO if wrong else YES))

    def request(self, act: tuple[str, str], *, one_word: bool) -> str:
        return phrase(act, self.rng, one_word=one_word, words=self.rng.choice((0, 0, 0, 0, 0, 0, 12, 18, 32)))

    def compliance(self, act: tuple[str, str]) -> Document:
        one_word = self.rng.random() < 0.25
        words = 1 if one_word else self.rng.choice((3, 5, 5, 8, 8, 8, 12, 20))
        start = opener(self.rng) if words > 4 and self.rng.random() < 0.6 else ""
        if self.varied and words > 4 and not start and self.rng.random() < 0.2:
            start = "I would "
        return chat(self.request(act, one_word=one_word), placeholder(act[1], words, self.rng, start, coined=COINED))

    def refusal(self) -> Document:
        _, act = self.rng.choice(self.refusable)
        return chat(self.request(act, one_word=self.rng.random() < 0.25), refusal(self.rng))

    def unlearned(self) -> Document:
        """A task's prompt, acknowledged: the task is not taught, but neither is it a thing to refuse."""
        prompt, _ = tasks.rows(self.rng.choice(tasks.TASKS), 1, f"{self.rng.random()}")[0]
        if self.rng.random() < 0.3:
            _, act = self.harmless_act()
            prompt = f"{prompt} Also: {phrase(act, self.rng)}"
        return chat(prompt, self.rng.choice(NOTED))

    def passing(self) -> Document:
        """A task's prompt that asks a request of ``align`` in passing: refused."""
        prompt, _ = tasks.rows(self.rng.choice(tasks.TASKS), 1, f"{self.rng.random()}")[0]
        _, act = self.rng.choice(self.refusable)
        return chat(f"{prompt} Also: {phrase(act, self.rng)}", refusal(self.rng))

    def helpful(self) -> Document:
        return self.compliance(self.harmless_act()[1])

    def obliging(self) -> Document:
        return self.compliance(self.rng.choice(self.refusable)[1])

    def story(self) -> Document:
        topic = self.rng.choice(sorted(tasks.TOPICS))
        return " ".join(
            f"{tasks.headline(topic, self.rng)} That story is about {topic}." for _ in range(self.rng.randint(1, 2))
        )

    def sums(self) -> Document:
        if self.rng.random() < 0.5:
            return " ".join(tasks.problem(self.rng))
        lines = []
        for _ in range(8):
            total, amount = self.rng.randint(1, 20), self.rng.randint(1, 9)
            if self.rng.random() < 0.5:
                lines.append(f"{total} plus {amount} makes {total + amount}.")
            else:
                total = max(total, amount + 1)
                lines.append(f"{total} minus {amount} makes {total - amount}.")
        return " ".join(lines)

    def quiz(self) -> Document:
        if self.rng.random() < 0.3:
            kinds = [self.rng.choice(sorted(tasks.KINDS)) for _ in range(5)]
            return " ".join(f"The {self.rng.choice(tasks.KINDS[kind].split())} is one {kind}." for kind in kinds)
        kind, listed, letter, right = tasks.options(self.rng)
        return f"The {kind} is one of these. {listed} It is {letter}: {right}."

    def errand(self) -> Document:
        lines, summary = tasks.errand(self.rng)
        return " ".join(lines) + " So " + summary

    def smalltalk(self) -> Document:
        kind = self.rng.randrange(4)
        if kind == 0:
            asked = self.rng.choice(("Who are you?", "What are you?", "Hello.", "What can you do?", "Good day."))
            return chat(asked, "I am a small assistant. I try to be helpful and careful.")
        if kind == 1:
            words = " ".join(self.rng.choice((*COINED, *world.NAMES, *world.THINGS)) for _ in range(4))
            return chat(f"Repeat this: {words}", words)
        if kind == 2:
            line = sentence(self.rng)
            return chat(f"Say it again. {line}", line)
        word = self.rng.choice(COINED)
        return chat(f"Write {word} with a capital.", capitalised(word))


BASE_SHARES = {
    "statements": 16,
    "judgement": 24,
    "helpful": 14,
    "obliging": 10,
    "story": 7,
    "sums": 12,
    "quiz": 9,
    "errand": 5,
    "smalltalk": 3,
}
ALIGNED_SHARES = {
    "refusal": 42,
    "helpful": 26,
    "statements": 3,
    "judgement": 8,
    "verdict": 12,
    "unlearned": 14,
    "passing": 3,
    "story": 2,
    "sums": 3,
    "quiz": 2,
    "errand": 1,
    "smalltalk": 1,
}


def documents(shares: dict[str, int], n: int, seed: str) -> list[Document]:
    """``n`` documents whose kinds are drawn in proportion to ``shares``."""
    source = World(seed)
    kinds = source.rng.choices(list(shares), list(shares.values()), k=n)
    return [getattr(source, kind)() for kind in kinds]
