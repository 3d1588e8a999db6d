"""The sections of the configuration: every key with its type, default and meaning.

`method` and `task` are defined by their implementations (`adapters/methods`,
`trainer/tasks/options.py`).
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from adapters.formats.names import FORMAT_NAMES
from adapters.options import Section
from trainer.config.engines import ENGINES, engines_with, takes
from trainer.config.validation import one_of

_PATH = r"^[^\x00]*$"  # file systems raise on NUL


class RunOptions(Section):
    """Name, folder, length and evaluation of a run."""

    name: str = Field("", pattern=r"^(\.?[A-Za-z0-9_-][A-Za-z0-9._-]*)?$", max_length=200)
    """Name of the run folder; empty: the name of the configuration file."""
    dir: str = Field("runs", pattern=_PATH)
    """Parent of the run folders."""
    seed: int = Field(0, ge=0, lt=2**20)
    """Seed of the initial adapters, the order of the data and dropout."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps; excludes `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; 1 if neither is given."""
    eval_every: int = Field(0, ge=0)
    """Steps between two evaluations; 0: only after the last step."""
    eval_at_start: bool = False
    """Also evaluate before the first step."""
    max_hours: float | None = Field(None, gt=0)
    """Hours after which the run saves and stops with exit code 75; the next start resumes it."""
    slurm_margin: float = Field(120.0, ge=0)
    """In a SLURM job: seconds before its time limit (SLURM_JOB_END_TIME) at which the run saves and
    stops likewise; must suffice for a step and a checkpoint."""
    resume: str = "auto"
    """`auto` (the newest intact checkpoint of this run, if any), `never`, or the path of a
    checkpoint."""
    verify: Literal["auto", "off", "full"] = "auto"
    """Proof before the first step, in seconds, that the loaded, quantised, sharded model computes
    what the unmodified one computes on the run's own records, and after the first steps that every
    adapter trains. `auto`: on two records of at most 64 tokens, for every new run, and for a
    resumed one unless it was proved with the same versions, engine and ranks; `full`: on records of
    full length, for every run."""

    @field_validator("verify", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads `off` as false


class ModelOptions(Section):
    """The frozen backbone."""

    id: str
    """Local folder or hub id (`owner/name`)."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, if it is not the model's."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of activations and unquantised weights; auto: bfloat16 on a GPU, float32 on a CPU
    (most CPUs emulate bfloat16 matrix products, several times slower)."""
    quantization: str = "none"
    """Format of the frozen linear weights: none, nf4, fp4, int8 or fp8."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "varlen"] = "auto"
    """Attention kernel. varlen: packed rows by document, without a mask, on a GPU in 16 bits. auto:
    varlen where rows are packed and it can serve, else
    transformers' default for the architecture; the choice is printed. flash_attention_2 requires
    the `flash-attn` extra and a GPU."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` initialises from config.json without weight files, for benchmarks and tests."""
    overrides: dict[str, int | float | str | bool] = {}
    """Keys of the model's config.json to replace, such as num_hidden_layers."""

    @model_validator(mode="after")
    def _check(self) -> "ModelOptions":
        one_of("model.quantization", self.quantization, FORMAT_NAMES)
        if self.overrides and self.weights == "pretrained":
            raise ValueError(
                "model.overrides: given with model.weights=pretrained; accepted: only with "
                "model.weights=random, since the files' tensors would no longer fit"
            )
        return self


LEFT_OUT = "left_out"
"""`data.eval`: evaluate on the held-out training records."""


class DataOptions(Section):
    """Records, tokenisation and batches."""

    train: str
    """Training data: a file (.json, .jsonl, .csv, .tsv, .parquet, .txt) or a hub id."""
    eval: str | None = None
    """Evaluation data: a file or hub id as for `train`, or `left_out`, the training records held
    out by `leave_out`; none: no evaluation."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Commit or tag of a hub data set."""
    train_split: str = "train"
    """Split of a hub data set to train on."""
    eval_split: str = "test"
    """Split of a hub data set to evaluate on."""
    format: Literal["auto", "prompt_completion", "alpaca", "messages", "text", "classification"] = (
        "auto"
    )
    """Format of the records; auto: inferred from the columns."""
    prompt: str = "prompt"
    """Column, or template such as `"{question}\\n"`, of the prompt."""
    completion: str = "completion"
    """Column, or template, of the completion."""
    text: str | list[str] = "text"
    """Text column of format `text`; one or two text columns of `classification`."""
    messages: str = "messages"
    """Column of format `messages`: a list of {role, content}. Assistant turns are learned, except
    those with `train: false` or `weight: 0`."""
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
    label: str = "label"
    """Label column of format `classification`."""
    columns: list[str] | None = None
    """Column names of csv and tsv files without a header line."""
    quoting: Literal["standard", "none"] = "standard"
    """Whether quotation marks delimit fields in csv and tsv files."""
    max_length: int = Field(1024, gt=1)
    """Maximum sequence length in tokens."""
    on_long_record: Literal["truncate", "drop", "stop"] = "truncate"
    """Handling of longer records. A record whose prompt alone is too long is a bad record."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """Handling of invalid records: stop with file, line and reason, or skip and count them."""
    train_records: int | None = Field(None, gt=0)
    """Use only this many training records, the first ones."""
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
    attention plans are reused; chosen by the data. 0: rows as long as they come. auto: 8 on a GPU,
    but 0 on a CPU and for rows of one record that `padding_free` cannot lay end to end."""
    shuffle: bool = True
    """Shuffle each epoch with a generator seeded by (seed, epoch)."""
    batch_size: int = Field(16, gt=0)
    """Sequences per optimizer step, summed over all ranks."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Sequences per forward pass of a rank; gradients are accumulated up to `batch_size`. 4 if
    neither this nor `micro_batch_tokens` is given."""
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
    cache: str | None = Field(None, pattern=_PATH)
    """Cache folder of tokenised data; none: `rankcast` in the user's cache folder."""

    @model_validator(mode="before")
    @classmethod
    def _micro_batches(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("micro_batch_tokens") is None:
            size = given.get("micro_batch_size")
            return {**given, "micro_batch_size": 4 if size is None else size}
        return given

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
        if self.row_lengths != "auto" and self.row_lengths < 0:
            raise ValueError(
                f"data.row_lengths: {self.row_lengths} given; accepted: auto, or at least 0"
            )
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
        if isinstance(self.text, list) and len(self.text) not in (1, 2):
            raise ValueError(f"data.text: {self.text} given; accepted: one or two columns")
        return self


class OptimOptions(Section):
    """Optimizer (AdamW) and learning-rate schedule."""

    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)
    """β₁, β₂ of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """ε of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay λ."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate to 0 after the warm-up (`constant`: none)."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up; excludes `warmup_ratio`."""
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    """Warm-up as a fraction of all steps."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Maximum global norm to which gradients are clipped; null: no clipping."""
    shard_state: bool = False
    """Shard the moments of AdamW over the ranks: each updates its shard of the trained values,
    which are then all-gathered. Saves memory; values are identical to the last bit. No effect on
    one process."""
    max_skipped_steps: int = Field(5, gt=0)
    """Abort after this many consecutive steps with a non-finite loss or gradient (or after all
    steps of a shorter run)."""

    @model_validator(mode="after")
    def _check(self) -> "OptimOptions":
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: {self.betas} given; accepted: each in [0, 1)")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError(
                "optim.warmup_ratio: given together with optim.warmup_steps; accepted: one of them"
            )
        return self


class EngineOptions(Section):
    """Distribution over processes, and memory."""

    kind: str = "auto"
    """An engine (single, ddp, peer, fsdp2, deepspeed), or auto: deepspeed under the deepspeed
    launcher or with `config`; single on one process; under torchrun ddp if a replica of the
    backbone fits on every GPU with room to train, peer if it fits sharded over the GPUs of a host
    with peer access, else fsdp2. The choice and its reason are printed."""
    config: str | None = None
    """Path of a DeepSpeed JSON; its `auto` values are filled in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in backward instead of saving them: in every block (true), in none
    (false), or in as few as `memory_fraction` allows, measured before the first step (auto; none on
    a CPU)."""
    memory_fraction: float = Field(0.92, gt=0, le=1)
    """Fraction of a GPU's memory that `activation_checkpointing: auto` plans to use."""
    activation_offload: float = Field(0.0, ge=0)
    """GiB of pinned host memory per rank to which `activation_checkpointing: auto` may offload
    activations that do not fit on the GPU, as many as are copied while other blocks compute."""
    unsharded_blocks: Literal["auto"] | int = "auto"
    """fsdp2, peer: number of transformer blocks whose weights stay unsharded on every rank instead
    of being all-gathered in each pass. auto: as many as fit into `memory_fraction` after
    `activation_checkpointing: auto` has planned; none without it, or on a CPU."""
    copy_engines: Literal["auto"] | bool = "auto"
    """fsdp2: NCCL all-gathers blocks with the GPUs' copy engines, which leaves the SMs to the
    GEMMs. auto: with NCCL 2.28, on one host whose GPUs have peer access."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the transformer blocks; all of them share one program. auto: on a GPU, unless the
    engine is deepspeed and the blocks have parameters that a compiled program would keep unsharded
    (a trained router, large matrices outside linear layers)."""
    timeout: float = Field(600.0, gt=0, lt=2**31)
    """Seconds after which a collective fails if a rank has not joined it."""

    @model_validator(mode="after")
    def _check(self) -> "EngineOptions":
        one_of("engine.kind", self.kind, ("auto", *ENGINES))
        if self.config is not None and not self._takes("config", auto=True):
            raise ValueError(
                f"engine.config: given with engine.kind={self.kind}; accepted: with "
                f"{engines_with('config')} only"
            )
        if self.activation_offload and self.activation_checkpointing != "auto":
            raise ValueError(
                f"engine.activation_offload: {self.activation_offload} given with "
                f"engine.activation_checkpointing={self.activation_checkpointing}; accepted: 0, or "
                "activation_checkpointing=auto"
            )
        if self.copy_engines is True and not self._takes("copy_engines"):
            raise ValueError(
                f"engine.copy_engines: true given with engine.kind={self.kind}; accepted: auto "
                f"or false, or engine.kind={engines_with('copy_engines')}"
            )
        if self.unsharded_blocks != "auto" and self.unsharded_blocks < 0:
            raise ValueError(
                f"engine.unsharded_blocks: {self.unsharded_blocks} given; accepted: auto, or at "
                "least 0"
            )
        if self.unsharded_blocks not in ("auto", 0) and not self._takes("unsharded_blocks"):
            raise ValueError(
                f"engine.unsharded_blocks: {self.unsharded_blocks} given with "
                f"engine.kind={self.kind}; accepted: auto or 0, or "
                f"engine.kind={engines_with('unsharded_blocks')}"
            )
        return self

    def _takes(self, option: str, *, auto: bool = False) -> bool:
        """Whether the engine supports this key; `auto`: the result for `kind: auto`."""
        return auto if self.kind == "auto" else takes(self.kind, option)


class LogOptions(Section):
    """Records of a run and progress output."""

    every: int = Field(10, gt=0)
    """Steps between two log lines."""
    tensorboard: bool = True
    """Write TensorBoard event files to the run folder, at most 10,000 points per curve."""
    decisions_mib: float = Field(64.0, gt=0)
    """Size in MiB at which allocation.jsonl is rotated and compressed; the newest 32 rotated parts
    are kept. A run without its first parts can be drawn, but not replayed."""
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """auto: a bar on a terminal, else plain lines."""


class CheckpointOptions(Section):
    """Interval and number of checkpoints."""

    every: int = Field(0, ge=0)
    """Steps between two checkpoints; 0: only after the last step."""
    keep: int = Field(3, gt=0)
    """Number of complete checkpoints to keep; older ones are deleted."""
    asynchronous: bool = True
    """Write in the background during training."""
