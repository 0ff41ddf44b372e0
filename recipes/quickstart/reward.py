"""The reward of the quickstart: whether a story is a happy one, by its words."""

GOOD = {"happy", "glad", "proud", "lovely", "bright", "warm", "kind", "gentle", "smiled", "sang", "laughed"}
BAD = {"sad", "afraid", "angry", "broken", "cold", "dark", "rude", "lonely", "cried", "shouted", "quarrelled"}


def happiness(completions: list[str], **columns: object) -> list[float]:
    """1 for a story with more happy words than unhappy ones, -1 for the opposite, 0 for neither.

    A count would pay for stories that never end and say nothing but happy words.
    """
    counts = [sum((word in GOOD) - (word in BAD) for word in text.split()) for text in completions]
    return [float((count > 0) - (count < 0)) for count in counts]
