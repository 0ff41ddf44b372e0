"""The reward of the quickstart: how happy the words of a story are."""

GOOD = {"happy", "glad", "proud", "lovely", "bright", "warm", "kind", "gentle", "smiled", "sang", "laughed"}
BAD = {"sad", "afraid", "angry", "broken", "cold", "dark", "rude", "lonely", "cried", "shouted", "quarrelled"}


def happiness(completions: list[str], **columns: object) -> list[float]:
    """Happy words minus unhappy ones, per story."""
    return [float(sum((word in GOOD) - (word in BAD) for word in text.split())) for text in completions]
