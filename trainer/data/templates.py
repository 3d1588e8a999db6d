"""The chat template of a source of records, and its renderings."""

import functools
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from trainer.config.data_options import DataOptions, SourceOptions
from trainer.config.validation import local
from trainer.data.known_templates import KNOWN
from trainer.data.time_limit import time_limit
from trainer.errors import BadRecord, UserError
from trainer.tasks.tokenisation import special_tokens

Span = tuple[int, int]
Templates = str | dict[str, str]

_SECONDS = 10.0
"""Of computing, for all renderings of a conversation; a thousand times what they take."""
_KEY = "data.chat_template"
_QUESTION, _ANSWER = "Xq7", "Zk8"


def read_anew() -> None:
    """Templates' files are read once in a run, which calls this at its start: a file that is edited
    or removed while it trains changes nothing."""
    _of_file.cache_clear()


def limited() -> AbstractContextManager[None]:
    """Raises UserError in a context that renders for too long."""
    return time_limit(
        _SECONDS,
        f"the chat template does not end within {_SECONDS:g} s; accepted: a template "
        f"(chat_template of the tokenizer, or {_KEY}) whose loops end",
    )


def templates_of(tokenizer: Any, options: SourceOptions) -> Templates | None:
    """The template, or several by name, of the tokenizer, or the one that `data.chat_template`
    says. `data.template_arguments` stand before each as defaults of variables, so that it renders
    the same wherever it is saved. Raises UserError."""
    found = getattr(tokenizer, "chat_template", None)
    if options.chat_template is not None:
        found = _named(options.chat_template, found, tokenizer)
    given = options.template_arguments
    if not given:
        return found
    if not found:
        raise UserError(
            "data.template_arguments: given, but the tokenizer has no chat template; accepted: "
            f"{_KEY} with it"
        )
    texts = list(found.values()) if isinstance(found, dict) else [found]
    for name in given:
        if not any(re.search(rf"\b{name}\b", text) for text in texts):
            raise UserError(
                f"data.template_arguments: {name}: the chat template does not use it; accepted: "
                "variables of the template"
            )
    defaults = "".join(  # a Python literal of ASCII characters is one of Jinja too
        f"{{% set {name} = {name} | default({value!a}) %}}\n" for name, value in given.items()
    )
    if isinstance(found, dict):
        return {name: defaults + text for name, text in found.items()}
    return defaults + found


def set_template(tokenizer: Any, options: DataOptions) -> Templates | None:
    """What exports have in place of the tokenizer's own template: the one that all sources are
    rendered by, or, where they differ, that of the section. None: the tokenizer's own."""
    found = [templates_of(tokenizer, source) for _, source in options.sources]
    same = all(one == found[0] for one in found)
    template = found[0] if same else templates_of(tokenizer, options)
    return None if template == getattr(tokenizer, "chat_template", None) else template


def template_of(tokenizer: Any, options: SourceOptions, tools: list[dict] | None) -> str:
    """The template that renders a conversation with `tools`. Raises BadRecord, UserError."""
    found = templates_of(tokenizer, options)
    if not found:
        raise BadRecord(
            f"the tokenizer has no chat template; accepted: {_KEY} ({', '.join(KNOWN)}, a file), "
            "or a model that has one"
        )
    if isinstance(found, str):
        return found
    name = "tool_use" if tools and "tool_use" in found else "default"
    if name not in found:
        raise UserError(
            f"{_KEY}: null given, and none of the tokenizer's templates is the default; accepted: "
            f"{', '.join(found)}"
        )
    return found[name]


def _named(name: str, own: Templates | None, tokenizer: Any) -> str:
    """A template by its name, the tokenizer's own names first, or of a file."""
    if isinstance(own, dict) and name in own:
        return own[name]
    if name in KNOWN:
        return ("{{ bos_token }}" if _begins(tokenizer) else "") + KNOWN[name]
    path = local(name, _KEY)
    if path is None or not path.is_file():
        names = [*(own if isinstance(own, dict) else ()), *KNOWN]
        what = "Jinja text" if "{%" in name or "{{" in name else f"{name!r}"
        raise UserError(f"{_KEY}: {what} given; accepted: a file that holds it, {', '.join(names)}")
    return _of_file(path)


@functools.lru_cache(maxsize=4)
def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its begin token before a text."""
    before, _ = special_tokens(tokenizer, "auto", False)
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in before


@functools.cache
def _of_file(path: Path) -> str:
    from jinja2 import TemplateSyntaxError

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{_KEY}: {path}: {why}; accepted: a file of Jinja text") from error
    if not text.strip():
        raise UserError(f"{_KEY}: {path}: empty; accepted: a file of Jinja text")
    with limited():
        try:
            _rendered([], None, text, False, {})
        except TemplateSyntaxError as error:
            raise UserError(
                f"{_KEY}: {path}:{error.lineno}: {error.message}; accepted: a file of Jinja text"
            ) from error
        except Exception:
            return text  # it may well refuse to render nothing
    return text


def render(
    tokenizer: Any, template: str, messages: list[dict], tools: list[dict] | None, prompt: bool,
    marked: bool = False,
) -> tuple[str, list[Span]]:  # fmt: skip
    """As `apply_chat_template`, which does not give the marked spans of the text."""
    try:
        return _rendered(messages, tools, template, marked, {
            "add_generation_prompt": prompt, **tokenizer.special_tokens_map
        })  # fmt: skip
    except Exception as error:  # templates raise errors of any type
        reason = " ".join(str(error).split()) or repr(error)
        raise BadRecord(f"the chat template refuses it: {reason}") from error


def _rendered(
    messages: list[dict], tools: list[dict] | None, template: str, marked: bool, given: dict
) -> tuple[str, list[Span]]:
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template  # annotated otherwise than it is
    texts, marks = render(
        [messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=marked,
        **given,
    )
    return texts[0], [span for span in marks[0] if span[0] < span[1]] if marked else []


@functools.lru_cache(maxsize=4)
def added_tokens(tokenizer: Any) -> dict[str, bool]:
    """Tokens that the tokenizer does not split, and whether they are special."""
    added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    return added | dict.fromkeys(tokenizer.all_special_tokens, True)


def on_templates(tokenizer: Any, options: DataOptions) -> Iterator[str]:
    """Remarks on templates that the configuration sets."""
    sources = [source for _, source in options.sources]
    yield from dict.fromkeys(filter(None, (_end_of_turn(tokenizer, one) for one in sources)))
    found = [templates_of(tokenizer, one) for one in sources]
    if any(one != found[0] for one in found):
        yield f"{_KEY}: differs between sources; exports have that of `data`, not an entry's"


def _end_of_turn(tokenizer: Any, options: SourceOptions) -> str | None:
    """The remark where a template that is set ends turns with what is no token of the tokenizer."""
    if options.chat_template is None:
        return None
    end = turn_end(tokenizer, options)
    name = f"{_KEY}: {options.chat_template} ends a turn with"
    if end == "":
        return f"{name} nothing: the model does not learn to stop"
    if end is None or any(token in end for token in added_tokens(tokenizer)):
        return None
    count = len(tokenizer(end, add_special_tokens=False)["input_ids"])
    return (
        f"{name} {end!r}, which is {count} tokens for this tokenizer: all are learned, and "
        "generation stops there only if it is told to; model.added_tokens makes it one"
    )


def turn_end(tokenizer: Any, options: SourceOptions) -> str | None:
    """What the template puts behind an answer, without spaces around it; None where there is no
    template, or it refuses a plain question and answer."""
    said = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text, _ = render(tokenizer, template_of(tokenizer, options, None), said, None, False)
    except BadRecord:  # as every record will say
        return None
    return text.rpartition(_ANSWER)[2].strip()


def stops(tokenizer: Any, options: DataOptions) -> tuple[list[int], list[str]]:
    """(tokens, texts) with which the templates end an answer: texts where they are no token."""
    tokens, texts = [], []
    for _, source in options.sources:
        end = turn_end(tokenizer, source) or ""
        found = next((token for token in added_tokens(tokenizer) if end.startswith(token)), None)
        if found is not None:
            tokens.append(tokenizer.convert_tokens_to_ids(found))
        elif end:
            texts.append(end)
    return tokens, texts
