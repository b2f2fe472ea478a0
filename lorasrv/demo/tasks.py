"""The demo's tasks: what each sample adapter was trained to do with a word.

Every task is a pure function from a word to a word, so a demo or a test can
check an adapter's answer to the letter. Standard library only: the command
imports this without torch.
"""

import codecs
import random
from collections.abc import Callable
from dataclasses import dataclass

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
MIN_LETTERS = 3
MAX_LETTERS = 9


@dataclass(frozen=True, kw_only=True)
class Task:
    """One sample adapter: its folder name, a sentence for people, and the exact answer for a word."""

    name: str
    description: str
    transform: Callable[[str], str]


def capital(word: str) -> str:
    """`banana` -> `Banana`."""
    return word[:1].upper() + word[1:]


def rot13(word: str) -> str:
    """`banana` -> `onanan`."""
    return codecs.encode(word, "rot13")


def stars(word: str) -> str:
    """`banana` -> `b*n*n*`."""
    return "".join("*" if letter in VOWELS else letter for letter in word)


def reverse(word: str) -> str:
    """`banana` -> `ananab`."""
    return word[::-1]


def pig_latin(word: str) -> str:
    """`banana` -> `ananabay`; one letter moves, whether vowel or consonant."""
    return word[1:] + word[:1] + "ay"


def mirror_upper(word: str) -> str:
    """`banana` -> `ANANAB`."""
    return word[::-1].upper()


TASKS: tuple[Task, ...] = (
    Task(name="capital", description="makes the first letter a capital", transform=capital),
    Task(name="upper", description="writes the word in capitals", transform=str.upper),
    Task(name="rot13", description="moves every letter 13 places along the alphabet", transform=rot13),
    Task(name="stars", description="writes * for every vowel", transform=stars),
    Task(name="reverse", description="writes the word backwards", transform=reverse),
    Task(name="pig-latin", description="moves the first letter to the end and adds ay", transform=pig_latin),
    Task(name="mirror-upper", description="writes the word backwards in capitals", transform=mirror_upper),
)


def prompt(word: str) -> str:
    """The text that asks for a word; the base model answers it by copying the word."""
    return f"{word}>"


def random_words(seed: int, count: int) -> list[str]:
    """`count` distinct lower-case words of 3 to 9 letters that can be pronounced; the same seed gives the same words.

    Consonants and vowels alternate, so every word has a vowel to star out.
    Palindromes are left out: on them `reverse` could not be told from a copy.
    """
    rng = random.Random(seed)
    words: dict[str, None] = {}  # a dict, not a set: it keeps the order of drawing
    while len(words) < count:
        start = rng.randrange(2)
        length = rng.randint(MIN_LETTERS, MAX_LETTERS)
        word = "".join(rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(length))
        if word != word[::-1]:
            words[word] = None
    return list(words)
