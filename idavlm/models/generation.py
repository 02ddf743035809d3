"""Generation with images: they are encoded once, and repeated with their sample for beams."""

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor

from idavlm._compat import cache_in
from idavlm.models.placeholders import holds_tokens
from idavlm.modules.inner_adaptor import takes_workflow

# Tensors with one row per image, and tensors with one row per box.
IMAGE_INPUTS = ("pixel_values", "image_features", "image_roles", "identity_index", "image_sizes")
BOX_INPUTS = ("boxes", "box_image", "box_identity")


class ImageGenerationMixin(GenerationMixin):
    """transformers' generation for batches with one row per image, which ``sample_index`` assigns to samples.

    A conversation may be continued with the cache of an earlier call. Pass the images of the whole conversation again;
    those that the cache has read are not inserted a second time, but new scenes attend to their references.
    """

    generate = takes_workflow(GenerationMixin.generate)

    def prepare_inputs_for_generation(self, input_ids, *, is_first_iteration=False, **kwargs):
        """Prepare one step: drop what the cache has processed, and extend the indices of identities to new tokens."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        index, step_ids = inputs.get("token_identity_index"), inputs.get("input_ids")
        if index is not None and step_ids is not None:
            # The answer is about the identity at the end of the prompt. Cached tokens are not processed again.
            num_generated = max(input_ids.shape[1] - index.shape[1], 0)
            index = torch.cat([index, index[:, -1:].expand(-1, num_generated)], 1)
            inputs["token_identity_index"] = index[:, -step_ids.shape[1] :]
            if inputs.get("name_mask") is not None:  # names are those of the prompt
                inputs["name_mask"] = nn.functional.pad(inputs["name_mask"], (0, num_generated))
        cache = cache_in((), kwargs)
        if holds_tokens(cache):
            has_new_images = is_first_iteration and step_ids is not None and self._is_placeholder(step_ids).any()
            if has_new_images:
                self._check_continued(input_ids, step_ids, kwargs)
            else:
                for name in (*IMAGE_INPUTS, "sample_index", "identities"):
                    inputs.pop(name, None)
            inputs.pop("name_mask", None)
        for name in BOX_INPUTS:
            inputs.pop(name, None)
        return inputs

    def _is_placeholder(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.config.image_token_id

    def _check_continued(self, input_ids: Tensor, step_ids: Tensor, kwargs: dict) -> None:
        """Check the images of a call whose cache holds the start of the conversation and that adds new images."""
        if self.id_former is not None and self.id_former.identity_embedding_type == "name":
            raise ValueError(
                "identity_embedding='name' reads the names of the whole prompt, which the cache does not hold; pass "
                "the conversation without a cache to add images."
            )
        if self.image_index_embedding is None:
            return
        sample_index = kwargs.get("sample_index")
        num_images = torch.bincount(sample_index.cpu(), minlength=len(input_ids)) if sample_index is not None else None
        num_placeholders = self._is_placeholder(input_ids).sum(1).cpu()
        if num_images is None or not torch.equal(num_images * self.config.image_seq_length, num_placeholders):
            raise ValueError(
                f"max_images={self.config.max_images} numbers the images of a conversation, but input_ids hold "
                f"{num_placeholders.tolist()} image placeholders and there are "
                f"{None if num_images is None else num_images.tolist()} images of {self.config.image_seq_length} "
                "tokens; with a cache pass input_ids and images of the whole conversation."
            )

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """Exclude the image placeholder from what is generated: no image could take its place."""
        processors = super()._get_logits_processor(*args, **kwargs)
        processors.insert(0, SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device))
        return processors

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeat the images of a sample with the sample, for beams and for several answers."""
        index = kwargs.get("token_identity_index")
        if index is not None and input_ids is not None and index.shape != input_ids.shape:
            raise ValueError(
                f"token_identity_index has shape {tuple(index.shape)} and input_ids {tuple(input_ids.shape)}; pass one "
                "index per token of the prompt."
            )
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if kwargs.get(name) is not None}
        for name in BOX_INPUTS:
            kwargs.pop(name, None)
        sample_index = kwargs.pop("sample_index", None)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if images and sample_index is None:
            raise ValueError("images without sample_index: pass the row of the batch that each image belongs to.")
        if images:
            copies = torch.arange(expand_size)
            samples, order = (sample_index.cpu()[:, None] * expand_size + copies).flatten().sort(stable=True)
            kwargs.update({name: value[(order // expand_size).to(value.device)] for name, value in images.items()})
            kwargs["sample_index"] = samples
        return input_ids, kwargs
