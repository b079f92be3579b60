"""Conversations: forms, media, faulty templates, and special tokens in texts."""

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import InputError, PromptError
from smolvlm_jax.processing import SmolVLMProcessor, SmolVLMTokenizer
from smolvlm_jax.processing.template import DEFAULT_CHAT_TEMPLATE

from .conftest import DOCLING, tri_img

IMAGE = Image.fromarray(tri_img(30, 40))
TOKENIZE = {"tokenize": True, "return_dict": True, "return_tensors": "np", "add_generation_prompt": True}


def user(*content):
    return {"role": "user", "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


PICTURE = {"type": "image", "image": IMAGE}


# ---- forms


def test_forms_of_content(processor):
    wanted = "<|im_start|>User:<image>Q?<end_of_utterance>\nAssistant:"
    forms = [
        [user({"type": "image"}, text("Q?"))],
        ({"role": "user", "content": ({"type": "image", "image": IMAGE}, "Q?")},),
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}, text("Q?")], "name": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}, text("Q?")]}],
    ]
    for form in forms:
        before = repr(form)
        assert processor.apply_chat_template(form, add_generation_prompt=True) == wanted
        assert repr(form) == before  # the caller's messages are left alone


@pytest.mark.parametrize(
    "conversation",
    [[], {}, "hello", None, [[]], [["hello"]], [{"content": "x"}], [user({"text": "x"})], [user({"type": "text"})], [user(7)],
     [{"role": "user", "content": 7}], [{"role": "user"}]],
)  # fmt: skip
def test_not_conversations(processor, conversation):
    if conversation == [[]]:  # a conversation without messages is empty, not wrong
        assert processor.apply_chat_template(conversation) == ["<|im_start|>"]
        return
    with pytest.raises(PromptError):
        processor.apply_chat_template(conversation)


def test_keys_of_messages_are_the_templates(processor):
    """A key beyond role and content is refused, unless the template reads it."""
    messages = [{"role": "user", "name": "Ann", "content": "x", "tool_calls": [], "weight": 1}]
    template = "{% for m in messages %}{{ m.name }}: {{ m['content'][0]['text'] }}{# type #}{% endfor %}"
    assert processor.apply_chat_template(messages, template) == "Ann: x"
    with pytest.raises(PromptError, match="'name'"):
        processor.apply_chat_template(messages)


def test_roles_are_meant_however_they_are_spelt(processor):
    """In chat, batch and training: the last turn of an Assistant is the assistant's."""
    from smolvlm_jax.records.conversations import read_conversation

    messages = [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Ho"}]
    plain = [{**message, "role": message["role"].lower()} for message in messages]
    named = [{"from": role, "value": message["content"]} for role, message in zip(("Human", "GPT"), messages, strict=True)]
    wanted = processor.apply_chat_template(plain)
    for one in (messages, named):
        assert processor.apply_chat_template(one) == wanted
        record = {"messages" if one is messages else "conversations": one}
        assert read_conversation(record, last="assistant").messages[-1]["role"] == "assistant"
        with pytest.raises(InputError, match="assistant's own"):
            read_conversation(record)


def test_pictures_given_twice(processor):
    messages = [user(PICTURE, text("Q?"))]
    with pytest.raises(InputError, match="twice"):
        processor.apply_chat_template(messages, processor_kwargs={"images": [IMAGE]}, **TOKENIZE)
    bare = [user({"type": "image"}, text("Q?"))]
    given = processor.apply_chat_template(bare, processor_kwargs={"images": [IMAGE]}, **TOKENIZE)
    own = processor.apply_chat_template(messages, processor_kwargs={"images": None}, **TOKENIZE)
    assert np.array_equal(given["pixel_values"], own["pixel_values"])


def test_mixed_batch(processor):
    """One picture, two pictures, none at all, several turns: every row is what it would be alone."""
    conversations = [
        [user(PICTURE, text("one"))],
        [user(PICTURE, {"type": "image", "image": Image.fromarray(tri_img(16, 200))}, text("two"))],
        [user(text("none"))],
        [user(PICTURE, text("a")), {"role": "assistant", "content": "b"}, user(text("c"), PICTURE)],
    ]
    out = processor.apply_chat_template(conversations, padding=True, padding_side="left", **TOKENIZE)
    flat = processor.apply_chat_template(conversations, padding=True, padding_side="left", pixel_format="uint8", **TOKENIZE)
    assert np.array_equal(out["input_ids"], flat["input_ids"])
    start = 0
    for row, conversation in enumerate(conversations):
        alone = processor.apply_chat_template(conversation, **TOKENIZE)
        assert out["input_ids"][row][out["attention_mask"][row] == 1].tolist() == alone["input_ids"][0].tolist()
        tiles = alone["pixel_values"].shape[1] if "pixel_values" in alone else 0
        assert (alone["input_ids"] == processor.image_token_id).sum() == 4 * tiles
        if tiles:
            assert np.array_equal(out["pixel_values"][row, :tiles], alone["pixel_values"][0])
            one = processor.apply_chat_template(conversation, pixel_format="uint8", **TOKENIZE)
            assert np.array_equal(flat["pixel_values"][start : start + tiles], one["pixel_values"])
        start += tiles
    assert flat["num_tiles"] == start and flat["num_tiles"].shape == ()
    text_only = processor.apply_chat_template([conversations[2]] * 2, padding=True, **TOKENIZE)
    assert sorted(text_only) == ["attention_mask", "input_ids"]
    text_only = processor.apply_chat_template(conversations[2], pixel_format="uint8", **TOKENIZE)
    assert sorted(text_only) == ["attention_mask", "input_ids"]


def test_sources_of_pictures(processor, tmp_path):
    import base64

    path = tmp_path / "p.png"
    IMAGE.save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    wanted = processor.apply_chat_template([user(PICTURE, text("Q?"))], **TOKENIZE)
    items = [{"path": str(path)}, {"image": str(path)}, {"image": path}, {"base64": encoded}, {"image": np.asarray(IMAGE)}]
    items += [{"url": f"data:image/png;base64,{encoded}"}, {"image": path.read_bytes()}]
    for item in items:
        out = processor.apply_chat_template([user({"type": "image", **item}, text("Q?"))], **TOKENIZE)
        assert np.array_equal(out["pixel_values"], wanted["pixel_values"])
        assert np.array_equal(out["input_ids"], wanted["input_ids"])


def test_pictures_given_are_pictures_consumed(processor):
    """An own template that drops the picture, or repeats it, is an error."""
    for template in ("{{ messages[0].role }}", "<image><image>{{ messages[0].role }}"):
        with pytest.raises(InputError, match="<image> occurs"):
            processor.apply_chat_template([user(PICTURE, text("Q?"))], chat_template=template, **TOKENIZE)
    with pytest.raises(InputError, match="<image> occurs"):
        processor.apply_chat_template([user({"type": "image"}, text("Q?"))], **TOKENIZE)


def test_continue_final_message(processor):
    messages = [user(text("Q?")), {"role": "assistant", "content": [text("The answer ")]}]
    found = processor.apply_chat_template(messages, continue_final_message=True)
    assert found == "<|im_start|>User: Q?<end_of_utterance>\nAssistant: The answer "
    trimmed = "{% for m in messages %}{{ m.role }}: {{ m.content[0]['type'] and m.content[0].text | trim }}\n{% endfor %}"
    assert processor.apply_chat_template(messages, trimmed, continue_final_message=True) == "user: Q?\nassistant: The answer"
    with pytest.raises(PromptError, match="exclude"):
        processor.apply_chat_template(messages, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(PromptError, match="no text"):
        processor.apply_chat_template([user({"type": "image"})], continue_final_message=True)
    with pytest.raises(PromptError, match="drops"):
        processor.apply_chat_template(messages, "{{ messages[0]['content'][0]['type'] }}", continue_final_message=True)


# ---- templates


def test_no_template_in_the_checkpoint(own_checkpoint):
    """The built-in default is used."""
    processor = SmolVLMProcessor.from_pretrained(own_checkpoint)
    assert processor.chat_template is None
    prompt = processor.apply_chat_template([user({"type": "image"}, text("Q?"))], add_generation_prompt=True)
    assert prompt == "<|im_start|>User:<image>Q?<end_of_utterance>\nAssistant:"


def test_template_by_name_and_variables(small, small_video, tokenizer):
    templates = {
        "default": DEFAULT_CHAT_TEMPLATE,
        "short": "{{ bos_token }}{{ tone }}{{ tools | tojson }}{{ messages[0]['role'] }}",
    }
    processor = SmolVLMProcessor(small, tokenizer, small_video, 4, templates)
    assert processor.apply_chat_template([user(text("x"))], "short", tools=[{"a": "<é>"}], tone="kind").endswith(
        'kind[{"a": "<é>"}]user'
    )
    with pytest.raises(PromptError, match="default"):
        SmolVLMProcessor(small, tokenizer, small_video, 4, {"short": "x"}).apply_chat_template([user(text("x"))])


def test_templates_that_know_strings_only(processor):
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert processor.apply_chat_template([{"role": "user", "content": "hello"}], template) == "[hello]"
    both = "{% set c = messages[0].content %}{% if c is string %}{{ c }}{% else %}{{ c[0]['text'] }}{% endif %}"
    assert processor.apply_chat_template([{"role": "user", "content": "hello"}], both) == "hello"


def test_what_no_template_reads_is_refused(processor):
    for arguments in ({"tools": [{"name": "x"}]}, {"documents": [{"title": "x"}]}, {"chat_template": "shrot"}):
        with pytest.raises(PromptError, match="|".join(arguments) + "|shrot"):
            processor.apply_chat_template([user(text("x"))], **arguments)
    assert processor.apply_chat_template([user(text("x"))], tools=[], documents=None)


def test_docling_template(processor):
    arguments = {"chat_template": DOCLING, "add_generation_prompt": True, "controls": {"length": "short"}}
    found = processor.apply_chat_template([user({"type": "image"}, "Convert this page to docling.")], **arguments)
    assert found == (
        "<|start_of_role|>user<|end_of_role|><image>Convert this page to docling.<|end_of_text|>\n"
        '<|start_of_role|>assistant {"length": "short"}<|end_of_role|>'
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update({'role': 'x'}) %}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ range(10000000) | list }}",
        "{{ raise_exception('no') }}",
        "{{ undefined.attribute }}",
        "{% for",
        "{{ 1 / 0 }}",
        "{{ '%s' | format }}",
    ],
)
def test_template_is_sandboxed(processor, template):
    try:
        found = processor.apply_chat_template([user(text("x"))], chat_template=template)
    except PromptError:
        return
    assert found == ""  # what is private is undefined to a template, and undefined renders as nothing


def test_template_gets_no_objects(processor):
    """Pictures and arrays have methods that write files; a template sees their type's name."""
    template = "{{ messages[0]['content'][0]['image'] }}{{ messages[0]['content'][0]['image'].save('/nowhere/x.png') }}"
    with pytest.raises(PromptError):
        processor.apply_chat_template([user(PICTURE)], chat_template=template)
    seen = processor.apply_chat_template([user(PICTURE)], chat_template="{{ messages[0]['content'][0]['image'] }}{# type #}")
    assert seen == "<Image>"


# ---- words of a user

STEERING = ["<image>", "<end_of_utterance>", "<|im_start|>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>",
            "<row_7_col_9>", "<video>", "<|im_end|>", "<|endoftext|>"]  # fmt: skip


@pytest.mark.parametrize("word", STEERING)
def test_steering_words_are_refused(processor, word):
    for content in (f"a{word}b", [text(word)], [PICTURE, text(f"{word} x")], [text(word[:3]), text(word[3:])]):
        for tokenize in (False, True):
            with pytest.raises(PromptError, match=r"special_tokens_in_text"):
                processor.apply_chat_template([{"role": "user", "content": content}], tokenize=tokenize)
    with pytest.raises(PromptError, match="role"):
        processor.apply_chat_template([{"role": f"user{word}", "content": "x"}], special_tokens_in_text="escape")
    with pytest.raises(PromptError, match="tools"):
        processor.apply_chat_template([user(text("x"))], tools=[{"name": word}])


@pytest.mark.parametrize("word", STEERING)
def test_steering_words_are_escaped(processor, word):
    """Read as characters: the prompt decodes to the same text, and no id in the user's text is a special token."""
    steering = set(processor.tokenizer.added_tokens.values())
    plain = processor.apply_chat_template([user(PICTURE, text("aXb"))], **TOKENIZE)["input_ids"][0].tolist()
    for content in ([text(f"a{word}b")], [text(f"a{word[:2]}"), text(f"{word[2:]}b")]):
        out = processor.apply_chat_template([user(PICTURE, *content)], special_tokens_in_text="escape", **TOKENIZE)
        ids = out["input_ids"][0].tolist()
        assert [id for id in ids if id in steering] == [id for id in plain if id in steering]
        assert processor.decode(ids) == processor.decode(plain).replace("aXb", f"a{word}b")
        same = processor.apply_chat_template([user(PICTURE, *content)], sanitize_control_tokens=True, **TOKENIZE)
        assert same["input_ids"][0].tolist() == ids
        # no count changes by it
        assert processor.count_prompt_tokens(
            [user(PICTURE, *content)], add_generation_prompt=True, special_tokens_in_text="escape"
        ) == [len(ids)]
    with pytest.raises(PromptError, match="tokenize=True"):
        processor.apply_chat_template([user(text(word))], special_tokens_in_text="escape")


def test_escaped_ids_are_those_of_the_characters(processor, tokenizer):
    """What is escaped is tokenised with its neighbours, exactly as if the word were no token."""
    out = processor.apply_chat_template([user(text("see <image> tags"))], special_tokens_in_text="escape", **TOKENIZE)
    characters = tokenizer.encode(" see <image> tags", split_special_tokens=True)
    ids = out["input_ids"][0].tolist()
    assert ids == [1, 11126, 42, *characters, 49279, 198, 9519, 9531, 42]


def test_allowed_words_steer(processor):
    """ "allow" is the reference's behaviour: a literal <image> is the place of a picture, which has to be passed."""
    arguments = {"special_tokens_in_text": "allow", **TOKENIZE}
    ids = processor.apply_chat_template([user(text("a<end_of_utterance>b"))], **arguments)["input_ids"][0].tolist()
    assert ids.count(49279) == 2
    with pytest.raises(InputError, match="<image> occurs"):
        processor.apply_chat_template([user(text("a<image>b"))], **arguments)
    # prompts that are strings already are taken as they are: each <image> is the place of a picture
    assert "pixel_values" in processor(text="a<image>b", images=IMAGE)
    with pytest.raises(InputError, match="special_tokens_in_text"):
        processor.apply_chat_template([user(text("x"))], special_tokens_in_text="maybe")


def test_harmless_texts_are_untouched(processor, tokenizer):
    """Angle brackets, beginnings and ends of special tokens: same prompt as with no protection at all."""
    for words in (
        "a < b",
        "<",
        "<i",
        "x<",
        "mage>",
        ">",
        "<|im_",
        "im_end|>",
        "<div>",
        "\ue000",
        "<row",
        "naïve 你好 🙂",
        "<|reserved_special_token_3|>",
    ):
        for mode in ("error", "escape"):
            found = processor.apply_chat_template([user(text(words))], special_tokens_in_text=mode, **TOKENIZE)
            allowed = processor.apply_chat_template([user(text(words))], special_tokens_in_text="allow", **TOKENIZE)
            assert found["input_ids"].tolist() == allowed["input_ids"].tolist()
        assert words in processor.apply_chat_template([user(text(words))])


def test_a_template_cannot_complete_a_word(processor):
    """The text ends in the beginning of a special token, the template goes on with its end."""
    template = "{% for m in messages %}{{ m['content'][0]['text'] }}image>{# type #}{% endfor %}"
    with pytest.raises(PromptError, match="add up"):
        processor.apply_chat_template([user(text("a <"))], template)
    out = processor.apply_chat_template([user(text("a <"))], template, special_tokens_in_text="escape", **TOKENIZE)
    assert processor.image_token_id not in out["input_ids"]
    assert processor.decode(out["input_ids"][0]) == "a <image>"


# ---- arguments


def test_unknown_arguments(processor):
    with pytest.raises(InputError, match="do_image_spliting"):
        processor(text="a<image>", images=IMAGE, do_image_spliting=False)
    for name in ("text_kwargs", "images_kwargs", "videos_kwargs"):
        with pytest.raises(InputError, match="nonsense"):
            processor(text="a<image>", images=IMAGE, **{name: {"nonsense": 1}})
    with pytest.raises(InputError, match="twice"):
        processor(text="a<image>", images=IMAGE, do_resize=True, images_kwargs={"do_resize": True})
    with pytest.raises(InputError, match=r'return_tensors is .pt.*write "np" or "jax"'):
        processor(text="a", return_tensors="pt")
    with pytest.raises(InputError, match="pixel_format"):
        processor(text="<image>", images=IMAGE, pixel_format="bf16")
    with pytest.raises(InputError, match="padding=True"):
        processor(text=["a", "b c d"], return_tensors="np")


def test_truncation_never_cuts_a_picture(processor):
    """The error says how long the prompt is."""
    whole = processor(text="<image>hello world", images=IMAGE)["input_ids"][0]
    for limit in (1, 10, len(whole) - 3):
        with pytest.raises(InputError, match=f"max_length={len(whole)}"):
            processor(text="<image>hello world", images=IMAGE, truncation=True, max_length=limit)
    same = processor(text="<image>hello world", images=IMAGE, truncation=True, max_length=len(whole))
    assert same["input_ids"] == [whole]
    cut = processor(text="one two three", truncation=True, max_length=2)["input_ids"][0]
    assert processor.decode(cut) == " two three"  # the checkpoint truncates on the left


def test_padding_arguments(tokenizer):
    rows = ["hello", "hello world there"]
    assert tokenizer(rows, padding="max_length", max_length=5, padding_side="left", return_tensors="np")[
        "input_ids"
    ].tolist() == [
        [2, 2, 2, 2, 28120],
        [2, 2, 28120, 905, 665],
    ]
    assert tokenizer(rows, padding=True, pad_to_multiple_of=4, return_tensors="np")["input_ids"].shape == (2, 4)
    assert tokenizer("hello", return_attention_mask=False) == {"input_ids": [28120]}
    assert tokenizer("")["input_ids"] == [] and tokenizer([""], return_tensors="np")["input_ids"].shape == (1, 0)
    for bad in ({"padding": "shortest"}, {"padding": True, "padding_side": "top"}):
        with pytest.raises(InputError):
            tokenizer(rows, **bad)
    for bad in (7, None, ["a", 1]):
        with pytest.raises(InputError):
            tokenizer(bad)


def test_decode(tokenizer, processor):
    ids = tokenizer("<|im_start|>hi there<end_of_utterance>")["input_ids"]
    for form in (ids, np.array(ids), tuple(ids)):
        assert tokenizer.decode(form) == "<|im_start|>hi there<end_of_utterance>"
        assert tokenizer.decode(form, skip_special_tokens=True) == "hi there"
    assert processor.batch_decode(np.array([ids, ids]), skip_special_tokens=True) == ["hi there"] * 2
    assert tokenizer.decode(np.array([ids, ids]), skip_special_tokens=True) == ["hi there"] * 2
    assert tokenizer.decode(42) == ":" and tokenizer.decode([]) == ""
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == "hi there"
    with pytest.raises(InputError, match="-100"):
        tokenizer.decode([1, -100])


def test_markup_of_document_checkpoints_stays(tmp_path):
    """Doctags are special tokens, but belong to the answer."""
    from .conftest import write_own_checkpoint

    write_own_checkpoint(tmp_path)
    plain = SmolVLMTokenizer.from_pretrained(tmp_path)
    assert not plain.keep_markup
    plain.backend.add_special_tokens(["<doctag>", "</doctag>", "<text>", "<|end_of_text|>"])
    plain.save_pretrained(tmp_path)
    tokenizer = SmolVLMTokenizer.from_pretrained(tmp_path)
    assert tokenizer.keep_markup
    ids = tokenizer.encode("<doctag><text>hi</doctag><end_of_utterance><|end_of_text|><image>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<doctag><text>hi</doctag>"
    assert tokenizer.decode(ids, skip_special_tokens=True, keep_markup=False) == "hi"
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == ["<doctag><text>hi</doctag>"]
    # and markup in a conversation is text, while control tokens stay refused
    template = "{% for m in messages %}{{ m.content[0].text }}<|end_of_text|>{# type #}{% endfor %}"
    processor = SmolVLMProcessor(tokenizer=tokenizer, chat_template=template)
    processor.apply_chat_template([{"role": "assistant", "content": "<doctag>x</doctag>"}])
    with pytest.raises(PromptError):
        processor.apply_chat_template([{"role": "assistant", "content": "<|end_of_text|>"}])
