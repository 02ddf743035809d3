"""Yi-VL 6B and 34B: LLaVA's format with norms in the projector, its own tower inside and its own prompt."""

from idavlm.conversion.llava import has_projector, is_normed, plan_llava
from idavlm.conversion.parts import read_tokenizer
from idavlm.conversion.plan import Places, Plan
from idavlm.conversion.source import Source
from idavlm.data.chat_templates import YI_VL, YI_VL_STOP

NAME = "Yi-VL"
LOOKS = "keys model.mm_projector.*, mm_projector_type with norm"


def matches(source: Source) -> bool:
    return has_projector(source) and is_normed(source)


def plan(source: Source, places: Places) -> Plan:
    tokenizer = read_tokenizer(source, places)
    starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    template = "{{ bos_token }}" + YI_VL if starts else YI_VL
    made = plan_llava(
        source, places, tokenizer, image_token="<image_placeholder>", chat_template=template, box_format="unit"
    )
    made.generation["stop_strings"] = [YI_VL_STOP]
    return made
