"""The words of questions and answers: one wording a task, shared by training and evaluation."""

from collections.abc import Mapping, Sequence

from idavlm.datasets.album import Person, Picture

WHO = "Who is in the pictures?"


def roll_call(pictures: Sequence[Picture], names: Mapping[str, str]) -> str:
    """ "Picture 1: Kate. Picture 2: someone."."""
    who = [" and ".join(names.get(person.identity, "someone") for person in one.people) for one in pictures]
    return " ".join(f"{picture_number(number)}: {one}." for number, one in enumerate(who, 1))


def where_is(name: str) -> str:
    return f"Where is {name}?"


def which_shows(name: str) -> str:
    return f"Which picture shows {name}?"


def in_which_is(name: str, activity: str) -> str:
    return f"In which picture is {name} {activity}?"


def describe(pictures: int) -> str:
    return "Describe the picture." if pictures == 1 else "Describe the pictures."


def in_picture(question: str, number: int) -> str:
    """ "What is Kate doing?" of one picture out of several: "What is Kate doing in picture 2?"."""
    return f"{question.rstrip('?')} in picture {number}?"


def picture_number(number: int) -> str:
    return f"Picture {number}"


def is_doing(name: str, activity: str) -> str:
    return f"{name} is {activity}."


def caption(people: Sequence[Person], names: Mapping[str, str]) -> str:
    """ "Kate is waving, someone is running and Tom is reading.", from left to right; ``names`` by identity."""
    clauses = [f"{names.get(person.identity, 'someone')} is {person.activity}" for person in people]
    joined = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
    return joined[0].upper() + joined[1:] + "."


def captions(pictures: Sequence[Picture], names: Mapping[str, str]) -> str:
    """ "Picture 1: Kate is waving. Picture 2: Tom is running."."""
    return " ".join(f"{picture_number(i)}: {caption(one.people, names)}" for i, one in enumerate(pictures, 1))
