"""Built-in tasks: last words of the built-in corpus, and facts to be found again in a long text.

The second is what a quantiser that spares some tokens and not others may break without any divergence to show for it:
what is asked for stands far back, among text that has nothing to do with it.
"""

import json
import random
import re
from typing import Final

from kvserve_api.errors import SpecError
from kvserve_profiler import corpus
from kvserve_profiler.tasks.items import TaskSet, last_word

LAST_WORD: Final = "last-word"
RETRIEVAL: Final = "retrieval"
NAMES: Final = (LAST_WORD, RETRIEVAL)

CONTEXT_SENTENCES: Final = 24
FACTS: Final = 6
_COLOURS: Final = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")
_THINGS: Final = ("door", "box", "locker", "gate", "safe", "drawer", "cabinet", "garage")
_SENTENCE: Final = re.compile(r"(?<=[.!?])\s+")


def task_set(name: str, *, seed: int = 0, items: int = 64) -> TaskSet:
    """Return a built-in task.

    Args:
        name: One of ``NAMES``.
        seed: Of what is random.
        items: How many to make; fewer if the corpus has no more.

    Raises:
        SpecError: There is no task of this name.
    """
    if name not in NAMES:
        raise SpecError("task", f"{name!r} is not built in; there are {', '.join(NAMES)}")
    make = _last_words if name == LAST_WORD else _retrieval
    lines = [json.dumps(line) for line in make(random.Random(seed), items)]
    return TaskSet.parse("\n".join(lines).encode(), name)


def _sentences() -> list[str]:
    """Return the sentences of the corpus's prose; code has none."""
    text = " ".join(document for document in corpus.documents()[:3])
    return [one for one in _SENTENCE.split(" ".join(text.split())) if one[-1:] in ".!?"]


def _last_words(chance: random.Random, items: int) -> list[dict[str, object]]:
    """Return sentences behind those that stand before them, without the full stop."""
    sentences = _sentences()
    ends = [
        index
        for index in range(CONTEXT_SENTENCES, len(sentences))
        if last_word(sentences[index]) and sentences[index][:-1].rsplit(" ", 1)[-1].isalpha()
    ]
    return [
        {
            "task": "last-word",
            "text": " ".join(sentences[end - CONTEXT_SENTENCES : end + 1])[:-1],
        }
        for end in sorted(chance.sample(ends, min(items, len(ends))))
    ]


def _retrieval(chance: random.Random, items: int) -> list[dict[str, object]]:
    """Return texts with facts strewn in, one of which is begun again at the end."""
    sentences = _sentences()
    keys = [f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS]
    result: list[dict[str, object]] = []
    for _ in range(items):
        start = chance.randrange(len(sentences) - CONTEXT_SENTENCES)
        context = sentences[start : start + CONTEXT_SENTENCES]
        chosen = chance.sample(keys, FACTS)
        facts = {key: str(chance.randrange(1000, 10_000)) for key in chosen}
        for key, code in facts.items():
            context.insert(chance.randrange(len(context) + 1), f"The code of the {key} is {code}.")
        asked = chance.choice(chosen)
        result.append(
            {
                "task": "exact-match",
                "prompt": f"{' '.join(context)}\n\nThe code of the {asked} is",
                "answer": facts[asked],
                "stop": [".", "\n", ","],
                "max_tokens": 8,
            }
        )
    return result
