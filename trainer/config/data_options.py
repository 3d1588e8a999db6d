"""The `data` section of the configuration: records, tokenisation and batches."""

import itertools
import keyword
import re
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from adapters.options import PATH, Section

LEFT_OUT = "left_out"
"""`data.eval`: evaluate on the held-out training records."""


SourceNames = str | list[str]
"""What `data.train` and `data.eval` name."""
_OF_RENDERING = ("messages", "tools", "documents", "add_generation_prompt")
_CONSTANTS = ("true", "false", "none")
"""Of Jinja, which otherwise has Python's keywords."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Of a set that is evaluated on: a part of its scores' names."""


class SourceOptions(Section):
    """A source of training records: which they are, how they are read and converted."""

    train: SourceNames | None = None
    """Training data: a file (.json, .jsonl, .csv, .tsv, .parquet, .txt, each also with .gz or
    .zst), a glob, a folder of files of one kind, a folder that `datasets.save_to_disk` wrote, a
    folder of images in subfolders named after their classes, or a hub id; or a list of those, read
    one after the other."""
    train_split: str = "train"
    """Split to train on, of a hub data set, a saved DatasetDict, or a folder of files named after
    splits."""
    train_records: int | None = Field(None, gt=0)
    """Use only this many training records, the first ones."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Commit or tag of a hub data set."""
    format: Literal[
        "auto", "prompt_completion", "alpaca", "messages", "text", "classification",
        "multiple_choice", "commonsense", "question_answering",
        "images",
    ] = "auto"  # fmt: skip
    """Format of the records; auto: inferred from the columns."""
    prompt: str = "prompt"
    """Column, or template such as `"{question}\\n"`, of the prompt."""
    completion: str = "completion"
    """Column, or template, of the completion."""
    text: str | list[str] = "text"
    """Text column of format `text`; one or two text columns of `classification`."""
    messages: str = "messages"
    """Column of format `messages`: a list of {role, content}, or of ShareGPT's {from, value};
    where there is no such column, `conversations`. Assistant turns are learned, except those with
    `train: false` or `weight: 0`."""
    message_fields: dict[str, str] | None = None
    """Fields of messages that have other names in the data, such as `{role: speaker, content:
    text}`."""
    roles: dict[str, list[str]] | None = None
    """Roles that have other names in the data, such as `{assistant: [bot], user: [customer]}`.
    Those of ShareGPT (human, gpt, …) are known."""
    as_chat: bool = False
    """Put records of formats `prompt_completion` and `alpaca` through the chat template, as turns
    of user and assistant."""
    system: str | None = None
    """System message of conversations that have none, as a message or in a column `system`. In
    format `alpaca` it replaces the first sentences."""
    chat_template: str | None = Field(None, pattern=PATH)
    """Chat template in place of the tokenizer's: one of its names where it has several, alpaca,
    chatml, gemma, llama-3, mistral, phi-3, or a file of Jinja text. Saved with the tokenizer in
    exports."""
    template_arguments: dict[str, JsonValue] | None = None
    """Variables for the chat template, such as `{enable_thinking: false}`. Saved in the template as
    their defaults."""
    tools: str = "tools"
    """Column of the tools that the chat template is given: a list of JSON schemas, or its text."""
    turns: Literal["auto", "all", "last"] = "auto"
    """Assistant turns that are learned. auto: those that the chat template marks by
    `{% generation %}` (and the end token right after the mark), else all; all: whatever it marks;
    last: the last one. Where the template rewrites earlier turns, each turn is an example with the
    conversation up to it."""
    add_bos: Literal["auto"] | bool = "auto"
    """Put the begin token before a text; auto: where the tokenizer does. Chats: as the template."""
    add_eos: Literal["auto"] | bool = "auto"
    """Put the end token after a text, and learn it; auto: where there is one. Never doubled. Chats:
    as the template."""
    image: str = "image"
    """Column of format `images`: {bytes, path} as `datasets` keeps images, bytes, or a path."""
    label: str = "label"
    """Label column of formats `classification`, `images` and `multiple_choice` (one of
    `choice_labels`, or the text of a choice)."""
    choices: str | list[str] = "choices"
    """Choices of format `multiple_choice`: a column with a list of texts, or with `text` and
    `label` lists; or a list of columns or templates, one for each choice."""
    choice_texts: list[str] | None = None
    """Choices that are the same for every record, in place of `choices`, such as `["no", "yes"]`;
    in format `commonsense` in place of its answers' texts."""
    blank: str | None = Field(None, min_length=1)
    """Mark in the prompt that the choices fill in, such as `_` (WinoGrande): what follows it is
    scored, given the sentence up to it with the choice."""
    choice_labels: list[str] | None = None
    """Labels of the choices, in order; none: those that come with them, else 0, 1, …"""
    answers: Literal["texts", "names"] = "texts"
    """Choices of format `commonsense` (the json files of LLM-Adapters): the texts of the answers
    ("a bacterial population"), or the sentence that names one ("the correct answer is answer2")."""
    columns: list[str] | None = None
    """Column names of csv and tsv files without a header line."""
    quoting: Literal["standard", "none"] = "standard"
    """Whether quotation marks delimit fields in csv and tsv files."""

    @model_validator(mode="after")
    def _check_source(self) -> "SourceOptions":
        if isinstance(self.text, list) and len(self.text) not in (1, 2):
            raise ValueError(f"data.text: {self.text} given; accepted: one or two columns")
        if self.as_chat and self.format not in ("auto", "prompt_completion", "alpaca", "messages"):
            raise ValueError(
                f"data.as_chat: true given with data.format={self.format}; accepted: false"
            )
        for key in ("choices", "choice_texts", "choice_labels"):
            given = getattr(self, key)
            if isinstance(given, list) and (len(given) < 2 or len(set(given)) < len(given)):
                raise ValueError(f"data.{key}: {given} given; accepted: two or more, all different")
        if self.choice_texts is not None and self.choices != "choices":
            raise ValueError(
                f"data.choice_texts: given together with data.choices ({self.choices}); accepted: "
                "one of them"
            )
        if self.answers == "names" and (self.blank or self.choice_texts):
            key = "blank" if self.blank else "choice_texts"
            raise ValueError(f"data.{key}: given with data.answers=names; accepted: null")
        for name in self.template_arguments or {}:
            is_free = name not in (*_OF_RENDERING, *_CONSTANTS) and not name.endswith("_token")
            if not name.isidentifier() or keyword.iskeyword(name) or not is_free:
                raise ValueError(
                    f"data.template_arguments: {name} given; accepted: names of variables that a "
                    "rendering does not set itself"
                )
        names = [name for names in (self.roles or {}).values() for name in names]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"data.roles: {name} given for two roles; accepted: one of them")
        return self


class MixtureSource(SourceOptions):
    """One of the sources of `data.mixture`."""

    weight: float = Field(gt=0)
    """Its records among all that are trained on, relative to the other weights."""


class DataOptions(SourceOptions):
    """Records, tokenisation and batches."""

    mixture: list[MixtureSource] | None = Field(None, min_length=1)
    """Several sources by weight, in place of `train`. Each entry has `train` and `weight`, and
    the keys above in which it differs; see [data.md](data.md#sources-and-mixtures)."""
    mixture_until: Literal["first", "last"] = "first"
    """When an epoch of a mixture ends: the first source is used up, or the last, while the others
    repeat."""
    eval: SourceNames | int | float | dict[str, SourceNames] | None = None
    """Evaluation data: a source as for `train`, or several, by name (`{arc: FILE, boolq: FILE}`),
    each evaluated by itself; a share (0.05) or a number of the training records, drawn by the seed
    and never trained on; or `left_out`, the training records held out by `leave_out`; none: no
    evaluation."""
    eval_split: str = "test"
    """Split to evaluate on, likewise."""
    max_length: int = Field(1024, gt=1)
    """Maximum sequence length in tokens."""
    on_long_record: Literal["truncate", "split", "drop", "stop"] = "truncate"
    """Handling of longer records: cut them (`truncate` says where), cut plain text into pieces of
    max_length, leave them out and count them, or end the run. Of a longer record that is no plain
    text, `split` ends the run."""
    truncate: Literal["end", "prompt"] = "end"
    """What a longer record loses. end: its last tokens; a record whose prompt alone is too long is
    a bad record. prompt: the first tokens of its prompt, that is of what precedes the first learned
    token, but for the begin token; and its end only if that is not enough."""
    overlap: int = Field(0, ge=0)
    """With `on_long_record: split`: tokens of a piece that the next one begins with, as context;
    they are not learned again."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """Handling of invalid records: stop with file, line and reason, or skip and count them."""
    eval_records: int | None = Field(None, gt=0)
    """Use only this many evaluation records, the first ones."""
    packing: bool = False
    """Pack several records into a sequence, by best fit and without attention between them. Refused
    for models with layers that carry state along it (recurrent, convolutional, linear
    attention)."""
    padding_free: Literal["auto"] | bool = "auto"
    """Lay the sequences of a micro-batch end to end in one row, without attention between them,
    instead of padding them to one length. auto: where attention runs by document (on a GPU, see
    `model.attention`) and the model allows packing; elsewhere a mask over a long row would cost
    more than padding."""
    row_lengths: Literal["auto"] | int = "auto"
    """Number of different row lengths, to which rows are padded so that compiled programs and
    attention plans are reused; chosen by the data, and fewer where that adds less than half a
    percent of tokens. 0: rows as long as they come. auto: 8 on a GPU, but 0 on a CPU and for rows
    of one record that `padding_free` cannot lay end to end."""
    shuffle: bool = True
    """Shuffle each epoch with a generator seeded by (seed, epoch)."""
    batch_size: int = Field(16, gt=0)
    """Sequences per optimizer step, summed over all ranks."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Sequences per forward pass of a rank; gradients are accumulated up to `batch_size`. 4 if
    neither this nor `micro_batch_tokens` is given. Evaluations of small models on a GPU take
    several micro-batches at once."""
    micro_batch_tokens: int | None = Field(None, gt=0)
    """Tokens per forward pass of a rank, at most, in place of `micro_batch_size`: the sequences of
    a step are spread evenly over as few micro-batches as hold them. Where rows are padded, padding
    counts."""
    micro_batches_multiple_of: int | None = Field(None, gt=0)
    """With `micro_batch_tokens`: round the number of micro-batches of a step up to a multiple of
    this, such as the number of ranks, so that none runs an empty one. On any number of ranks the
    same micro-batches."""
    leave_out: int = Field(0, ge=0)
    """Number of training records held out, drawn by the seed. Methods with validation hold out
    theirs anyway; set the same number for methods compared with them."""
    workers: Literal["auto"] | int = "auto"
    """Processes that tokenise. auto: this one, and, if it takes longer than some seconds, one for
    each core, at most 16. What they make does not depend on their number."""
    cache: str | None = Field(None, pattern=PATH)
    """Cache folder of tokenised data; none: `rankcast` in the user's cache folder."""

    @property
    def sources(self) -> list[tuple[SourceNames, "DataOptions"]]:
        """Each source of training records, and the options by which it is read: these, or those of
        an entry of the mixture."""
        if self.mixture is None:
            return [(self.train or [], self)]
        own = SourceOptions.model_fields
        return [
            (entry.train or [], self.model_copy(update={key: getattr(entry, key) for key in own}))
            for entry in self.mixture
        ]

    @property
    def train_name(self) -> str:
        """Key and sources of the training records, in messages."""
        key = "data.train" if self.mixture is None else "data.mixture"
        names = [[name] if isinstance(name, str) else name for name, _ in self.sources]
        return f"{key}: {', '.join(itertools.chain(*names))}"

    @property
    def eval_sources(self) -> dict[str, SourceNames]:
        """What `eval` names besides the training records, by name; that of a single one is ""."""
        if isinstance(self.eval, dict):
            return self.eval
        is_source = isinstance(self.eval, str | list) and self.eval != LEFT_OUT
        return {"": self.eval} if is_source else {}  # type: ignore[dict-item]

    @property
    def eval_names(self) -> list[str]:
        """The sets that are evaluated on; that of a single one is ""."""
        return list(self.eval) if isinstance(self.eval, dict) else [""] * (self.eval is not None)

    @property
    def eval_drawn(self) -> int | float | None:
        """The number, or share, of the training records that are drawn for evaluation."""
        return self.eval if isinstance(self.eval, int | float) else None

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, given: object) -> object:
        """Each source of a mixture has the section's keys, where it gives none of its own."""
        if not isinstance(given, dict) or not isinstance(given.get("mixture"), list):
            return given
        keys = SourceOptions.model_fields.keys() & given.keys() - {"train"}
        common = {key: given[key] for key in keys}
        mixture = [{**common, **one} if isinstance(one, dict) else one for one in given["mixture"]]
        return {**given, "mixture": mixture}

    @model_validator(mode="before")
    @classmethod
    def _micro_batches(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("micro_batch_tokens") is None:
            size = given.get("micro_batch_size")
            return {**given, "micro_batch_size": 4 if size is None else size}
        return given

    @model_validator(mode="after")
    def _check_sources(self) -> "DataOptions":
        if self.mixture is not None and self.train is not None:
            raise ValueError(
                f"data.mixture: given together with data.train ({self.train}); accepted: one of "
                "them"
            )
        if self.mixture is None and self.mixture_until != "first":
            raise ValueError(
                f"data.mixture_until: {self.mixture_until} given without data.mixture; accepted: "
                "first"
            )
        for index, (source, _) in enumerate(self.sources):
            if not source and self.mixture is None:
                raise ValueError(
                    "data.train: missing; accepted: string or a list of strings, or data.mixture"
                )
            if not source:
                raise ValueError(
                    f"data.mixture.{index}.train: missing; accepted: string or a list of strings"
                )
        drawn = self.eval_drawn
        if drawn is not None and not (drawn >= 1 if isinstance(drawn, int) else 0 < drawn < 1):
            raise ValueError(
                f"data.eval: {drawn} given; accepted: a share of the training records between 0 "
                "and 1, a number of them from 1, or a source"
            )
        if drawn is not None and self.eval_records is not None:
            raise ValueError(
                f"data.eval_records: {self.eval_records} given with data.eval={drawn}; "
                "accepted: null"
            )
        self._check_eval()
        return self

    def _check_eval(self) -> None:
        if self.eval in ([], {}):
            raise ValueError(f"data.eval: {self.eval} given; accepted: at least one source")
        for name, source in self.eval_sources.items():
            if name and not _NAME.fullmatch(name):
                raise ValueError(
                    f"data.eval: {name!r} given as a name; accepted: letters, digits, - and _"
                )
            if not source or source == LEFT_OUT:
                raise ValueError(
                    f"data.eval.{name}: {source!r} given; accepted: a source as for data.train"
                )

    @model_validator(mode="after")
    def _check(self) -> "DataOptions":
        size, tokens = self.micro_batch_size, self.micro_batch_tokens
        if size is not None and tokens is not None:
            raise ValueError(
                f"data.micro_batch_tokens: {tokens} given together with data.micro_batch_size "
                f"({size}); accepted: one of them, the other null"
            )
        if tokens is not None and tokens < self.max_length:
            raise ValueError(
                f"data.micro_batch_tokens: {tokens} given; accepted: at least data.max_length "
                f"({self.max_length})"
            )
        if tokens is None and self.micro_batches_multiple_of is not None:
            raise ValueError(
                f"data.micro_batches_multiple_of: {self.micro_batches_multiple_of} given without "
                "data.micro_batch_tokens; accepted: null"
            )
        self._check_length()
        if self.row_lengths != "auto" and self.row_lengths < 0:
            raise ValueError(
                f"data.row_lengths: {self.row_lengths} given; accepted: auto, or at least 0"
            )
        if self.workers != "auto" and self.workers < 1:
            raise ValueError(f"data.workers: {self.workers} given; accepted: auto, or at least 1")
        if size is not None and size > self.batch_size:
            raise ValueError(
                f"data.micro_batch_size: {self.micro_batch_size} given; accepted: at most "
                f"data.batch_size ({self.batch_size})"
            )
        if self.eval == LEFT_OUT and not self.leave_out:
            raise ValueError(
                "data.leave_out: 0 given with data.eval=left_out; accepted: the number of training "
                "records to evaluate on"
            )
        return self

    def _check_length(self) -> None:
        how = self.on_long_record
        if how == "split" and self.format not in ("auto", "text"):
            raise ValueError(
                f"data.on_long_record: split given with data.format={self.format}; accepted: plain "
                "text, or truncate, drop, stop"
            )
        if self.overlap and how != "split":
            raise ValueError(
                f"data.overlap: {self.overlap} given with data.on_long_record={how}; accepted: 0, "
                "or data.on_long_record=split"
            )
        if self.overlap >= self.max_length:
            raise ValueError(
                f"data.overlap: {self.overlap} given; accepted: less than data.max_length "
                f"({self.max_length})"
            )
        if self.truncate == "prompt" and how != "truncate":
            raise ValueError(
                f"data.truncate: prompt given with data.on_long_record={how}; accepted: end, or "
                "data.on_long_record=truncate"
            )
