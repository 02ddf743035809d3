"""What the checks find: problems by file and line, and their report as text and JSON."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

ERROR, WARNING = "error", "warning"

CHECKS: dict[str, tuple[str, str]] = {
    # Records that cannot be read. The first three are the kinds of DataError.
    "json": (ERROR, "a record is not valid JSON, or has a key twice"),
    "record": (ERROR, "a field violates the schema: roles, turns, boxes, paths, unknown fields"),
    "placeholders": (ERROR, "placeholders and images of a record differ in number"),
    "no_records": (ERROR, "a file has no record that can be read"),
    "id_repeated": (ERROR, "two records of a file have one id; a warning for training records"),
    "record_repeated": (WARNING, "two records of a file are equal, apart from their id"),
    # Names
    "name_unmentioned": (ERROR, "no text mentions a name; a warning if the record mentions another name"),
    "name_spelling": (WARNING, "texts mention a name in another case only, which is not found"),
    "names_alike": (ERROR, "two names of a record differ only in case, white space or Unicode form"),
    "name_generic": (WARNING, "a name reads as a description, such as 'the man'"),
    "person_twice": (ERROR, "two names of a record are one person, by meta.people"),
    "meta": (ERROR, "meta names what the record does not have, or has another type"),
    # Texts
    "markup_in_text": (ERROR, "a text holds the placeholder of another format, such as <image> or <bbox>"),
    "question_missing": (WARNING, "a user turn has images, but no text"),
    "answer_in_question": (WARNING, "the question holds the whole answer"),
    "choices": (ERROR, "false answers are missing or repeated, or a numbered image does not exist"),
    "target": (ERROR, "the target of a location question is not introduced or not asked for"),
    # Boxes
    "box_outside": (ERROR, "a box leaves its image"),
    "box_units": (ERROR, "a box in pixels is within 0..1, so it seems to be relative"),
    "box_small": (WARNING, "a box has a side of less than 4 pixels"),
    "box_whole_image": (WARNING, "a box covers the whole image, and the record has another box in it"),
    "boxes_equal": (WARNING, "two names have the same box in one image"),
    "absent_but_boxed": (WARNING, "an answer says that the only name asked for is absent, but its box is there"),
    # Images
    "image_missing": (ERROR, "an image file does not exist"),
    "image_damaged": (ERROR, "an image cannot be used: truncated, too large, too narrow, outside the image root"),
    "image_blank": (WARNING, "an image has one colour"),
    "image_repeated": (WARNING, "the messages of a record hold one image twice"),
    "reference_repeated": (WARNING, "an identity has one reference photo twice"),
    "reference_shared": (ERROR, "two identities of a record have the same reference photo"),
    # Leaks within a record
    "reference_is_scene": (ERROR, "a reference has exactly the pixels of an image that is asked about"),
    "reference_like_scene": (
        ERROR,
        "a reference is an image that is asked about: scaled, mirrored or compressed again",
    ),
    "reference_from_scene": (
        ERROR,
        "a reference is cut out of a scene; a warning if meta says so",
    ),
    "same_shot": (ERROR, "a reference and an image that is asked about are of one shot, by meta"),
    "same_scene": (WARNING, "a reference and an image that is asked about are of one scene of a film, by meta"),
    # Leaks between training and held-out records
    "person_in_both": (ERROR, "training and held-out records introduce one person"),
    "image_in_both": (ERROR, "training and held-out records hold one image"),
    "similar_image_in_both": (ERROR, "training and held-out records hold one image, scaled or compressed again"),
    "shot_in_both": (ERROR, "training and held-out records hold images of one shot, by meta"),
    "record_in_both": (ERROR, "training and held-out records ask the same about the same images"),
    # With a processor
    "encoding": (ERROR, "the processor cannot encode a record: too long, the chat template refuses it, ..."),
}
"""The checks: name -> level and what they find."""

MAX_PROBLEMS = 1000
"""Default number of problems of one check that a report lists. All are counted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of one record.

    Attributes:
        check: a key of :data:`CHECKS`.
        level: ``"error"`` or ``"warning"``.
        file: the file of the record.
        line: its line, from 1; None for a row of a table.
        where: file and line, or file and row, as in the errors of the library.
        id: id of the record; "" if it could not be read.
        message: what is wrong, with field and value.
    """

    check: str
    level: str
    file: str
    line: int | None
    where: str
    id: str
    message: str


@dataclass
class ValidationReport:
    """Result of :func:`validate_records`.

    Attributes:
        problems: the problems, at most ``max_problems`` of each check.
        counts: number of all problems of each check.
        num_errors: number of all problems of level ``"error"``.
        files: file -> number of its records.
        num_images: number of different images that were opened.
        seconds: duration.
        max_problems: limit on the problems of one check in ``problems``.
        people_known: number of records with identities whose persons ``meta.people`` names, and of all with identities.
    """

    problems: list[Problem] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    num_errors: int = 0
    files: dict[str, int] = field(default_factory=dict)
    num_images: int = 0
    seconds: float = 0.0
    max_problems: int = MAX_PROBLEMS
    people_known: tuple[int, int] = (0, 0)

    def add(self, problem: Problem) -> None:
        """Count a problem, and list it unless there are many of its check."""
        self.counts[problem.check] += 1
        self.num_errors += problem.level == ERROR
        if self.counts[problem.check] <= self.max_problems:
            self.problems.append(problem)

    @property
    def num_warnings(self) -> int:
        """Number of all problems of level ``"warning"``."""
        return self.counts.total() - self.num_errors

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "errors": self.num_errors,
            "warnings": self.num_warnings,
            "counts": dict(self.counts),
            "files": self.files,
            "images": self.num_images,
            "seconds": round(self.seconds, 2),
            "listed_per_check": self.max_problems,
            "problems": [asdict(problem) for problem in self.problems],
        }

    def describe(self, *, most: int = 20) -> str:
        """The report as text: at most ``most`` problems of each check, then the counts."""
        lines, shown = [], Counter()
        for problem in self.problems:
            shown[problem.check] += 1
            if shown[problem.check] <= most:
                lines.append(f"{problem.where}: {problem.level}: {problem.check}: {problem.message}")
        lines += [
            f"... and {self.counts[check] - most} more of {check}" for check in shown if self.counts[check] > most
        ]
        records = sum(self.files.values())
        lines.append(
            f"{records} records, {self.num_images} images in {self.seconds:.1f} s: {self.num_errors} errors, "
            f"{self.num_warnings} warnings"
            + "".join(f"\n  {count} {check}: {CHECKS[check][1]}" for check, count in self.counts.most_common())
        )
        known, of = self.people_known
        if known < of:
            lines.append(
                f"{of - known} of {of} records with identities have no meta.people: their persons are told apart by "
                "their reference photos only."
            )
        return "\n".join(lines)
