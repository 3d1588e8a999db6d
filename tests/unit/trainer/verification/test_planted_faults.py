"""Faults planted in a loaded model, in its data and in its training: each is found before the run
has trained to any effect, and the message names the module and the cause."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from adapters.formats.formats import FORMATS
from adapters.gated import GatedAdapter
from adapters.layers.linear import AdaptedLinear
from tests.architectures import Case, check_loss, check_train, outcome
from tests.helpers import quick_config, sample, save_mixture, save_random_model
from trainer.data.dataset import TokenDataset
from trainer.distributed.world import World
from trainer.engine.single import SingleEngine
from trainer.errors import RunFailed, UserError
from trainer.loading.materialize import Materializer
from trainer.run.run import run
from trainer.session import Session, open_session
from trainer.tasks.base import Batch
from trainer.tasks.causal_lm import CausalLM
from trainer.verification.calls import relative_error, token_errors, typical
from trainer.verification.reference import Reference
from trainer.verification.verify import verify_session


def opened(tmp_path, *overrides: str) -> Session:
    return open_session(quick_config(tmp_path, "run.verify=auto", *overrides), World())


def fault(session: Session) -> str:
    with pytest.raises(UserError) as refusal:
        verify_session(session)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def without_documents(batch: Batch) -> Batch:
    batch.inputs.pop("position_ids", None)
    return replace(batch, documents=None)


# --- a wrong mask --------------------------------------------------------------------------------


def test_positions_that_do_not_restart_let_records_see_each_other(tmp_path, monkeypatch):
    honest = CausalLM.collate

    def running_on(self, sequences, *, empty=False, width=0):
        return without_documents(honest(self, sequences, empty=empty, width=width))

    monkeypatch.setattr(CausalLM, "collate", running_on)
    said = fault(opened(tmp_path, "data.packing=true"))
    assert said.startswith("data.packing: true given, but the records of a row see each other in")
    assert "LlamaForCausalLM" in said and "from model.layers.0 on" in said
    assert "accepted: false" in said
    verify_session(opened(tmp_path))


BART = {
    "d_model": 64, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "is_decoder": True,
}  # fmt: skip


@pytest.mark.parametrize("model_type", sample(["bart", "rwkv"], "rwkv"))
def test_a_model_whose_packing_leaks_is_refused_and_trains_without(tmp_path, model_type):
    """Positions that no mask knows, and a state along the row."""
    own = BART if model_type == "bart" else {}
    folder = save_random_model(tmp_path / "model", model_type, AutoModelForCausalLM, **own)
    leaking = quick_config(tmp_path, "run.verify=auto", f"model.id={folder}", "data.packing=true")
    with pytest.raises(UserError, match=r"data\.packing: true given.*accepted: false"):
        run(leaking, World())
    assert not leaking.run_folder.exists(), "nothing was trained"
    run(quick_config(tmp_path, "run.verify=auto", f"model.id={folder}", "run.steps=1"), World())


def test_records_are_compared_with_themselves_where_no_plain_block_fits(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.verification.forward._room", lambda session: 10**6)
    packed = ("data.packing=true", "model.dtype=bfloat16")
    proof = verify_session(opened(tmp_path, *packed))
    assert re.search(
        r"the forward pass of 64 and 53 tokens packed and padded against the same records alone "
        r"\(not against LlamaForCausalLM of transformers: a block without quantisation takes",
        proof.line,
    )
    assert not proof.complete
    honest = CausalLM.collate
    monkeypatch.setattr(
        CausalLM,
        "collate",
        lambda self, rows, **others: without_documents(honest(self, rows, **others)),
    )
    said = fault(opened(tmp_path, *packed))
    assert said.startswith("data.packing: true given, but the records of a row see each other in")


def with_massive_first_tokens(session: Session) -> None:
    """As trained models have: the norm of the begin token's hidden state is 1000 times the rest."""
    model = session.model.model
    model.embed_tokens.register_forward_hook(
        lambda module, inputs, out: (
            out * torch.where(torch.arange(out.shape[1]) == 0, 1000.0, 1.0).to(out)[None, :, None]
        )
    )


@pytest.mark.parametrize("weight_format", ["none", "nf4"])
def test_a_massive_first_token_hides_no_fault(tmp_path, monkeypatch, weight_format):
    plain = Reference.__init__

    def with_massive(self, session):
        plain(self, session)
        with_massive_first_tokens(self)

    monkeypatch.setattr(Reference, "__init__", with_massive)
    session = opened(tmp_path, "model.dtype=bfloat16", f"model.quantization={weight_format}")
    with_massive_first_tokens(session)
    assert verify_session(session).complete
    attention = session.model.model.layers[1].self_attn
    honest = attention.forward

    def leaking(hidden_states, position_embeddings, attention_mask=None, **kwargs):
        mixed = hidden_states.clone()
        mixed[:, 1:] += 0.5 * hidden_states[:, 1:].mean(1, keepdim=True)
        return honest(mixed, position_embeddings, attention_mask, **kwargs)

    attention.forward = leaking
    assert fault(session).startswith("model.layers.1.self_attn: makes another output of the same")


def test_errors_of_single_tokens():
    torch.manual_seed(0)
    expected = torch.randn(40, 64)
    expected[0] *= 1000
    leaked = expected + torch.cat([torch.zeros(1, 64), 0.3 * torch.randn(39, 64)])
    assert relative_error(leaked, expected) < 0.01 < 0.25 < typical(token_errors(leaked, expected))
    one = expected.clone()
    one[7] += torch.randn(64)
    assert typical(token_errors(one, expected)) == 0 and token_errors(one, expected).max() > 0.5
    one[7] = torch.nan
    assert token_errors(one, expected).max() == torch.inf


def test_errors_that_are_not_the_models_keep_their_traceback(tmp_path, monkeypatch):
    session = opened(tmp_path)

    def failing(*_, **__):
        raise ValueError("of these records")

    handle = session.model.model.layers[1].mlp.register_forward_pre_hook(failing)
    said = fault(session)
    assert said.startswith("LlamaForCausalLM cannot compute these records: of these records;")
    handle.remove()
    monkeypatch.setattr("trainer.verification.forward._hidden", failing)
    with pytest.raises(ValueError, match=r"^of these records$"):
        verify_session(session)


def test_want_of_memory_does_not_end_a_run(tmp_path, monkeypatch):
    session = opened(tmp_path)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = session.model.model.layers[1].mlp.register_forward_pre_hook(full)
    proof = verify_session(session)
    handle.remove()
    assert "buffers, in" in proof.line and not proof.complete
    assert proof.line.endswith("; the forward pass not compared: out of memory")
    assert all(not m._forward_hooks for m in session.model.modules()) and session.model.training
    assert verify_session(session).complete


def test_windows_that_no_record_reaches(tmp_path):
    layers = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4096,
        "use_sliding_window": True,
    }
    folder = save_random_model(tmp_path / "model", "qwen2", AutoModelForCausalLM, **layers)
    line = verify_session(opened(tmp_path, f"model.id={folder}")).line
    assert line.endswith("; sliding_window of 4096 not reached")
    layers["sliding_window"] = 8
    folder = save_random_model(tmp_path / "short", "qwen2", AutoModelForCausalLM, **layers)
    assert "not reached" not in verify_session(opened(tmp_path, f"model.id={folder}")).line


def test_a_mask_that_shows_the_future(tmp_path):
    session = opened(tmp_path)
    attention = session.model.model.layers[3].self_attn
    honest = attention.forward

    def unmasked(hidden_states, position_embeddings, attention_mask=None, **kwargs):
        length = hidden_states.shape[1]
        everything = torch.zeros(1, 1, length, length)
        return honest(hidden_states, position_embeddings, everything, **kwargs)

    attention.forward = unmasked
    said = fault(session)
    assert said.startswith("model.layers.3.self_attn: makes another output of the same input")
    assert "agree are q_proj, k_proj, v_proj" in said and "mask" in said


def test_a_model_that_attends_to_what_it_predicts(tmp_path, monkeypatch):
    def everything(config, inputs_embeds, attention_mask=None, **kwargs):
        rows, length = inputs_embeds.shape[:2]
        return torch.zeros(rows, 1, length, length, dtype=inputs_embeds.dtype)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", everything)
    said = fault(opened(tmp_path))
    assert "task.kind: causal_lm given" in said and "attends to the tokens" in said


@pytest.mark.parametrize(
    "part, name",
    [("causal", "prophetnet"), ("classification", "fnet"), ("classification", "xlnet")],
)
def test_padding_that_changes_results_in_transformers_too(tmp_path, part, name):
    """n-gram streams, a Fourier transform, pooling at the row's end: refused, and trained without
    padding."""
    case = Case(name, part, tmp_path)
    assert (
        "accepted: 1, which needs no padding"
        in outcome(lambda: run(case.config("a"), World()))["message"]
    )
    check_train(case)
    check_loss(case)


def test_padding_that_is_attended_to(tmp_path, monkeypatch):
    from trainer.tasks.sequence_classification import SequenceClassification

    data = tmp_path / "data.csv"
    data.write_text(
        "text,label\n" + "\n".join(f"{'word ' * (1 + i % 9)},{i % 2}" for i in range(40))
    )
    folder = save_random_model(tmp_path / "model", "bert")
    overrides = (
        f"model.id={folder}", "task.kind=sequence_classification", f"data.train={data}",
        "data.eval=null", "data.format=classification", "data.prompt=prompt",
        "data.completion=completion",
    )  # fmt: skip
    verify_session(opened(tmp_path, *overrides))
    honest = SequenceClassification.collate

    def all_seen(self, sequences, *, empty=False, width=0):
        batch = honest(self, sequences, empty=empty, width=width)
        batch.inputs["attention_mask"].fill_(1)
        return batch

    monkeypatch.setattr(SequenceClassification, "collate", all_seen)
    assert "records that are padded together change each other" in fault(
        opened(tmp_path, *overrides)
    )


# --- a buffer of garbage -------------------------------------------------------------------------


@pytest.mark.parametrize("factor", sample([1.01, float("nan")], 1.01))
def test_a_buffer_of_garbage(tmp_path, factor):
    session = opened(tmp_path)
    session.model.model.rotary_emb.inv_freq.mul_(factor)
    assert fault(session).startswith(
        "model.rotary_emb.inv_freq: this buffer differs from the unmod"
    )


def test_what_was_never_filled(tmp_path):
    session = opened(tmp_path)
    norm = session.model.model.layers[2].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"), requires_grad=False)
    assert "layers.2.input_layernorm.weight: was never loaded or initialised" in fault(session)
    session = opened(tmp_path)
    session.model.model.norm.weight.data[3] = float("inf")
    assert fault(session).startswith("model.norm.weight: holds values that are not finite")


# --- a weight off by one row ---------------------------------------------------------------------


UP = "model.layers.2.mlp.up_proj"


@pytest.mark.parametrize("name", sample([UP, "model.embed_tokens", "model.norm"], UP))
def test_a_weight_off_by_one_row(tmp_path, name):
    session = opened(tmp_path)
    weight = session.model.get_submodule(name).weight
    weight.data.copy_(weight.data.roll(1, 0))
    said = fault(session)
    assert said.startswith(f"{name}.weight: what single gathers is not what was loaded")


@pytest.mark.parametrize("model_type", sample(["llama", "mixtral"], "mixtral"))
def test_a_packed_weight_that_the_engine_gathers_off_by_one_row(tmp_path, monkeypatch, model_type):
    model = (
        [f"model.id={save_mixture(tmp_path / 'm', 'mixtral')}"] if model_type == "mixtral" else []
    )
    session = opened(tmp_path, "model.quantization=int8", *model)
    verify_session(session)
    layers = [m for m in session.model.modules() if hasattr(m, "weight_format") and m.adapts]
    layer = layers[-1]
    name = next(name for name, m in session.model.named_modules() if m is layer)
    honest = type(layer).dequantised
    monkeypatch.setattr(
        type(layer),
        "dequantised",
        lambda self, dtype: (
            honest(self, dtype).roll(1, -2) if self is layer else honest(self, dtype)
        ),
    )
    assert fault(session).startswith(f"{name}.weight: what single gathers is not what was loaded")


def test_a_broadcast_that_shifts_a_matrix(tmp_path, monkeypatch):
    honest = Materializer.assign_to_model

    def shifted(self, task):
        if task.name == "model.layers.1.self_attn.o_proj.weight":
            self._packed[task] = self._packed[task].roll(1, 0)
        honest(self, task)

    monkeypatch.setattr(Materializer, "assign_to_model", shifted)
    assert "model.layers.1.self_attn.o_proj.weight: what" in fault(opened(tmp_path))


# --- a dead adapter ------------------------------------------------------------------------------


def test_an_adapter_without_gradient_ends_the_run(tmp_path, monkeypatch):
    honest = AdaptedLinear.low_rank_backward

    def without(self, dy, x, need_x):
        if self.out_features == 320:  # gate_proj and up_proj
            return None, None
        return honest(self, dy, x, need_x)

    monkeypatch.setattr(AdaptedLinear, "low_rank_backward", without)
    with pytest.raises(
        RunFailed, match=r"layers\.0\.mlp\.gate_proj, .* and 5 more: no gradient"
    ) as e:
        run(quick_config(tmp_path, "run.verify=auto"), World())
    assert "its adapter has no effect" in str(e.value) and "method.targets" in str(e.value)


def test_a_weight_that_is_read_directly(tmp_path, monkeypatch):
    """In a model that does not run without values, so that nothing was found before."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        assert np.isfinite(x.detach().numpy()).all()
        up = F.linear(x, self.up_proj.weight)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)

    # As if it were the library's own.
    forward.__globals__["__name__"] = "transformers.models.llama.modeling_llama"
    try:
        monkeypatch.setattr(LlamaMLP, "forward", forward)
        with pytest.raises(RunFailed, match=r"up_proj.*LlamaMLP reads the layer's weight itself"):
            run(quick_config(tmp_path, "run.verify=auto"), World())
    finally:
        forward.__globals__["__name__"] = __name__


def test_an_update_that_does_not_reach_an_adapter(tmp_path, monkeypatch):
    from adapters.optimizer import MaskedAdamW

    honest = MaskedAdamW._update

    def partly(self, *args):
        honest(self, *args)
        for slot in self._slots:
            if slot.trainable.name == "model.layers.2.self_attn.k_proj.B":
                slot.view(self.values).zero_()

    monkeypatch.setattr(MaskedAdamW, "_update", partly)
    with pytest.raises(RunFailed, match=r"layers\.2\.self_attn\.k_proj: B is still exactly 0"):
        run(quick_config(tmp_path, "run.verify=auto"), World())


def test_layers_that_no_record_reaches_are_only_noted(tmp_path, monkeypatch, capsys):
    """A layer for values that do not occur: unused, not wrong. Only values tell."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        y = self.act_fn(self.gate_proj(x))
        if bool((y > 1e9).any()):
            y = y * self.up_proj(x)
        return self.down_proj(y)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    run(quick_config(tmp_path, "run.verify=auto", "log.progress=plain"), World())
    said = capsys.readouterr().out
    assert re.search(r"note +adapters without effect: .*\.0\.mlp\.up_proj.* never called", said)


# --- a doubled begin token -----------------------------------------------------------------------


def test_a_doubled_begin_token(tmp_path, monkeypatch):
    honest = TokenDataset.__getitem__

    def doubled(self, index):
        example = honest(self, index)
        example.input_ids = [1, *example.input_ids]
        example.loss_mask = [0, *example.loss_mask]
        return example

    monkeypatch.setattr(TokenDataset, "__getitem__", doubled)
    said = fault(opened(tmp_path, "data.add_bos=true"))
    assert said.startswith("data.train: record 1: the begin token '<s>' stands twice in a row")


# --- a scale left out ----------------------------------------------------------------------------


def test_an_adapter_without_its_scale(tmp_path, monkeypatch):
    honest = GatedAdapter.cast

    def unscaled(self, dtype):
        A, g, B = honest(self, dtype)
        return A, torch.ones_like(g), B

    monkeypatch.setattr(GatedAdapter, "cast", unscaled)
    said = fault(opened(tmp_path, "method.alpha=32"))  # g = 32 / 8
    assert said.startswith("model.layers.0.self_attn.q_proj: what its adapter adds to the output")
    assert "is 0.25 times x ΔWᵀ: its scale" in said


@pytest.mark.parametrize("weight_format", sample(["nf4", "int8", "fp8"], "nf4"))
def test_a_format_without_its_scales(tmp_path, monkeypatch, weight_format):
    kind = type(FORMATS[weight_format])
    honest = kind.decode

    def unscaled(self, codes, scales, shape, dtype):
        return honest(self, codes, torch.ones_like(scales), shape, dtype)

    monkeypatch.setattr(kind, "decode", unscaled)
    said = fault(opened(tmp_path, f"model.quantization={weight_format}"))
    assert f"model.layers.0.self_attn.q_proj.weight: its {weight_format} values differ" in said
    assert "its scales are wrong" in said


def test_an_attention_without_its_scale(tmp_path):
    session = opened(tmp_path, "model.dtype=bfloat16")
    session.model.model.layers[1].self_attn.scaling = 1.0
    said = fault(session)
    assert said.startswith("model.layers.1.self_attn: makes another output") and "scale" in said


def test_an_operator_with_a_bias_of_its_own(tmp_path):
    session = opened(tmp_path)
    layer = session.model.model.layers[3].mlp.down_proj
    layer.bias = torch.nn.Parameter(torch.ones(layer.out_features), requires_grad=False)
    assert fault(session).startswith("model.layers.3.mlp.down_proj: makes another output")


def test_an_engine_that_gathers_nothing(tmp_path, monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def emptied(self, module):
        held = [(p, p.data) for p in module.parameters()]
        for parameter, data in held:
            parameter.data = torch.zeros_like(data)
        yield
        for parameter, data in held:
            parameter.data = data

    monkeypatch.setattr(SingleEngine, "unsharded", emptied)
    assert "is not what was loaded" in fault(opened(tmp_path))
