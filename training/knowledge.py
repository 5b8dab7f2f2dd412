"""What things are for and what they do: the world knowledge that questions by function and by consequence ask for.

Text-only training teaches all of it. Questions about a picture use a part: each kind keeps one use and one way of
asking for itself that no grounding question of the training splits ever has, and the splits `ood_function` and
`ood_wording` ask them.
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


KNOWLEDGE: dict[str, Knowledge] = {
    "mug": Knowledge(
        uses=("drink coffee from", "hold hot tea", "pour cocoa into"),
        held_out_use="sip warm milk from",
        consequences=("my coffee has nowhere to go", "the tea is ready to be poured", "i want a hot drink on my desk"),
        held_out_consequence="the cocoa would run all over the table without it",
        held_out_wording=0,
    ),
    "plate": Knowledge(
        uses=("serve dinner on", "eat a sandwich from", "put a slice of cake on"),
        held_out_use="carry a steak to the table on",
        consequences=(
            "the food would lie on the bare table without it",
            "dinner is ready to be served",
            "the cake needs a base",
        ),
        held_out_consequence="guests cannot eat spaghetti off the table",
        held_out_wording=1,
    ),
    "bottle": Knowledge(
        uses=("carry water in", "store juice in", "keep a drink closed in"),
        held_out_use="take lemonade on a hike in",
        consequences=(
            "i will be thirsty on the long walk",
            "the juice has to be sealed",
            "the water must not spill in my bag",
        ),
        held_out_consequence="the wine has to be kept for another year",
        held_out_wording=2,
    ),
    "fork": Knowledge(
        uses=("pick up spaghetti with", "spear a piece of meat with", "eat salad with"),
        held_out_use="twirl noodles with",
        consequences=(
            "the noodles slip from my hand",
            "the salad is served and i have only my fingers",
            "the meat must be held while i cut",
        ),
        held_out_consequence="the last olive cannot be speared",
        held_out_wording=3,
    ),
    "spoon": Knowledge(
        uses=("eat soup with", "stir a drink with", "scoop ice cream with"),
        held_out_use="taste the sauce with",
        consequences=(
            "the soup is getting cold",
            "the sugar lies at the bottom of the glass",
            "the yogurt cannot be eaten by hand",
        ),
        held_out_consequence="the porridge cannot be lifted",
        held_out_wording=4,
    ),
    "scissors": Knowledge(
        uses=("cut paper with", "trim a thread with", "cut hair with"),
        held_out_use="snip a ribbon with",
        consequences=("the paper strip is too long", "the fringe hangs into my eyes", "the loose thread bothers me"),
        held_out_consequence="the coupon must come out of the newspaper",
        held_out_wording=0,
    ),
    "banana": Knowledge(
        uses=("peel and eat for energy", "eat that grows in bunches", "mash into sweet bread"),
        held_out_use="slip on in a cartoon",
        consequences=(
            "i need food that gives sustained energy",
            "the monkey is hungry",
            "my muscles cramp for lack of potassium",
        ),
        held_out_consequence="the runner wants a soft sweet snack",
        held_out_wording=1,
    ),
    "apple": Knowledge(
        uses=("bake a round fruit pie with", "press cider from", "bite into that is crisp and round"),
        held_out_use="put on the teacher's desk as a gift",
        consequences=(
            "the doctor stays away if i eat one a day",
            "the worm has found its home",
            "the cider press is empty",
        ),
        held_out_consequence="the horse wants a crunchy round treat",
        held_out_wording=2,
    ),
    "carrot": Knowledge(
        uses=("feed a rabbit with", "peel and chop into a stew", "eat for good eyesight"),
        held_out_use="give a snowman as a nose",
        consequences=("the rabbit is hungry", "the snowman has no nose", "my eyes want more vitamin a"),
        held_out_consequence="the stew lacks a root vegetable",
        held_out_wording=3,
    ),
    "book": Knowledge(
        uses=("read a story in", "study for an exam with", "learn a poem from"),
        held_out_use="look up history in",
        consequences=("i am bored and want a story", "the exam is tomorrow", "the child wants to be read to sleep"),
        held_out_consequence="the rainy day needs a long novel",
        held_out_wording=4,
    ),
    "pencil": Knowledge(
        uses=("write a note with", "draw a sketch with", "mark a line with"),
        held_out_use="fill in a crossword with",
        consequences=(
            "i must sign the form",
            "the idea will be forgotten unless it is written down",
            "the sketch is unfinished",
        ),
        held_out_consequence="the shopping list is still in my head",
        held_out_wording=0,
    ),
    "key": Knowledge(
        uses=("unlock a door with", "open a padlock with", "start an old car with"),
        held_out_use="get into a locked house with",
        consequences=("i am locked out", "the padlock does not open", "the drawer is locked"),
        held_out_consequence="the treasure chest stays shut",
        held_out_wording=1,
    ),
    "phone": Knowledge(
        uses=("call a friend with", "take a selfie with", "send a message with"),
        held_out_use="browse the internet on",
        consequences=(
            "somebody has to call an ambulance",
            "i want to text my sister",
            "the photo must be shared at once",
        ),
        held_out_consequence="my mother waits to hear my voice",
        held_out_wording=2,
    ),
    "clock": Knowledge(
        uses=("tell the time with", "wake up in the morning with", "measure the hours with"),
        held_out_use="see whether it is noon with",
        consequences=("i must not be late", "i would oversleep without it", "nobody knows what time it is"),
        held_out_consequence="the train leaves at eight sharp",
        held_out_wording=3,
    ),
    "glasses": Knowledge(
        uses=("see sharply with", "correct poor eyesight with", "wear on the nose"),
        held_out_use="put on to read small print",
        consequences=("the letters are blurred", "she is short-sighted", "grandfather cannot see the screen clearly"),
        held_out_consequence="everything far away looks fuzzy",
        held_out_wording=4,
    ),
    "ball": Knowledge(
        uses=("play catch with", "kick into a goal", "throw for a dog"),
        held_out_use="bounce on the floor",
        consequences=("the dog wants to fetch", "the team cannot play without it", "the children want to play catch"),
        held_out_consequence="the goalkeeper has nothing to stop",
        held_out_wording=0,
    ),
    "hammer": Knowledge(
        uses=("drive a nail with", "break a stone with", "do heavy carpentry with"),
        held_out_use="hit a chisel with",
        consequences=("the nail sticks out", "the picture must be hung on the wall", "the wall has to be knocked down"),
        held_out_consequence="the loose board has to be nailed down",
        held_out_wording=1,
    ),
    "candle": Knowledge(
        uses=("light a dark room with", "set a romantic mood with", "put on a birthday cake"),
        held_out_use="melt wax from",
        consequences=("the power is out", "the room is dark", "the birthday cake has nothing to blow out"),
        held_out_consequence="the lamp broke and night is coming",
        held_out_wording=2,
    ),
}


def taught_uses(kind: str) -> list[tuple[str, int]]:
    """(use, wording index) pairs that training splits may ask for."""
    known = KNOWLEDGE[kind]
    wordings = [index for index in range(len(FUNCTION_WORDINGS)) if index != known.held_out_wording]
    return [(use, wording) for use in known.uses for wording in wordings]
