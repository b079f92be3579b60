"""The bundled checkpoint: what it was trained for, on digits it has never seen, through our own generate()."""

import handwritten_numbers as numbers
import numpy as np
import pytest
from PIL import Image

from smolvlm_jax import SmolVLMProcessor, generate, load, resolve


@pytest.fixture(scope="module")
def tiny():
    model, params = load("tiny")
    return model, params, SmolVLMProcessor.from_pretrained(resolve("tiny"))


def ask(tiny, conversations, **options):
    model, params, processor = tiny
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        padding=True,
        return_tensors="np",
        **{"padding_side": "left", "pixel_format": "uint8", **options},
    )
    tokens = generate(model, params, **inputs, max_new_tokens=20)
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


@pytest.mark.thorough
def test_held_out_accuracy():
    """The figures of docs/tiny.md, on all 1,000 numbers and 500 comparisons, by its command."""
    result = numbers.evaluate("tiny")
    assert result["readings"] >= 0.95, result
    assert result["digits"][4] >= 0.93, result
    assert result["comparisons"] >= 0.90, result
    assert result["split"] >= 0.5, result


@pytest.mark.slow
def test_caches_in_8_bits_cost_no_accuracy():
    plain, int8 = (numbers.evaluate("tiny", kv_cache_dtype=dtype) for dtype in (None, "int8"))
    for what in ("readings", "comparisons"):
        assert abs(int8[what] - plain[what]) <= 0.005, (plain, int8)


def test_swapping_pictures_swaps_answers(tiny):
    rng = np.random.default_rng(3)
    pictures = {n: numbers.draw(n, True, rng) for n in ("12", "845")}
    conversation = lambda *order: [
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": pictures[n]} for n in order),
                {"type": "text", "text": "Which picture shows the larger number?"},
            ],
        }
    ]
    a, b = ask(tiny, [conversation("12", "845"), conversation("845", "12")])
    assert a == "12 and 845. The second." and b == "845 and 12. The first."


@pytest.mark.thorough
def test_batched_equals_alone_whatever_the_padding_and_the_layout(tiny):
    """13 conversations of one picture, two pictures and none: alone, together, padded left and right, uint8 and float32."""
    rng = np.random.default_rng(4)
    conversations = [numbers.reading(rng, True).messages for _ in range(6)]
    conversations += [numbers.comparison(rng, True).messages for _ in range(5)]
    conversations += [
        [{"role": "user", "content": [{"type": "text", "text": text}]}] for text in ("Number?", "Read the number.")
    ]
    alone = [ask(tiny, [c])[0] for c in conversations]
    for options in ({}, {"padding_side": "right"}, {"pixel_format": "float32"}):
        assert ask(tiny, conversations, **options) == alone, options
    for size in (2, 7):
        assert ask(tiny, conversations[:size]) == alone[:size]
        assert ask(tiny, conversations[::-1][:size]) == alone[::-1][:size]


def test_the_examples_are_held_out_and_read_right(tiny):
    for name, number in (("number", "4207"), ("first", None), ("second", None)):
        path = resolve("tiny").parents[2] / "examples" / f"{name}.png"
        if not path.exists():
            pytest.skip("examples/ lies beside an editable install only")
        picture = Image.open(path)
        question = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Number?"}]}]
        answer = ask(tiny, [question])[0]
        assert answer.isdigit() and (number is None or answer == number)


def test_transformers_reads_it_and_says_the_same(tiny):
    """The bundled files are a Hugging Face checkpoint like any other."""
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    model, params, processor = tiny
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(resolve("tiny"), dtype=torch.float32).eval()
    rng = np.random.default_rng(5)
    for example in (numbers.reading(rng, True), numbers.comparison(rng, True)):
        inputs = processor.apply_chat_template(
            example.messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="np"
        )
        with torch.no_grad():
            tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in inputs.items()}
            want = theirs.generate(**tensors, max_new_tokens=20, do_sample=False)[0].tolist()
        got = generate(model, params, **inputs, max_new_tokens=20)[0].tolist()
        assert got == want
