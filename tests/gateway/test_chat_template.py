"""Chat templates render as their authors expect, and nothing more."""

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.gateway.chat_template import ChatTemplate

pytestmark = pytest.mark.core

HELLO = [{"role": "user", "content": "<hello> & é"}]


def render(source: str, **special_tokens: str) -> str:
    return ChatTemplate(source, special_tokens).render(HELLO)


def test_special_tokens_and_messages_are_there() -> None:
    assert render("{{ bos_token }}{{ messages[0].content }}", bos_token="<s>") == "<s><hello> & é"


def test_blocks_leave_no_line_breaks_and_no_indentation() -> None:
    assert render("  {% if true %}\nyes\n  {% endif %}\n") == "yes\n"


def test_tojson_escapes_neither_html_nor_unicode() -> None:
    assert render("{{ messages[0].content | tojson }}") == '"<hello> & é"'


def test_loops_can_be_left() -> None:
    assert render("{% for n in range(9) %}{% if n > 1 %}{% break %}{% endif %}{{ n }}{% endfor %}") == "01"


def test_there_are_no_tools_and_templates_can_ask() -> None:
    assert render("{% if tools is not none %}tools{% else %}none{% endif %}") == "none"


def test_generation_blocks_are_their_content() -> None:
    assert render("{% generation %}said{% endgeneration %}") == "said"


def test_refusal_is_the_clients_error_in_the_templates_words() -> None:
    with pytest.raises(PrismError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__['json'] }}"],
)
def test_template_reaches_nothing_outside(source: str) -> None:
    with pytest.raises(PrismError):
        render(source)
