"""The same thought in fewer words: what a reward for brevity has to find among the samples before it can prefer it.

    There is a pink mug at the lower right.                          a pink mug lower right.
    A mug is made to drink tea. There is a pink mug at the left.     a mug. a pink mug left.
    The spoon is at the left. There is a red mug in the centre.      spoon left. a red mug centre.

Every thing and place that the long thought names stays, and so does the article before a thing: there the policy learns
to look at it (`watch_at` in grounding_data.py).
"""

from __future__ import annotations

import re

_RULES = tuple(
    (re.compile(pattern), left)
    for pattern, left in (
        (r"^(?:(An?) )?(\w+) (?:is|are) made to [^.]*\.", r"\1 \2."),
        (r"^.*?, so (?:(an?) |the )?(\w+) helps?\.", r"\1 \2."),
        (r"\b(?:There|It) (?:is|are) ", ""),
        (r"\b[Tt]he (\w+) (?:is|are) ", r"\1 "),
        (r" (?:at|in) the (?=upper|lower|left|right|top|bottom|centre)", " "),
    )
)


def told_briefly(thinking: str) -> str:
    """A thinking of `questions.py` or `visual_questions.think_about_world` in fewer words; others stay as they are."""
    told = thinking
    for pattern, left in _RULES:
        told = pattern.sub(left, told)
    told = told.strip()
    return told if told == thinking else told[:1].lower() + told[1:]
