"""The sections of a configuration: every key with its type, default and meaning.

`method` and `task` are their implementations' own (`adapters/methods`, `trainer/tasks/options.py`).
"""

from typing import Literal

from pydantic import Field, model_validator

from adapters.formats.names import FORMAT_NAMES
from adapters.options import Section
from trainer.config.engines import ENGINES, takes, that_take
from trainer.config.validation import one_of

_PATH = r"^[^\x00]*$"  # the system raises on others


class RunOptions(Section):
    """What is run, where its folder is, how long it lasts."""

    name: str = Field("", pattern=r"^(\.?[A-Za-z0-9_-][A-Za-z0-9._-]*)?$", max_length=200)
    """Name of the run's folder; empty: the name of the configuration file."""
    dir: str = Field("runs", pattern=_PATH)
    """Folder that holds the run folders."""
    seed: int = Field(0, ge=0, lt=2**20)
    """Seed of the adapters' start, the order of the data and dropout."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps to train for; excludes `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; 1 where neither is given."""
    eval_every: int = Field(0, ge=0)
    """Evaluate every so many steps; 0: after the last step only."""
    eval_at_start: bool = False
    """Evaluate before the first step too."""
    max_hours: float | None = Field(None, gt=0)
    """Save and stop after so many hours, with exit code 75: started again the run goes on."""
    slurm_margin: float = Field(120.0, ge=0)
    """In a SLURM job: do the same so many seconds before its time limit (SLURM_JOB_END_TIME); long
    enough for a step and a checkpoint."""
    resume: str = "auto"
    """`auto` (the newest good checkpoint of this run, if any), `never`, or a checkpoint's path."""


class ModelOptions(Section):
    """The frozen backbone."""

    id: str
    """A local folder, or a hub id (`owner/name`)."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it is not the model's."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of activations and unquantised weights; auto: bfloat16 on a GPU, float32 on a CPU
    (most CPUs emulate bfloat16 products, several times slower)."""
    quantization: str = "none"
    """Format of the frozen linear weights: none, nf4, fp4, int8 or fp8."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; auto: transformers' own choice for the architecture. flash_attention_2
    needs the `flash-attn` extra and a GPU."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` needs no weight files, only config.json: for benchmarks and tests."""
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
"""`data.eval`: evaluate on the training records that were left out."""


class DataOptions(Section):
    """Records, and how they become batches."""

    train: str
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .txt) or a hub id."""
    eval: str | None = None
    """The same for held-out data, or `left_out`: the training records that `leave_out` takes
    out; none: no evaluation."""
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
    """What a record holds; auto: by its columns."""
    prompt: str = "prompt"
    """Column, or template such as `"{question}\\n"`, of the part that is given."""
    completion: str = "completion"
    """Column, or template, of the part that is learned."""
    text: str | list[str] = "text"
    """Text column of `text`; one or two text columns of `classification`."""
    messages: str = "messages"
    """Column of `messages`: a list of {role, content}."""
    label: str = "label"
    """Label column of `classification`."""
    columns: list[str] | None = None
    """Column names of a csv or tsv file without a header line."""
    quoting: Literal["standard", "none"] = "standard"
    """Whether quotation marks in csv and tsv delimit fields."""
    max_length: int = Field(1024, gt=1)
    """Longest sequence, in tokens."""
    on_long_record: Literal["truncate", "drop", "stop"] = "truncate"
    """What happens to a longer record. One whose prompt alone is too long is a bad record."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used: stop with file, line and reason, or count it and go on."""
    train_records: int | None = Field(None, gt=0)
    """Use the first so many training records."""
    eval_records: int | None = Field(None, gt=0)
    """Use the first so many evaluation records."""
    packing: bool = False
    """Fill sequences with several records; none attends to another."""
    shuffle: bool = True
    """Draw a new order for each epoch from (seed, epoch)."""
    batch_size: int = Field(16, gt=0)
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = Field(4, gt=0)
    """Sequences per forward pass of a rank. Gradients are accumulated over as many as needed."""
    leave_out: int = Field(0, ge=0)
    """Training records drawn by the seed and left out of training. Methods that validate take
    theirs out anyway, so give the same number to the methods that they are compared with."""
    cache: str | None = Field(None, pattern=_PATH)
    """Folder for tokenised data; none: `rankcast` in the user's cache folder."""

    @model_validator(mode="after")
    def _check(self) -> "DataOptions":
        if self.micro_batch_size > self.batch_size:
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
    """How the learning rate falls to 0 after the warm-up (`constant`: it does not)."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up; excludes `warmup_ratio`."""
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    """Warm-up as a share of all steps."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the gradient's global norm; null: never."""
    shard_state: bool = False
    """Split the moments of AdamW over the ranks: each updates its part of the trained values, which
    are then gathered. The same values to the last bit, in less memory; nothing on one process."""
    max_skipped_steps: int = Field(5, gt=0)
    """Stop after so many steps in a row whose loss or gradient is not finite (or after all of a run
    that has fewer)."""

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
    """How the work is spread over processes."""

    kind: str = "auto"
    """An engine (single, ddp, peer, fsdp2, deepspeed), or auto: deepspeed under the deepspeed
    launcher (or with `config`); under torchrun ddp where the whole backbone fits on every GPU and
    leaves room, peer where it does so spread over those of a host, if they can read each other's
    memory, else fsdp2; single alone. The choice and its reason are printed."""
    config: str | None = None
    """A DeepSpeed JSON of your own; its `auto` values are filled in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Compute activations again in backward instead of keeping them: in every block (true), in none
    (false), or in as few as `memory_fraction` allows, measured before the first step (auto; on a
    CPU none)."""
    memory_fraction: float = Field(0.92, gt=0, le=1)
    """Share of a GPU's memory that `activation_checkpointing: auto` plans to use."""
    activation_offload: float = Field(0.0, ge=0)
    """GiB of the host's memory, a rank, to which `activation_checkpointing: auto` may move
    activations that the GPU has no room for, as many as travel while other blocks run. They are
    page-locked."""
    unsharded_blocks: Literal["auto"] | int = "auto"
    """Transformer blocks whose weights stay whole on every rank from step to step, where they would
    be gathered anew for each pass (fsdp2, peer): so many, or (auto) as many as `memory_fraction`
    has room for once `activation_checkpointing: auto` has planned; without that, and on a CPU,
    none."""
    copy_engines: Literal["auto"] | bool = "auto"
    """fsdp2: NCCL gathers blocks by the GPUs' copy engines, not by a kernel that takes a part of
    the GPU from the products. auto: with NCCL 2.28, on one host whose GPUs reach each other's
    memory."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the transformer blocks, once for all of them. auto: on a GPU, unless the engine is
    deepspeed and the blocks hold what compiling would keep gathered (a trained router, large
    matrices that are no linear layer's)."""
    timeout: float = Field(600.0, gt=0, lt=2**31)
    """Seconds after which a collective that some rank never joined is given up."""

    @model_validator(mode="after")
    def _check(self) -> "EngineOptions":
        one_of("engine.kind", self.kind, ("auto", *ENGINES))
        if self.config is not None and not self._takes("config", auto=True):
            raise ValueError(
                f"engine.config: given with engine.kind={self.kind}; accepted: with "
                f"{that_take('config')} only"
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
                f"or false, or engine.kind={that_take('copy_engines')}"
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
                f"engine.kind={that_take('unsharded_blocks')}"
            )
        return self

    def _takes(self, option: str, *, auto: bool = False) -> bool:
        """Whether the engine takes this key; `auto`: what `kind: auto` does."""
        return auto if self.kind == "auto" else takes(self.kind, option)


class LogOptions(Section):
    """What is written down while training."""

    every: int = Field(10, gt=0)
    """Log every so many steps."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder; at most 10,000 points a curve."""
    decisions_mib: float = Field(64.0, gt=0)
    """Size at which allocation.jsonl is closed and compressed; the newest 32 closed parts are kept.
    A run whose first parts are gone can be drawn, not replayed."""
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """auto: a bar on a terminal, else plain lines."""


class CheckpointOptions(Section):
    """When the run is saved, and what is kept."""

    every: int = Field(0, ge=0)
    """Save every so many steps; 0: after the last step only."""
    keep: int = Field(3, gt=0)
    """Complete checkpoints to keep; older ones are deleted."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
