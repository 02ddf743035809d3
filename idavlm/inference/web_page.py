"""A web page: a cast on the left, a scene and a question on the right, and the answer with boxes and identity map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from idavlm.data.photos import PhotoLoader
from idavlm.datasets.characters import ACTIVITIES, draw_characters
from idavlm.datasets.characters.drawing import look_of
from idavlm.inference.answer_overlay import draw_boxes, draw_identity_map
from idavlm.inference.batching import BatchingEngine
from idavlm.inference.generation_options import GenerationOptions
from idavlm.inference.identity_answer import IdentityMap, answer_question

Cast = dict[str, list[Image.Image]]
"""Photos of each person by name."""

_KEPT_SECONDS = 600
"""Files of uploaded photos are deleted after this time, and with the end of the server."""


@dataclass(frozen=True, eq=False)
class WebExample:
    """A cast, a scene and a question that the page offers.

    Attributes:
        title: text of its button.
        cast: photos of each person by name.
        scene: the image.
        question: the question.
    """

    title: str
    cast: Cast
    scene: Image.Image
    question: str


def build_web_page(
    engine: BatchingEngine, *, title: str, examples: Sequence[WebExample] = (), max_new_tokens: int = 64
) -> Any:
    """Build the page. ``page.launch(...)`` serves it.

    Each browser session has its own cast, in memory. Sessions share forward passes of the model.

    Args:
        engine: runs the model.
        title: heading of the page.
        examples: offered as buttons.
        max_new_tokens: largest number of tokens of an answer.

    Returns:
        ``gradio.Blocks``.

    Raises:
        ImportError: gradio is not installed; the extra ``web`` installs it.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("the web page needs gradio; install it with: pip install 'idavlm[web]'") from error

    options = GenerationOptions(max_new_tokens=max_new_tokens)

    loader = PhotoLoader(**engine.processor.image_limits)

    def add(cast: Cast, name: str, files: Sequence[str] | None):
        try:
            cast = add_to_cast(cast, name, files or (), loader)
        except ValueError as error:
            gr.Warning(str(error))
            return cast, gr.skip(), gr.skip(), gr.skip(), gr.skip()
        return cast, _gallery(cast), _choices(gr, cast), "", None

    def remove(cast: Cast, name: str | None):
        cast = {other: photos for other, photos in cast.items() if other != name}
        return cast, _gallery(cast), _choices(gr, cast)

    def ask(cast: Cast, scene: Image.Image | None, question: str):
        try:
            if scene is None:
                raise ValueError("There is no image; upload one.")
            if not question.strip():
                raise ValueError("There is no question; write one.")
            with_maps = bool(cast) and getattr(engine.model, "id_former", None) is not None
            answer = answer_question(
                engine, question, images=[scene], identities=cast, options=options, with_identity_maps=with_maps
            )
        except ValueError as error:
            gr.Warning(str(error))  # gr.Error would write "Error" over every output
            return "", None, None, gr.skip(), None
        drawn = draw_boxes(scene, answer.boxes, list(cast))
        maps = answer.identity_maps[0] if answer.identity_maps else None
        shown = next((name for name in cast if name in question), next(iter(cast), None))
        return answer.text, drawn, maps, gr.update(value=shown), show_map(scene, maps, shown)

    def show_map(scene: Image.Image | None, maps: IdentityMap | None, name: str | None):
        if scene is None or maps is None or name not in maps.names:
            return None
        return draw_identity_map(scene, maps, name)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, _KEPT_SECONDS)) as page:
        cast_state, map_state = gr.State({}, time_to_live=3600), gr.State(None, time_to_live=3600)
        gr.Markdown(f"# {title}\nUpload photos of people, name them, and ask about them in another image.")
        with gr.Row():
            with gr.Column(scale=2):
                gr.Markdown("Cast")  # a label would cover a part of the first photo
                gallery = gr.Gallery(
                    show_label=False,
                    columns=3,
                    height=330,
                    interactive=False,
                    object_fit="contain",
                    buttons=["fullscreen"],
                    elem_id="cast",
                )
                name_box = gr.Textbox(label="Name", placeholder="Kate", elem_id="name")
                files = gr.File(
                    label="Photos of this person", file_count="multiple", file_types=["image"], elem_id="photos"
                )
                add_button = gr.Button("Add to the cast", elem_id="add")
                with gr.Row():
                    person = gr.Dropdown([], label="Person", elem_id="person", scale=2)
                    remove_button = gr.Button("Remove", elem_id="remove", scale=1)
            with gr.Column(scale=3):
                scene = gr.Image(type="pil", label="Image", height=320, elem_id="scene")
                question = gr.Textbox(label="Question", placeholder="Where is Kate?", elem_id="question")
                ask_button = gr.Button("Ask", variant="primary", elem_id="ask")
                answer = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
                with gr.Row():
                    shown = {"interactive": False, "height": 300, "buttons": ["fullscreen", "download"]}
                    drawn = gr.Image(label="Boxes", elem_id="boxes", **shown)
                    heat = gr.Image(label="Identity map", elem_id="map", **shown)
        if examples:
            gr.Markdown("### Examples")
            with gr.Row():
                for number, example in enumerate(examples):
                    button = gr.Button(example.title, elem_id=f"example-{number}")

                    def load(example: WebExample = example):
                        cast = dict(example.cast)
                        return cast, _gallery(cast), _choices(gr, cast), example.scene, example.question

                    button.click(load, None, [cast_state, gallery, person, scene, question])

        add_button.click(add, [cast_state, name_box, files], [cast_state, gallery, person, name_box, files])
        remove_button.click(remove, [cast_state, person], [cast_state, gallery, person])
        asked = [cast_state, scene, question], [answer, drawn, map_state, person, heat]
        ask_button.click(ask, *asked)
        question.submit(ask, *asked)
        person.input(show_map, [scene, map_state, person], heat)
    return page


def add_to_cast(
    cast: Mapping[str, list[Image.Image]], name: str, files: Sequence[str], loader: PhotoLoader | None = None
) -> Cast:
    """Return the cast with the photos of ``files`` added to a person, who may be new.

    Args:
        cast: photos of each person by name.
        name: name of the person.
        files: paths of the photos.
        loader: opens the photos; by default with the limits of :class:`idavlm.data.photos.PhotoLoader`.

    Raises:
        DataError: a file is no image, or it is too large.
        ValueError: the name is empty, or there is no file.
    """
    name = " ".join(name.split())
    if not name:
        raise ValueError("The name is empty; write the name of the person.")
    if not files:
        raise ValueError(f"There is no photo of {name}; upload one.")
    loader = PhotoLoader() if loader is None else loader
    photos = [loader.load(str(file), field=f"the photo of {name}") for file in files]
    return {**cast, name: [*cast.get(name, ()), *photos]}


def drawn_examples(*, size: int = 256, seed: int = 0) -> list[WebExample]:
    """Examples of drawn characters that no training of idavlm-tiny has seen."""
    names = ("Kate", "Tom", "Alice")
    rng = np.random.default_rng([seed, 79])
    looks = [look_of(f"test-{1000 + number}", seed) for number in range(len(names))]

    def activities(count: int) -> list:
        return [ACTIVITIES[number] for number in rng.choice(len(ACTIVITIES), count, replace=False)]

    cast = {
        name: [draw_characters([look], [activity], rng, size)[0] for activity in activities(2)]
        for name, look in zip(names, looks, strict=True)
    }
    scene, _ = draw_characters(looks, activities(3), rng, size)
    pair, _ = draw_characters(looks[1:], activities(2), rng, size)
    return [
        WebExample("Where is Kate?", cast, scene, "Where is Kate?"),
        WebExample("What is Tom doing?", cast, scene, "What is Tom doing?"),
        WebExample("What is Alice doing?", {name: cast[name] for name in names[1:]}, pair, "What is Alice doing?"),
    ]


def _gallery(cast: Cast) -> list[tuple[Image.Image, str]]:
    return [(photo, name) for name, photos in cast.items() for photo in photos]


def _choices(gr: Any, cast: Cast) -> Any:
    return gr.update(choices=list(cast), value=next(iter(cast), None))
