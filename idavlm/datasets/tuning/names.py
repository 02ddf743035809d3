"""Names of the people in records: drawn anew for every record, all different, and in agreement with pronouns."""

import re
from collections.abc import Sequence
from random import Random

FEMININE = (
    *("Ada", "Agnes", "Alice", "Amelia", "Anna", "Astrid", "Beatrice", "Bella", "Carla", "Chloe", "Clara", "Dora"),
    *("Edith", "Elena", "Ella", "Emma", "Esther", "Eva", "Fiona", "Freya", "Grace", "Greta", "Hannah", "Helen", "Ida"),
    *("Ines", "Ingrid", "Iris", "Jane", "Julia", "Kate", "Klara", "Laura", "Lena", "Lina", "Lucy", "Maria", "Marta"),
    *("Maya", "Mila", "Nadia", "Nina", "Nora", "Olga", "Pia", "Rita", "Rosa", "Ruth", "Sara", "Sofia", "Stella"),
    *("Tara", "Tina", "Uma", "Vera", "Wanda", "Yara", "Zoe"),
)
MASCULINE = (
    *("Adam", "Alan", "Amir", "Anton", "Arthur", "Ben", "Boris", "Bruno", "Carl", "Daniel", "David", "Diego", "Eli"),
    *("Emil", "Erik", "Felix", "Frank", "George", "Hassan", "Henry", "Hugo", "Isaac", "Ivan", "Jack", "Jasper"),
    *("John", "Jonas", "Karim", "Lars", "Leo", "Liam", "Lucas", "Luis", "Marco", "Mark", "Martin", "Max", "Nico"),
    *("Noah", "Oliver", "Omar", "Oscar", "Otto", "Paul", "Peter", "Rafael", "Samir", "Simon", "Stefan", "Theo"),
    *("Thomas", "Tom", "Victor", "Viktor", "Walter", "Wim", "Yusuf", "Zeno"),
)
NEUTRAL = (
    *("Alex", "Andrea", "Ariel", "Avery", "Bailey", "Blake", "Casey", "Charlie", "Chris", "Dana", "Eden", "Ellis"),
    *("Emery", "Finley", "Frankie", "Hayden", "Indigo", "Jamie", "Jesse", "Jordan", "Jules", "Kai", "Kendall", "Kim"),
    *(
        "Kit",
        "Lee",
        "Lennon",
        "Logan",
        "Marlow",
        "Morgan",
        "Nicky",
        "Noel",
        "Parker",
        "Quinn",
        "Reese",
        "Remy",
        "Riley",
    ),
    *("River", "Robin", "Rowan", "Sam", "Sasha", "Shannon", "Sky", "Stevie", "Taylor", "Terry", "Toni", "Yuki"),
)
"""Names that suit everyone."""

_HE = re.compile(r"\b(?:he|him|his|himself)\b", re.IGNORECASE)
_SHE = re.compile(r"\b(?:she|her|hers|herself)\b", re.IGNORECASE)
_FEMININE = re.compile(r"\b(?:wom[ae]n|girls?|lad(?:y|ies)|females?|mother|mom|daughter|sister|bride|waitress)\b", re.I)
_MASCULINE = re.compile(r"\b(?:m[ae]n|boys?|guys?|males?|father|dad|son|brother|groom|waiter|gentlem[ae]n)\b", re.I)
_POOLS = {"feminine": FEMININE, "masculine": MASCULINE, "neutral": NEUTRAL}


def pronoun_gender(texts: Sequence[str], num_people: int) -> str:
    """Which names suit the pronouns of some texts: ``"feminine"``, ``"masculine"`` or ``"neutral"``.

    A pronoun is attributed only if the texts are about one person. With several people, it is not known whom "she"
    refers to, so all of them get neutral names.
    """
    he, she = (any(pattern.search(text) for text in texts) for pattern in (_HE, _SHE))
    if he == she or num_people != 1:
        return "neutral"
    return "masculine" if he else "feminine"


def phrase_gender(text: str) -> str:
    """Which names suit a phrase about one person, by its nouns: "a young woman" is feminine."""
    feminine, masculine = _FEMININE.search(text), _MASCULINE.search(text)
    if bool(feminine) == bool(masculine):
        return "neutral"
    return "feminine" if feminine else "masculine"


def draw_names(genders: Sequence[str], rng: Random, texts: Sequence[str] = ()) -> list[str]:
    """Draw a name for each gender (``"feminine"``, ``"masculine"``, ``"neutral"``), all different.

    Args:
        genders: one per person.
        rng: source of the choices.
        texts: texts of the record. A name that one of them holds as a word is not drawn.
    """
    used = {word for text in texts for word in re.findall(r"\w+", text)}
    drawn: list[str] = []
    for gender in genders:
        pool = [name for name in _POOLS[gender] if name not in used]
        drawn.append(rng.choice(pool))
        used.add(drawn[-1])
    return drawn


_PUNCTUATION = re.compile(r"\s+([.,?!;:%)\]])")
_CONTRACTION = re.compile(r"\s*'\s*(s|t|re|ve|ll|d|m)\b", re.IGNORECASE)
_NEGATION = re.compile(r"\s+n't\b", re.IGNORECASE)
_OPENING = re.compile(r"([(\[])\s+")
_HYPHEN = re.compile(r"(?<=\w)\s+-\s+(?=\w)")


def join_words(words: Sequence[str]) -> str:
    """Write tokens of an annotation as a sentence: no space before punctuation, in contractions, around a hyphen."""
    text = " ".join(" ".join(words).split())
    text = _OPENING.sub(r"\1", _PUNCTUATION.sub(r"\1", _NEGATION.sub("n't", text)))
    text = _HYPHEN.sub("-", _CONTRACTION.sub(r"'\1", text))
    return text[:1].upper() + text[1:]
