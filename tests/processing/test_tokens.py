"""Added tokens of a checkpoint or a fine-tuner are words like others; only the template's and the media tokens steer."""

import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image
from tiers import fast_first

from smolvlm_jax.errors import CheckpointError, InputError, PromptError
from smolvlm_jax.processing import SmolVLMProcessor, SmolVLMTokenizer

from .conftest import tri_img, write_own_checkpoint

FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
STEERING = ["<image>", "<end_of_utterance>", "<|im_start|>", "<fake_token_around_image>", "<global-img>", "<row_1_col_2>"]
WORDS = ["<loc_12>", "<tool_call>", "</tool_call>", "<|my_token|>", "<doctag>", "<obj>", "[SEP_X]", "kilogram", "<éé>", "<a b>"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def put(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def with_tokens(directory, rng, place):
    """The small checkpoint with ten more tokens of random flags, written in one of the places that files have for them."""
    write_own_checkpoint(directory)
    config = {**read(directory / "tokenizer_config.json"), "tokenizer_class": "PreTrainedTokenizerFast"}
    size = len(read(directory / "tokenizer.json")["model"]["vocab"])
    tokens = [{"content": word, **{flag: rng.random() < 0.4 for flag in FLAGS}} for word in rng.sample(WORDS, 6)]
    if place == "tokenizer.json":
        tokenizer = read(directory / "tokenizer.json")
        tokenizer["added_tokens"] += [{"id": size + n, **token} for n, token in enumerate(tokens)]
        put(directory / "tokenizer.json", tokenizer)
    elif place == "added_tokens_decoder":
        config["added_tokens_decoder"] = {str(size + n): token for n, token in enumerate(tokens)}
    elif place == "added_tokens.json":
        put(directory / "added_tokens.json", {token["content"]: size + n for n, token in enumerate(tokens)})
        config["additional_special_tokens"] = [tokens[0]["content"]]
    elif place == "special_tokens_map.json":
        put(directory / "special_tokens_map.json", {"additional_special_tokens": [token["content"] for token in tokens]})
    else:
        config["extra_special_tokens"] = [token["content"] for token in tokens]
    put(directory / "tokenizer_config.json", config)
    return [token["content"] for token in tokens]


def texts(rng, words, count):
    """Random texts of tokens, pieces of tokens, spaces and letters."""
    pieces = [
        *words,
        *words,
        *STEERING,
        "a",
        "xx",
        " ",
        "  ",
        "\n",
        "<",
        ">",
        "<loc_",
        "12>",
        "é",
        "_",
        "1",
        "kilo",
        "<image",
        "数",
    ]
    return ["".join(rng.choice(pieces) for _ in range(rng.randrange(1, 14))) for _ in range(count)]


PLACES = ["tokenizer.json", "added_tokens_decoder", "added_tokens.json", "special_tokens_map.json", "extra_special_tokens"]


def vary(directory, rng, words):
    """More of what the small files may say about special tokens: names with flags, names of their own, a second file."""
    config = read(directory / "tokenizer_config.json")
    if rng.random() < 0.3:
        content = rng.choice(["a", "<unk>", words[0]])
        flags = {"lstrip": rng.random() < 0.5, "normalized": rng.random() < 0.5, "special": True}
        config["unk_token"] = {"__type": "AddedToken", "content": content, **flags}
    if rng.random() < 0.3:
        config["image_token"] = rng.choice(["<image>", "<img>"])
    if rng.random() < 0.3:
        config["extra_special_tokens"] = {"loc_token": "<loc_99>"}
    put(directory / "tokenizer_config.json", config)
    if rng.random() < 0.3:
        end = {"content": "<end_of_utterance>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
        path = directory / "special_tokens_map.json"
        put(path, {"eos_token": end, "pad_token": "<pad>", **(read(path) if path.exists() else {})})
    return [*words, "<loc_99>", "<img>", "<unk>", "<pad>"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("seed", fast_first(3, range(40)))
def test_ids_are_those_of_transformers(place, seed, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    rng = random.Random(f"{place}{seed}")
    words = vary(tmp_path / "m", rng, with_tokens(tmp_path / "m", rng, place))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    ours = SmolVLMTokenizer.from_pretrained(tmp_path / "m")
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    for text in texts(rng, words, 60):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True, keep_markup=False) == theirs.decode(ids, skip_special_tokens=True)
    # and again from what we write
    ours.save_pretrained(tmp_path / "again")
    again = SmolVLMTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_vocab() == ours.get_vocab()
    assert all(again.encode(text) == ours.encode(text) for text in texts(rng, words, 20))


@pytest.fixture(params=range(3))
def extended(request, tmp_path):
    """(processor, its words): the small checkpoint with more tokens, steering ones among the markup of random flags."""
    rng = random.Random(request.param)
    words = with_tokens(tmp_path / "m", rng, rng.choice(PLACES[:3]))
    return SmolVLMProcessor.from_pretrained(tmp_path / "m"), words, rng


def ids_of(processor, *content, **options):
    options = {"tokenize": True, "return_tensors": "np", "add_generation_prompt": True, **options}
    return processor.apply_chat_template([{"role": "user", "content": list(content)}], **options)[0].tolist()


def text(words):
    return {"type": "text", "text": words}


def test_added_tokens_are_words_in_every_mode(extended):
    """Nothing of a text without steering words is changed or refused, and it is read as the reference reads it."""
    processor, words, rng = extended
    assert not processor.steering_words() & set(words)
    assert set(STEERING[:3]) <= processor.steering_words()
    for words_only in texts(rng, words, 60):
        for word in [*STEERING, "<row_", "<image"]:
            words_only = words_only.replace(word, "")
        allowed = ids_of(processor, text(words_only), special_tokens_in_text="allow")
        assert ids_of(processor, text(words_only), special_tokens_in_text="escape") == allowed
        assert ids_of(processor, text(words_only), special_tokens_in_text="error") == allowed


def test_escape_protects_what_steers_and_nothing_else(extended):
    """Ids are those of a tokenizer that has all added tokens but those that steer."""
    processor, words, rng = extended
    tokenizer, steering = processor.tokenizer, processor.steering_words()
    picture = {"type": "image", "image": Image.fromarray(tri_img(20, 30))}
    plain = ids_of(processor, picture, text(""), special_tokens_in_text="escape")
    start = max(n for n, id in enumerate(plain) if id == tokenizer.fake_image_token_id) + 1
    stop = len(plain) - plain[::-1].index(tokenizer.eos_token_id) - 1
    control = {tokenizer.added_tokens[word] for word in steering if word in tokenizer.added_tokens}
    for words_and_more in texts(rng, words, 80):
        ids = ids_of(processor, picture, text(words_and_more), special_tokens_in_text="escape")
        assert ids == [*plain[:start], *tokenizer.encode_without(steering, words_and_more), *plain[stop:]], words_and_more
        assert control.isdisjoint(ids[start : len(ids) - len(plain) + stop])


def test_steering_words_come_from_the_template(tmp_path):
    """A token that one template writes is a word for another; a word in letters only never steers."""
    rng = random.Random(0)
    with_tokens(tmp_path / "m", rng, "added_tokens_decoder")
    config = read(tmp_path / "m" / "tokenizer_config.json")
    size = len(read(tmp_path / "m" / "tokenizer.json")["model"]["vocab"])
    names = ["<|user|>", "<|assistant|>", "User", "<think>", "<loc_1>"]
    config["added_tokens_decoder"] = {str(size + n): {"content": name, "special": n % 2 == 0} for n, name in enumerate(names)}
    config["chat_template"] = (
        "{% for m in messages %}<|im_start|>{{ '<|' + m.role + '|>' }}{% set end = '<end_of_utterance>' %}User"
        "{{ m.content[0].text if m.content[0].type == '<think>' else m.content }}{{ end }}{% endfor %}"
    )
    put(tmp_path / "m" / "tokenizer_config.json", config)
    processor = SmolVLMProcessor.from_pretrained(tmp_path / "m")
    assert {"<|user|>", "<|assistant|>", "<|im_start|>", "<image>"} <= processor.steering_words()
    assert not {"User", "<think>", "<loc_1>"} & processor.steering_words()
    with pytest.raises(PromptError, match=r"<\|user\|>"):
        processor.apply_chat_template([{"role": "user", "content": "a<|user|>"}])
    other = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert processor.apply_chat_template([{"role": "user", "content": "a<|user|>"}], other) == "a<|user|>"


def test_labels_of_added_tokens_are_learned(tmp_path):
    from smolvlm_jax.train.config import DataConfig
    from smolvlm_jax.train.samples import make_sample

    for seed, place in enumerate(PLACES):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        words = with_tokens(tmp_path / "m", random.Random(seed), place)
        processor = SmolVLMProcessor.from_pretrained(tmp_path / "m")
        answer = " . ".join(words) + " <image> "
        messages = [{"role": "user", "content": [text("q")]}, {"role": "assistant", "content": [text(answer)]}]
        sample = make_sample(processor, messages, DataConfig(length=2000))
        learned = sample.labels[sample.labels != -100]
        assert np.isin([processor.tokenizer.added_tokens[word] for word in words], learned).all()
        assert processor.decode(learned).strip().endswith("<image> <end_of_utterance>")


def test_tokens_without_embeddings_are_refused(tmp_path):
    from smolvlm_jax import SmolVLMTextConfig
    from smolvlm_jax.errors import ConfigError
    from smolvlm_jax.train.checks import check_vocabulary

    with_tokens(tmp_path / "m", random.Random(0), "added_tokens_decoder")
    tokenizer = SmolVLMTokenizer.from_pretrained(tmp_path / "m")
    check_vocabulary(tokenizer, SmolVLMTextConfig(vocab_size=len(tokenizer)))
    with pytest.raises(ConfigError, match=f"2 tokens beyond the model's {len(tokenizer) - 2} embeddings"):
        check_vocabulary(tokenizer, SmolVLMTextConfig(vocab_size=len(tokenizer) - 2))


def test_half_a_surrogate_pair_is_named(tmp_path):
    tokenizer = SmolVLMTokenizer.from_pretrained(write_own_checkpoint(tmp_path / "m"))
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tokenizer.encode("a\ud800")


def test_panics_of_the_library_are_errors(tmp_path):
    """A regular expression that backtracks without end, and a post-processor that names a token which is not there."""
    directory = write_own_checkpoint(tmp_path / "m")
    tokenizer = read(directory / "tokenizer.json")
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    put(directory / "tokenizer.json", {**tokenizer, "pre_tokenizer": slow})
    with pytest.raises(InputError, match="cannot tokenise"):
        SmolVLMTokenizer.from_pretrained(directory).encode("a" * 2000 + "b")
    around = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    around["single"] = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    put(directory / "tokenizer.json", {**tokenizer, "post_processor": around})
    with pytest.raises((InputError, CheckpointError), match="cannot"):
        SmolVLMTokenizer.from_pretrained(directory).encode("a")


# ---- tokenizers that normalise

TWINS = ["＜end_of_utterance＞", "<END_OF_UTTERANCE>", "<ｉｍａｇｅ>", "<Image>", "＜ROW_1_col_2＞", "＜ｖｉｄｅｏ＞", "a<ﬁx>"]
NORMALIZERS = {
    "nfkc": [{"type": "NFKC"}],
    "nfkc and lower case": [{"type": "NFKC"}, {"type": "Lowercase"}],
    "bert": [
        {"type": "BertNormalizer", **dict.fromkeys(("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"), True)}
    ],
    "without": [{"type": "NFD"}, {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}],
}


def normalising(directory, normalizers, flagged: bool = True):
    """The small checkpoint with a tokenizer that normalises, and looks for its words in what it has normalised."""
    write_own_checkpoint(directory)
    tokenizer = read(directory / "tokenizer.json")
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    tokenizer["added_tokens"] = [{**token, "normalized": flagged} for token in tokenizer["added_tokens"]]
    put(directory / "tokenizer.json", tokenizer)
    return SmolVLMProcessor.from_pretrained(directory)


@pytest.mark.parametrize("name", fast_first(1, NORMALIZERS))
def test_twins_of_steering_words_do_not_steer(name, tmp_path):
    processor = normalising(tmp_path / "m", NORMALIZERS[name])
    words = processor.steering_words()
    steering = {processor.tokenizer.added_tokens[word] for word in words if word in processor.tokenizer.added_tokens}
    count = lambda ids: sum(id in steering for id in ids)
    fixed = count(ids_of(processor, text("x")))
    twins = [*TWINS, "<ima\u200bge>", "<end_of_\u200butterance>"]
    found = 0
    for twin in [*twins, *(f"a {twin}{twin} <image> b" for twin in twins)]:
        allowed = count(processor.tokenizer.encode(twin))
        assert count(ids_of(processor, text(twin), special_tokens_in_text="escape")) == fixed, twin
        halves = [text(twin[: len(twin) // 2]), text(twin[len(twin) // 2 :])]
        assert count(ids_of(processor, *halves, special_tokens_in_text="escape")) == fixed, twin
        if allowed:
            found += 1
            for content in ([text(twin)], halves):
                with pytest.raises(PromptError, match="special token"):
                    ids_of(processor, *content)
            with pytest.raises(PromptError, match="role"):
                message = {"role": f"user{twin}", "content": "x"}
                processor.apply_chat_template([message], special_tokens_in_text="escape", tokenize=True)
        else:
            assert ids_of(processor, text(twin)) == ids_of(processor, text(twin), special_tokens_in_text="allow")
    assert found >= 8


@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("name", fast_first(1, NORMALIZERS))
def test_harmless_texts_keep_their_ids(name, flagged, tmp_path):
    processor = normalising(tmp_path / "m", NORMALIZERS[name], flagged)
    for words in ("Ａ ﬁne ＜ day", "x<", "mage>", "＜i", "MAGE＞", "数 é\u200b", "<DIV>", "naïve", "＜row", "\ue000 <"):
        allowed = ids_of(processor, text(words), special_tokens_in_text="allow")
        for mode in ("error", "escape"):
            assert ids_of(processor, text(words), special_tokens_in_text=mode) == allowed, words


def test_a_template_that_changes_case_makes_no_word(processor):
    """The published one writes the role with a capital and everything else of it small."""
    for role in ("x<END_OF_UTTERANCE>", "<IMAGE>"):
        with pytest.raises(PromptError, match="role"):
            processor.apply_chat_template([{"role": role, "content": "x"}], special_tokens_in_text="escape", tokenize=True)
    lower = "{% for m in messages %}{{ m['content'][0]['text'] | lower }}<end_of_utterance>{# type #}{% endfor %}"
    message = [{"role": "user", "content": "see <IMAGE>"}]
    with pytest.raises(PromptError, match="add up"):
        processor.apply_chat_template(message, lower)
    ids = processor.apply_chat_template(message, lower, special_tokens_in_text="escape", tokenize=True)[0]
    assert processor.image_token_id not in ids and processor.decode(ids) == "see <image><end_of_utterance>"
    assert "<IMAGE>" in processor.apply_chat_template(message)
    with pytest.raises(PromptError, match="key"):
        processor.apply_chat_template(message, "{{ tools }}{{ messages[0].content }}{# type #}", tools=[{"<image>": 1}])
