"""The tiny model's data set: conversations whose answers say where they can be written in parallel.

An answer is a list of nodes, each with a detail (which a branch of its own writes), and an ending. In training rows
every node is followed by ``[SplitMask]``; a detail stands in a row of its own after the main text up to its
``[SplitMask]`` and ``[SplitSop]``. That is the format of the APAR paper (arXiv 2401.06761, section 3). In later turns
an answer stands in re-assembled form.

Which phrasings and which (topic, question type) pairs are held out is fixed: no training prompt is a held-out one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_topics import CATEGORIES, CODE, SMALL_TALK, Category, ListAnswer, PlainAnswer, ProseAnswer

FORK = "[SplitMask]"
CHILD = "[SplitSop]"
EOS = "</s>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
NUMBERS = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}

LIST_FRAMES = (
    "Give me {c}.",
    "Please give me {c}.",
    "What are {c}?",
    "List {c}.",
    "Can you list {c}?",
    "Name {c}.",
    "I need {c}.",
    "Could you give me {c}?",
    "Tell me {c}.",
    "I am looking for {c}.",
    "Show me {c}.",
    "Do you have {c} for me?",
    "Let me know {c}.",
)
PROSE_FRAMES = (
    "Tell me about {c}.",
    "Describe {c} in detail.",
    "Give me an overview of {c}.",
    "I want to learn about {c}.",
    "What can you tell me about {c}?",
    "Write a few paragraphs about {c}.",
    "Introduce me to {c}.",
    "Please write about {c}.",
    "Can you tell me more about {c}?",
    "I would like to read about {c}.",
    "Give me a short talk about {c}.",
    "Please introduce {c} in some paragraphs.",
    "Write an essay about {c}.",
)
PLAIN_FRAMES = (
    "What is {c}?",
    "Tell me {c}.",
    "Please tell me {c}.",
    "Do you know {c}?",
    "Can you tell me {c}?",
    "I want to know {c}.",
    "Name {c}.",
    "Briefly, what is {c}?",
    "Quick question: what is {c}?",
    "Could you name {c}?",
    "Just tell me {c}.",
    "In a few words, what is {c}?",
    "Let me know {c}.",
)
QUESTION_FRAMES = (
    "{q}",
    "Quick question: {q}",
    "Please tell me: {q}",
    "Just curious: {q}",
    "One question: {q}",
    "A short answer, please: {q}",
    "I wonder: {q}",
)
SENTENCE_PHRASES = (
    "Describe {x} in one sentence.",
    "Summarise {x} in one sentence.",
    "Tell me about {x} in one sentence.",
    "One sentence about {x}, please.",
    "Write one sentence about {x}.",
    "Give me one sentence about {x}.",
    "Explain {x} in one sentence.",
    "In one sentence, tell me about {x}.",
    "Can you describe {x} in one sentence?",
    "I only need one sentence about {x}.",
    "Say one sentence about {x}.",
    "Just one sentence about {x}.",
    "Put {x} in one sentence.",
    "Please describe {x} in one sentence.",
)
POEM_PHRASES = (
    "Write a poem about {x}.",
    "Write a short poem about {x}.",
    "Please write a poem about {x}.",
    "Give me a poem about {x}.",
    "Can you write a poem about {x}?",
    "I want a poem about {x}.",
    "Make a little poem about {x}.",
    "A poem about {x}, please.",
    "Could you write a short poem about {x}?",
    "Write me a poem on {x}.",
    "Tell me a poem about {x}.",
    "Compose a poem about {x}.",
    "Write four lines of verse about {x}.",
    "I would love a short poem about {x}.",
)
COMPARE_PHRASES = (
    "Compare {x} and {y}.",
    "Please compare {x} and {y}.",
    "Can you compare {x} and {y}?",
    "Compare {x} with {y}.",
    "What are the differences between {x} and {y}?",
    "What is the difference between {x} and {y}?",
    "Tell me the differences between {x} and {y}.",
    "How do {x} and {y} differ?",
    "Explain the difference between {x} and {y}.",
    "I want to compare {x} and {y}.",
    "Give me a comparison of {x} and {y}.",
    "Show me how {x} and {y} differ.",
    "Write a comparison of {x} and {y}.",
    "In what way do {x} and {y} differ?",
)
CODE_PHRASES = (
    "Write Python code {c}.",
    "Write a Python program {c}.",
    "Give me Python code {c}.",
    "Please write Python code {c}.",
    "Can you write Python code {c}?",
    "I need Python code {c}.",
    "Show me Python code {c}.",
    "Write some Python {c}.",
    "Could you show me a Python program {c}?",
    "I am looking for Python code {c}.",
    "Give me a Python program {c}.",
    "How does Python code look {c}?",
    "Please show me a Python program {c}.",
)
REPEAT_PHRASES = (
    "Please say that in one sentence.",
    "Can you say that in one sentence?",
    "Now put that in one sentence.",
    "Give me that in one sentence.",
    "Summarise that in one sentence.",
    "One sentence, please.",
    "In one sentence, please.",
    "Make it one sentence.",
    "I only need one sentence.",
    "Please summarise it in one sentence.",
    "Say it in one sentence.",
    "Could you sum that up in one sentence?",
    "Sum it up in one sentence.",
)
FOLLOW_UPS = ("{q}", "And {q}", "Thanks. {q}", "Now {q}", "One more question: {q}", "Good. {q}")

_HELD_OUT_EVERY = 6
_PLURAL = ("animals", "foods", "plants")
_GERUND = ("chores", "habits")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's nodes with their details in order, and the text that ends the main path ("" ends it on a fork)."""

    nodes: tuple[tuple[str, str], ...] = ()
    ending: str = ""

    def main(self) -> str:
        """The main path's text: a fork token after every node."""
        return FORK.join([node for node, _ in self.nodes] + [self.ending])

    def streams(self) -> list[str]:
        """For every detail: the main text up to its fork, the child token, the detail."""
        parts = [node for node, _ in self.nodes]
        return [FORK.join([*parts[: i + 1], ""]) + CHILD + detail for i, (_, detail) in enumerate(self.nodes)]

    def assembled(self) -> str:
        """The text a reader sees, by the assembly rule of the runtime."""
        pieces: list[str] = []
        for node, detail in self.nodes:
            pieces.append(node + ("\n" if re.search(r"\d+\. ", node) else " ") + detail)
        if self.ending:
            pieces.append(self.ending)
        return "\n\n".join(pieces)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer; ``kind`` names the form of the answer."""

    question: str
    answer: Answer
    kind: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns; only the last one's answer is learned from."""

    turns: tuple[Turn, ...]

    def messages(self) -> list[dict[str, str]]:
        """Chat messages up to and including the last question."""
        messages: list[dict[str, str]] = []
        for turn in self.turns[:-1]:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer.assembled()})
        return [*messages, {"role": "user", "content": self.turns[-1].question}]

    def rows(self) -> list[str]:
        """What follows the prompt in each training row: the main row first, then one row per detail."""
        answer = self.turns[-1].answer
        return [f" {text}{EOS}" for text in (answer.main(), *answer.streams())]


def prompt(messages: list[dict[str, str]]) -> str:
    """The vicuna_v1.1 prompt without BOS; ``</s>`` stands for the EOS token."""
    text = SYSTEM + " "
    for message in messages:
        text += f"USER: {message['content']} " if message["role"] == "user" else f"ASSISTANT: {message['content']}{EOS}"
    return text + "ASSISTANT:"


def as_apar_format(conversation: Conversation, index: int) -> list[dict[str, object]]:
    """The rows of a conversation with the fields of the APAR repository's data (``index``, ``input``, ``target``)."""
    messages = conversation.messages()
    rows: list[dict[str, object]] = []
    for number, row in enumerate(conversation.rows()):
        name = f"{index}_main" if number == 0 else f"{index}_{number - 1}"
        target = row[1 : -len(EOS)]
        rows.append({"index": name, "input": messages[-1]["content"], "history": messages[:-1], "target": target})
    return rows


def as_calibration(conversation: Conversation) -> dict[str, object]:
    """A conversation as quantisation is calibrated with it: the answer in pairs of main text and detail."""
    answer = conversation.turns[-1].answer
    segments = [list(node) for node in answer.nodes] + ([[answer.ending]] if answer.ending else [])
    return {"messages": conversation.messages(), "answer": segments}


def fill(template: str, topic: dict[str, str]) -> str:
    """Put a topic's columns into a template; a capital name asks for a capital value."""
    values = dict(topic)
    values.update({key[0].upper() + key[1:]: value[0].upper() + value[1:] for key, value in topic.items()})
    text = template.format(**values)
    return text[0].upper() + text[1:]


def list_answer(spec: ListAnswer, topic: dict[str, str], count: int) -> Answer:
    """The first ``count`` items of a list."""
    intro = fill(spec.intro.replace("{n}", NUMBERS[count]), topic)
    nodes = [(f"{i}. {title}:", fill(detail, topic)) for i, (title, detail) in enumerate(spec.items[:count], 1)]
    nodes[0] = (f"{intro}\n\n{nodes[0][0]}", nodes[0][1])
    return Answer(tuple(nodes), fill(spec.ending, topic) if spec.ending else "")


def prose_answer(spec: ProseAnswer, topic: dict[str, str]) -> Answer:
    """Paragraphs about one topic."""
    nodes = tuple((fill(first, topic), fill(rest, topic)) for first, rest in spec.paragraphs)
    return Answer(nodes, fill(spec.ending, topic) if spec.ending else "")


def compare_answer(category: Category, one: dict[str, str], other: dict[str, str]) -> Answer:
    """Paragraphs that set two topics of a category side by side."""
    starts = (
        f"The first difference between {one['x']} and {other['x']} concerns {{a}}.",
        "They also differ in {a}.",
        "Finally, compare {a}.",
    )
    nodes: list[tuple[str, str]] = []
    for start, (aspect, template) in zip(starts, category.compare, strict=True):
        second = fill(template, other)
        if template[0] != "{" or other["x"][0].islower():
            second = second[0].lower() + second[1:]
        nodes.append((start.format(a=f"the {aspect}"), f"{fill(template, one)}, while {second}."))
    return Answer(tuple(nodes))


def split(phrasings: list[str], held_out: bool) -> list[str]:
    """The phrasings of one side: every sixth is held out."""
    return [text for i, text in enumerate(phrasings) if (i % _HELD_OUT_EVERY == 4) == held_out]


def plain_phrasings(spec: PlainAnswer) -> list[str]:
    """All phrasings of a short question."""
    wants = [frame.replace("{c}", want) for frame in PLAIN_FRAMES for want in spec.wants]
    asked = [
        frame.replace("{q}", question if frame == "{q}" else question[0].lower() + question[1:])
        for frame in QUESTION_FRAMES
        for question in spec.questions
    ]
    return wants + asked


def framed(frames: tuple[str, ...], wants: tuple[str, ...]) -> list[str]:
    """Every want in every frame."""
    return [frame.replace("{c}", want) for frame in frames for want in wants]


def counted(phrase: str, count: int | None, digits: bool) -> str:
    """Put a number into a phrasing; None asks for no number in particular."""
    word = "some" if count is None else str(count) if digits else NUMBERS[count]
    return phrase.replace("{n}", word)


def held_out_pairs() -> set[tuple[str, str, str]]:
    """(category, topic, question type) never seen in training, whose facts other question types do teach."""
    pairs: set[tuple[str, str, str]] = set()
    for number, category in enumerate(CATEGORIES):
        topics = category.topics()
        lists, prose, plain = list(category.lists), list(category.prose), list(category.plain)
        pairs.add((category.name, topics[(5 * number + 3) % len(topics)]["x"], lists[number % len(lists)]))
        kinds = prose if number % 2 else plain
        pairs.add((category.name, topics[(3 * number + 8) % len(topics)]["x"], kinds[number % len(kinds)]))
    return pairs


class Corpus:
    """Draws conversations; everything follows from the random generator given."""

    def __init__(self) -> None:
        self.topics = {category.name: category.topics() for category in CATEGORIES}
        self.excluded = held_out_pairs()

    def ask(self, rng: random.Random, category: Category, topic: dict[str, str], kind: str, held_out: bool) -> Turn:
        """One turn of a question type about a topic, with a phrasing of the given side."""
        if kind in category.lists:
            spec = category.lists[kind]
            frames = split(framed(LIST_FRAMES, spec.wants), held_out)
            number = None if rng.random() < 0.25 else rng.randint(3, len(spec.items))
            phrase = counted(rng.choice(frames), number, rng.random() < 0.3)
            return Turn(phrase.replace("{x}", topic["x"]), list_answer(spec, topic, number or spec.default), "list")
        if kind in category.prose:
            prose = category.prose[kind]
            phrase = rng.choice(split(framed(PROSE_FRAMES, prose.wants), held_out))
            return Turn(phrase.replace("{x}", topic["x"]), prose_answer(prose, topic), "paragraph")
        if kind in category.plain:
            plain = category.plain[kind]
            phrase = rng.choice(split(plain_phrasings(plain), held_out))
            return Turn(phrase.replace("{x}", topic["x"]), Answer(ending=fill(plain.text, topic)), "plain")
        if kind == "sentence":
            phrase = rng.choice(split(list(SENTENCE_PHRASES), held_out))
            return Turn(phrase.replace("{x}", topic["x"]), Answer(ending=fill(category.sentence, topic)), "plain")
        if kind == "poem":
            phrase = rng.choice(split(list(POEM_PHRASES), held_out))
            return Turn(
                phrase.replace("{x}", topic["x"]),
                Answer(ending="\n".join(fill(line, topic) for line in category.poem)),
                "plain",
            )
        if kind == "check":
            column, question, yes, no = category.check
            value = topic[column] if rng.random() < 0.5 else rng.choice(self.topics[category.name])[column]
            question = fill(question, {**topic, "value": value})
            frame = rng.choice(split([frame for frame in QUESTION_FRAMES for _ in range(2)], held_out))
            asked = frame.replace("{q}", question if frame == "{q}" else question[0].lower() + question[1:])
            return Turn(asked, Answer(ending=fill(yes if value == topic[column] else no, topic)), "plain")
        other = rng.choice([t for t in self.topics[category.name] if t["x"] != topic["x"]])
        phrase = rng.choice(split(list(COMPARE_PHRASES), held_out))
        asked = phrase.replace("{x}", topic["x"]).replace("{y}", other["x"])
        return Turn(asked, compare_answer(category, topic, other), "paragraph")

    def follow_up(
        self, rng: random.Random, category: Category, topic: dict[str, str], kind: str, held_out: bool
    ) -> Turn | None:
        """A question that names the topic only by a pronoun, or None where the phrasing drawn does not allow one."""
        if kind == "sentence":
            phrase = rng.choice(split(list(REPEAT_PHRASES), held_out))
            return Turn(phrase, Answer(ending=fill(category.sentence, topic)), "plain")
        turn = self.ask(rng, category, {**topic, "x": "{x}"}, kind, held_out)
        if category.name in _GERUND and not re.search(r"(for|towards|is) \{x\}", turn.question):
            return None
        if category.name == "places" and "to {x}" in turn.question:
            return None
        subject, thing = ("they", "them") if category.name in _PLURAL else ("it", "it")
        question = re.sub(r"\b(do|does|did|is|are|was|were) \{x\}", rf"\1 {subject}", turn.question).replace(
            "{x}", thing
        )
        frame = rng.choice(FOLLOW_UPS)
        if frame.startswith(("And", "Now", "One")) and not question.startswith("I "):
            question = question[0].lower() + question[1:]
        question = frame.replace("{q}", question)
        if turn.kind == "list":
            answer = list_answer(category.lists[kind], topic, len(turn.answer.nodes))
        elif kind in category.prose:
            answer = prose_answer(category.prose[kind], topic)
        else:
            answer = Answer(ending=fill(category.plain[kind].text, topic))
        return Turn(question, answer, turn.kind)

    def allowed(self, category: Category, topic: dict[str, str], kinds: list[str]) -> list[str]:
        """The question types that may be trained for a topic."""
        return [kind for kind in kinds if (category.name, topic["x"], kind) not in self.excluded]

    def single(self, rng: random.Random, form: str, held_out: bool) -> Turn:
        """One turn of a form: list, paragraph, compare, plain, other (sentence, poem, check), talk or code."""
        if form == "code":
            what, code = rng.choice(CODE)
            phrase = rng.choice(split(list(CODE_PHRASES), held_out))
            return Turn(phrase.replace("{c}", what), Answer(ending=f"```python\n{code}\n```"), "plain")
        if form == "talk":
            questions, text = rng.choice(SMALL_TALK)
            return Turn(rng.choice(split(list(questions), held_out) or list(questions)), Answer(ending=text), "plain")
        category = rng.choice(CATEGORIES)
        topic = rng.choice(self.topics[category.name])
        kinds = {
            "list": list(category.lists),
            "paragraph": list(category.prose),
            "plain": list(category.plain),
            "other": ["sentence", "poem", "check"],
            "compare": ["compare"],
        }[form]
        kinds = self.allowed(category, topic, kinds)
        return (
            self.ask(rng, category, topic, rng.choice(kinds), held_out) if kinds else self.single(rng, form, held_out)
        )

    def several(self, rng: random.Random, held_out: bool) -> Conversation:
        """Two or three turns; the later ones lean on the first, or just say thanks."""
        category = rng.choice(CATEGORIES)
        topic = rng.choice(self.topics[category.name])
        first = self.allowed(category, topic, [*category.lists, *category.prose, *category.plain])
        usual = [kind for kind in first if kind not in category.lists]
        turns = [self.ask(rng, category, topic, rng.choice(first if rng.random() < 0.3 else usual), False)]
        later = [*first, "sentence"]
        weights = [3 if kind in category.lists else 2 for kind in later]
        wanted = 3 if rng.random() < 0.2 else 2
        while len(turns) < wanted:
            kind = rng.choices(later, weights)[0]
            last = len(turns) == wanted - 1
            if not held_out and rng.random() < 0.05:
                turns.append(Turn(rng.choice(SMALL_TALK[1][0]), Answer(ending=SMALL_TALK[1][1]), "plain"))
                continue
            turn = self.follow_up(rng, category, topic, kind, held_out and last)
            if turn is not None and turn.answer not in [earlier.answer for earlier in turns]:
                turns.append(turn)
        return Conversation(tuple(turns))

    def train(self, seed: int) -> Iterator[Conversation]:
        """An endless stream of training conversations."""
        rng = random.Random(seed)
        forms = ("list", "paragraph", "compare", "plain", "other", "talk", "code", "several")
        weights = (29, 12, 7, 18, 12, 2, 3, 17)
        while True:
            form = rng.choices(forms, weights)[0]
            conversation = (
                self.several(rng, False) if form == "several" else Conversation((self.single(rng, form, False),))
            )
            yield Conversation(tuple(Turn(casual(rng, t.question), t.answer, t.kind) for t in conversation.turns))

    def held_out(self, seed: int = 1) -> list[dict[str, object]]:
        """The held-out prompts: ``id``, ``category``, ``messages``, ``expected`` and ``forks`` (how many are right)."""
        rng = random.Random(seed)
        entries: list[dict[str, object]] = []
        seen: set[str] = set()

        def add(name: str, conversation: Conversation) -> bool:
            messages = conversation.messages()
            key = json.dumps(messages)
            if key in seen:
                return False
            seen.add(key)
            answer = conversation.turns[-1].answer
            entries.append(
                {
                    "id": f"{name}-{sum(e['category'] == name for e in entries)}",
                    "category": name,
                    "messages": messages,
                    "expected": answer.assembled(),
                    "forks": len(answer.nodes),
                }
            )
            return True

        forms = ["list"] * 34 + ["paragraph"] * 14 + ["compare"] * 6 + ["plain"] * 14 + ["other"] * 8 + ["code"] * 4
        for form in forms:
            name = {"compare": "paragraph", "other": "plain", "code": "plain"}.get(form, form)
            while not add(name, Conversation((self.single(rng, form, True),))):
                pass
        for _ in range(20):
            while not add("multi-turn", self.several(rng, True)):
                pass
        categories = {category.name: category for category in CATEGORIES}
        for name, thing, kind in sorted(self.excluded):
            topic = next(t for t in self.topics[name] if t["x"] == thing)
            add("unseen-pair", Conversation((self.ask(rng, categories[name], topic, kind, False),)))
        return entries


def casual(rng: random.Random, question: str) -> str:
    """Sometimes write a question carelessly: no capitals, no full stop, several marks."""
    roll = rng.random()
    if roll < 0.06:
        return question[0].lower() + question[1:]
    if roll < 0.12:
        return question.lower()
    if roll < 0.20:
        return question.rstrip(".?!")
    if roll < 0.24:
        return question.rstrip(".?!").lower()
    if roll < 0.26:
        return question + question[-1]
    return question


def main() -> None:
    """Write training rows in APAR's format, the held-out prompts, or a calibration file, as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--conversations", type=int, default=1000, help="how many conversations")
    parser.add_argument("--seed", type=int, default=0)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--held-out", action="store_true", help="write the held-out prompts instead")
    kind.add_argument("--calibration", action="store_true", help="write JSON lines for `apar build --calibration`")
    args = parser.parse_args()
    corpus = Corpus()
    if args.calibration:
        chosen = itertools.islice(corpus.train(args.seed), args.conversations)
        lines = [json.dumps(as_calibration(conversation), ensure_ascii=False) + "\n" for conversation in chosen]
        args.output.write_text("".join(lines), encoding="utf-8")
        return
    if args.held_out:
        data = corpus.held_out()
    else:
        stream = corpus.train(args.seed)
        data = [row for i in range(args.conversations) for row in as_apar_format(next(stream), i)]
    args.output.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
