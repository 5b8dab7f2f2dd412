"""What things are for and what they do: the world knowledge that questions by function and by consequence ask for.

Text-only training teaches all of it. Questions about a picture use a part: each kind keeps one use and one way of asking for
itself that no grounding question of the training splits ever has, and the splits `ood_function` and `ood_wording` ask them.
"""

from __future__ import annotations

from dataclasses import dataclass

FUNCTION_WORDINGS = (
    "something to {use}",
    "the thing you would take to {use}",
    "what i need to {use}",
    "an object that is made to {use}",
    "a tool or item to {use}",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Knowledge:
    """Uses read after `something to …`; consequences stand alone."""

    uses: tuple[str, ...]
    held_out_use: str
    """Asked of a picture in the split `ood_function` alone."""
    consequences: tuple[str, ...]
    held_out_consequence: str
    """Asked of a picture in the split `ood_wording` alone."""
    held_out_wording: int
    """Index into `FUNCTION_WORDINGS` that this kind is asked by in the split `ood_wording` alone."""


def _know(wording: int, uses: str, held_out_use: str, consequences: str, held_out_consequence: str) -> Knowledge:
    return Knowledge(
        uses=tuple(uses.split("; ")), held_out_use=held_out_use, consequences=tuple(consequences.split("; ")),
        held_out_consequence=held_out_consequence, held_out_wording=wording % len(FUNCTION_WORDINGS),
    )  # fmt: skip


KNOWLEDGE: dict[str, Knowledge] = {
    "mug": _know(0, "drink coffee from; hold hot tea; pour cocoa into", "sip warm milk from",
                 "my coffee has nowhere to go; the tea is ready to be poured; i want a hot drink on my desk",
                 "the cocoa would run all over the table without it"),
    "plate": _know(1, "serve dinner on; eat a sandwich from; put a slice of cake on", "carry a steak to the table on",
                   "the food would lie on the bare table without it; dinner is ready to be served; the cake needs a base",
                   "guests cannot eat spaghetti off the table"),
    "bottle": _know(2, "carry water in; store juice in; keep a drink closed in", "take lemonade on a hike in",
                    "i will be thirsty on the long walk; the juice has to be sealed; the water must not spill in my bag",
                    "the wine has to be kept for another year"),
    "fork": _know(3, "pick up spaghetti with; spear a piece of meat with; eat salad with", "twirl noodles with",
                  "the noodles slip from my hand; the salad is served and i have only my fingers; the meat must be held while i cut",
                  "the last olive cannot be speared"),
    "spoon": _know(4, "eat soup with; stir a drink with; scoop ice cream with", "taste the sauce with",
                   "the soup is getting cold; the sugar lies at the bottom of the glass; the yogurt cannot be eaten by hand",
                   "the porridge cannot be lifted"),
    "scissors": _know(0, "cut paper with; trim a thread with; cut hair with", "snip a ribbon with",
                      "the paper strip is too long; the fringe hangs into my eyes; the loose thread bothers me",
                      "the coupon must come out of the newspaper"),
    "banana": _know(1, "peel and eat for energy; eat that grows in bunches; mash into sweet bread", "slip on in a cartoon",
                    "i need food that gives sustained energy; the monkey is hungry; my muscles cramp for lack of potassium",
                    "the runner wants a soft sweet snack"),
    "apple": _know(2, "bake a round fruit pie with; press cider from; bite into that is crisp and round", "put on the teacher's desk as a gift",
                   "the doctor stays away if i eat one a day; the worm has found its home; the cider press is empty",
                   "the horse wants a crunchy round treat"),
    "carrot": _know(3, "feed a rabbit with; peel and chop into a stew; eat for good eyesight", "give a snowman as a nose",
                    "the rabbit is hungry; the snowman has no nose; my eyes want more vitamin a",
                    "the stew lacks a root vegetable"),
    "book": _know(4, "read a story in; study for an exam with; learn a poem from", "look up history in",
                  "i am bored and want a story; the exam is tomorrow; the child wants to be read to sleep",
                  "the rainy day needs a long novel"),
    "pencil": _know(0, "write a note with; draw a sketch with; mark a line with", "fill in a crossword with",
                    "i must sign the form; the idea will be forgotten unless it is written down; the sketch is unfinished",
                    "the shopping list is still in my head"),
    "key": _know(1, "unlock a door with; open a padlock with; start an old car with", "get into a locked house with",
                 "i am locked out; the padlock does not open; the drawer is locked",
                 "the treasure chest stays shut"),
    "phone": _know(2, "call a friend with; take a selfie with; send a message with", "browse the internet on",
                   "somebody has to call an ambulance; i want to text my sister; the photo must be shared at once",
                   "my mother waits to hear my voice"),
    "clock": _know(3, "tell the time with; wake up in the morning with; measure the hours with", "see whether it is noon with",
                   "i must not be late; i would oversleep without it; nobody knows what time it is",
                   "the train leaves at eight sharp"),
    "glasses": _know(4, "see sharply with; correct poor eyesight with; wear on the nose", "put on to read small print",
                     "the letters are blurred; she is short-sighted; grandfather cannot see the screen clearly",
                     "everything far away looks fuzzy"),
    "ball": _know(0, "play catch with; kick into a goal; throw for a dog", "bounce on the floor",
                  "the dog wants to fetch; the team cannot play without it; the children want to play catch",
                  "the goalkeeper has nothing to stop"),
    "hammer": _know(1, "drive a nail with; break a stone with; do heavy carpentry with", "hit a chisel with",
                    "the nail sticks out; the picture must be hung on the wall; the wall has to be knocked down",
                    "the loose board has to be nailed down"),
    "candle": _know(2, "light a dark room with; set a romantic mood with; put on a birthday cake", "melt wax from",
                    "the power is out; the room is dark; the birthday cake has nothing to blow out",
                    "the lamp broke and night is coming"),
}  # fmt: skip


def taught_uses(kind: str) -> list[tuple[str, int]]:
    """(use, wording index) pairs that training splits may ask for."""
    known = KNOWLEDGE[kind]
    wordings = [index for index in range(len(FUNCTION_WORDINGS)) if index != known.held_out_wording]
    return [(use, wording) for use in known.uses for wording in wordings]
