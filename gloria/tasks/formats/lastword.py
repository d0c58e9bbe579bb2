"""The last word of a text: CALAME-PT and LAMBADA, and the rules under which a continuation counts as right."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from gloria.errors import UserError
from gloria.tasks.examples import LastWord
from gloria.tasks.formats.files import Loaded, Problems, check_unique, json_rows
from gloria.tasks.task import Task

LOG_LIKELIHOOD = "log-likelihood"


@dataclass(frozen=True)
class Rule:
    """How to generate, which word of the continuation is the answer, and when it equals the gold word."""

    max_new_tokens: int
    repetition_penalty: float = 1.0
    pattern: str = r"\w+"
    drop: str = ""  # characters taken out of the word
    fold: bool = True  # case and accents do not matter
    join_lines: bool = False  # line ends are taken out before the word is looked for
    stop: bool = True  # generation may stop once the word is over; otherwise it makes max_new_tokens
    strip: bool = True  # white space at the end of the context is taken away before the model sees it

    def word(self, continuation: str) -> str:
        """The predicted word, as it is compared; "" where there is none."""
        text = continuation.replace("\n", "") if self.join_lines else continuation
        found = re.search(self.pattern, text)
        return self.compared(found[0]) if found else ""

    def compared(self, word: str) -> str:
        """A word in the form in which two words are equal or not. The gold word goes through it too."""
        word = re.sub(f"[{re.escape(self.drop)}]", "", word) if self.drop else word
        if not self.fold:
            return word.strip()
        return "".join(c for c in unicodedata.normalize("NFKD", word.strip().lower()) if not unicodedata.combining(c))

    def is_over(self, continuation: str) -> bool:
        """No further token can change the word. Half a character at the end, as of a byte-level token, may continue."""
        text = continuation.rstrip("\ufffd")
        found = re.search(self.pattern, text)
        return self.stop and found is not None and found.end() < len(text)


# All greedy. "gloria-script" is GlórIA's run_calame_eval.py: 5 tokens (it ignores its flag), a penalty on repetition,
# which forbids words of the context, and contexts as published (7 % of CALAME's end in a space); "paper" is the same on
# stripped contexts; "first-word" compares alike and generates until the word ends; "tucano" is what its harness
# does: accents and case count.
RULES = {
    "first-word": Rule(max_new_tokens=16),
    "paper": Rule(max_new_tokens=5, repetition_penalty=2.0, join_lines=True, stop=False),
    "gloria-script": Rule(max_new_tokens=5, repetition_penalty=2.0, join_lines=True, stop=False, strip=False),
    "tucano": Rule(max_new_tokens=10, pattern=r"\S+", drop=".,?!", fold=False),
}


def read_last_words(path: Path, task: Task) -> Loaded:
    """Rows {sentence, last_word}, or {text}, whose last word is then cut off.

    Where every sentence of the file ends in its last word it is cut off as well (LAMBADA's translations differ in it).
    """
    problems = Problems(path)
    rows = list(json_rows(path, problems))
    examples: list[LastWord] = []
    for number, (line, row) in enumerate(rows):
        context, word = row.get("sentence"), row.get("last_word")
        if isinstance(row.get("text"), str):
            context, _, word = row["text"].rstrip().rpartition(" ")
        if not isinstance(context, str) or not context.strip() or not isinstance(word, str | None):
            problems.add(line, "a part is missing or no text; sentence and last_word, or text, are expected")
            continue
        examples.append(LastWord(str(row.get("id", number)), context, word))
    problems.report()
    if not examples:
        raise UserError(f"{path}: has no rows; get the file again")
    ends = all(e.word and e.context.rstrip().removesuffix(e.word).endswith(" ") for e in examples)
    if ends and "text" not in rows[0][1]:
        examples = [LastWord(e.id, e.context.rstrip().removesuffix(e.word or ""), e.word) for e in examples]
    check_unique(examples, [line for line, _ in rows], problems)
    problems.report()
    words = [e.word for e in examples if e.word is not None]
    counts = {
        "contexts": len(examples),
        "without a gold word": len(examples) - len(words),
        "contexts that end in a space": sum(e.context != e.context.rstrip() for e in examples),
        "empty gold words": sum(not word.strip() for word in words),
        "gold words that are several": sum(len(word.split()) > 1 for word in words),
    }
    return Loaded(list(examples), counts)
