"""Generation with images: they are encoded once, and repeated with their sample for beams."""

import torch
from torch import nn
from transformers import GenerationMixin

from idavlm._compat import cache_in
from idavlm.modules.inner_adaptor import takes_workflow

# Tensors with one row per image, and tensors with one row per box.
IMAGE_INPUTS = ("pixel_values", "image_features", "image_roles", "identity_index", "image_sizes")
BOX_INPUTS = ("boxes", "box_image", "box_identity")


class ImageGenerationMixin(GenerationMixin):
    """transformers' generation for batches with one row per image, which ``sample_index`` assigns to samples."""

    generate = takes_workflow(GenerationMixin.generate)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Prepare one step: drop what the cache has processed, and extend the indices of identities to new tokens."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        index, step_ids = inputs.get("token_identity_index"), inputs.get("input_ids")
        if index is not None and step_ids is not None:
            # The answer is about the identity at the end of the prompt. Cached tokens are not processed again.
            num_generated = max(input_ids.shape[1] - index.shape[1], 0)
            index = torch.cat([index, index[:, -1:].expand(-1, num_generated)], 1)
            inputs["token_identity_index"] = index[:, -step_ids.shape[1] :]
            if inputs.get("name_mask") is not None:  # names are those of the prompt
                inputs["name_mask"] = nn.functional.pad(inputs["name_mask"], (0, num_generated))
        cache = cache_in((), kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            for name in (*IMAGE_INPUTS, "sample_index", "name_mask"):
                inputs.pop(name, None)
        for name in BOX_INPUTS:
            inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeat the images of a sample with the sample, for beams and for several answers."""
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
