"""Conversations as a chat template renders them, and which of their text is learned.

Learned are assistant turns: from the end of the generation prompt to the end of the turn, or what
the template itself marks by `{% generation %}`. Where a template renders earlier turns otherwise
than it rendered them as last ones (it drops their thoughts, say), each turn is an example of its
own: the conversation up to it, as the model meets it when it answers.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trainer.config.data_options import SourceOptions
from trainer.data.forms import accepted, as_parts
from trainer.data.messages import Conversation, is_assistant, name_of
from trainer.data.shown import REASONING, content_of, hidden, missing, reasoning_of
from trainer.data.templates import Span, added_tokens, limited, render, template_of
from trainer.errors import BadRecord

Segments = list[tuple[str, bool]]

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE, _ANSWER = "Xq7", "Zk8"
_FEW = 3  # turns that are rendered one by one


def chats(chat: Conversation, options: SourceOptions, tokenizer: Any) -> list[Segments]:
    """The examples of a conversation, as segments. Raises BadRecord."""
    template = template_of(tokenizer, options, chat.tools)
    with limited():
        return _examples(chat, template, options, tokenizer)


def _examples(
    said: Conversation, template: str, options: SourceOptions, tokenizer: Any
) -> list[Segments]:
    messages, turns = said.messages, said.turns
    if options.turns == "last":
        turns = turns[-1:]
    messages = accepted(messages[: turns[-1] + 1], said.tools, template, tokenizer)
    marked = options.turns != "all" and _MARK.search(template) is not None
    chat = Chat(messages, said.tools, tokenizer, template, marked, said.names)
    together = chat.together(turns)
    examples = [together] if together is not None else [chat.alone(turn) for turn in turns]
    ends = turns[-1:] if together is not None else turns
    for turn, (text, _) in zip(ends, examples, strict=True):
        chat.check_history(turn + 1, text)
    chat.check_tools(turns[-1] + 1, options.tools)
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
    names: list[str]
    """Of the messages, in what is said of them."""
    _rendered: dict[tuple[int, bool], tuple[str, list[Span]]] = field(default_factory=dict)
    _headers: dict[bool, str] = field(default_factory=dict)

    def together(self, turns: list[int]) -> tuple[str, list[Span]] | None:
        """The conversation up to the last of `turns`, and the spans of all of them; None where it
        renders one of them otherwise than as the last turn."""
        text, marks = self._render(turns[-1] + 1)
        if self.marked:
            assistants = [i for i in range(turns[-1] + 1) if is_assistant(self.messages[i])]
            if len(marks) != len(assistants):
                return None
            of_turn = dict(zip(assistants, marks, strict=True))
            marked = [(turn, of_turn[turn]) for turn in turns]
            if any(missing(self.messages[turn], *_parted(text, [span])) for turn, span in marked):
                return None
            return text, self._ended(turns[-1], [span for _, span in marked], marks[-1])
        text = self._closed(turns[-1])
        if len(turns) > _FEW:
            found = self._by_first_turn(turns, text)
            if found is not None:
                return text, found
        spans: list[Span] = []
        for turn in turns:
            closed, start = self._closed(turn), self._start(turn)
            if not text.startswith(closed) or (spans and start < spans[-1][1]):
                return None
            spans.append((start, len(closed)))
            self._check(turn, text, spans[-1:])
        return text, spans

    def _by_first_turn(self, turns: list[int], text: str) -> list[Span] | None:
        """The spans of many turns without a rendering for each: every assistant turn has to look as
        the first one, with its own content, and the generation prompt must occur nowhere else. None
        where that does not hold."""
        assistants = [i for i in range(turns[-1] + 1) if is_assistant(self.messages[i])]
        if assistants[0] == 0 or any(map(self._is_more, assistants)):
            return None
        contents = [content_of(self.messages[i]) for i in assistants]
        before, closed = self._render(assistants[0])[0], self._closed(assistants[0])
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
            spans[-1:] = self._ended(turn, spans[-1:], spans[-1] if spans else (0, 0))
        else:
            text = self._closed(turn)
            spans = [(self._start(turn), len(text))]
        self._check(turn, text, spans)
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
            before, shared = self._kept(turn), _shared(opened, closed)
            if shared < before:
                raise BadRecord(
                    f"{self.names[turn]}: the chat template rewrites earlier turns when this "
                    "one is added: learned tokens are ambiguous"
                )
        probed = self._probed(turn).find(_PROBE, before)  # own text may look like a header
        if not turn and probed < 0:
            raise BadRecord(f"{self.names[0]}: the chat template does not show where it begins")
        return shared if probed < 0 else min(probed, shared)

    def _probed(self, turn: int) -> str:
        """The rendering that a turn would end if all that it says were the probe."""
        message = {key: value for key, value in self.messages[turn].items() if key != "tool_calls"}
        in_parts = isinstance(message.get("content"), list)
        message |= {"content": _PROBE} | {key: _PROBE for key in REASONING if key in message}
        other = [*self.messages[:turn], as_parts(message) if in_parts else message]
        return render(self.tokenizer, self.template, other, self.tools, False)[0]

    def _closed(self, turn: int) -> str:
        """The rendering that a turn ends, with the token that ends it, and without the generation
        prompt that templates add which do not heed whether it is asked for."""
        (text, _), start, kept = self._render(turn + 1), self._start(turn), self._kept(turn + 1)
        again = text[kept:].strip()
        before = [text[:start]]
        if turn and again != self.tokenizer.eos_token:  # which may end whatever is rendered
            before.append(self._render(turn)[0])
        if not again or not any(part.rstrip().endswith(again) for part in before):
            return text + self._next_header(turn, text)
        # What is kept may hold the beginning of the prompt: that of all headers.
        content = str(content_of(self.messages[turn])).strip()
        at = text.rfind(content, start, kept) + len(content)
        found = _first(text[at:kept], added_tokens(self.tokenizer))
        if at < start + len(content) or found is None or self.messages[turn].get("tool_calls"):
            raise BadRecord(
                f"{self.names[turn]}: the chat template adds a generation prompt that is not "
                "asked for, and no special token shows where the turn ends; accepted: a template "
                "that heeds add_generation_prompt"
            )
        end = at + found
        spaces = len(text[end:kept]) - len(text[end:kept].lstrip())
        return text[: end + spaces]

    def _next_header(self, turn: int, closed: str) -> str:
        """Where a turn ends in no special token, but the next one begins with one, that: it is what
        generation stops at."""
        ends = tuple(token for token, special in added_tokens(self.tokenizer).items() if special)
        content = str(content_of(self.messages[turn])).rstrip()
        if closed.rstrip().endswith(ends) and not content.endswith(ends):
            return ""
        calls = bool(self.messages[turn].get("tool_calls"))
        if calls not in self._headers:
            self._headers[calls] = self._followed(turn, calls, ends)
        return self._headers[calls]

    def _followed(self, turn: int, calls: bool, ends: tuple[str, ...]) -> str:
        """The token of `ends` that a turn is followed by, and it does not end in one itself."""
        said = {"role": "assistant", "content": _PROBE}
        said = {**self.messages[turn], **said} if calls else said
        answer = {"role": "tool" if calls else "user", "content": _ANSWER}
        messages = [*self.messages[:turn], said, answer]
        if any(isinstance(message.get("content"), list) for message in messages):
            messages = list(map(as_parts, messages))
        try:
            closed, text = (
                render(self.tokenizer, self.template, messages[:end], self.tools, False)[0]
                for end in (turn + 1, turn + 2)
            )
        except BadRecord:  # a template of one turn
            return ""
        if closed.rstrip().endswith(ends) or not text.startswith(closed):
            return ""
        found = _leading(text[len(closed) :], ends)
        return "" if found in (None, self.tokenizer.bos_token) else found

    @functools.cached_property
    def _heeds_prompt(self) -> bool:
        """Whether the generation prompt is added where it is asked for only."""
        end = max(1, next(i for i, message in enumerate(self.messages) if is_assistant(message)))
        try:
            return self._render(end)[0] != self._render(end, True)[0]
        except BadRecord:
            return True

    @functools.cached_property
    def _again(self) -> str:
        """What renderings end in without being asked: a generation prompt, but for what all headers
        begin with. It is what gives way when the user answers."""
        if self._heeds_prompt:
            return ""
        turn = next(i for i, message in enumerate(self.messages) if is_assistant(message))
        said = [{"role": "assistant", "content": _PROBE}, {"role": "user", "content": _ANSWER}]
        if any(isinstance(message.get("content"), list) for message in self.messages):
            said = list(map(as_parts, said))
        tails = []
        for some in (said[:1], said):
            messages = [*self.messages[:turn], *some]
            try:
                text = render(self.tokenizer, self.template, messages, self.tools, False)[0]
            except BadRecord:  # a template of one turn
                return ""
            tails.append(text.rpartition(_PROBE)[2])
        return tails[0][_shared(*tails) :]

    def _kept(self, end: int) -> int:
        """Length of the rendering of `end` messages up to a prompt that was not asked for."""
        text, _ = self._render(end)
        return len(text) - len(self._again) if text.endswith(self._again) else len(text)

    def _ended(self, turn: int, spans: list[Span], last: Span) -> list[Span]:
        """Marked turns with the end token that the marks leave out: the added token, if any, that
        directly follows the `last` one, of `turn`, unless marks end in a special one."""
        text, _ = self._render(turn + 1)
        tokens = added_tokens(self.tokenizer)
        special = tuple(token for token, is_special in tokens.items() if is_special)
        end = _leading(text[last[1] : self._kept(turn + 1)], tokens)
        if end is None or _cut(text, last).rstrip().endswith(special):
            return spans
        ended = []
        for start, stop in spans:
            skipped = len(text[stop:]) - len(text[stop:].lstrip())
            is_followed = text.startswith(end, stop + skipped)
            ended.append((start, stop + skipped + len(end) if is_followed else stop))
        return ended

    def _is_more(self, turn: int) -> bool:
        """Whether a turn says something beside its content."""
        message = self.messages[turn]
        return bool(message.get("tool_calls") or reasoning_of(message))

    def _check(self, turn: int, text: str, spans: list[Span]) -> None:
        what = missing(self.messages[turn], *_parted(text, spans))
        if what is not None:
            raise BadRecord(f"{self.names[turn]}: the chat template leaves out its {what}")

    def check_history(self, end: int, text: str) -> None:
        """`text`: the rendering of the first `end` messages. Raises BadRecord."""
        for index, surely in hidden(self.messages[:end], text):
            if surely or not self._shows_probe(index, end):
                raise BadRecord(f"{self.names[index]}: the chat template leaves out its content")

    def _shows_probe(self, index: int, end: int) -> bool:
        """Whether another content of a message would be seen in a rendering."""
        content: Any = _PROBE
        if isinstance(self.messages[index].get("content"), list):
            content = [{"type": "text", "text": _PROBE}]
        messages = self.messages[:end]
        messages[index] = {**messages[index], "content": content}
        try:
            shown = render(self.tokenizer, self.template, messages, self.tools, False)[0]
        except BadRecord:
            return False
        return shown.count(_PROBE) > self._render(end)[0].count(_PROBE)

    def check_tools(self, end: int, column: str) -> None:
        """Every tool has to be named more often than without tools. Raises BadRecord."""
        if not self.tools:
            return
        text, _ = self._render(end)
        try:
            bare, _ = render(self.tokenizer, self.template, self.messages[:end], None, False)
        except BadRecord:  # a template for tools only
            bare = ""
        for name in map(name_of, self.tools):
            if text.count(name) <= bare.count(name):
                raise BadRecord(f"{column}: the chat template leaves out the tool {name!r}")

    def _render(self, end: int, prompt: bool = False) -> tuple[str, list[Span]]:
        """(text of the first `end` messages, with a generation prompt if `prompt`; marked spans)"""
        if (end, prompt) not in self._rendered:
            self._rendered[end, prompt] = render(
                self.tokenizer, self.template, self.messages[:end], self.tools, prompt, self.marked
            )
        return self._rendered[end, prompt]


def _leading(text: str, tokens: Iterable[str]) -> str | None:
    """The longest of `tokens` that a text begins with, after spaces."""
    text = text.lstrip()
    return max((t for t in tokens if text.startswith(t)), key=len, default=None)


def _first(text: str, tokens: Iterable[str]) -> int | None:
    """Where the first of `tokens` in a text ends."""
    found = [(text.find(token), -len(token)) for token in tokens if token in text]
    return min(found)[0] - min(found)[1] if found else None


def _segments(text: str, spans: list[Span]) -> Iterator[tuple[str, bool]]:
    done = 0
    for start, end in spans:
        yield text[done:start], False
        yield text[start:end], True
        done = end
    yield text[done:], False


def _parted(text: str, spans: list[Span]) -> tuple[str, str]:
    """(what is learned, what stands before it)"""
    before = text[: spans[0][0]] if spans else text
    return "".join(_cut(text, span) for span in spans), before


def _cut(text: str, span: Span) -> str:
    return text[span[0] : span[1]]


def _shared(first: str, second: str) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
