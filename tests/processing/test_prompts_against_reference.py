"""Prompts beyond the golden cases: Idefics3's processor (same strings, no videos) and transformers' template renderer."""

import random

import numpy as np
import pytest
from PIL import Image
from real_tokenizer import TEMPLATE

from smolvlm_jax.errors import PromptError
from smolvlm_jax.processing import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMTokenizer
from smolvlm_jax.processing.template import DEFAULT_CHAT_TEMPLATE

from .conftest import hash_img

transformers = pytest.importorskip("transformers", reason="compares with transformers 5.23")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

STEERING = ["<image>", "<|im_start|>", "<end_of_utterance>", "<row_1_col_1>"]
WORDS = ["a", " the", " cat", "\n", "\n\n", ":", " 42", "?", "naïve", "  ", *STEERING]


@pytest.fixture(scope="module")
def both(checkpoint):
    settings = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
    theirs = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(**settings),
        transformers.AutoTokenizer.from_pretrained(checkpoint),
        image_seq_len=4,
        chat_template=TEMPLATE,
    )
    tokenizer = SmolVLMTokenizer.from_pretrained(checkpoint, pre_tokenizer="transformers-5")
    ours = SmolVLMProcessor(SmolVLMImageProcessor(**settings), tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    return theirs, ours


def picture(rng):
    return Image.fromarray(hash_img(rng.randint(1, 60), rng.randint(1, 60)))


def test_ids_of_random_batches(both):
    theirs, ours = both
    rng = random.Random(0)
    for number in range(150):
        texts = ["".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))) for _ in range(rng.randint(1, 3))]
        images = [
            [Image.fromarray(hash_img(rng.randint(1, 60), rng.randint(1, 60))) for _ in range(text.count("<image>"))]
            for text in texts
        ]
        options = {"padding": True, "padding_side": rng.choice(["left", "right"]), "return_tensors": "np"}
        if number % 3 == 0:
            options["do_image_splitting"] = False
        if number % 4 == 0:
            options["pad_to_multiple_of"] = 8
        if number % 5 == 0:
            options["size"] = {"longest_edge": rng.choice([16, 32, 112])}
        images = images if any(images) else None
        wanted = theirs(text=list(texts), images=images, **options)
        found = ours(text=texts, images=images, **options)
        assert sorted(found) == sorted(wanted)
        for name in found:
            assert found[name].dtype == wanted[name].dtype and np.array_equal(found[name], wanted[name]), (number, name, texts)


def test_random_conversations(both):
    """Rendered by transformers, with the published template and the one with videos."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _, ours = both
    rng = random.Random(1)
    for number in range(300):
        conversation = []
        for _ in range(rng.randint(1, 5)):
            items = []
            for _ in range(rng.randint(1, 4)):
                words = "".join(rng.choice(WORDS) for _ in range(rng.randint(0, 5)))
                items.append(
                    {"type": rng.choice(["image", "video"])} if rng.random() < 0.3 else {"type": "text", "text": words}
                )
            conversation.append({"role": rng.choice(["user", "assistant", "system", "TOOL x"]), "content": items})
        options = {"add_generation_prompt": rng.random() < 0.5}
        if number % 3 == 0:
            options = {"continue_final_message": True}
        template = DEFAULT_CHAT_TEMPLATE if any(i["type"] == "video" for m in conversation for i in m["content"]) else TEMPLATE
        arguments = ours.tokenizer.special_tokens_map
        try:
            (wanted,), _ = render_jinja_template([conversation], chat_template=template, **options, **arguments)
        except ValueError:
            with pytest.raises(PromptError):
                ours.apply_chat_template(conversation, special_tokens_in_text="allow", **options)
            continue
        assert ours.apply_chat_template(conversation, special_tokens_in_text="allow", **options) == wanted
        # without special tokens in the texts, protection changes nothing
        if not any(word in item.get("text", "") for m in conversation for item in m["content"] for word in STEERING):
            assert ours.apply_chat_template(conversation, **options) == wanted


def test_own_templates(both):
    """What published templates use: loops, namespaces, macros, filters, generation marks, dates."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _, ours = both
    templates = [
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role | upper }}\n{% endfor %}\n",
        "{%- macro say(x) -%}<{{ x | trim }}>{%- endmacro -%}{% for m in messages %}{{ say(m.content[0].text) }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m['content'][0]['text'] }}{% endgeneration %}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ messages | tojson }}{{ dict(a=1) | tojson(indent=2) }}",
        "  {% if true %}\n  x\n  {% endif %}\n{{ bos_token }}{{ eos_token }}",
        "{{ messages[0].content | map(attribute='text') | join('-') }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ 'ab' * 3 }}{{ 7 * 6 }}{{ 2 + 3 }}{{ messages[0]['content'][0]['text'].split(' ')[0].strip() }}",
    ]
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": " é <b> "}, {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "z"}]},
    ]
    for template in templates:
        (wanted,), _ = render_jinja_template([conversation], chat_template=template, **ours.tokenizer.special_tokens_map)
        assert ours.apply_chat_template(conversation, chat_template=template) == wanted, template
