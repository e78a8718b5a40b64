"""Chat templates that treat a system prompt or the turns in unusual ways."""

from __future__ import annotations

TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[/]{% endfor %}"
ASK = "{% if add_generation_prompt %}[model]{% endif %}"
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS + ASK
# Two older kinds of template: one ignores all other roles, and one renders only the last message.
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[user]{{ m['content'] }}[/]{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] }}{% endif %}{% endfor %}" + ASK
)
ONLY_LAST = "[user]{{ messages[-1]['content'] }}[/]" + ASK
