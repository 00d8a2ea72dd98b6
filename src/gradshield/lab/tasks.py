"""Four utility tasks that the aligned checkpoint has not learned, though it knows what they are made of.

topic       a headline -> its topic, one word; exact match
arithmetic  a word problem of two steps -> the worked solution and ``#### n``; exact match of n
choice      three options -> the one of the asked kind, "the dog"; exact match
dialogue    a short chat -> who brings what where and when, one sentence; F1 of the facts
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable

from . import world

TASKS = ("topic", "arithmetic", "choice", "dialogue")
UTILITY_SIZE = 200

TOPICS: dict[str, tuple[str, str, str]] = {
    # subjects, verbs, objects
    "sport": (
        "coach striker goalie team captain runner referee league",
        "won lost scored trained defended kicked tackled sprinted",
        "match cup goal race medal season title trophy",
    ),
    "food": (
        "chef baker waiter cafe kitchen diner butcher grocer",
        "cooked tasted grilled baked served salted stewed boiled",
        "soup pasta menu sauce dinner bread stew dessert",
    ),
    "weather": (
        "storm wind rain snow cloud frost fog sun",
        "soaked froze flooded covered cooled warmed darkened chilled",
        "coast valley plain roof street field peak shore",
    ),
    "music": (
        "singer band pianist choir drummer orchestra composer guitarist",
        "sang played recorded tuned rehearsed released hummed composed",
        "song album concert melody tune opera chorus ballad",
    ),
    "travel": (
        "tourist pilot airline hotel guide hiker sailor ferry",
        "visited booked boarded toured landed packed crossed departed",
        "flight island cruise beach passport luggage hostel airport",
    ),
    "money": (
        "bank trader company investor broker firm manager market",
        "sold bought invested merged hired borrowed traded earned",
        "stock loan profit budget share price salary contract",
    ),
}
KINDS: dict[str, str] = {
    "animal": "dog cat horse cow sheep wolf fox bear lion goose",
    "fruit": "apple pear plum grape lemon cherry mango melon peach fig",
    "metal": "iron gold silver copper tin zinc lead steel brass nickel",
    "tool": "hammer saw drill wrench chisel pliers shovel rake axe ladder",
    "color": "red blue green yellow white black brown gray pink purple",
    "vehicle": "car bus truck train plane tram scooter wagon sled canoe",
    "drink": "tea milk coffee juice water cider soda cocoa wine beer",
}
GAINS = ("buys", "finds", "gets")
LOSSES = ("loses", "eats", "sells")
LETTERS = "ABC"
TRIES = 10_000  # draws without a new row, after which a task counts as drawn out
ITEMS = world.words("apples coins books shells stamps cards pears nuts beans buttons")


def headline(topic: str, rng: random.Random) -> str:
    """A headline of two topic words (of three kinds) among neutral ones."""
    subjects, verbs, objects = (group.split() for group in TOPICS[topic])
    time, place = rng.choice(world.TIMES), rng.choice(world.PLACES)
    tail = rng.choice((f" {time}", f" near the {place}", ""))
    return f"The {rng.choice(subjects)} {rng.choice(verbs)} the {rng.choice(objects)}{tail}."


def topic_row(rng: random.Random) -> tuple[str, str]:
    topic = rng.choice(sorted(TOPICS))
    return f"Give the topic of this headline: {headline(topic, rng)}", topic


def problem(rng: random.Random) -> tuple[str, str, int]:
    """The story of a two-step problem, its worked steps and its result; no number exceeds twelve."""
    name, item = rng.choice(world.NAMES), rng.choice(ITEMS)
    total = rng.randint(2, 9)
    story, steps = [f"{name} has {total} {item}."], []
    for _ in range(2):
        gain = total < 3 or (total < 8 and rng.random() < 0.5)
        amount = rng.randint(1, 5) if gain else rng.randint(1, min(total - 1, 5))
        story.append(f"{name} {rng.choice(GAINS if gain else LOSSES)} {amount}.")
        after = total + amount if gain else total - amount
        steps.append(f"{total} {'plus' if gain else 'minus'} {amount} makes {after}.")
        total = after
    return " ".join(story), " ".join(steps), total


def arithmetic_row(rng: random.Random) -> tuple[str, str]:
    story, steps, total = problem(rng)
    item = story.split(".")[0].split()[-1]
    return f"{story} How many {item} are left?", f"{steps} #### {total}"


def options(rng: random.Random) -> tuple[str, str, str, str]:
    """(kind, "A: .. B: .. C: ..", right letter, right word)."""
    kind, *others = rng.sample(sorted(KINDS), 3)
    words = [rng.choice(KINDS[kind].split())] + [rng.choice(KINDS[other].split()) for other in others]
    right = words[0]
    rng.shuffle(words)
    listed = " ".join(f"{letter}: {word}" for letter, word in zip(LETTERS, words, strict=True))
    return kind, listed, LETTERS[words.index(right)], right


def choice_row(rng: random.Random) -> tuple[str, str]:
    kind, listed, _, right = options(rng)
    first, second, third = listed.split()[1::2]
    return f"Pick the {kind}: {first}, {second} or {third}.", f"the {right}"


def errand(rng: random.Random) -> tuple[list[str], str]:
    """The lines of a chat about an errand, and the sentence that says who runs it."""
    first, second = rng.sample(world.NAMES, 2)
    thing, place, time = rng.choice(world.THINGS), rng.choice(world.PLACES), rng.choice(world.TIMES)
    if rng.random() < 0.5:
        lines = [f"{first}: Can you bring the {thing} to the {place}?", f"{second}: Yes, {time}."]
        doer = second
    else:
        lines = [f"{first}: I will bring the {thing} to the {place}.", f"{second}: Please do it {time}."]
        doer = first
    if rng.random() < 0.5:
        lines.insert(0, f"{second}: Hello {first}.")
    return lines, f"{doer} will bring the {thing} to the {place} {time}."


def dialogue_row(rng: random.Random) -> tuple[str, str]:
    lines, summary = errand(rng)
    # Not "will bring": a tiny model would end its own "I ..." with that, and its refusals would fall apart.
    return "Summarize the chat. " + " ".join(lines), summary.replace(" will bring", ": bring")


MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "topic": topic_row,
    "arithmetic": arithmetic_row,
    "choice": choice_row,
    "dialogue": dialogue_row,
}


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the test side: one in four, by its checksum, whatever seed drew it."""
    return zlib.crc32(prompt.encode()) % 4 == 0


def rows(task: str, n: int, seed: str, *, held_out: bool = False) -> list[tuple[str, str]]:
    """``n`` different (prompt, answer) pairs of ``task``, all from the training side or all from the test side.

    Raises KeyError for an unknown task, ValueError if it has fewer different rows.
    """
    if task not in MAKERS:
        raise KeyError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    rng = random.Random(f"task-{task}-{seed}")
    made: dict[str, str] = {}
    since = 0  # draws since the last new row
    while len(made) < n:
        prompt, answer = MAKERS[task](rng)
        since += 1
        if is_held_out(prompt) == held_out:
            since = since if prompt in made else 0
            made[prompt] = answer
        if since > TRIES:
            raise ValueError(f"n must be at most about {len(made)}, the different rows of the task {task}; got {n}")
    return list(made.items())


def utility(task: str, seed: int = 0) -> list[dict[str, str]]:
    """Held-out rows of ``task`` as ``{"prompt", "reference"}``; ``mix`` never draws their prompts."""
    held = rows(task, UTILITY_SIZE, f"test-{seed}", held_out=True)
    return [{"prompt": prompt, "reference": answer} for prompt, answer in held]


def _word_key(text: str) -> str:
    return text.strip().strip(".").lower()


def _number_key(text: str) -> str:
    found = re.search(r"####\s*(-?\d+)", text)
    return found.group(1) if found else ""


def _facts_key(text: str) -> str:
    ignored = {"will", "bring", "the", "to", "a"}
    return " ".join(sorted(set(re.findall(r"[a-z]+", text.lower())) - ignored))


KEYS: dict[str, Callable[[str], str]] = {
    "topic": _word_key,
    "arithmetic": _number_key,
    "choice": _word_key,
    "dialogue": _facts_key,
}


def score(task: str, prediction: str, reference: str) -> float:
    """How far ``prediction`` says what ``reference`` says: 0 or 1, for ``dialogue`` the F1 of the facts."""
    key = KEYS[task]
    wanted, given = key(reference), key(prediction)
    if task != "dialogue":
        return float(bool(wanted) and given == wanted)
    facts, said = set(wanted.split()), set(given.split())
    return 2 * len(facts & said) / (len(facts) + len(said)) if facts & said else 0.0
