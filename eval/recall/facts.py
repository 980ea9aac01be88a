"""QA1 to QA3 in the manner of BABILong (Kuratov et al. 2024, arXiv 2406.10149): bAbI's facts scattered in a book.

People walk between places, take things and leave them (Weston et al. 2015, arXiv 1502.05698). QA1: where is someone
(one fact). QA2: where is a thing (two facts). QA3: where was it before (three facts). The story is simulated here, so
no data is needed; two worked examples show the form of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from linearize.eval.recall.item import BOOK, Item, Needle, spread

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("kitchen", "bathroom", "bedroom", "garden", "hallway", "office")
THINGS = ("apple", "football", "milk")
GO = ("moved to", "went to", "travelled to", "journeyed to")
TAKE, DROP = ("took", "picked up", "grabbed"), ("dropped", "left", "put down")
BEFORE = (
    "I will give you context with facts about people hidden in some text, and a question. Answer the question based "
    "only on the facts.\n\n"
)
FACTS = 8


@dataclass
class Story:
    """Sentences, and where they leave everybody and everything."""

    sentences: list[str] = field(default_factory=list)
    at: dict[str, str] = field(default_factory=dict)
    """Person -> place."""
    held: dict[str, str] = field(default_factory=dict)
    """Thing -> who holds it."""
    seen: dict[str, list[str]] = field(default_factory=dict)
    """Thing -> places that it has been in, in order."""

    def go(self, person: str, place: str, random: Random) -> None:
        """A walk; what the person holds comes along."""
        self.sentences.append(f"{person} {random.choice(GO)} the {place}.")
        self.at[person] = place
        for thing in [thing for thing, holder in self.held.items() if holder == person]:
            self.seen.setdefault(thing, []).append(place)

    def take(self, person: str, thing: str, random: Random) -> None:
        """Someone takes a thing where they are."""
        self.sentences.append(f"{person} {random.choice(TAKE)} the {thing}.")
        self.held[thing] = person
        if self.seen.get(thing, [""])[-1] != self.at[person]:
            self.seen.setdefault(thing, []).append(self.at[person])

    def drop(self, thing: str, random: Random) -> None:
        """It stays where it is."""
        self.sentences.append(f"{self.held.pop(thing)} {random.choice(DROP)} the {thing}.")


EVEN = [step / 40 for step in range(41)]
"""Depths that sentences are drawn for."""


@dataclass(frozen=True)
class Facts:
    """A generator: how many supporting facts its question needs, 1 to 3."""

    supporting: int

    def __call__(self, random: Random, depth: float | None = None) -> Item:
        """One question about a story of `FACTS` sentences at drawn depths."""
        examples = ""
        for _ in range(2):
            story, asked, answer = self.story(random)
            examples += f"{' '.join(story.sentences)}\n{asked} the {answer}.\n\n"
        story, asked, answer = self.story(random)
        depths = spread(random, len(story.sentences), EVEN)
        return Item(
            before=BEFORE + examples,
            needles=tuple(Needle(text, at) for text, at in zip(story.sentences, depths, strict=True)),
            after=f"\n{asked} the",
            answers=(answer,),
            distractors=tuple(random.sample([place for place in PLACES if place != answer], 3)),
            haystack=BOOK,
        )

    def story(self, random: Random) -> tuple[Story, str, str]:
        """A story, the question with the beginning of its answer, and the place that is the answer."""
        while True:
            story = Story()
            while len(story.sentences) < FACTS:
                self._happen(story, random)
            if self.supporting == 1:
                person = random.choice(list(story.at))
                asked = f"Where is {person}? The most recent location of {person} is"
                return story, asked, story.at[person]
            thing = next((t for t in THINGS if len(story.seen.get(t, ())) >= self.supporting - 1), None)
            if thing is None:
                continue
            places = story.seen[thing]
            if self.supporting == 2:
                return story, f"Where is the {thing}? The {thing} is in", places[-1]
            asked = (
                f"Where was the {thing} before the {places[-1]}? Before the {places[-1]} the {thing} was in"
            )
            return story, asked, places[-2]

    def _happen(self, story: Story, random: Random) -> None:
        person = random.choice(PEOPLE)
        free = [thing for thing in THINGS if thing not in story.held]
        holding = [thing for thing, holder in story.held.items() if holder == person]
        if self.supporting > 1 and person in story.at and random.random() < 0.5:
            if holding and random.random() < 0.5:
                story.drop(random.choice(holding), random)
                return
            # a thing is taken where it lies, or where it was never seen
            here = [t for t in free if story.seen.get(t, [story.at[person]])[-1] == story.at[person]]
            if here:
                story.take(person, random.choice(here), random)
                return
        story.go(person, random.choice([place for place in PLACES if place != story.at.get(person)]), random)
