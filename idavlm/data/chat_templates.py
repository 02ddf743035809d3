"""Chat templates with ``{% generation %}`` marks around the assistant turns, which become the labels.

Every space and line break matters: a prompt that differs from the training prompt of a released model degrades its
answers. Jinja removes a line break that follows a ``{% %}`` tag, so such line breaks are written as ``{{ '\\n' }}``.
"""

VICUNA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% if loop.previtem is undefined or loop.previtem['role'] != 'assistant' %} "
    "{% endif %}USER: {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %} ASSISTANT:"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""``<system> USER: ... ASSISTANT: ...</s>USER: ...`` (LLaVA-1.5)."""

YI_VL_STOP = "###"
"""Stop string of Yi-VL."""

YI_VL = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
    "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed and "
    "polite answers. "
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"  # noqa: RUF001
    "{% endif %}{{ '\n\n' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% if loop.previtem is undefined or loop.previtem['role'] != 'assistant' %}###"
    "{% endif %} Human: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}### Assistant:"
    "{% generation %} {{ message['content'] }}\n###{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)
"""``<system>\\n\\n### Human: ...\\n### Assistant: ...\\n### Human: ...`` (Yi-VL). Generation stops at ``###``."""

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Llama 3 Instruct (IAA)."""

_CHATML_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CHATML = _CHATML_TURNS
"""ChatML without a default system text (SmolLM2, Qwen2)."""

QWEN_CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + _CHATML_TURNS
)
"""ChatML with Qwen's default system text (Qwen-VL-Chat, IDA-VLM)."""

ROLE_TOKENS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""One special token per role (for the small models that are trained from scratch)."""
