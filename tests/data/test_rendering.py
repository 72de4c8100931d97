"""Chat templates come from strangers: whatever they do is told in one line, within the limits."""

import time
from types import SimpleNamespace

import pytest

from oprd_tune.data import rendering
from oprd_tune.data.rendering import render
from oprd_tune.errors import ConfigError
from oprd_tune.workers import ProcessPool

CHAT = [{"role": "user", "content": "1+1="}]
DEEP = "{% for a in range(99999) %}{% for b in range(99999) %}" * 2 + "{% endfor %}" * 4
DOUBLING = "{% set n = namespace(x='x') %}{% for i in range(29) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.fixture
def pool(monkeypatch):
    pool = ProcessPool(rendering._PROGRAM, seconds=1.0, workers=1, megabytes=700, idle_seconds=0.3)
    monkeypatch.setattr(rendering, "_POOL", pool)
    yield pool
    pool.close()


def told(template):
    with pytest.raises(ConfigError) as error:
        render(template, [CHAT], add_generation_prompt=True)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (DEEP, "ran for more than 1 s on 1 conversations, and was stopped"),
        ("{{ 7 ** (7 ** 12) }}", "ran for more than 1 s|asked for too much memory|limit"),
        ("{{ 'x' * 10 ** 10 }}", "asked for too much memory"),
        ("{{ messages[0].content * 10 ** 10 }}", "asked for too much memory"),
        ("{{ 'x'.ljust(10 ** 10) }}", "asked for too much memory"),
        (DOUBLING, "asked for too much memory|more than 64 million characters|ran for more"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "asked for too much memory"),
        ("{{ messages[0].content * 20000000 }}", "more than 64 million characters"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('x' * 9999999) }}", "xxxx"),
        ("{% if %}", "Expected an expression"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_hostile_templates(pool, template, reason):
    start = time.monotonic()
    said = told(template)
    assert any(part in said for part in reason.split("|")), said
    assert time.monotonic() - start < 20  # the limit, and the start of a process on a busy machine
    assert render("{{ messages[0].content }}", [CHAT], add_generation_prompt=False) == ["1+1="]


def test_a_process_that_ends_is_told(pool, monkeypatch):
    render("", [CHAT], add_generation_prompt=False)
    monkeypatch.setattr(pool, "run", lambda jobs: [None])
    assert "ended its process on 1 conversations" in told("")


def test_without_a_renderer_that_is_told(monkeypatch):
    def fails(jobs):
        raise ChildProcessError("template_worker.py does not start: ImportError: no jinja2")

    monkeypatch.setattr(rendering, "_POOL", SimpleNamespace(run=fails, late=0))
    assert told("") == "chat templates cannot be rendered: template_worker.py does not start: ImportError: no jinja2"


def test_many_chats_keep_their_order_and_the_process_ends_when_idle(pool):
    chats = [[{"role": "user", "content": str(i)}] for i in range(601)]
    texts = render("{{ messages[0].content }}{{ tail }}", chats, add_generation_prompt=False, tail="!")
    assert texts == [f"{i}!" for i in range(601)]
    wait = time.monotonic() + 10
    while pool.pids:
        assert time.monotonic() < wait
        time.sleep(0.05)
    assert render("{{ tail }}", [CHAT], add_generation_prompt=False, tail="again") == ["again"]
