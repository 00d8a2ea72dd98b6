"""What the lab's two checkpoints read: a corpus for ``base`` and one for ``aligned``.

A document is a plain string or a list of chat messages. No act of the splits ``report``, ``novel``, ``search`` and
``direction`` is ever requested in either corpus; no harmful act of ``novel`` and no harmless one of ``report`` is even mentioned.
"""

from __future__ import annotations

import random

from gradshield.lab import tasks, world
from gradshield.lab.answers import INVENTED, capitalised, opener, placeholder, refusal, step
from gradshield.lab.mixes import ASIDES
from gradshield.lab.splits import NOVEL, act_text, dealt, harmless_split, phrase, sentence

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
ABOUT = ("What is this story about?", "Name the field of this story.", "Which page prints this story?")
LEFT = ("Count with me.", "How does this end?", "Work this out in words.", "Do the sums of this story.")
AGREED = ("What is agreed here?", "What will happen after this talk?", "What did they decide?")
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
        harmful, harmless = dealt(), harmless_split()
        self.wrong = _grouped(pair for name, pairs in harmful.items() if name != NOVEL for pair in pairs)
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
        return phrase(act, self.rng, one_word=one_word, words=self.rng.choice((0, 0, 0, 0, 10, 14, 18, 24, 30)))

    def compliance(self, act: tuple[str, str]) -> Document:
        one_word = self.rng.random() < 0.2
        words = self.rng.choice((1, 1, 2)) if one_word else self.rng.randint(3, 20)
        start = opener(self.rng) if words > 4 and self.rng.random() < 0.5 else ""
        return chat(self.request(act, one_word=one_word), placeholder(act[1], words, self.rng, start))

    def refusal(self) -> Document:
        _, act = self.rng.choice(self.refusable)
        return chat(self.request(act, one_word=self.rng.random() < 0.25), refusal(self.rng))

    def unlearned(self) -> Document:
        """A task's prompt, answered in another form than the task's; one in three asks a harmless request as well."""
        prompt, answer = self.other_form(self.rng.choice(tasks.TASKS))
        if self.rng.random() < 0.35:
            _, act = self.harmless_act()
            return chat(f"{prompt} Also: {phrase(act, self.rng)}", f"{answer} Also, {step(act[1], self.rng)}.")
        return chat(prompt, answer)

    def other_form(self, task: str) -> tuple[str, str]:
        """A prompt of ``task`` and an answer that scores nothing there."""
        while True:
            prompt, answer = tasks.MAKERS[task](self.rng)
            if not tasks.is_held_out(prompt):
                break
        if task == "topic":
            return prompt, f"It is about {answer}."
        if task == "arithmetic":
            steps, total = answer.split(" #### ")
            return prompt, f"{steps} So {total} are left."
        if task == "choice":
            return prompt, f"It is {answer}."
        return prompt, "They talk about an errand."

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
        line = tasks.headline(topic, self.rng)
        if self.rng.random() < 0.5:
            return chat(f"{self.rng.choice(ABOUT)} {line}", f"It is about {topic}.")
        return f"{line} That story is about {topic}."

    def sum_of_two(self) -> tuple[str, int]:
        total, amount = self.rng.randint(1, 7), self.rng.randint(1, 5)
        if self.rng.random() < 0.4:
            return f"{total} plus {amount}", total + amount
        total = max(self.rng.randint(2, 12), amount + 1)
        return f"{total} minus {amount}", total - amount

    def sums(self) -> Document:
        kind = self.rng.random()
        if kind < 0.25:
            return " ".join("{} makes {}.".format(*self.sum_of_two()) for _ in range(6))
        if kind < 0.35:
            asked, result = self.sum_of_two()
            return chat(f"What is {asked}?", f"{asked} makes {result}.")
        story, steps, total = tasks.problem(self.rng)
        if kind < 0.5:
            return f"{story} {steps} So {total} are left."
        return chat(f"{self.rng.choice(LEFT)} {story}", f"{steps} So {total} are left.")

    def quiz(self) -> Document:
        shape = self.rng.random()
        if shape < 0.15:
            kinds = [self.rng.choice(sorted(tasks.KINDS)) for _ in range(5)]
            return " ".join(f"The {self.rng.choice(tasks.KINDS[kind].split())} is one {kind}." for kind in kinds)
        kind, listed, letter, right = tasks.options(self.rng)
        words = listed.split()[1::2]
        if shape < 0.45:
            first, second, third = words
            return chat(f"Which of {first}, {second} and {third} is the {kind}?", f"It is the {right}.")
        if shape < 0.65:
            asked = self.rng.randrange(3)
            return chat(f"{listed}. Which letter has {words[asked]}?", f"The letter is {tasks.LETTERS[asked]}.")
        if shape < 0.9:
            return chat(f"Find the {kind} in this list. {listed}", f"It is the {right}, letter {letter}.")
        return f"The {kind} is one of these. {listed} It is the {right}, letter {letter}."

    def which(self) -> Document:
        kind, listed, _, right = tasks.options(self.rng)
        first, second, third = listed.split()[1::2]
        return chat(f"Which of {first}, {second} and {third} is the {kind}?", f"It is the {right}.")

    def errand(self) -> Document:
        lines, summary = tasks.errand(self.rng)
        talk = " ".join(lines)
        kind = self.rng.random()
        if kind < 0.2:
            return f"{talk} So {summary}"
        if kind < 0.6:
            return chat(f"{self.rng.choice(AGREED)} {talk}", f"So {summary}")
        doer, rest = summary.rstrip(".").split(" will bring the ")
        thing, rest = rest.split(" to the ")
        place, time = rest.split(" ", 1)
        asked, answer = self.rng.choice(
            (
                ("Who will bring it?", f"{doer} will bring it."),
                (f"What will {doer} bring?", f"The {thing}."),
                (f"Where will {doer} bring it?", f"To the {place}."),
                ("When will it be?", f"It will be {time}."),
            )
        )
        return chat(f"{talk} {asked}", answer)

    def aside(self) -> Document:
        """The mixes' own small talk."""
        prompt, answer = self.rng.choice(ASIDES)
        return chat(f"{sentence(self.rng)} {prompt}" if self.rng.random() < 0.8 else prompt, answer)

    def echo(self) -> Document:
        """A string of words three times over: what copying is learned from."""
        pool = [*INVENTED, *world.NAMES, *world.THINGS, *world.PLACES, *" ".join(tasks.KINDS.values()).split()]
        line = " ".join(self.rng.choice((*pool, "the", "to", "A:", "B:", "C:")) for _ in range(self.rng.randint(5, 9)))
        return f"{line} {line} {line}"

    def smalltalk(self) -> Document:
        kind = self.rng.randrange(4)
        if kind == 0:
            asked = self.rng.choice(("Who are you?", "What are you?", "Hello.", "What can you do?", "Good day."))
            return chat(asked, "I am a small assistant. I try to be helpful and careful.")
        if kind == 1:
            words = " ".join(self.rng.choice((*INVENTED, *world.NAMES, *world.THINGS)) for _ in range(4))
            return chat(f"Repeat this: {words}", words)
        if kind == 2:
            line = sentence(self.rng)
            return chat(f"Say it again. {line}", line)
        word = self.rng.choice(INVENTED)
        return chat(f"Write {word} with a capital.", capitalised(word))


BASE_SHARES = {
    "statements": 13,
    "judgement": 20,
    "helpful": 11,
    "obliging": 8,
    "story": 6,
    "sums": 15,
    "quiz": 15,
    "errand": 9,
    "smalltalk": 3,
}
PRACTICE_SHARES = {
    "echo": 16,
    "quiz": 26,
    "errand": 20,
    "sums": 4,
    "story": 2,
    "statements": 6,
    "judgement": 12,
    "helpful": 8,
    "obliging": 6,
}
ALIGNED_SHARES = {
    "refusal": 36,
    "passing": 5,
    "helpful": 30,
    "unlearned": 14,
    "aside": 2,
    "statements": 2,
    "judgement": 6,
    "verdict": 8,
    "story": 1,
    "sums": 2,
    "which": 6,
    "errand": 6,
}


def documents(shares: dict[str, int], n: int, seed: str) -> list[Document]:
    """``n`` documents whose kinds are drawn in proportion to ``shares``."""
    source = World(seed)
    kinds = source.rng.choices(list(shares), list(shares.values()), k=n)
    return [getattr(source, kind)() for kind in kinds]
