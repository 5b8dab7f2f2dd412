"""How objects and places are called in questions and in thinking."""

from __future__ import annotations

from typing import Protocol

from .object_kinds import PAIR_NOUNS


class Thing(Protocol):
    """What a question needs to know of an object."""

    @property
    def kind(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def material(self) -> str: ...
    @property
    def centre_xy(self) -> tuple[float, float]: ...
    @property
    def area_px(self) -> float: ...


def where(centre_xy: tuple[float, float], size_hw: tuple[int, int]) -> str:
    """One of nine words for a place in the picture: `at the upper left` … `in the centre` … `at the lower right`."""
    column = min(int(3 * centre_xy[0] / size_hw[1]), 2)
    row = min(int(3 * centre_xy[1] / size_hw[0]), 2)
    if (row, column) == (1, 1):
        return "in the centre"
    if row == 1:
        return f"at the {('left', '', 'right')[column]}"
    if column == 1:
        return f"at the {('top', '', 'bottom')[row]}"
    return f"at the {('upper', '', 'lower')[row]} {('left', '', 'right')[column]}"


def with_article(words: str) -> str:
    """`a mug`, `an apple`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def article_name(thing: Thing) -> str:
    """`a red mug`, `an orange pair of scissors`."""
    noun = f"pair of {thing.kind}" if thing.kind in PAIR_NOUNS else thing.kind
    return with_article(f"{thing.colour} {noun}")


def be(noun: str) -> str:
    """The form of `to be` that goes with a kind or with a phrase that ends in one."""
    return "are" if noun.rsplit(" ", 1)[-1] in PAIR_NOUNS else "is"


def with_the(noun: str) -> str:
    """`the mug`; what has its article already stays."""
    return noun if noun.startswith("the ") else f"the {noun}"


def made_to(kind: str, use: str) -> str:
    """The first sentence of thinking about a function."""
    subject = kind if kind in PAIR_NOUNS else with_article(kind)
    return f"{subject[0].upper()}{subject[1:]} {be(kind)} made to {use}."


def helpful(kind: str) -> str:
    """What is concluded from a consequence: `a mug helps`, `the scissors help`."""
    return f"the {kind} help" if kind in PAIR_NOUNS else f"{with_article(kind)} helps"


def material_word(material: str) -> str:
    """The adjective: `wooden`, `glass`."""
    return {"wood": "wooden"}.get(material, material)


def count_word(count: int) -> str:
    """0 … 4 in words."""
    return ("no", "one", "two", "three", "four")[count]
