"""An ID-Former attached to a vision-language model of transformers.

Every image-text model of transformers computes its image tokens in ``get_image_features``, in the width of the language
model. :func:`attach_id_former` adds a :class:`idavlm.modules.ResidualIDFormer` to what that method returns. The model
keeps its class, its weights and its processor.
"""

import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from idavlm._compat import cache_in, cache_name, encodes_images_before_generation
from idavlm.data.packing import tokens_of_samples, unpack
from idavlm.models.dummy_image import dummy_image_arguments, runs_all_modules, statistics_kept
from idavlm.models.image_arguments import keep_images
from idavlm.models.packed_attention import packed_positions, packed_rows
from idavlm.models.packed_identities import unpack_identities
from idavlm.models.placeholders import holds_tokens
from idavlm.models.same_model import check_same_model, model_probe
from idavlm.models.stored_photos import images_to_encode, with_stored
from idavlm.models.supervision import mean_contrastive_loss, supervised_scenes, token_targets
from idavlm.models.token_grids import token_grids
from idavlm.modules import ImageTokens, ResidualIDFormer
from idavlm.modules.residual_id_former import ResidualOutput
from idavlm.utils import IGNORE_INDEX, ImageRole, check_choice
from idavlm.utils.sharding import whole_state_dict, writing_once

WEIGHTS, CONFIG = "id_former.safetensors", "id_former.json"
"""Files that :func:`save_id_former` writes."""

CACHE = cache_name()
ENCODED_IMAGES = "mm_encoder_outputs"
"""Keyword argument in which transformers' ``generate`` passes images that it has encoded before the first pass."""


@dataclass(eq=False)
class IdentityInputs:
    """What an attached ID-Former has to know about the images of a batch. :class:`IdentityProcessor` makes it.

    The images are numbered in the order of their placeholders, sample after sample.

    Attributes:
        image_roles, sample_index, identity_index: ``[I]``, see :meth:`idavlm.IDFormer.forward`.
        num_image_tokens: ``[I]`` number of placeholders of each image.
        identity_name_ids: ``[num_samples, G, L]`` token ids of the names of the identities, -1 at padding. Needed with
            ``identity_embedding="name"``.
        original_image_sizes: ``[I, 2]`` height and width of the original images in pixels. Needed with boxes.
        boxes: ``[N, 4]`` boxes of identities with references, in pixels of the original image.
        box_image: ``[N]`` image of each box.
        box_identity: ``[N]`` identity of each box within its sample.
        identities: a :class:`idavlm.models.SelectedIdentities` of a bank. The photos of references are then not
            encoded again.
    """

    image_roles: Tensor | None = None
    sample_index: Tensor | None = None
    identity_index: Tensor | None = None
    num_image_tokens: Tensor | None = None
    identity_name_ids: Tensor | None = None
    original_image_sizes: Tensor | None = None
    boxes: Tensor | None = None
    box_image: Tensor | None = None
    box_identity: Tensor | None = None
    identities: Any = None

    @property
    def roles(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``image_roles``, ``sample_index`` and ``identity_index``."""
        return self.image_roles, self.sample_index, self.identity_index

    @classmethod
    def pop_from(cls, arguments: dict[str, Any]) -> "IdentityInputs | None":
        """Remove the identity inputs from keyword arguments and return them; None if there are none."""
        found = {name: arguments.pop(name, None) for name in IDENTITY_INPUTS}
        if all(value is None for value in found.values()):
            return None
        inputs = cls(**found)
        for name in ("image_roles", "sample_index", "num_image_tokens"):
            if getattr(inputs, name) is None:
                given = ", ".join(name for name, value in found.items() if value is not None)
                raise ValueError(f"{name} is missing, but {given} was passed; IdentityProcessor makes all of them.")
        return inputs


IDENTITY_INPUTS = tuple(field.name for field in fields(IdentityInputs))
"""Keyword arguments that ``forward`` and ``generate`` of a model take once an ID-Former is attached."""


@dataclass
class AttachedOutput(CausalLMOutputWithPast):
    """Output of a model with an attached ID-Former if boxes were passed, or with ``output_identity_maps=True``.

    Attributes:
        loss: ``language_loss + auxiliary_loss``, if labels were passed; ``auxiliary_loss`` otherwise.
        logits, cache, hidden_states, attentions: those of the model; the cache is named ``past_key_values`` before
            transformers 5.24.
        language_loss: loss of the model, if labels were passed.
        identity_map_loss, contrastive_loss, auxiliary_loss: see :class:`idavlm.models.IDAVLMOutput`.
        identity_maps: one map per identity layer, ``[N, G + 1]`` for the N image tokens of the batch.
    """

    language_loss: Tensor | None = None
    identity_map_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    identity_maps: tuple[Tensor, ...] | None = None


def attach_id_former(
    model: PreTrainedModel,
    *,
    num_heads: int = 8,
    freeze_model: bool = True,
    residual_on: str = "image_tokens",
    identity_map_loss_weight: float = 1.0,
    contrastive_loss_weight: float = 0.0,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Attach a new ID-Former to an image-text model of transformers, in place.

    Afterwards ``model.id_former`` is a :class:`idavlm.modules.ResidualIDFormer`. ``forward`` and ``generate`` take the
    fields of :class:`IdentityInputs`, which :class:`IdentityProcessor` makes. Without them, or without references, the
    outputs are those of the model before, bit by bit. With the default gate that also holds with references, until the
    ID-Former is trained. With references, ``generate`` never writes the image token, which no image could replace.

    Args:
        model: a model with ``get_image_features``, for example from ``AutoModelForImageTextToText.from_pretrained``.
        num_heads: number of attention heads.
        freeze_model: freeze all parameters of the model, as peft does. :func:`detach_id_former` undoes it.
        residual_on: ``"image_tokens"``, or ``"all_features"`` to also add a residual of its own to each level of
            DeepStack features (Qwen3-VL), which are left alone otherwise.
        identity_map_loss_weight, contrastive_loss_weight: factors of the losses of the identity attention, which are
            computed if boxes are passed.
        dtype: type of the new parameters; by default that of the embeddings of the language model.
        options: arguments of :class:`idavlm.modules.ResidualIDFormer` (``hidden_size=256``,
            ``identity_embedding="name"``, ...).

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no ``get_image_features``, or an ID-Former already.
    """
    check_choice("residual_on", residual_on, ("image_tokens", "all_features"))
    base = _base_with_image_features(model)
    if hasattr(model, "id_former"):
        raise ValueError(
            f"{type(model).__name__} already has an id_former; call detach_id_former(model) first to attach another."
        )
    embeddings = model.get_input_embeddings()
    token_size = model.config.get_text_config().hidden_size
    num_deepstack_levels = _num_deepstack_levels(model.config) if residual_on == "all_features" else 0
    if residual_on == "all_features" and not num_deepstack_levels:
        raise ValueError(
            f"residual_on={residual_on!r}, but {type(model).__name__} has no DeepStack features; use 'image_tokens'."
        )
    id_former = ResidualIDFormer(
        token_size=token_size, num_heads=num_heads, num_deepstack_levels=num_deepstack_levels, **options
    )
    frozen = []
    if freeze_model:
        frozen = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        model.requires_grad_(False)
    parameter_type = next(embeddings.parameters())
    model.id_former = id_former.to(device=parameter_type.device, dtype=dtype or parameter_type.dtype)
    weights = {"identity_map_loss": identity_map_loss_weight, "contrastive_loss": contrastive_loss_weight}
    seam = ImageFeaturesWithIdentities(model, base, weights)
    for method in (
        seam,
        BaseForwardWithIdentities(model, base, seam),
        ForwardWithIdentities(model, seam, frozen),
        GenerationWithIdentities(model),
        GenerateWithIdentities(model, seam),
    ):
        method.install()
    return model


def detach_id_former(model: PreTrainedModel) -> PreTrainedModel:
    """Remove an attached ID-Former. The model is what it was before :func:`attach_id_former`.

    Raises:
        ValueError: no ID-Former is attached, or something else has replaced ``forward`` since.
    """
    forward = _attached_forward(model)
    base = forward.seam.owner
    kinds = (
        (model, ForwardWithIdentities),
        (model, GenerationWithIdentities),
        (model, GenerateWithIdentities),
        (base, BaseForwardWithIdentities),
        (base, ImageFeaturesWithIdentities),
    )
    methods = [owner.__dict__.get(kind.name) for owner, kind in kinds]
    for method, (owner, kind) in zip(methods, kinds, strict=True):
        if not isinstance(method, kind):
            raise ValueError(
                f"{type(owner).__name__}.{kind.name} was replaced after the ID-Former was attached; undo that first "
                "(accelerate.hooks.remove_hook_from_module, peft's unload, ...)."
            )
    for method in methods:
        method.restore()
    del model.id_former
    parameters = dict(model.named_parameters())
    for name in forward.frozen:
        if name in parameters:
            parameters[name].requires_grad_(True)
    return model


def save_id_former(model: nn.Module, folder: str | Path) -> None:
    """Write the attached ID-Former alone: ``id_former.safetensors`` and ``id_former.json``.

    Parameters that are partitioned (ZeRO-3, FSDP2) are gathered. All processes then call this function, and the first
    one writes.

    Args:
        model: a model with an attached ID-Former; peft models and other wrappers are looked through.
        folder: the folder; created if it does not exist.
    """
    model = _unwrapped(model)
    forward = _attached_forward(model)
    id_former = _active(model.id_former)
    folder = Path(folder)
    tensors = {name: tensor.contiguous() for name, tensor in whole_state_dict(id_former).items()}
    content = {
        "id_former": id_former.to_config(),
        "loss_weights": forward.seam.loss_weights,
        "model": model_probe(model),
    }
    with writing_once(id_former) as writes:
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / CONFIG).write_text(json.dumps(content, indent=2))


def load_id_former(
    model: PreTrainedModel, folder: str | Path, *, freeze_model: bool = True, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Attach the ID-Former that :func:`save_id_former` wrote.

    Args:
        model: the model that it was trained on, in any precision.
        folder: the folder.
        freeze_model, dtype: see :func:`attach_id_former`.

    Raises:
        FileNotFoundError: the folder holds no ID-Former.
        ValueError: it was trained on another model, or its weights do not fit its configuration.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG} does not exist; save_id_former(model, folder) writes it.")
    content = json.loads((folder / CONFIG).read_text())
    check_same_model(content["model"], model_probe(model), folder)
    options = dict(content["id_former"])
    if options.pop("num_deepstack_levels", 0):
        options["residual_on"] = "all_features"
    options.pop("token_size")
    weights = {f"{name}_weight": value for name, value in content["loss_weights"].items()}
    attach_id_former(model, freeze_model=freeze_model, dtype=dtype, **weights, **options)
    tensors = load_file(folder / WEIGHTS)
    expected = model.id_former.state_dict()
    if tensors.keys() != expected.keys():
        detach_id_former(model)
        difference = ", ".join(sorted(tensors.keys() ^ expected.keys()))
        raise ValueError(f"{folder / WEIGHTS} and {CONFIG} do not fit each other: they differ in {difference}.")
    model.id_former.load_state_dict(tensors)
    return model


class ReplacedMethod:
    """An object that takes the place of a method on one instance, as accelerate's hooks do.

    It holds the instance and no closure, so the instance can be pickled and copied. Its signature is that of the
    original with further keyword arguments; transformers reads it to find out which inputs a method takes.
    """

    name: str
    """Name of the method."""
    added: tuple[str, ...] = IDENTITY_INPUTS
    """Keyword arguments that the object takes besides those of the original."""

    def __init__(self, owner: nn.Module):
        self.owner = owner
        self.replaced = owner.__dict__.get(self.name)

    @property
    def original(self) -> Callable:
        """The method before it was replaced."""
        return self.replaced or getattr(type(self.owner), self.name).__get__(self.owner)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.original)
        names = [name for name in self.added if name not in signature.parameters]
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        parameters = list(signature.parameters.values())
        is_last = parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        rest = [parameters.pop()] if is_last else []
        return signature.replace(parameters=[*parameters, *added, *rest])

    def install(self) -> None:
        """Take the place of the method."""
        setattr(self.owner, self.name, self)

    def restore(self) -> None:
        """Put the original back."""
        delattr(self.owner, self.name)
        if self.replaced is not None:
            setattr(self.owner, self.name, self.replaced)


class ImageFeaturesWithIdentities(ReplacedMethod):
    """``get_image_features`` of a base model, with the residual of the ID-Former of its model.

    The ID-Former is looked up by its name at each call, because peft may have wrapped it.
    """

    name = "get_image_features"

    def __init__(self, model: PreTrainedModel, base: nn.Module, loss_weights: dict[str, float]):
        super().__init__(base)
        self.model = model
        self.loss_weights = loss_weights
        self.call: _Call | None = None
        self.is_checked = False

    @contextmanager
    def calling(self, call: "_Call") -> Iterator[None]:
        """Within the block, the identity inputs of ``call`` apply to the images of the model."""
        self.call = call
        try:
            yield
        finally:
            self.call = None

    def __call__(self, *args, **kwargs):
        passed = IdentityInputs.pop_from(kwargs)
        call = self.call if passed is None else _Call(passed)
        if call is None:
            if not runs_all_modules(self.model):
                return self.original(*args, **kwargs)
            call = _Call(None)
        as_dict = kwargs.get("return_dict")
        arguments = inspect.signature(self.original).bind(*args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        if call.inputs is None:
            output = self.original(**{**arguments, "return_dict": True})
            self._add_residual_of_general_images(output, call)
            return output if as_dict or as_dict is None else output.to_tuple()
        stored = {}
        if call.inputs.identities is not None:
            stored = call.inputs.identities.stored(*call.inputs.roles)
        lengths = call.inputs.num_image_tokens.tolist()
        new = images_to_encode(len(lengths), stored)
        encoded = keep_images(self.model.config, arguments, lengths, new) if stored else arguments
        output = self.original(**{**encoded, "return_dict": True})
        self._add_residual(output, call, arguments, stored, new)
        return output if as_dict or as_dict is None else output.to_tuple()

    def encode(
        self, arguments: Mapping[str, Any]
    ) -> tuple[list[tuple[Tensor, list[Tensor]]], tuple[tuple[int, int] | None, ...]]:
        """The image tokens of each image before the ID-Former, and its DeepStack features, one tensor per level.

        Also returns rows and columns of the tokens of each image, None where they form no grid. Without
        ``num_image_tokens``, which the processor makes if there are identities, all tokens are of one image.
        """
        names = inspect.signature(self.original).parameters
        passed = {name: arguments[name] for name in names if arguments.get(name) is not None}
        output = self.original(**passed, return_dict=True)
        tokens = _flat(output.pooler_output)
        lengths = arguments["num_image_tokens"].tolist() if "num_image_tokens" in arguments else [len(tokens)]
        grids = token_grids(self.model.config, lengths, output.pooler_output, passed)
        tokens = tokens.split(lengths)
        levels = [_flat(level).split(lengths) for level in output.get("deepstack_features") or ()]
        return [(part, [level[image] for level in levels]) for image, part in enumerate(tokens)], grids

    def _add_residual(
        self,
        output: ModelOutput,
        call: "_Call",
        arguments: Mapping[str, Any],
        stored: Mapping[int, Any],
        new: Sequence[int],
    ) -> None:
        """Add the residual to ``output``, which holds the tokens of the images ``new``; the others are ``stored``."""
        self._warn_if_frozen()
        inputs = call.inputs
        entries = output.pooler_output
        lengths = tuple(inputs.num_image_tokens.tolist())
        flat = _flat(entries)
        if sum(lengths[image] for image in new) != len(flat):
            raise ValueError(
                f"num_image_tokens={[lengths[image] for image in new]} are {sum(lengths[image] for image in new)} "
                f"image tokens, but {type(self.model).__name__} made {len(flat)}; pass the outputs of "
                "IdentityProcessor for the same images."
            )
        levels = [_flat(level) for level in output.get("deepstack_features") or ()]
        if stored:
            flat = _with_stored(flat, lengths, new, {image: photo.features for image, photo in stored.items()})
            levels = [
                _with_stored(level, lengths, new, {image: photo.deepstack[n] for image, photo in stored.items()})
                for n, level in enumerate(levels)
            ]
        grids = token_grids(self.model.config, lengths, entries, arguments)
        self._run_id_former(call, ImageTokens(flat, lengths, grids), inputs.roles, levels)
        self._replace(output, call.result, lengths)

    def _add_residual_of_general_images(self, output: ModelOutput, call: "_Call") -> None:
        """Add the residual to image tokens without identities. It is 0; all processes run the ID-Former."""
        flat = _flat(output.pooler_output)
        levels = [_flat(level) for level in output.get("deepstack_features") or ()]
        self._run_id_former(call, ImageTokens(flat, (len(flat),), (None,)), _general_roles(1), levels)
        self._replace(output, call.result, (len(flat),))

    def run_on_dummy_image(self, call: "_Call", device: torch.device) -> Tensor:
        """Run all modules of a batch without images on a dummy image, and the ID-Former on none of its tokens.

        Returns:
            0, which depends on the parameters of these modules.
        """
        arguments = dummy_image_arguments(self.model.config, self.original, device)
        with statistics_kept(self.owner):
            output = self.original(**arguments, return_dict=True)
        flat = _flat(output.pooler_output)[:0]
        levels = [_flat(level)[:0] for level in output.get("deepstack_features") or ()]
        self._run_id_former(call, ImageTokens(flat, (), ()), _general_roles(0), levels)
        return call.result.tokens.sum() + sum(level.sum() for level in call.result.deepstack_tokens)

    def _run_id_former(
        self, call: "_Call", images: ImageTokens, roles: tuple[Tensor, Tensor, Tensor | None], levels: list[Tensor]
    ) -> None:
        inputs, targets = call.inputs, None
        if call.is_supervised:
            targets = torch.full((len(images.tokens),), IGNORE_INDEX, device=images.tokens.device)
            if inputs is not None and inputs.boxes is not None:
                targets = _targets(images, inputs)
            call.num_labelled = int((targets >= 0).sum())
        call.result = self.model.id_former(
            images,
            *roles,
            name_embeddings=self._name_embeddings(inputs, images.tokens.device),
            targets=targets,
            teacher_forcing=call.teacher_forcing,
            with_contrastive_loss=bool(self.loss_weights["contrastive_loss"]),
            gather_references=call.gather_references,
            deepstack_tokens=levels,
        )

    def _replace(self, output: ModelOutput, result: ResidualOutput, lengths: Sequence[int]) -> None:
        output.pooler_output = _like(output.pooler_output, result.tokens, lengths)
        if result.deepstack_tokens:
            output.deepstack_features = [
                _like(level, tokens, lengths)
                for level, tokens in zip(output.deepstack_features, result.deepstack_tokens, strict=True)
            ]

    def _warn_if_frozen(self) -> None:
        """Warn once if the model is trained but its ID-Former, which is new, is not: peft freezes all other modules."""
        if self.is_checked or not (self.model.training and torch.is_grad_enabled()):
            return
        self.is_checked = True
        # A new ID-Former has output projections of zero: while they are frozen, identities have no effect.
        projections = [
            module.out_proj for name, module in self.model.id_former.named_modules() if name.endswith("attention")
        ]
        is_trained = any(parameter.requires_grad for layer in projections for parameter in layer.parameters())
        id_former = _active(self.model.id_former)
        gate = id_former.identity_embedding_gate
        if id_former.identity_embedding_type is not None:  # acts without the projections, unless its gate is 0
            is_trained |= gate is None or gate.requires_grad or bool(gate.any())
        if not is_trained and not any(layer.weight.any() for layer in projections):
            warnings.warn(
                "id_former is frozen and was never trained, so identities have no effect. With peft, pass "
                "modules_to_save=['id_former'] to LoraConfig; otherwise call model.id_former.requires_grad_(True).",
                stacklevel=2,
            )

    def _name_embeddings(self, inputs: IdentityInputs | None, device: torch.device) -> Tensor | None:
        """The mean embedding of the tokens of each name, ``[num_samples, G, C]``."""
        if _active(self.model.id_former).identity_embedding_type != "name":
            return None
        ids = None if inputs is None else inputs.identity_name_ids
        if ids is None:
            if not runs_all_modules(self.model):
                return None
            ids = torch.zeros(1, 0, 0, dtype=torch.long, device=device)  # embedded as the names of other processes are
        is_token = ids >= 0
        embedded = self.model.get_input_embeddings()(ids.clamp(min=0))
        embedded = embedded * is_token[..., None]
        return embedded.sum(2) / is_token.sum(2, keepdim=True).clamp(min=1)


class ForwardWithIdentities(ReplacedMethod):
    """``forward`` of a model with an attached ID-Former; it takes the identity inputs as further keyword arguments."""

    name = "forward"
    added = (*IDENTITY_INPUTS, "token_sample_index", "teacher_forcing", "gather_references", "output_identity_maps")

    def __init__(self, model: PreTrainedModel, seam: ImageFeaturesWithIdentities, frozen: list[str]):
        super().__init__(model)
        self.seam = seam
        self.frozen = frozen

    def __call__(
        self,
        *args,
        token_sample_index: Tensor | None = None,
        teacher_forcing: bool = False,
        gather_references: bool = False,
        output_identity_maps: bool = False,
        **kwargs,
    ):
        options = {
            "teacher_forcing": teacher_forcing,
            "gather_references": gather_references,
            "output_identity_maps": output_identity_maps,
        }
        if token_sample_index is None:
            return self._forward(args, kwargs, None, **options)
        kwargs["position_ids"] = packed_positions(self.owner, token_sample_index, kwargs)
        with packed_rows(self.owner, token_sample_index, kwargs) as of_rows:
            return self._forward(args, kwargs | of_rows, tokens_of_samples(token_sample_index), **options)

    def _forward(
        self,
        args,
        kwargs: dict[str, Any],
        tokens: Tensor | None,
        *,
        teacher_forcing: bool,
        gather_references: bool,
        output_identity_maps: bool,
    ):
        """The forward pass. ``tokens``: where the tokens of each sample are in packed rows, or None."""
        unpack_identities(kwargs)
        inputs = IdentityInputs.pop_from(kwargs)
        runs_all = runs_all_modules(self.owner)
        if inputs is None and not runs_all:
            return self.original(*args, **kwargs)
        if inputs is not None and kwargs.get("input_ids") is not None and kwargs.get("pixel_values") is not None:
            _check_rows(self.owner.config, kwargs["input_ids"], inputs, tokens)
        has_boxes = inputs is not None and inputs.boxes is not None
        # Where all modules have to run, the losses are computed without boxes, too, and are then 0.
        computes_losses = runs_all and (self.owner.training or kwargs.get("labels") is not None)
        call = _Call(
            inputs,
            teacher_forcing=teacher_forcing,
            gather_references=gather_references,
            is_supervised=has_boxes or computes_losses,
        )
        with self.seam.calling(call):
            if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None and not args:
                # Images alone: identity pretraining does not run the language model.
                names = inspect.signature(self.seam.original).parameters
                self.seam(**{name: kwargs[name] for name in names if kwargs.get(name) is not None})
                output = ModelOutput()
            else:
                output = self.original(*args, **kwargs)
        if call.result is None or not (output_identity_maps or call.is_supervised):
            return output
        return self._with_identities(output, call)

    def _with_identities(self, output: ModelOutput, call: "_Call") -> AttachedOutput:
        """Output of the model with the losses of the identity attention."""
        inputs, result, losses = call.inputs, call.result, {}
        language_loss = loss = output.get("loss")
        if result.map_losses is not None:
            num_scenes = 0
            if inputs is not None and inputs.boxes is not None:
                num_scenes = int(supervised_scenes(*inputs.roles, inputs.box_image, inputs.box_identity).sum())
            losses["identity_map_loss"] = result.map_losses.sum() / max(num_scenes, 1)
            if result.contrastive_loss is not None:
                losses["contrastive_loss"] = mean_contrastive_loss(
                    result.contrastive_loss, call.num_labelled, num_scenes, over_processes=call.gather_references
                )
            weighted = (self.seam.loss_weights[name] * value for name, value in losses.items())
            losses["auxiliary_loss"] = sum(weighted)
            loss = losses["auxiliary_loss"] + (0 if loss is None else loss)
        return AttachedOutput(
            loss=loss,
            language_loss=language_loss,
            **losses,
            logits=output.get("logits"),
            **{CACHE: output.get(CACHE)},
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            identity_maps=result.identity_maps,
        )


class BaseForwardWithIdentities(ReplacedMethod):
    """``forward`` of the base model. Trainers that compute the logits themselves (TRL) call it instead of the model's.

    It takes the identity inputs as keyword arguments, also packed into ``mm_token_type_ids``.
    """

    name = "forward"

    def __init__(self, model: PreTrainedModel, base: nn.Module, seam: ImageFeaturesWithIdentities):
        super().__init__(base)
        self.model = model
        self.seam = seam

    def __call__(self, *args, **kwargs):
        unpack_identities(kwargs)
        inputs, runs_all = IdentityInputs.pop_from(kwargs), runs_all_modules(self.model)
        if inputs is not None and kwargs.get("input_ids") is not None and kwargs.get("pixel_values") is not None:
            _check_rows(self.model.config, kwargs["input_ids"], inputs)
        call = self.seam.call  # of the model's forward, which has taken the inputs
        if call is None and (inputs is not None or runs_all):
            call = _Call(inputs, is_supervised=runs_all and self.model.training)
        if call is None:
            return self._forward(*args, **kwargs)
        with self.seam.calling(call):
            # generate encodes images before the first pass, see GenerateWithIdentities.
            has_images = any(
                name in kwargs for name in ("pixel_values", ENCODED_IMAGES) if kwargs.get(name) is not None
            )
            if runs_all and not has_images and not holds_tokens(cache_in(args, kwargs)):
                return self._forward_with_dummy_image(call, *args, **kwargs)
            return self._forward(*args, **kwargs)

    def _forward_with_dummy_image(self, call: "_Call", *args, **kwargs):
        """Run the modules that encode images where a batch with images does: after the text was embedded."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None:
            kwargs["inputs_embeds"] = embeds + self.seam.run_on_dummy_image(call, embeds.device).to(embeds)
            return self._forward(*args, **kwargs)

        def add_zero(module, inputs, embedded: Tensor) -> Tensor:
            hook.remove()  # the names of identities are embedded by the same module
            return embedded + self.seam.run_on_dummy_image(call, embedded.device).to(embedded)

        hook = self.model.get_input_embeddings().register_forward_hook(add_zero)
        try:
            return self._forward(*args, **kwargs)
        finally:
            hook.remove()

    def _forward(self, *args, **kwargs):
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        # After a graph break, torch.compile would look a bound method up on the instance, and find this object.
        return type(self.owner).forward(self.owner, *args, **kwargs)


class GenerationWithIdentities(ReplacedMethod):
    """``prepare_inputs_for_generation`` of a model whose signature names the identity inputs.

    ``generate`` rejects arguments that neither this method nor ``forward`` takes, and trainers replace ``forward``.
    """

    name = "prepare_inputs_for_generation"

    def __call__(self, *args, **kwargs):
        return self.original(*args, **kwargs)


class GenerateWithIdentities(ReplacedMethod):
    """``generate`` of a model. With identities it never writes the image token, which no image could replace.

    transformers' own ``generate`` fails after an image token without a cache, and goes on with a wrong embedding with
    one. Without identities that stays as it is.

    Where all modules have to run, a prompt without images runs a dummy image where others encode theirs.
    """

    name = "generate"
    added = ()

    def __init__(self, owner: nn.Module, seam: ImageFeaturesWithIdentities):
        super().__init__(owner)
        self.seam = seam

    def __call__(self, *args, **kwargs):
        has_images = kwargs.get("pixel_values") is not None
        if not has_images and encodes_images_before_generation(self.owner) and runs_all_modules(self.owner):
            with torch.no_grad():
                self.seam.run_on_dummy_image(_Call(None), self.owner.device)
        given = dict(kwargs)
        unpack_identities(given)
        if any(given.get(name) is not None for name in IDENTITY_INPUTS):
            bound = self.__signature__.bind(*args, **kwargs)
            token = SuppressTokensLogitsProcessor([self.owner.config.image_token_id], device=self.owner.device)
            bound.arguments["logits_processor"] = LogitsProcessorList(
                [*(bound.arguments.get("logits_processor") or ()), token]
            )
            args, kwargs = bound.args, bound.kwargs
        return self.original(*args, **kwargs)


@dataclass(eq=False)
class _Call:
    """One call of ``forward`` or ``generate``: its identity inputs, and what the ID-Former returned.

    Attributes:
        inputs: the identity inputs; None if the batch has no identities.
        teacher_forcing, gather_references: see :meth:`idavlm.models.IDAVLMForConditionalGeneration.forward`.
        is_supervised: whether the losses of the identity attention are computed. They are 0 without boxes.
        result: output of the ID-Former.
        num_labelled: number of image tokens that show an identity according to the boxes.
    """

    inputs: IdentityInputs | None
    teacher_forcing: bool = False
    gather_references: bool = False
    is_supervised: bool = False
    result: ResidualOutput | None = None
    num_labelled: int = 0


def image_features_with_identities(model: nn.Module) -> ImageFeaturesWithIdentities | None:
    """The ``get_image_features`` of a model with an attached ID-Former; None without one."""
    method = getattr(getattr(model, "base_model", None), "get_image_features", None)
    return method if isinstance(method, ImageFeaturesWithIdentities) else None


def _base_with_image_features(model: PreTrainedModel) -> nn.Module:
    base = getattr(model, "base_model", None)
    if not isinstance(model, PreTrainedModel) or not hasattr(base, "get_image_features"):
        raise ValueError(
            f"model={type(model).__name__} has no get_image_features; pass an image-text model of transformers that "
            "inserts image tokens into its text, such as Qwen2.5-VL, LLaVA or SmolVLM. Wrap it with peft afterwards."
        )
    return base


def _num_deepstack_levels(config) -> int:
    return len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside peft, DDP and ``torch.compile``: the module that the ID-Former was attached to."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), ForwardWithIdentities) or "id_former" in module._modules:
            return module
    raise ValueError(f"{type(model).__name__} has no attached ID-Former; call attach_id_former(model) first.")


def _general_roles(num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """``image_roles``, ``sample_index`` and ``identity_index`` of general images of one sample."""
    zeros = torch.zeros(num_images, dtype=torch.long)
    return torch.full_like(zeros, ImageRole.GENERAL), zeros, zeros


def _active(id_former: nn.Module) -> ResidualIDFormer:
    """The ID-Former that is trained, where peft's ``modules_to_save`` has wrapped it."""
    copies = getattr(id_former, "modules_to_save", None)
    return id_former if copies is None else copies[id_former.active_adapter]


def _attached_forward(model: nn.Module) -> ForwardWithIdentities:
    forward = model.__dict__.get("forward")
    while forward is not None and not isinstance(forward, ForwardWithIdentities):
        forward = getattr(forward, "__wrapped__", None)  # accelerate wraps it
    if forward is None:
        raise ValueError(f"{type(model).__name__} has no attached ID-Former; call attach_id_former(model) first.")
    return forward


def _check_rows(config, input_ids: Tensor, inputs: IdentityInputs, tokens: Tensor | None = None) -> None:
    """Check that each sample holds the placeholders of the images that ``sample_index`` assigns to it."""
    is_image = input_ids == config.image_token_id
    placeholders = (is_image if tokens is None else unpack(is_image, tokens, False)).sum(1).tolist()
    tokens = [0] * len(placeholders)
    for sample, count in zip(inputs.sample_index.tolist(), inputs.num_image_tokens.tolist(), strict=True):
        if not 0 <= sample < len(tokens):
            raise ValueError(f"sample_index holds {sample}, but input_ids has {len(tokens)} rows, numbered from 0.")
        tokens[sample] += count
    if tokens != placeholders:
        raise ValueError(
            f"the rows of input_ids hold {placeholders} image placeholders, but by sample_index and num_image_tokens "
            f"they have {tokens}; pass the outputs of IdentityProcessor unchanged. (Beam search with several images "
            "per prompt needs transformers 5.24.)"
        )


def _targets(images: ImageTokens, inputs: IdentityInputs) -> Tensor:
    needed = ("box_image", "box_identity", "original_image_sizes", "identity_index")
    missing = [name for name in needed if getattr(inputs, name) is None]
    if missing:
        raise ValueError(f"boxes need {', '.join(missing)} as well; IdentityProcessor makes all of them.")
    return token_targets(
        images,
        inputs.boxes,
        inputs.box_image,
        inputs.box_identity,
        inputs.original_image_sizes,
        inputs.image_roles,
        inputs.sample_index,
        inputs.identity_index,
    )


def _flat(entries) -> Tensor:
    """All image tokens ``[N, C]`` of ``pooler_output``: a tensor, or one tensor per image or sample."""
    return torch.cat([entry.flatten(0, -2) for entry in entries])


def _like(entries, tokens: Tensor, lengths: Sequence[int]):
    """Arrange packed tokens ``[N, C]`` as the entries of ``pooler_output``: a tensor, a list or a tuple."""
    if isinstance(entries, Tensor):
        return tokens.view(-1, *entries.shape[1:])
    sizes = [entry[..., 0].numel() for entry in entries]
    if sum(sizes) != len(tokens):  # stored photos were inserted
        return type(entries)(tokens.split(list(lengths)))
    return type(entries)(part.view(entry.shape) for part, entry in zip(tokens.split(sizes), entries, strict=True))


def _with_stored(flat: Tensor, lengths: Sequence[int], new: Sequence[int], stored: Mapping[int, Tensor]) -> Tensor:
    """Tokens of all images from those of the images ``new`` and the ``stored`` ones."""
    parts = with_stored(flat.split([lengths[image] for image in new]), new, stored, len(lengths))
    for image, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        if len(part) != length:
            raise ValueError(
                f"image {image} has {length} placeholders, but the stored photo has {len(part)} image tokens; pass the "
                "photos to the processor as they were added to the bank."
            )
    return torch.cat(parts)
