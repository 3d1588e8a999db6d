"""Conversations as a chat template renders them, and which of their text is learned.

Learned are assistant turns: from the end of the generation prompt to the end of the turn, or what
the template itself marks by `{% generation %}`. Where a template renders earlier turns otherwise
than it rendered them as last ones (it drops their thoughts, say), each turn is an example of its
own: the conversation up to it, as the model meets it when it answers.
"""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainer.config.sections import DataOptions
from trainer.data.time_limit import time_limit
from trainer.errors import BadRecord

Segments = list[tuple[str, bool]]
Span = tuple[int, int]

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PROBE = "Xq7"
_SECONDS = 10.0
"""Of computing, for all renderings of a conversation; a thousand times what they take."""
_REMEDY = "accepted: a template (chat_template of the tokenizer) whose loops end"
_FEW = 3  # turns that are rendered one by one


def chats(row: dict, options: DataOptions, tokenizer: Any) -> list[Segments]:
    """The examples of a row of format `messages`, as segments. Raises BadRecord."""
    messages, turns = _messages(row, options.messages)
    with time_limit(_SECONDS, f"the chat template does not end within {_SECONDS:g} s; {_REMEDY}"):
        return _examples(row, messages, turns, options, tokenizer)


def _examples(
    row: dict, messages: list[dict], turns: list[int], options: DataOptions, tokenizer: Any
) -> list[Segments]:
    column = options.messages
    tools = _tools(row.get(options.tools), options.tools)
    if not getattr(tokenizer, "chat_template", None):
        raise BadRecord("the tokenizer has no chat template; accepted: a model that has one")
    template = tokenizer.get_chat_template(None, tools)
    if _wants_parts(tokenizer, template):
        messages = [_as_parts(message) for message in messages]
    if options.turns == "last":
        turns = turns[-1:]
    marked = options.turns != "all" and _MARK.search(template) is not None
    chat = Chat(messages, tools, tokenizer, template, marked, column)
    together = chat.together(turns)
    examples = [together] if together is not None else [chat.alone(turn) for turn in turns]
    for name in map(_name_of, tools or ()):
        if not all(name in text for text, _ in examples):
            raise BadRecord(f"{options.tools}: the chat template leaves out the tool {name!r}")
    return [list(_segments(text, spans)) for text, spans in examples]


@dataclass
class Chat:
    """One conversation and its renderings."""

    messages: list[dict]
    tools: list[dict] | None
    tokenizer: Any
    template: str
    marked: bool
    """Whether the template's own marks say what is learned."""
    column: str
    _rendered: dict[tuple[int, bool], tuple[str, list[Span]]] = field(default_factory=dict)

    def together(self, turns: list[int]) -> tuple[str, list[Span]] | None:
        """The conversation up to the last of `turns`, and the spans of all of them; None where it
        renders one of them otherwise than as the last turn."""
        text, marks = self._render(turns[-1] + 1)
        if self.marked:
            assistants = [i for i in range(turns[-1] + 1) if _is_assistant(self.messages[i])]
            if len(marks) != len(assistants):
                return None
            of_turn = dict(zip(assistants, marks, strict=True))
            marked = [(turn, of_turn[turn]) for turn in turns]
            if any(self._missing(turn, _cut(text, span), thoughts=True) for turn, span in marked):
                return None
            return text, [span for _, span in marked]
        if len(turns) > _FEW:
            found = self._by_first_turn(turns, text)
            if found is not None:
                return text, found
        spans: list[Span] = []
        for turn in turns:
            closed, _ = self._render(turn + 1)
            start = self._start(turn)
            if not text.startswith(closed) or (spans and start < spans[-1][1]):
                return None
            spans.append((start, len(closed)))
            self._check(turn, _cut(text, spans[-1]))
        return text, spans

    def _by_first_turn(self, turns: list[int], text: str) -> list[Span] | None:
        """The spans of many turns without a rendering for each: every assistant turn has to look as
        the first one, with its own content, and the generation prompt must occur nowhere else. None
        where that does not hold."""
        assistants = [i for i in range(turns[-1] + 1) if _is_assistant(self.messages[i])]
        if assistants[0] == 0 or any(len(_own(self.messages[i], True)) > 1 for i in assistants):
            return None
        contents = [_own(self.messages[i])[0][1] for i in assistants]
        before, closed = (self._render(assistants[0] + done)[0] for done in (0, 1))
        start, content = self._start(assistants[0]), contents[0].strip()
        header = closed[len(before) : start]
        if not (header and content and closed.startswith(before)):
            return None
        lead, own, tail = closed[start:].partition(contents[0])
        if not own:
            lead, own, tail = closed[start:].partition(content)
        # Whether history stays as it is, is seen at the first turn and at the last but one.
        kept = [closed, self._render(assistants[-2] + 1)[0]]
        if not own or not all(map(text.startswith, kept)) or text.count(header) != len(assistants):
            return None
        spans, at = {}, len(before)
        for index, content in zip(assistants, contents, strict=True):
            for form in (content, content.strip()):
                whole = header + lead + form + tail
                found = text.find(whole, at)
                if found >= 0:
                    break
            else:
                return None
            at = found + len(whole)
            spans[index] = (found + len(header), at)
        return [spans[index] for index in turns]

    def alone(self, turn: int) -> tuple[str, list[Span]]:
        """The conversation up to a turn, and the spans of that turn."""
        text, marks = self._render(turn + 1)
        if self.marked:
            before = _shared(self._render(turn, True)[0], text) if turn else 0
            spans = [span for span in marks if span[1] > before]
        else:
            spans = [(self._start(turn), len(text))]
        self._check(turn, "".join(_cut(text, span) for span in spans))
        return text, spans

    def _start(self, turn: int) -> int:
        """Where a turn begins in the rendering that it ends: after the generation prompt, or, where
        that differs, after what both begin with."""
        closed, _ = self._render(turn + 1)
        before, shared = 0, len(closed)
        if turn:
            opened, _ = self._render(turn, True)
            if closed.startswith(opened):
                return len(opened)
            before, shared = len(self._render(turn)[0]), _shared(opened, closed)
            if shared < before:
                raise BadRecord(
                    f"{self.column}[{turn}]: the chat template rewrites earlier turns when this "
                    "one is added: learned tokens are ambiguous"
                )
        probed = self._probed(turn).find(_PROBE, before)  # own text may look like a header
        if not turn and probed < 0:
            raise BadRecord(f"{self.column}[0]: the chat template does not show where it begins")
        return shared if probed < 0 else min(probed, shared)

    def _probed(self, turn: int) -> str:
        """The rendering that a turn would end if all that it says were the probe."""
        message = {key: value for key, value in self.messages[turn].items() if key != "tool_calls"}
        in_parts = isinstance(message.get("content"), list)
        message |= {"content": _PROBE} | {key: _PROBE for key in _REASONING if key in message}
        other = [*self.messages[:turn], _as_parts(message) if in_parts else message]
        return _apply(self.tokenizer, self.template, other, self.tools, False)[0]

    def _check(self, turn: int, learned: str) -> None:
        what = self._missing(turn, learned)
        if what is not None:
            raise BadRecord(f"{self.column}[{turn}]: the chat template leaves out its {what}")

    def _missing(self, turn: int, learned: str, thoughts: bool = False) -> str | None:
        """What of a turn's own text is not in its learned text; templates may change spaces."""
        squeezed = _squeezed(learned)
        own = _own(self.messages[turn], thoughts)
        return next((what for what, text in own if _squeezed(text) not in squeezed), None)

    def _render(self, end: int, prompt: bool = False) -> tuple[str, list[Span]]:
        """(text of the first `end` messages, with a generation prompt if `prompt`; marked spans)"""
        if (end, prompt) not in self._rendered:
            messages = self.messages[:end]
            try:
                found = _apply(
                    self.tokenizer, self.template, messages, self.tools, prompt, self.marked
                )
            except BadRecord:
                if all("content" in message for message in messages):
                    raise
                # Beside tool calls some templates need no content, others an empty one.
                filled = [{"content": "", **message} for message in messages]
                found = _apply(
                    self.tokenizer, self.template, filled, self.tools, prompt, self.marked
                )
            self._rendered[end, prompt] = found
        return self._rendered[end, prompt]


def _apply(
    tokenizer: Any, template: str, messages: list[dict], tools: list[dict] | None, prompt: bool,
    marked: bool = False,
) -> tuple[str, list[Span]]:  # fmt: skip
    """As `apply_chat_template`, which does not give the marked spans of the text."""
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template  # annotated otherwise than it is
    try:
        texts, marks = render(
            [messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise errors of any type
        reason = " ".join(str(error).split()) or repr(error)
        raise BadRecord(f"the chat template refuses it: {reason}") from error
    return texts[0], [span for span in marks[0] if span[0] < span[1]] if marked else []


@functools.lru_cache(maxsize=4)
def _wants_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template shows contents as lists of parts only, not as strings."""

    def shows(content: Any) -> bool:
        try:
            messages = [{"role": "user", "content": content}]
            return _PROBE in _apply(tokenizer, template, messages, None, False)[0]
        except BadRecord:
            return False

    return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])


def _as_parts(message: dict) -> dict:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _segments(text: str, spans: list[Span]) -> Iterator[tuple[str, bool]]:
    done = 0
    for start, end in spans:
        yield text[done:start], False
        yield text[start:end], True
        done = end
    yield text[done:], False


def _cut(text: str, span: Span) -> str:
    return text[span[0] : span[1]]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _shared(first: str, second: str) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _is_assistant(message: dict) -> bool:
    return message["role"] == "assistant"


def _own(message: dict, thoughts: bool = False) -> list[tuple[str, str]]:
    """(what it is, text) of everything in a turn that its rendering has to show."""
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    own = [("content", content)]
    own += [("tool calls", _name_of(call)) for call in message.get("tool_calls", ())]
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if thoughts and isinstance(reasoning, str):
        own.append(("reasoning", reasoning))
    return own


def _messages(row: dict, column: str) -> tuple[list[dict], list[int]]:
    """The messages as templates take them, and the indices of the turns to learn."""
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise BadRecord(no_column(column, row) if column not in row else f"{column}: no messages")
    found, turns = [], []
    for index, message in enumerate(messages):
        message, is_learned = _message(message, f"{column}[{index}]")
        found.append(message)
        if is_learned:
            turns.append(index)
    if not turns:
        some = any(map(_is_assistant, found))
        raise BadRecord(f"{column}: no assistant message" + (" that is trained" if some else ""))
    return found, turns


def _message(message: Any, name: str) -> tuple[dict, bool]:
    """(a message as templates take it, whether it is learned)"""
    fields = message if isinstance(message, dict) else {}
    fields = {key: value for key, value in fields.items() if value is not None}
    train, weight = fields.pop("train", True), fields.pop("weight", 1)
    if not isinstance(fields.get("role"), str) or not ("content" in fields or _calls(fields)):
        raise BadRecord(f"{name}: no message with role and content")
    if not isinstance(train, bool):
        raise BadRecord(f"{name}: train {train!r}; accepted: true, false")
    if weight not in (0, 1):
        raise BadRecord(f"{name}: weight {weight!r}; accepted: 0, 1")
    if isinstance(fields.get("content"), list):
        fields["content"] = "".join(_part(part, name) for part in fields["content"])
    is_assistant = _is_assistant(fields)
    if is_assistant and not isinstance(fields.get("content", ""), str):
        raise BadRecord(
            f"{name}: content holds a {type(fields['content']).__name__}; accepted: text"
        )
    if calls := fields.pop("tool_calls", None):
        fields["tool_calls"] = _parsed_calls(calls, name)
    return fields, is_assistant and train and weight == 1


def _calls(fields: dict) -> bool:
    return fields["role"] == "assistant" and bool(fields.get("tool_calls"))


def _part(part: Any, name: str) -> str:
    """The text of a part of a content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise BadRecord(f"{name}: content with a part of type {kind!r}; accepted: text")
    return text


def _parsed_calls(calls: Any, name: str) -> list[dict]:
    """Tool calls with their arguments as objects: templates write them as JSON themselves."""
    calls = _from_json(calls)
    if not isinstance(calls, list):
        raise BadRecord(f"{name}: tool_calls holds a {type(calls).__name__}; accepted: a list")
    found = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f"{name}.tool_calls[{index}]: no function with a name")
        arguments = _from_json(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            raise BadRecord(f"{name}.tool_calls[{index}]: its arguments are no JSON object")
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _tools(tools: Any, column: str) -> list[dict] | None:
    """The tools of a row: a list of JSON schemas, or the JSON text of one."""
    tools = _from_json(tools or None)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(_name_of(tool), str) for tool in tools):
        raise BadRecord(f"{column}: no list of functions with names")
    return tools


def _name_of(tool: Any) -> Any:
    """The name of a tool, or of the one that is called."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _from_json(value: Any) -> Any:
    """What a JSON text holds; everything else, and what is no JSON, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def no_column(column: str, row: dict) -> str:
    """The reason of a row without a column."""
    return f"no column {column!r}; there are {', '.join(map(str, row)) or 'none'}"
