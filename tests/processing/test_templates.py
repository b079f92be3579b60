"""Chat templates that nobody vouches for: bounded memory and time, and the same text wherever they run."""

import resource
import time

import pytest

from smolvlm_jax.errors import PromptError
from smolvlm_jax.processing import rendering, sandbox
from smolvlm_jax.processing.steering import steering_words
from smolvlm_jax.processing.template import DEFAULT_CHAT_TEMPLATE, render

from .conftest import DOCLING

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "é <b> 数"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
]
# Each fills 6 GB, or runs for minutes, if it is let. {S} stands for a string that the template makes itself.
DOUBLE = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(40) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s|length }}"
HOSTILE = {
    "doubling with ~": DOUBLE.replace("STEP", "ns.s ~ ns.s"),
    "doubling with join": DOUBLE.replace("STEP", "[ns.s, ns.s]|join"),
    "doubling with format": DOUBLE.replace("STEP", "'%s%s' % (ns.s, ns.s)"),
    "doubling with replace": DOUBLE.replace("STEP", "ns.s.replace('x', 'xx')"),
    "doubling a list": DOUBLE.replace("'xxxxxxxx'", "[1]").replace("STEP", "ns.s + ns.s"),
    "doubling a number": DOUBLE.replace("'xxxxxxxx'", "3").replace("range(40)", "range(99)").replace("STEP", "ns.s * ns.s"),
    "padding": "{{ ('x'|center(20000000000))|length }}",
    "a format": "{{ '{:>20000000000}'.format(1)|length }}",
    "an indent": "{{ [1]|tojson(indent=20000000000)|length }}",
    "a folded constant": "{{ 'x' * 9 }}{{ 'x'|center(9000000000) }}",
    "sets one after the other": "{% set a = 'xxxxxxxx' %}" + "{% set a = a ~ a %}" * 40 + "{{ a|length }}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long range": "{{ range(10**9)|list|length }}{% for i in range(1000000000) %}x{% endfor %}",
    "nested brackets": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "a long path": "{{ a" + ".b" * 1900 + " }}",
    "a longer path": "{{ a" + ".b" * 90_000 + " }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a long template": "x" * 200_001,
}
FAST = {
    "doubling with ~",
    "padding",
    "a folded constant",
    "a macro without end",
    "a long path",
    "a long template",
    "nested brackets",
}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.thorough) for n in HOSTILE])
def test_memory_and_time_are_bounded(name):
    start = time.monotonic()
    with pytest.raises(PromptError) as raised:
        render(HOSTILE[name], [CHAT], strings=[set()])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    assert time.monotonic() - start < 30  # 1 s of processor time, on a machine that does other things as well


@pytest.mark.parametrize(
    "template", ["{{ '{0:>9999999999}'.format(1) }}", "{{ '%09999999999d' % 1 }}", "{{ 1" + "+1" * 9000 + " }}"]
)
def test_a_template_that_can_never_be_used_is_tried_once(template, monkeypatch):
    """Which of its words steer is found by rendering it; what fails for every conversation is not tried with each."""
    asked, ask = [], rendering._ask
    monkeypatch.setattr(rendering, "_ask", lambda *request: asked.append(request) or ask(*request))
    with pytest.raises(PromptError, match=r"memory|not valid"):
        steering_words(template, frozenset({"<x>"}), frozenset())
    assert len(asked) == 1


@pytest.mark.thorough
def test_a_template_is_tried_within_one_limit():
    """Each of its eight trials alone would stay below it."""
    loops = "{% for m in messages %}{% for i in range(7000) %}{% for j in range(600) %}" + "{% endfor %}" * 3
    rendering.end_children()
    render(OTHERS[0], [CHAT], strings=[set()])
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(PromptError, match="seconds"):
        steering_words(loops, frozenset({"<x>"}), frozenset())
    rendering.end_children()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begin < 2.5


def test_a_limit_is_a_line_that_says_which(monkeypatch):
    monkeypatch.setattr(rendering, "_PATIENCE", 0.3)
    rendering.end_children()
    with pytest.raises(PromptError, match="seconds"):
        render(HOSTILE["loops in loops"], [CHAT], strings=[set()])


HONEST = [
    DEFAULT_CHAT_TEMPLATE,
    DOCLING,
    "{% for m in messages %}{{ loop.index }}{{ bos_token if loop.first }}{{ m.role|upper }}{{ eos_token }}{% endfor %}",
    # of Idefics3-8B-Llama3, and of a model with system messages
    "<|begin_of_text|>{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}<end_of_utterance>\n{% endfor %}",
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}You help.{% endif %}"
    "{{ m.role }}{% if loop.last and add_generation_prompt %}:{% endif %}{% endfor %}",
    "{% if tools %}{% for tool in tools %}{{ tool|tojson }}{% endfor %}{% endif %}{{ 'a' if add_generation_prompt else 'b' }}",
]
OTHERS = [
    "{% set x = messages[0] %}{{ x.role }}",
    "{% macro say(m) %}{{ m.role }}:{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% for m in messages %}{% for n in messages %}{{ n.role }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ messages }}{% endfor %}",
    "{% for m in messages %}{{ m.role.center(9) }}{% endfor %}",
    "{% for m in messages %}{% if 'x' in messages[0]['content'] %}x{% endif %}{% endfor %}",
    "{% for m in messages %}{% if messages == messages %}x{% endif %}{% endfor %}",
    "{% for m in messages %}{{ messages[0]['role'] }}{% endfor %}",
    "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}",
    "{{ messages|map(attribute='role')|join(', ') }}",
    "{% generation %}x{% endgeneration %}{{ raise_exception and 1 }}",
]


# Each of these stops a template that does too much. Which it meets first depends on how fast the machine hands out memory.
LIMITS = r"characters|of memory|seconds of processor time"


def test_which_templates_run_here():
    """Work in proportion to the conversation by form: no template of the other kind may be taken for one of these."""
    assert all(map(sandbox.harmless, HONEST))
    assert not any(map(sandbox.harmless, OTHERS))
    assert not any(sandbox.harmless(template) for template in HOSTILE.values() if len(template) < 5000 and "((" not in template)


@pytest.mark.parametrize("template", [*HONEST, *OTHERS])
def test_both_places_render_the_same(template):
    variables = {
        "messages": CHAT,
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tools": [{"a": "é"}],
    }
    here = sandbox.run(template, variables, 10**6)
    assert rendering._ask("run", template, variables, 10**6) == here
    assert frozenset(rendering._ask("variables_of", template)) == sandbox.variables_of(template)


def test_harmless_templates_are_bounded_as_well():
    """By form they do little, but they may be given much, and may write words of their own for each of its characters."""
    letters = [{"role": "user", "content": "é" * 1_000_000}]
    words = "{% for m in messages %}{% for c in m.content %}" + "word " * 700 + "{% endfor %}{% endfor %}"
    every = "{{ messages ~ '" + "' ~ messages ~ '" * 180 + "' }}"
    assert sandbox.harmless(words) and sandbox.harmless(every)
    for template in (words, every):
        with pytest.raises(PromptError, match=LIMITS):
            rendering.render(template, {"messages": letters})
    assert len(rendering.render(DOCLING, {"messages": letters})) > 1_000_000


def test_pictures_as_text_are_not_handed_to_templates():
    item = {"type": "image", "url": "data:image/png;base64," + "A" * 5_000}
    seen = render("{{ messages[0].content[0].url }}{# type #}", [[{"role": "user", "content": [item]}]], strings=[set()])
    assert len(seen[0]) < 100


def test_the_child_is_replaced_and_serves_on():
    with pytest.raises(PromptError, match=LIMITS):
        render(HOSTILE["doubling with ~"], [CHAT], strings=[set()])
    assert render(OTHERS[0], [CHAT], strings=[set()]) == ["user"]
    rendering.end_children()
    assert render(OTHERS[0], [CHAT], strings=[set()]) == ["user"]


def test_published_templates_start_no_child():
    rendering.end_children()
    for template in (DEFAULT_CHAT_TEMPLATE, DOCLING):
        assert render(template, [CHAT], strings=[set()])
    assert not rendering._children
