"""The counts of entities of ``conlleval.pl`` (CoNLL-2000), written word by word in plain Python."""

from collections import Counter
from collections.abc import Sequence

Tags = Sequence[str]


def evaluate(
    gold: Sequence[Tags], predicted: Sequence[Tags]
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Returns the number of correct, predicted and gold entities of each class."""
    correct: Counter[str] = Counter()
    found: Counter[str] = Counter()
    present: Counter[str] = Counter()
    for true, guessed in zip(gold, predicted, strict=True):
        previous = previous_guess = ("O", "")
        in_correct = False
        # As in the script, a sentence ends with a boundary that is outside of all entities.
        for tag, guess in zip([*true, "O"], [*guessed, "O"], strict=True):
            now, now_guess = _split(tag), _split(guess)
            if in_correct:
                end, end_guess = _ends(previous, now), _ends(previous_guess, now_guess)
                if end and end_guess and previous[1] == previous_guess[1]:
                    in_correct = False
                    correct[previous[1]] += 1
                elif end != end_guess or now[1] != now_guess[1]:
                    in_correct = False
            start, start_guess = _starts(previous, now), _starts(previous_guess, now_guess)
            if start and start_guess and now[1] == now_guess[1]:
                in_correct = True
            if start:
                present[now[1]] += 1
            if start_guess:
                found[now_guess[1]] += 1
            previous, previous_guess = now, now_guess
    return correct, found, present


def _split(tag: str) -> tuple[str, str]:
    if tag == "O":
        return "O", ""
    prefix, _, name = tag.partition("-")
    return (prefix, name) if name else ("B", tag)


def _starts(previous: tuple[str, str], now: tuple[str, str]) -> bool:
    """``startOfChunk`` of the script, for the prefixes B, I and O."""
    pair = (previous[0], now[0])
    return pair in {("B", "B"), ("I", "B"), ("O", "B"), ("O", "I")} or (
        now[0] != "O" and previous[1] != now[1]
    )


def _ends(previous: tuple[str, str], now: tuple[str, str]) -> bool:
    """``endOfChunk`` of the script, for the prefixes B, I and O."""
    pair = (previous[0], now[0])
    return pair in {("B", "B"), ("B", "O"), ("I", "B"), ("I", "O")} or (
        previous[0] != "O" and previous[1] != now[1]
    )
