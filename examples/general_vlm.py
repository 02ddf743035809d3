"""A small vision-language model that is trained from scratch on general images, for examples/attach_idformer.py.

General images show things and unnamed figures. The model learns to say where a thing is, which picture shows it, and
its colour, number and place. Some records introduce a thing by a name and reference images, as interleaved training
data of released models do ("Kate is <image of a red star>"). Some figures are painted in one colour and asked for among
other figures, by colour or by name ("Kate is <image of a red person>"). No record tells two figures of the same colour
apart.

There are two families, :class:`Llava` and :class:`Qwen2_5VL`. They share the images, the records and the trainings.
"""

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    FocalNetConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from idavlm import IdentityProcessor
from idavlm._compat import pil_image_processor
from idavlm.data.chat_templates import ROLE_TOKENS
from idavlm.datasets.characters.activities import ACTIVITIES
from idavlm.datasets.characters.body import figure
from idavlm.datasets.characters.general import COUNTS, GeneralImage, plan_general
from idavlm.datasets.characters.images import draw_objects, in_light, paste_sketch, place_figures, tight_box
from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.objects import COLOURS, THINGS, draw_thing, named_colour
from idavlm.datasets.characters.places import PLACES, VARIANTS, background
from idavlm.datasets.characters.shapes import Colour, Sketch, shade
from idavlm.datasets.record_composer import FIRST_NAMES
from idavlm.experimental.muon import MuonAdamW
from idavlm.experimental.small_models import small_image_processor
from idavlm.models import BoxFormat
from idavlm.models.boxes import box_iou
from idavlm.utils import IGNORE_INDEX, ImageRole, write_text

DRAWN_SIZE = 128  # pixels; boxes are in pixels of this size
CELL = 16  # pixels; a token stands for CELL x CELL pixels of the image that the model gets
WIDTH = 128
BATCH_SIZE = 16
BOXES = BoxFormat("bins32")
TOKEN_STD = 0.1  # of image tokens and of the token embeddings of the new language model
HELD_OUT = 10  # every tenth general image is for evaluation only
GUIDED_HEADS = 2

Grid = tuple[int, int]
"""Rows and columns of the tokens of an image."""


# --- General images: things and unnamed figures ---


@dataclass
class Item:
    """A thing or a figure in a general scene. ``words`` are what the vision tower learns to see."""

    kind: str
    colour: str
    words: dict[str, str]
    box: list[int] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """Items with the same key look alike to the script. No two figures are told apart."""
        return self.kind, self.colour


@dataclass
class Scene:
    """A general scene with the boxes of its items, or (``plan``) an image with questions and without boxes."""

    items: list[Item]
    place: str
    plan: GeneralImage | None = None
    grid: Grid = (6, 6)


def colour_word(rgb: Sequence[float]) -> str:
    """The nearest of the colour names."""
    named = {name: np.array(named_colour(name, _Middle())) for name in COLOURS}
    named |= {"grey": np.array((128, 128, 128)), "brown": np.array((122, 76, 42))}
    return min(named, key=lambda name: np.abs(named[name] - np.array(rgb)).sum())


class _Middle:
    """Takes the place of a random generator: the middle of every range."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2


def look_words(look: CharacterLook) -> dict[str, str]:
    """Words for what an unnamed figure wears."""
    words = {name: getattr(look, name) for name in LOOK_STYLES}
    return words | {name: colour_word(getattr(look, name)) for name in LOOK_COLOURS}


LOOK_STYLES = ("shirt_pattern", "sleeves", "lower", "hair_style", "hat", "beard", "glasses", "extra")
LOOK_COLOURS = (
    *("skin", "hair_colour", "shirt_colour", "second_colour", "lower_colour", "shoe_colour"),
    *("hat_colour", "extra_colour"),
)


def draw_scene(count: int, rng: np.random.Generator, *, figures_only: bool = False) -> tuple[Image.Image, Scene]:
    """Draw ``count`` things and figures side by side, at about the same height.

    With ``figures_only``, three of four figures are painted in one colour from head to foot, like toys. Such figures
    can be asked for among other figures ("the red person"), and no word for them tells who they are.
    """
    items, sketches = [], []
    for _ in range(count):
        if figures_only or rng.random() < 0.5:
            look = CharacterLook.from_seed(int(rng.integers(2**31)), 7, 7)
            activity = ACTIVITIES[rng.integers(len(ACTIVITIES))]
            sketch = figure(look, activity, rng)
            item = Item("person", "", look_words(look) | {"activity": activity.name})
            if figures_only and rng.random() < 0.75:
                item = Item("person", str(rng.choice(list(COLOURS))), {})
                paint(sketch, named_colour(item.colour, rng))
        else:
            kind, colour = str(rng.choice(list(THINGS))), str(rng.choice(list(COLOURS)))
            sketch = draw_thing(kind, named_colour(colour, rng))
            scale = rng.uniform(2.0, 3.6)
            sketch.shapes = [shape._replace(points=shape.points * scale) for shape in sketch.shapes]
            item = Item(kind, colour, {})
        items.append(item)
        sketches.append(sketch)
    placed = place_figures(sketches, [bool(rng.random() < 0.5) for _ in items], rng, DRAWN_SIZE)
    place = str(rng.choice(list(PLACES)))
    image = background(place, int(rng.integers(VARIANTS)), DRAWN_SIZE, rng)
    for number in sorted(range(count), key=lambda number: placed[number].y):
        items[number].box = [int(side) for side in tight_box(paste_sketch(image, placed[number]), DRAWN_SIZE)]
    return in_light(image, rng), Scene(items, place)


def paint(sketch: Sketch, colour: Colour) -> None:
    """Paint a sketch in one colour: its shapes differ in brightness only."""
    sketch.shapes = [
        shape._replace(colour=shade(colour, 0.6 + 0.5 * fmean(shape.colour) / 255)) for shape in sketch.shapes
    ]


def draw_general_images(
    folder: Path, *, num_scenes: int, num_figure_scenes: int, num_plans: int, seed: int = 123
) -> tuple[np.ndarray, list[Scene]]:
    """Draw general images of 128 x 128 pixels once, ``[N, 128, 128, 3]``.

    The first ``num_plans`` are those of :func:`plan_general`. ``num_scenes`` of one to four items follow, then
    ``num_figure_scenes`` of one to four figures.
    """
    name = f"general-{num_plans}-{num_scenes}-{num_figure_scenes}-{DRAWN_SIZE}"
    file, facts = folder / f"{name}.npy", folder / f"{name}.json"
    if facts.exists():  # written last
        return np.load(file, mmap_mode="r"), [_read_scene(values) for values in json.loads(facts.read_text())]
    rng, images, scenes = np.random.default_rng(seed), [], []
    for plan in plan_general(num_plans, Random(seed)):
        images.append(draw_objects(plan.thing, plan.colour, plan.count, plan.place, rng, DRAWN_SIZE))
        items = [Item(plan.thing, plan.colour, {})] if plan.count == 1 else []
        scenes.append(Scene(items, plan.place, plan))
    for number in range(num_scenes + num_figure_scenes):
        image, scene = draw_scene((1, 2, 3, 4, 3, 1)[number % 6], rng, figures_only=number >= num_scenes)
        images.append(image)
        scenes.append(scene)
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    folder.mkdir(parents=True, exist_ok=True)
    np.save(file, pixels)
    write_text(facts, json.dumps([asdict(scene) for scene in scenes]))
    return pixels, scenes


def _read_scene(values: dict) -> Scene:
    items = [Item(**item) for item in values["items"]]
    return Scene(items, values["place"], values["plan"] and GeneralImage(**values["plan"]))


def resized(image: Image.Image, grid: Grid) -> Image.Image:
    """The image in the size that has one token per cell of ``grid``. Boxes stay those of the drawn image."""
    rows, columns = grid
    return image.convert("RGB").resize((columns * CELL, rows * CELL), Image.Resampling.BICUBIC)


def cells(box: Sequence[float], grid: Grid) -> Tensor:
    """Which of the tokens of an image have their centre in a box, ``[rows * columns]``."""
    y, x = ((torch.arange(count) + 0.5) / count * DRAWN_SIZE for count in grid)
    x1, y1, x2, y2 = box
    inside_x, inside_y = (x > x1) & (x < x2), (y > y1) & (y < y2)
    return (inside_y[:, None] & inside_x[None]).flatten()


# --- Two families: the model, its processor, and how an image becomes tokens ---


class Family(ABC):
    """What differs between the models of this script."""

    model_class: type[PreTrainedModel]
    steps: list[int]
    """Steps of the tower, of the language model, of the ID-Former from boxes, and of tuning."""
    grids: list[Grid]
    """Grids of image tokens. Each image has one of them."""
    tower_name: str
    """Name of the vision tower in ``model.model``."""

    @abstractmethod
    def new_model(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel: ...

    @abstractmethod
    def wrapped_processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        """The processor of the family, without identities."""

    @abstractmethod
    def features(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """What the vision tower returns for images of one size, ``[B, rows * columns, 128]``."""

    @abstractmethod
    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        """The image tokens for features of the tower, in the width of the language model."""

    @abstractmethod
    def model_inputs(self, features: list[Tensor], grids: list[Grid], is_image: Tensor) -> dict[str, Tensor]:
        """Arguments of the model for stored features of images; ``is_image``: which of the input tokens are images."""

    def grid(self, row: int) -> Grid:
        """The grid of an image, by its row among the stored features."""
        return Random(row).choice(self.grids)

    def image_tokens(self, model: nn.Module, images: np.ndarray, grid: Grid) -> Tensor:
        """Image tokens of drawn images ``[B, 128, 128, 3]``, all in the size of ``grid``."""
        return self.project(model, self.features(model, pixel_values(images, grid)))

    def tower(self, model: nn.Module) -> nn.Module:
        return getattr(model.model, self.tower_name)

    def replace_tower(self, model: nn.Module, tower: nn.Module) -> nn.Module:
        """Put another vision tower into the model; returns the one before."""
        before = self.tower(model)
        setattr(model.model, self.tower_name, tower)
        return before

    def new_processor(self, tokenizer: PreTrainedTokenizerFast) -> IdentityProcessor:
        """The processor of the model, with identities."""
        return IdentityProcessor(self.wrapped_processor(tokenizer), box_format="bins32")


class Llava(Family):
    """``LlavaForConditionalGeneration`` with a FocalNet and a Llama. All images have one size."""

    model_class = LlavaForConditionalGeneration
    steps = [1000, 2600, 200, 300]  # noqa: RUF012
    grids = [(6, 6)]  # noqa: RUF012
    tower_name = "vision_tower"

    def new_model(self, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
        vision = FocalNetConfig(
            image_size=6 * CELL, patch_size=4, embed_dim=32, hidden_sizes=[32, 64, WIDTH], depths=[1, 1, 2],
            focal_levels=[2, 2, 2], focal_windows=[3, 3, 3], use_conv_embed=True, drop_path_rate=0.0, mlp_ratio=2.0,
            hidden_size=WIDTH,
        )  # fmt: skip
        text = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=36, vision_feature_layer=-1, vision_feature_select_strategy="full",
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = with_special_tokens(LlavaForConditionalGeneration(config), tokenizer)
        nn.init.normal_(model.get_input_embeddings().weight, std=TOKEN_STD)
        for layer in model.model.language_model.layers:
            # At first, half of the heads look for tokens like the one that looks, and all heads copy what they find.
            attention, half = layer.self_attn, WIDTH // 2
            nn.init.orthogonal_(attention.q_proj.weight)
            attention.k_proj.weight.data[:half].copy_(attention.q_proj.weight.data[:half])
            nn.init.orthogonal_(attention.v_proj.weight, gain=0.5)
            attention.o_proj.weight.data.copy_(attention.v_proj.weight.data.t())
        return model

    def wrapped_processor(self, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
        return LlavaProcessor(
            small_image_processor(6 * CELL),
            tokenizer,
            patch_size=CELL,
            vision_feature_select_strategy="full",
            image_token="<image>",
            chat_template=ROLE_TOKENS,
        )

    def features(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return self.tower(model)(pixels, output_hidden_states=True).hidden_states[-1]

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        return model.model.multi_modal_projector(features)

    def model_inputs(self, features: list[Tensor], grids: list[Grid], is_image: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack(features)}


class Qwen2_5VL(Family):
    """``Qwen2_5_VLForConditionalGeneration``: a ViT that merges 2 x 2 patches, windows, M-RoPE, images of any size.

    A ViT and a language model of this size learn slowly. Both start from a finished run of :class:`Llava`: the ViT
    imitates its image tokens, and the language model starts with its weights (:meth:`copy_language_model`).

    The tokenizer has no tokens around an image. Text has to stand between two images, or M-RoPE takes them for one.
    """

    model_class = Qwen2_5_VLForConditionalGeneration
    steps = [1200, 800, 200, 300]  # noqa: RUF012
    grids = [(6, 6), (5, 6), (7, 6), (6, 5), (6, 7)]  # noqa: RUF012
    tower_name = "visual"

    def new_model(self, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
        image_token = tokenizer.convert_tokens_to_ids("<image>")
        vision = Qwen2_5_VLVisionConfig(
            depth=4, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_heads=8, patch_size=CELL // 2,
            spatial_merge_size=2, temporal_patch_size=2, window_size=3 * CELL, out_hidden_size=WIDTH,
            fullatt_block_indexes=[1, 3], rope_parameters={"rope_type": "axial", "rope_theta": 100.0},
        )  # fmt: skip
        text = Qwen2_5_VLTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5, "mrope_section": [4, 6, 6]},
        )  # fmt: skip
        config = Qwen2_5_VLConfig(
            vision_config=vision, text_config=text, image_token_id=image_token, tie_word_embeddings=True,
            # The tokenizer has no videos and no tokens around images.
            video_token_id=-1, vision_start_token_id=-1, vision_end_token_id=-1,
        )  # fmt: skip
        model = with_special_tokens(Qwen2_5_VLForConditionalGeneration(config), tokenizer)
        for number, block in enumerate(model.model.visual.blocks):
            look_at_neighbours(block.attn, model.model.visual.rotary_pos_emb.inv_freq, distance=1 + number % 2)
        return model

    def copy_language_model(self, model: nn.Module, llava: dict[str, Tensor]) -> None:
        """Start the language model with the weights of a Llama. The biases, which a Llama lacks, stay at zero."""
        weights = {name: tensor for name, tensor in llava.items() if name.startswith(("model.language_model.", "lm_"))}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        other = [name for name in missing if not name.startswith("model.visual.") and not name.endswith(".bias")]
        if unexpected or other:
            raise ValueError(f"The language model of the teacher does not fit: {[*unexpected, *other][:5]}.")

    def wrapped_processor(self, tokenizer: PreTrainedTokenizerFast) -> "ImagesOnlyProcessor":
        image_processor = pil_image_processor("qwen2_vl", "Qwen2VLImageProcessor")(
            patch_size=CELL // 2,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": CELL**2, "longest_edge": 64 * CELL**2},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        return ImagesOnlyProcessor(image_processor, tokenizer, chat_template=ROLE_TOKENS)

    def features(self, model: nn.Module, pixels: Tensor) -> Tensor:
        rows, columns = pixels.shape[2] // CELL, pixels.shape[3] // CELL
        patches = rearrange(pixels, "b c (h m p) (w n q) -> (b h w m n) c p q", m=2, n=2, p=CELL // 2, q=CELL // 2)
        patches = repeat(patches, "patches c p q -> patches (c frames p q)", frames=2)  # an image is a video of one
        grid = torch.tensor([[1, 2 * rows, 2 * columns]]).expand(len(pixels), -1)
        tokens = self.tower(model)(patches, grid_thw=grid).pooler_output
        return tokens.view(len(pixels), rows * columns, -1)

    def project(self, model: nn.Module, features: Tensor) -> Tensor:
        return features  # the merger is a part of the tower

    def model_inputs(self, features: list[Tensor], grids: list[Grid], is_image: Tensor) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.cat(features),
            "image_grid_thw": torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids]),
            "mm_token_type_ids": is_image.long(),
        }


FAMILIES = {"llava": Llava(), "qwen2_5_vl": Qwen2_5VL()}


class ImagesOnlyProcessor(Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL without videos, which need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<image>", None
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids("<image>"), None
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def with_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def look_at_neighbours(attention: nn.Module, frequencies: Tensor, *, distance: int) -> None:
    """Start the eight heads of a block of a ViT with the eight neighbours of each patch, as a convolution does.

    The biases of queries and keys do that: after the rotation by the positions of two patches, their product is largest
    where one patch is the neighbour of the other. Heads that look everywhere at first learn much more slowly.
    """
    num_heads, size = attention.num_heads, attention.head_dim
    queries, keys, _ = attention.qkv.bias.view(3, num_heads, size)
    neighbours = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    # The first half of the rotated pairs is for rows, the second for columns; member i is paired with i + size / 2.
    for head, offsets in enumerate(neighbours):
        for axis, offset in enumerate(offsets):
            for number, weight in enumerate((1.0, 0.7)):  # the two highest frequencies
                member, angle = axis * len(frequencies) + number, frequencies[number] * offset * distance
                scale = (3.0 * size**0.5 * weight) ** 0.5  # sqrt(size): the attention divides by it
                queries[head, member] = scale
                keys[head, member] = scale * angle.cos()
                keys[head, member + size // 2] = -scale * angle.sin()
    width = num_heads * size
    nn.init.orthogonal_(attention.qkv.weight[2 * width :], gain=0.7)
    nn.init.orthogonal_(attention.proj.weight, gain=0.7)


def pixel_values(images: np.ndarray, grid: Grid) -> Tensor:
    """Drawn images in the size of ``grid``, ``[B, 3, rows * 16, columns * 16]`` with values from -1 to 1."""
    pixels = np.stack([np.asarray(resized(Image.fromarray(image), grid)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- The vision tower and the projector learn to see ---


def train_tower(
    family: Family,
    model: nn.Module,
    images: np.ndarray,
    scenes: list[Scene],
    *,
    steps: int,
    log: Callable,
) -> None:
    """Train tower and projector to see kind, colour, box and place, and what figures wear, at every token."""
    (grid,) = family.grids
    targets = tower_targets(scenes, grid)
    sizes = {name: int(value.max()) + 1 for name, value in targets.items() if value.dtype == torch.long}
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in sizes.items()})
    heads["box"] = nn.Linear(WIDTH, 4)
    tower, projector = family.tower(model), model.model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.orthogonal_(layer.weight)
    beside = [{"params": [*heads.parameters(), *projector.parameters()], "muon": False, "lr": 3e-3}]
    optimizer, schedule = tower_optimizer(tower, beside, steps=steps, warmup=30)
    train = torch.tensor([number for number in range(len(scenes)) if number % HELD_OUT])
    for step in range(steps):
        rows = train[torch.randint(len(train), (48,))]
        tokens = F.layer_norm(family.image_tokens(model, images[rows.numpy()], grid), (WIDTH,))
        losses = {}
        of_items = targets["cells"][rows] @ tokens  # the mean over the tokens of each item
        for name, size in sizes.items():
            target = targets[name][rows]
            inputs = {1: tokens.mean(1), 4: of_items, tokens.shape[1]: tokens}[target[0].numel()]
            scores, target = heads[name](inputs).view(-1, size), target.flatten()
            if (target >= 0).any():
                losses[name] = F.cross_entropy(scores, target, ignore_index=-1)
        box = targets["boxes"][rows]
        has_box = box[..., 0] >= 0
        losses["box"] = (heads["box"](tokens[has_box]) - box[has_box]).abs().mean()
        loss = sum({"kind": 2.0, "box": 20.0}.get(name, 1.0) * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            shown = {name: round(losses[name].item(), 3) for name in ("kind", "colour", "box", "hat") if name in losses}
            log(f"tower {step + 1}: {loss.item():.2f} {shown}")
    with torch.no_grad():  # the scale of the token embeddings of the language model
        tokens = family.image_tokens(model, images[: min(500, len(images))], grid).flatten(0, 1)
        scale = TOKEN_STD / tokens.std()
        projector.linear_2.weight.mul_(scale)
        projector.linear_2.bias.sub_(tokens.mean(0)).mul_(scale)


def tower_optimizer(
    tower: nn.Module, beside: Sequence[dict] = (), *, steps: int, warmup: int
) -> tuple[MuonAdamW, torch.optim.lr_scheduler.LambdaLR]:
    """Muon for the matrices of a tower and AdamW for the rest, with a cosine schedule.

    ``beside``: parameter groups of what is trained with the tower.
    """
    matrices = [parameter for parameter in tower.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in tower.parameters() if parameter.dim() != 2]
    optimizer = MuonAdamW(
        [{"params": matrices, "muon": True, "lr": 6e-3}, {"params": others, "muon": False, "lr": 2e-3}, *beside],
        lr=6e-3,
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (0.5 * (1 + np.cos(np.pi * step / steps)) + 0.01)
    )
    return optimizer, schedule


def imitate_tokens(
    family: Family, model: nn.Module, images: np.ndarray, teacher: Tensor, *, steps: int, log: Callable
) -> None:
    """Train the tower to return the image tokens of another model, ``teacher [N, 36, 128]``, for images of all sizes.

    All images of a batch have one size, and the next batch has the next size of the family. In sizes that the teacher
    does not know, its tokens are interpolated.
    """
    optimizer, schedule = tower_optimizer(family.tower(model), steps=steps, warmup=20)
    train = torch.tensor([number for number in range(len(images)) if number % HELD_OUT])
    test = torch.arange(0, len(images), HELD_OUT)[:200]

    def loss_of(rows: Tensor, grid: Grid) -> Tensor:
        tokens = family.image_tokens(model, images[rows.numpy()], grid)
        return F.mse_loss(tokens / TOKEN_STD, resized_tokens(teacher[rows], (6, 6), grid) / TOKEN_STD)

    variance = (teacher / TOKEN_STD).flatten(0, 1).var(0).mean()
    for step in range(steps):
        loss = loss_of(train[torch.randint(len(train), (48,))], family.grids[step % len(family.grids)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            with torch.no_grad():
                unexplained = [loss_of(test, grid) / variance for grid in family.grids]
            shown = ", ".join(f"{grid}: {1 - share:.2f}" for grid, share in zip(family.grids, unexplained, strict=True))
            log(f"tower {step + 1}: {loss.item():.3f}, share of the variance of held-out tokens {shown}")


def resized_tokens(tokens: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Interpolate image tokens ``[B, T, C]`` of a grid to another one."""
    tokens = rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])
    return rearrange(F.interpolate(tokens, new_grid, mode="bilinear"), "b c h w -> b (h w) c")


def tower_targets(scenes: list[Scene], grid: Grid) -> dict[str, Tensor]:
    """Classes of each token (kind, colour, row, column), of each figure (words) and of each image (place, count)."""
    num_tokens = grid[0] * grid[1]
    count, names = len(scenes), [*LOOK_STYLES, *LOOK_COLOURS, "activity"]
    found = {
        name: sorted({item.words[name] for scene in scenes for item in scene.items if item.words}) for name in names
    }
    kinds, colours, places = ["", *THINGS, "person"], list(COLOURS), list(PLACES)
    targets = {name: torch.full((count, 4), -1) for name in names}
    targets |= {name: torch.full((count, num_tokens), -1) for name in ("kind", "colour")}
    targets["row"] = torch.arange(grid[0]).repeat_interleave(grid[1]).expand(count, -1)
    targets["column"] = torch.arange(grid[1]).repeat(grid[0]).expand(count, -1)
    targets["place"] = torch.tensor([places.index(scene.place) for scene in scenes])
    plans = [scene.plan for scene in scenes]
    targets["count"] = torch.tensor([plan.count if plan else -1 for plan in plans])
    targets["thing"] = torch.tensor([list(THINGS).index(plan.thing) if plan else -1 for plan in plans])
    targets["paint"] = torch.tensor([colours.index(plan.colour) if plan else -1 for plan in plans])
    targets["boxes"] = torch.full((count, num_tokens, 4), -1.0)
    targets["cells"] = torch.zeros(count, 4, num_tokens)
    for row, scene in enumerate(scenes):
        if scene.plan:
            continue
        targets["kind"][row] = 0
        owners = torch.zeros(num_tokens, dtype=torch.long)
        for number, item in enumerate(scene.items):
            inside = cells(item.box, grid)
            owners += inside
            targets["cells"][row, number] = inside / inside.sum().clamp(min=1)
            targets["kind"][row, inside] = kinds.index(item.kind)
            targets["colour"][row, inside] = colours.index(item.colour) if item.colour else -1
            targets["boxes"][row, inside] = torch.tensor(item.box) / DRAWN_SIZE
            for name in names if item.words else ():
                targets[name][row, number] = found[name].index(item.words[name])
        targets["kind"][row, owners > 1] = -1  # tokens of several items
        targets["colour"][row, owners > 1] = -1
        targets["boxes"][row, owners > 1] = -1
    return targets


class StoredTower(nn.Module):
    """Takes the place of the frozen vision tower: ``pixel_values`` are its features, computed once."""

    spatial_merge_size = 2  # of Qwen2_5VL
    dtype = torch.float32

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(
            last_hidden_state=pixel_values, pooler_output=pixel_values, hidden_states=(pixel_values,)
        )


@dataclass
class Features:
    """What the vision tower says about images, ``tokens [N, T, 128]``. Smaller images leave the last tokens unused."""

    family: Family
    tokens: Tensor

    @classmethod
    @torch.no_grad()
    def compute(cls, family: Family, model: nn.Module, images: np.ndarray, grids: Sequence[Grid]) -> "Features":
        family.tower(model).eval()
        tokens = torch.zeros(len(images), max(rows * columns for rows, columns in grids), WIDTH)
        for grid in sorted(set(grids)):
            of_grid = np.array([row for row, of_row in enumerate(grids) if of_row == grid])
            for start in range(0, len(of_grid), 100):
                chunk = of_grid[start : start + 100]
                tokens[chunk, : grid[0] * grid[1]] = family.features(model, pixel_values(images[chunk], grid))
        return cls(family, tokens)

    def of(self, row: int, grid: Grid) -> Tensor:
        return self.tokens[row, : grid[0] * grid[1]]


# --- Text ---


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, whatever stands before it: a name is the same token in "Kate is" and "Where is Kate?"."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>", "<image>"]
    plans = [GeneralImage("", thing, "red", count, "park") for thing in THINGS for count in (1, 2)]
    texts = [text for plan in plans for pair in plan.questions() for text in pair]
    texts += [*FIRST_NAMES, *COLOURS, *(colour.capitalize() for colour in COLOURS), *COUNTS]
    texts += [*(count.capitalize() for count in COUNTS), *(str(number) for number in range(32)), *PLACES.values()]
    texts += [place.split(" ", 1)[1].capitalize() for place in PLACES.values()]
    texts += ["an person : ? . ,", "Which picture shows the", "Where is the", "What is in the picture?"]
    pattern = r"\n|\w+|[^\w\s]"
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[ \t]+"), "removed"), pre_tokenizers.Split(Regex(pattern), "isolated")]
    )
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*special, "\n", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_tokens([AddedToken(f"Picture {number}", normalized=False) for number in range(1, 9)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<image>"],
        chat_template=ROLE_TOKENS,
    )


def cached_tokenize(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    """The ids of a text. The texts of records repeat."""
    return lru_cache(maxsize=None)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass
class Photo:
    """An image of a record: its row among the stored features, and what an attached ID-Former has to know about it."""

    row: int
    grid: Grid
    role: ImageRole = ImageRole.GENERAL
    identity: int = 0
    start: int = 0  # position of its first token
    boxes: list[tuple[list[float], int]] = field(default_factory=list)  # of identities

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


class Record:
    """Token ids, labels and images of a conversation.

    The text is that of IdentityProcessor: "Kate is <image>" for references, then the question. Answers begin with the
    word that was asked for ("Kate 3 4 10 20"), which small models learn much faster.
    """

    def __init__(self, tokenize: Callable[[str], list[int]]):
        self.tokenize = tokenize
        self.ids, self.labels, self.photos = list(tokenize("<|user|>")), [IGNORE_INDEX], []
        self.answer_start = 0
        self.is_new = True  # no question yet
        self.looks: list[tuple[int, Sequence[int], list[int]]] = []
        """For guidance_loss: (layer, positions, positions that each of them should attend to)."""

    def text(self, text: str) -> int:
        """Add text; returns the position of its first token."""
        start, ids = len(self.ids), self.tokenize(text)
        self.ids += ids
        self.labels += [IGNORE_INDEX] * len(ids)
        return start

    def image(self, photo: Photo, label: int | None = None) -> Photo:
        """Add an image whose text before it starts at ``label``."""
        photo.start = len(self.ids)
        self.photos.append(photo)
        self.ids += self.tokenize("<image>") * photo.num_tokens
        self.labels += [IGNORE_INDEX] * photo.num_tokens
        looked = [photo.start - 1 if label is None else label]
        self.looks.append((0, range(photo.start, photo.start + photo.num_tokens), looked))
        return photo

    def turn(self, question: str, answer: str | None) -> int:
        """Add a question and its answer, or the question alone; returns the position of the answer."""
        self.text(("" if self.is_new else "<|user|>") + question + "<|assistant|>")
        self.is_new = False
        self.answer_start = len(self.ids)
        if answer is not None:
            ids = self.tokenize(answer + "<|end|>")
            self.ids += ids
            self.labels += ids
        return self.answer_start


def collate(records: Sequence[Record], features: Features, *, prompts: bool = False, identities: bool = True) -> dict:
    """A batch for the model; ``prompts`` ends each record before its last answer, for generation."""
    ids = [record.ids[: record.answer_start] if prompts else record.ids for record in records]
    longest = max(map(len, ids))
    batch = {name: torch.zeros(len(ids), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(ids), longest), IGNORE_INDEX)
    for row, of_row in enumerate(ids):
        place = slice(longest - len(of_row), longest) if prompts else slice(0, len(of_row))
        batch["input_ids"][row, place] = torch.tensor(of_row)
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = torch.tensor(records[row].labels[: len(of_row)])
    if prompts:
        del batch["labels"]
    photos = [photo for record in records for photo in record.photos]
    batch |= features.family.model_inputs(
        [features.of(photo.row, photo.grid) for photo in photos],
        [photo.grid for photo in photos],
        batch["input_ids"] == records[0].tokenize("<image>")[0],
    )
    if not identities or not any(photo.role == ImageRole.REFERENCE for photo in photos):
        return batch
    boxes = [(box, image, identity) for image, photo in enumerate(photos) for box, identity in photo.boxes]
    batch |= {
        "image_roles": torch.tensor([int(photo.role) for photo in photos]),
        "sample_index": torch.tensor([row for row, record in enumerate(records) for _ in record.photos]),
        "identity_index": torch.tensor([photo.identity for photo in photos]),
        "num_image_tokens": torch.tensor([photo.num_tokens for photo in photos]),
        "original_image_sizes": torch.full((len(photos), 2), DRAWN_SIZE),
    }
    if not prompts:
        batch |= {
            "boxes": torch.tensor([box for box, _, _ in boxes], dtype=torch.float).view(-1, 4),
            "box_image": torch.tensor([image for _, image, _ in boxes], dtype=torch.long),
            "box_identity": torch.tensor([identity for _, _, identity in boxes], dtype=torch.long),
        }
    return batch


def batches(draw: Callable[[], Record], rng: Random) -> Iterator[list[Record]]:
    """Endless batches of records of similar length."""
    while True:
        pool = sorted((draw() for _ in range(BATCH_SIZE * 6)), key=lambda record: len(record.ids))
        groups = [pool[start : start + BATCH_SIZE] for start in range(0, len(pool), BATCH_SIZE)]
        rng.shuffle(groups)
        yield from groups


# --- General training of the language model ---


class GeneralTasks:
    """Draws records about general images. ``held_out``: about images and pairings that were not trained on."""

    def __init__(self, scenes: list[Scene], tokenize: Callable, rng: Random, *, held_out: bool = False):
        self.scenes, self.tokenize, self.rng, self.held_out = scenes, tokenize, rng, held_out
        rows = [row for row in range(len(scenes)) if (row % HELD_OUT == 0) == held_out]
        self.singles, of_all = defaultdict(list), defaultdict(list)
        for row, scene in enumerate(scenes):
            if len(scene.items) == 1:
                of_all[scene.items[0].key].append(row)
        for row in rows:
            if len(scenes[row].items) == 1:
                self.singles[scenes[row].items[0].key].append(row)
        self.references = of_all if held_out else self.singles
        self.crowds = [row for row in rows if len(scenes[row].items) > (1 if held_out else 0) and not scenes[row].plan]
        self.plans = [row for row in rows if scenes[row].plan]
        self.keys = list(self.singles)

    def record(self) -> Record:
        tasks = (self.where_name, self.where_word, self.which_name, self.which_word, self.general)
        return self.rng.choices(tasks, (0.42, 0.12, 0.26, 0.07, 0.13))[0]()

    def where_name(self) -> Record:
        """Names introduced by images of like things; where are they?"""
        while True:
            row = self.rng.choice(self.crowds)
            named = self._introduce(self._unique(self.scenes[row].items), (row,), self.rng.randint(1, 4))
            if named:
                break
        record, shown = Record(self.tokenize), {}
        for name, item, photos in named:
            shown[name] = self._show(record, name, item, photos)
        photo = record.image(self._photo(row))
        record.text("\n")
        self.rng.shuffle(named)
        for name, item, _ in named[: 1 if self.held_out else None]:
            self._answer_where(record, f"Where is {name}?", name, item, photo, shown[name])
        return record

    def where_word(self) -> Record:
        """Where is the star? Where is the red person?"""
        while True:
            row = self.rng.choice(self.crowds)
            items, found = self.scenes[row].items, []
            for item in items:
                if sum(other.kind == item.kind for other in items) == 1:
                    found.append((item, item.kind, f"Where is the {item.kind}?"))
                elif item.colour and sum(other.colour == item.colour for other in items) == 1:
                    found.append((item, item.colour, f"Where is the {item.colour} {item.kind}?"))
            if found:
                break
        record = Record(self.tokenize)
        photo = record.image(self._photo(row))
        record.text("\n")
        self.rng.shuffle(found)
        for item, word, question in found[: 1 if self.held_out else None]:
            self._answer_where(record, question, word, item, photo, [])
        return record

    def which_name(self) -> Record:
        """Names introduced by images of like things; which picture shows them?"""
        while True:
            images = self._draw_choices()
            items = [self.scenes[row].items[0] for row in images]
            named = self._introduce(items, images, 1 if self.held_out else self.rng.randint(1, 4))
            if named:
                break
        record, shown = Record(self.tokenize), {}
        for name, item, photos in named:
            shown[name] = self._show(record, name, item, photos)
        photos = self._show_choices(record, images)
        for name, item, _ in named:
            self._answer_which(record, f"Which picture shows {name}?", name, items.index(item), photos, shown[name])
        return record

    def which_word(self) -> Record:
        """Which picture shows the star?"""
        images = self._draw_choices(different_kinds=True)
        items = [self.scenes[row].items[0] for row in images]
        record = Record(self.tokenize)
        photos = self._show_choices(record, images)
        numbers = self.rng.sample(range(len(items)), 1 if self.held_out else len(items))
        for number in numbers:
            kind = items[number].kind
            self._answer_which(record, f"Which picture shows the {kind}?", kind, number, photos, [])
        return record

    def general(self) -> Record:
        """Colour, number, place and description of one kind of thing."""
        row = self.rng.choice(self.plans)
        record = Record(self.tokenize)
        record.image(self._photo(row))
        record.text("\n")
        for question, answer in self.rng.sample(self.scenes[row].plan.questions(), 1 if self.held_out else 4):
            record.turn(question, answer)
        return record

    def _photo(self, row: int) -> Photo:
        return Photo(row, self.scenes[row].grid)

    def _unique(self, items: list[Item]) -> list[Item]:
        return [item for item in items if sum(other.key == item.key for other in items) == 1]

    def _introduce(self, items: list[Item], avoid: Sequence[int], most: int) -> list[tuple[str, Item, list[int]]]:
        """Names and reference images for up to ``most`` items."""
        items = self.rng.sample(items, min(most, len(items)))
        names = self.rng.sample(FIRST_NAMES, len(items))
        named = []
        for name, item in zip(names, items, strict=True):
            rows = [row for row in self.references[item.key] if row not in avoid]
            count = min(len(rows), 2 if self.held_out or (len(items) < 3 and self.rng.random() < 0.5) else 1)
            if count:
                named.append((name, item, self.rng.sample(rows, count)))
        return named

    def _draw_choices(self, different_kinds: bool = False) -> list[int]:
        """Images of one thing or figure each, all of different keys, often of similar ones."""
        count = 4 if self.held_out else self.rng.choice((2, 3, 4, 4))
        while True:
            first = self.rng.choice(self.keys)
            similar = [key for key in self.keys if key[0] == first[0] or key[1] == first[1]]
            figures = [key for key in self.keys if key[0] == "person"]
            keys = self.keys if different_kinds else self.rng.choices((self.keys, similar, figures), (0.5, 0.2, 0.3))[0]
            chosen = self.rng.sample(keys, min(count, len(keys)))
            kinds = {kind for kind, _ in chosen}
            if len(chosen) == count and (len(kinds) == count or not different_kinds):
                return [self.rng.choice(self.singles[key]) for key in chosen]

    def _show(self, record: Record, name: str, item: Item, rows: list[int]) -> list[int]:
        """Add reference images; returns the positions that show the item."""
        positions = []
        for row in rows:
            label = record.text(f"{name} is ")
            photo = record.image(self._photo(row), label)
            record.text("\n")
            positions += self._positions(photo, self.scenes[row].items[0])
        return positions

    def _show_choices(self, record: Record, rows: list[int]) -> list[Photo]:
        photos = []
        for number, row in enumerate(rows, 1):
            label = record.text(("\n" if number > 1 else "") + f"Picture {number}: ") + (number > 1)
            photos.append(record.image(self._photo(row), label))
        record.text("\n")
        return photos

    def _positions(self, photo: Photo, item: Item) -> list[int]:
        inside = cells(item.box, photo.grid) if item.box else torch.ones(photo.num_tokens, dtype=torch.bool)
        return [photo.start + number for number in inside.nonzero().flatten().tolist()]

    def _answer_where(
        self, record: Record, question: str, word: str, item: Item, photo: Photo, shown: list[int]
    ) -> None:
        box = BOXES.write("", item.box, (DRAWN_SIZE, DRAWN_SIZE))
        start = record.turn(question, f"{word} {box}")
        self._look(record, start, shown, self._positions(photo, item))
        record.looks.append((3, range(start + 1, start + 4), [start]))  # the first three numbers of the box

    def _answer_which(
        self, record: Record, question: str, word: str, number: int, photos: list[Photo], shown: list[int]
    ) -> None:
        start = record.turn(question, f"{word} Picture {number + 1}")
        item = self.scenes[photos[number].row].items[0]
        self._look(record, start, shown, self._positions(photos[number], item))

    def _look(self, record: Record, start: int, shown: list[int], target: list[int]) -> None:
        if shown:
            record.looks.append((1, [start], shown))
        if target:
            record.looks.append((2, [start], target))


def guidance_loss(attentions: Sequence[Tensor], records: Sequence[Record]) -> dict[int, Tensor]:
    """How much two heads of each layer look elsewhere than they should, ``-log(share)``, by layer.

    Layer 0: image tokens look at the word before them. Layer 1: the name in an answer looks at its reference images.
    Layer 2: it looks at what it refers to. Layer 3: the numbers of a box look at the name before them. A language model
    that has read much text and many interleaved images finds such steps by itself; one of this size, in minutes, does
    not.
    """
    losses = {}
    for layer in range(len(attentions)):
        places = [
            (row, query, key)
            for row, record in enumerate(records)
            for of_layer, queries, keys in record.looks
            if of_layer == layer
            for query in queries
            for key in keys
        ]
        if not places:
            continue
        rows, queries, keys = torch.tensor(places).t()  # one entry per pair
        weights = attentions[layer][:, :GUIDED_HEADS]  # [B, heads, T, T]
        length = weights.shape[-1]
        shares = weights.new_zeros(GUIDED_HEADS, len(records) * length)
        shares = shares.index_add(1, rows * length + queries, weights[rows, :, queries, keys].t())
        asked = (rows * length + queries).unique()
        losses[layer] = -shares[:, asked].clamp(min=1e-6).log().mean()
    return losses


def train_base(
    model: nn.Module,
    features: Features,
    scenes: list[Scene],
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    seed: int,
    num_tests: int = 50,
    log: Callable,
    log_every: int = 250,
) -> None:
    """Train the language model on general data; vision tower and projector stay as they are.

    Every ``log_every`` steps it answers ``num_tests`` held-out questions of each kind.
    """
    rng, tokenize = Random(seed), cached_tokenize(tokenizer)
    tasks = GeneralTasks(scenes, tokenize, rng)
    tests = general_tests(scenes, tokenize, count=num_tests)
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    embeddings = model.get_input_embeddings().weight
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() == 2 and parameter is not embeddings]
    others = [parameter for parameter in trained if parameter.dim() != 2]
    optimizer = MuonAdamW(
        [
            {"params": matrices, "muon": True, "lr": 3e-3},
            {"params": [*others, embeddings], "muon": False, "lr": 1.5e-3},
        ],
        lr=3e-3,
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps, warmup=30, decay=0.4))
    means, stream = defaultdict(list), batches(tasks.record, rng)
    model.model.language_model.set_attn_implementation("eager")  # the implementation that returns the attention
    model.train()
    for step in range(steps):
        records = next(stream)
        batch = collate(records, features)
        output = model(**batch, output_attentions=True)
        guidance = guidance_loss(output.attentions, records)
        # The guidance ends before the training does.
        weight = 0.5 * max(0.0, 1 - step / (0.7 * steps))
        loss = output.loss + weight * sum(guidance.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*others, embeddings], 1.0)
        optimizer.step()
        schedule.step()
        means["loss"].append(output.loss.item())
        for layer, value in guidance.items():
            means[f"layer {layer}"].append(value.item())
        if step % log_every == log_every - 1 or step == steps - 1:
            shown = {name: round(fmean(values[-log_every:]), 3) for name, values in means.items()}
            log(f"base {step + 1}: {shown} {general_scores(model, features, tests, tokenizer)}")
    model.model.language_model.set_attn_implementation("sdpa")
    model.requires_grad_(False)
    model.eval()


def warmup_stable_decay(steps: int, *, warmup: int, decay: float) -> Callable[[int], float]:
    """Factor of the learning rate: linear warmup, constant, then linear decay over the last ``decay`` of the steps."""
    return lambda step: min(1, (step + 1) / warmup, max(0.02, (steps - step) / (decay * steps)))


def general_tests(scenes: list[Scene], tokenize: Callable, *, count: int) -> dict[str, list[Record]]:
    tasks = GeneralTasks(scenes, tokenize, Random(77), held_out=True)
    names = ("where_name", "which_name", "where_word", "which_word", "general")
    return {name: [getattr(tasks, name)() for _ in range(count)] for name in names}


def general_scores(
    model, features: Features, tests: dict[str, list[Record]], tokenizer, *, identities: bool = True
) -> dict[str, float]:
    """Share of right answers: the same text, or for "where" a box with an IoU of at least 0.5."""
    scores = {}
    for name, records in tests.items():
        right = []
        answers = generate(model, records, features, tokenizer, identities=identities)
        for record, answer in zip(records, answers, strict=True):
            expected = tokenizer.decode(record.ids[record.answer_start :], skip_special_tokens=True)
            if name.startswith("where"):
                boxes = [BOXES.parse(text, (DRAWN_SIZE, DRAWN_SIZE)) for text in (answer, expected)]
                right.append(boxes[0] is not None and box_iou(*boxes) >= 0.5)
            else:
                right.append(answer == expected)
        scores[name] = round(fmean(right), 2)
    return scores


@torch.no_grad()
def generate(model, records: Sequence[Record], features: Features, tokenizer, *, identities: bool = True) -> list[str]:
    """Greedy answers to the last question of each record."""
    was_training = model.training
    model.eval()
    answers = {}
    order = sorted(range(len(records)), key=lambda number: len(records[number].ids))
    for start in range(0, len(order), 50):
        rows = order[start : start + 50]
        batch = collate([records[row] for row in rows], features, prompts=True, identities=identities)
        output = model.generate(**batch, max_new_tokens=16, do_sample=False)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers |= dict(zip(rows, texts, strict=True))
    model.train(was_training)
    return [answers[row] for row in range(len(records))]
