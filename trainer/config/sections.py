"""The sections of the configuration: every key with its type, default and meaning.

`method` and `task` are defined by their implementations (`adapters/methods`,
`trainer/tasks/options.py`).
"""

import sys
from typing import Literal

from pydantic import Field, field_validator, model_validator

from adapters.formats.names import FORMAT_NAMES
from adapters.options import PATH, Section
from trainer.config.engines import ENGINES, engines_with, takes
from trainer.config.trackers import TRACKERS
from trainer.config.validation import one_of

Shown = Literal["bar", "plain", "none"]
"""How progress is shown."""


class RunOptions(Section):
    """Name, folder, length and evaluation of a run."""

    name: str = Field("", pattern=r"^(\.?[A-Za-z0-9_-][A-Za-z0-9._-]*)?$", max_length=200)
    """Name of the run folder; empty: the name of the configuration file."""
    dir: str = Field("runs", pattern=PATH)
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
    keep_best: str | None = None
    """Metric, such as eval_loss or eval_accuracy, by which evaluations are compared: the checkpoint
    of the best one is kept, and its adapter exported instead of the last one."""
    patience: int | None = Field(None, gt=0)
    """End the run after this many evaluations in a row without a better `keep_best`."""
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
    added_tokens: list[str] | None = Field(None, min_length=1)
    """Special tokens to add to the tokenizer, whose rows of the embedding and the output head are
    trained in full beside the adapters. New rows start at the mean of those in use; a token that
    the tokenizer has already is not added, and its row trained from the value it has."""
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
    adapter: str | None = Field(None, pattern=PATH)
    """What a new run starts from: an adapter's folder (ours or PEFT's), a run folder or a
    checkpoint. The same method with the same ranks goes on; for another method it stays frozen
    beside the new adapters. A resumed run does not need it any more."""
    overrides: dict[str, int | float | str | bool] = {}
    """Keys of the model's config.json to replace, such as num_hidden_layers."""

    @model_validator(mode="after")
    def _check(self) -> "ModelOptions":
        one_of("model.quantization", self.quantization, FORMAT_NAMES)
        tokens = self.added_tokens or []
        wrong = next((t for t in tokens if not t.strip() or tokens.count(t) > 1), None)
        if wrong is not None:
            raise ValueError(
                f"model.added_tokens: {wrong!r} given; accepted: tokens that are not blank, each "
                "once"
            )
        if self.overrides and self.weights == "pretrained":
            raise ValueError(
                "model.overrides: given with model.weights=pretrained; accepted: only with "
                "model.weights=random, since the files' tensors would no longer fit"
            )
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
    compile_cache: str | None = Field(None, pattern=PATH)
    """Folder in which compiled programs and kernels are kept, so that the next start on these
    versions and GPUs does not compile them again; none: torch's own (in the host's folder for
    temporary files, which may not outlive the job)."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Launch the forward and the backward pass of all transformer blocks at once, as CUDA graphs
    captured for each row length (`data.row_lengths`) that is not rare. For engines single and ddp,
    where all blocks keep their activations and nothing is dropped. auto: on a GPU where that is so,
    the CPU takes longer to launch the blocks than the GPU to run them, and the memory suffices for
    the activations twice."""
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
        if self.cuda_graphs is True and not self._takes("cuda_graphs", auto=True):
            raise ValueError(
                f"engine.cuda_graphs: true given with engine.kind={self.kind}; accepted: auto or "
                f"false, or engine.kind={engines_with('cuda_graphs')}"
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
    """Steps between two log lines; the first and the last step are logged in any case."""
    tensorboard: bool = True
    """Write TensorBoard event files to the run folder, at most 10,000 points per curve."""
    trackers: list[str] = []
    """Trackers that the run is also logged to, of tensorboard, wandb, mlflow, trackio, comet,
    swanlab, aim, clearml, dvclive (docs/runs.md says what each holds): configuration, metrics and,
    where the tracker takes them, answers and the run's figures. Each is set up by its own
    environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, …). One that fails does not fail the
    run; the end waits at most 60 s for them, after a failure or a request to stop 5 s."""
    project: str = Field("rankcast", min_length=1)
    """The trackers' project, or experiment, that the run belongs to."""
    record_losses: bool = False
    """Write of each record of the last evaluation (or of the best one) the summed loss and its
    number of terms to `losses.jsonl`: causal_lm and sequence_classification."""
    decisions_mib: float = Field(64.0, gt=0)
    """Size in MiB at which allocation.jsonl is rotated and compressed; the newest 32 rotated parts
    are kept. A run without its first parts can be drawn, but not replayed."""
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """auto: a bar on a terminal or in a notebook, else plain lines."""

    @field_validator("trackers")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            one_of("log.trackers", name, TRACKERS)
        return names

    @property
    def all_trackers(self) -> list[str]:
        """Each once, TensorBoard among them where `tensorboard` asks for it."""
        return list(dict.fromkeys([*["tensorboard"] * self.tensorboard, *self.trackers]))

    @property
    def shown(self) -> Shown:
        """How progress is shown."""
        if self.progress == "auto":
            notebook = "ipykernel" in sys.modules
            return "bar" if notebook or sys.stderr.isatty() else "plain"
        return self.progress


class CheckpointOptions(Section):
    """Interval and number of checkpoints."""

    every: int = Field(0, ge=0)
    """Steps between two checkpoints; 0: only after the last step."""
    keep: int = Field(3, gt=0)
    """Number of complete checkpoints to keep; older ones are deleted."""
    asynchronous: bool = True
    """Write in the background during training."""
