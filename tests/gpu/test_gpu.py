"""What only a GPU can show; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from adapters.formats import float8
from adapters.formats.formats import FORMATS
from adapters.methods.lelora.options import PolicyOptions
from adapters.methods.lelora.reinforce import Reinforce
from tests.helpers import losses, quick_config
from tests.unit.adapters.layers.test_experts import ROUTINGS, offsets_of, stack_of
from tests.unit.adapters.layers.test_experts import gradients as stack_gradients
from tests.unit.adapters.layers.test_experts import reference as one_by_one
from tests.unit.adapters.layers.test_linear import gradients, host, reference
from tests.world.cases import ok, run_cases
from tests.world.test_engines import check_gathered
from trainer.config.config import load_config
from trainer.distributed import process_group
from trainer.memory.planner import largest_batch, make_plan, reduce_plan
from trainer.run.run import run
from trainer.session import open_session

kernels = pytest.importorskip("adapters.formats.kernels", reason="no Triton here")
encoded_rows, transposed = kernels.encoded_rows, kernels.transposed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", list(FORMATS))
def test_fused_operator_equals_autograd(fmt, dtype):
    layer = host(fmt, dtype=dtype, out=192, inp=256).cuda()
    layer.adapter.cuda()
    packed = layer.pack(torch.randn(192, 256, device="cuda", dtype=dtype) * 0.02, dtype)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    x = torch.randn(2, 5, 256, device="cuda", dtype=dtype)
    fused, plain = gradients(layer, layer, x), gradients(lambda t: reference(layer, t), layer, x)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if fmt == "fp8" and dtype == torch.bfloat16:
        tolerance = 5e-2  # activations are rounded to 3 bits of mantissa
    for ours, theirs in zip(fused, plain, strict=True):
        assert (ours - theirs).float().norm() <= tolerance * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_grouped_products_equal_one_expert_after_the_other(routing, dtype):
    counts = ROUTINGS[routing]
    stack, W = stack_of("nf4", (8, 3, None, 16))
    x = torch.randn(sum(counts), W.shape[2])
    expected = one_by_one(stack, W, x.requires_grad_(True), counts)
    plain = [expected, *stack_gradients(stack, x, expected)]
    moved = torch.nn.Parameter(stack.pack(W.cuda().to(dtype), dtype), requires_grad=False)
    stack.weight = moved
    for place in stack.layers:
        if place.adapter is not None:
            place.adapter.cuda()
    y = stack(x.cuda().to(dtype), offsets_of(counts).cuda())
    ours = [y, *stack_gradients(stack, x, y)]
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine.float().cpu() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("fmt", ["nf4", "fp4", "int8", "fp8"])
def test_cpu_and_gpu_quantise_alike(fmt):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    restored = []
    for device in ("cpu", "cuda"):
        packed = FORMATS[fmt].pack(weight.to(device), torch.float32)
        restored.append(FORMATS[fmt].unpack(packed, (128, 256), torch.float32).cpu())
    spread = (restored[0] - restored[1]).norm() / weight.norm()
    assert spread < 5e-3, "beyond ties and float16 scales"


@pytest.mark.parametrize("fmt", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("shape", [(64, 64), (130, 192), (7, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_and_gpu_read_the_same_matrix_from_the_same_bytes(fmt, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = FORMATS[fmt].pack(weight, dtype)
    on_cpu = FORMATS[fmt].unpack(packed, shape, dtype)
    on_gpu = FORMATS[fmt].unpack(packed.cuda(), shape, dtype)
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("shape", [(48, 256), (300, 28672), (1, 16)])
def test_rows_are_encoded_in_float8_within_its_precision(shape):
    x = torch.randn(shape, device="cuda").bfloat16()
    x[0] = 0
    columns = torch.rand(shape[1], device="cuda") + 0.5
    codes, scales = encoded_rows(x, columns, float8.E4M3)
    exact = x.float() * columns
    assert scales.shape == (shape[0], 1)
    assert not codes[0].float().any()
    largest = exact.abs().amax(1, keepdim=True)
    error = (codes.float() * scales - exact).abs()
    # Half a unit in the last of 3 bits, or of the smallest number (2⁻⁹ of a range up to 448).
    assert (error <= exact.abs() / 16 + largest * 2**-9 / 448).all()


def test_a_nan_survives_encoding():
    x = torch.ones(2, 64, device="cuda", dtype=torch.bfloat16)
    x[1, 3] = torch.nan
    codes, _ = encoded_rows(x, None, float8.E4M3)
    assert codes.float().isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("shape", [(16, 16), (130, 300), (4096, 1040)])
def test_codes_are_transposed(shape):
    codes = torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)
    assert torch.equal(transposed(codes), codes.t())


def test_fp8_trains_as_bfloat16_does(tmp_path):
    """The bar of this format: after 100 steps of a real run the loss is within 1 %."""
    model, data = Path("../shared/models/books-llama-28m"), Path("../shared/data/gsm8k/train.jsonl")
    if not (model.exists() and data.exists()):
        pytest.skip("needs the shared models and data")
    found = {}
    for fmt in ("none", "fp8"):
        config = load_config("configs/gsm8k_lora.yaml", [
            f"model.id={model}", f"data.train={data}", f"model.quantization={fmt}", f"run.dir={tmp_path}",
            f"run.name={fmt}", f"data.cache={tmp_path}/cache", "run.steps=100", "run.epochs=null",
            "run.eval_every=0", "run.eval_at_start=false", "data.eval=null", "log.every=1", "log.progress=none", "log.tensorboard=false",
        ])  # fmt: skip
        run(config, process_group.start("cuda"))
        found[fmt] = sum(losses(config.run_folder)[-10:]) / 10
    assert found["fp8"] == pytest.approx(found["none"], rel=0.01)


@pytest.mark.parametrize("kind", ["lalora", "weightlora_plus"])
def test_blocks_are_compiled_once_for_a_whole_run(kind, tmp_path):
    torch._dynamo.reset()
    config = quick_config(
        tmp_path, "run.steps=8", f"method.kind={kind}", "data.eval=null", "engine.device=cuda",
        "engine.compile=true", "engine.activation_checkpointing=false",
    )  # fmt: skip
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(config, process_group.start("cuda"))
    assert len(losses(config.run_folder)) == 8


def test_more_activations_than_fit_are_planned_and_an_error_lowers_the_plan(tmp_path):
    config = quick_config(tmp_path, "engine.device=cuda", "model.dtype=float32")
    session = open_session(config, process_group.start("cuda"))
    plan = make_plan(session)
    blocks = session.backbone.blocks
    assert plan.saved == len(blocks)  # a small model
    torch.cuda.reset_peak_memory_stats()
    size = config.data.micro_batch_size
    longest = sorted(session.train_data.lengths.tolist(), reverse=True)[:size]
    batch = largest_batch(session.task, config.data, session.backbone.rows, longest, size)
    loss, _ = session.task.loss(session.model, batch.to(torch.device("cuda")))
    session.engine.backward(loss)
    assert torch.cuda.max_memory_allocated() == pytest.approx(plan.peak, rel=0.1)
    assert "keep their activations" in reduce_plan(session) and blocks.saved == len(blocks) - 1


def test_activations_wait_on_the_host(tmp_path, monkeypatch):
    """The same gradients in the same order of operations, and less on the GPU meanwhile."""
    monkeypatch.setattr("trainer.model.activation_offload._LEAST", 2**12)
    config = quick_config(
        tmp_path, "engine.device=cuda", "model.dtype=float32", "model.weights=random",
        "model.overrides.num_hidden_layers=6", "model.overrides.hidden_size=256",
        "model.overrides.intermediate_size=1024", "data.packing=true", "data.max_length=512",
        "engine.activation_offload=1", "engine.memory_fraction=0.9",
    )  # fmt: skip
    session = open_session(config, process_group.start("cuda"))
    for adapter in session.method.adapters.values():
        adapter.B.data.fill_(0.01)
    blocks = session.backbone.blocks
    plan = make_plan(session)
    assert (plan.saved, plan.offloaded) == (6, 0)  # there is room
    batch = largest_batch(session.task, config.data, session.backbone.rows, [512] * 2, 2).to(
        torch.device("cuda")
    )
    found = {}
    for saved, moved in ((6, 0), (2, 4), (1, 3), (2, 4)):
        blocks.keep(saved, moved, 2**26)
        for _ in range(3):  # no synchronisation in between: places and memory are used again
            session.optimizer.zero_grad()
            loss, _ = session.task.loss(session.model, batch)
            blocks.host.settle()
            held = torch.cuda.memory_allocated()
            session.engine.backward(loss)
        found[saved, moved] = held, session.optimizer.gradients.clone()
    for (saved, _), (held, computed) in found.items():
        assert torch.equal(computed, found[6, 0][1])
        assert saved == 6 or held < found[6, 0][0]


@pytest.mark.parametrize("changes", [
    [], ["method.policy.credit=attributed", "method.policy.baseline=trend"],
    ["method.policy.credit=global"],
])  # fmt: skip
def test_a_policy_learns_on_a_gpu(changes, tmp_path):
    config = quick_config(
        tmp_path, "run.steps=8", "engine.device=cuda", "model.dtype=float32",
        "method.kind=lelora", "method.rank=4", *changes,
    )  # fmt: skip
    run(config, process_group.start("cuda"))
    found = losses(config.run_folder)
    assert len(found) == 8 and found[-1] < found[0]


@pytest.mark.parametrize("network", ["mlp", "resnet"])
@pytest.mark.parametrize("credit", ["counterfactual", "attributed"])
@pytest.mark.parametrize("budget", [{}, {"budget": 2.5, "within": "layer"}])
def test_a_policy_that_is_recorded_learns_as_one_that_is_not(credit, network, budget):
    """Also after its state was loaded into one that had been recorded."""
    n, draws = 40, {}
    generator = torch.Generator().manual_seed(0)
    shape = (n, 4, 3) if credit == "counterfactual" else (n,)
    rewards = torch.randn(8, *shape, generator=generator, dtype=torch.float64)
    features = torch.rand(8, n, 20, generator=generator)

    def policy():
        return Reinforce(
            PolicyOptions(credit=credit, network=network, learning_rate=0.01, **budget),
            layer=torch.arange(n) // 4, kind=torch.arange(n) % 4, features=20, ranks=[0, 2, 4, 8], locations=3,
            sizes=torch.ones(n), seed=1, device=torch.device("cuda"),
        )  # fmt: skip

    for recorded in (True, False):
        ours, draws[recorded] = policy(), []
        ours._descend._enabled = ours._evaluate._enabled = recorded
        for step in range(8):
            if step == 5:
                state = {name: value.clone() for name, value in ours.state_dict().items()}
            ours_draw = ours.draw(step, features[step])
            draws[recorded].append(torch.stack(ours_draw))
            ours.learn(rewards[step])
        assert (ours._descend._graph is not None) == recorded
        end = {name: p.clone() for name, p in ours.network.named_parameters()}
        ours._draws.clear()
        ours.load_state_dict(state)
        for step in range(5, 8):
            ours.draw(step, features[step])
            ours.learn(rewards[step])
        for name, p in ours.network.named_parameters():
            torch.testing.assert_close(p, end[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.stack(draws[True]), torch.stack(draws[False]))


@pytest.mark.parametrize("changes", [[], ["model.quantization=nf4", "data.packing=true"]])
def test_a_run_learns_and_agrees_with_the_cpu(changes, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        config = quick_config(
            tmp_path, "run.steps=10", f"run.name={device}", f"engine.device={device}",
            "model.dtype=float32", *changes,
        )  # fmt: skip
        run(config, process_group.start(device))
        found.append(losses(config.run_folder))
    assert found[1][-1] < found[1][0]
    worst = max(abs(a - b) / a for a, b in zip(*found, strict=True))
    assert worst < (1e-3 if not changes else 1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_packed_bytes_survive_sharding_and_gathering(tmp_path):
    """NCCL's copies must not touch bits that look like a NaN."""
    check_gathered(tmp_path, "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fmt", ["none", "nf4"])
def test_engines_train_alike(fmt, tmp_path):
    """More blocks than a rank has room for at a time, some of which are computed again, compiled."""
    cases = {}
    for engine in ("ddp", "peer", "fsdp2", "deepspeed"):
        config = quick_config(
            tmp_path, f"run.name={engine}", "run.steps=10", f"engine.kind={engine}",
            "engine.device=cuda", "model.dtype=float32", f"model.quantization={fmt}",
            "model.weights=random", "model.overrides.num_hidden_layers=7", "engine.compile=true",
            "engine.activation_checkpointing=false",
        )  # fmt: skip
        cases[engine] = ("train_only", config.model_dump())
    cases["again"] = ("train_only", quick_config(
        tmp_path, "run.name=again", "run.steps=10", "engine.kind=peer", "engine.device=cuda",
        "model.dtype=float32", f"model.quantization={fmt}", "model.weights=random",
        "model.overrides.num_hidden_layers=7", "engine.activation_checkpointing=true",
    ).model_dump())  # fmt: skip
    for name, engine, *changes in [
        ("peer-whole", "peer"), ("fsdp2-whole", "fsdp2"),  # all blocks, since there is room
        ("kernels", "fsdp2", "engine.copy_engines=false", "engine.unsharded_blocks=0"),
        ("copies", "fsdp2", "engine.copy_engines=true", "engine.unsharded_blocks=0"),
        ("copies-whole", "fsdp2", "engine.copy_engines=true", "engine.unsharded_blocks=3"),
    ]:  # fmt: skip
        cases[name] = ("train_only", quick_config(
            tmp_path, f"run.name={name}", "run.steps=10", f"engine.kind={engine}", *changes,
            "engine.device=cuda", "model.dtype=float32", f"model.quantization={fmt}",
            "model.weights=random", "model.overrides.num_hidden_layers=7",
        ).model_dump())  # fmt: skip
    plans = {f"plan-{n}": ("planned", cases[n][1]) for n in ("peer-whole", "fsdp2-whole")}
    results = run_cases(tmp_path / "work", {**cases, **plans}, device="cuda")
    for name, result in results.items():
        assert name not in plans or ok(result) == [[7, 7, 7]] * 2
        ok(result)
    expected = losses(tmp_path / "runs/ddp")
    for name in cases:
        assert losses(tmp_path / "runs" / name) == pytest.approx(expected, rel=1e-4), name


def trained_on_two(tmp_path, runs):
    """Losses of ten steps, by run, each with its changes of the configuration."""
    shared = ["run.steps=10", "engine.device=cuda", "model.dtype=float32"]
    configs = {
        name: quick_config(tmp_path, f"run.name={name}", *shared, *changes)
        for name, changes in runs.items()
    }
    cases = {name: ("train_only", config.model_dump()) for name, config in configs.items()}
    for result in run_cases(tmp_path / "work", cases, device="cuda").values():
        ok(result)
    return [losses(config.run_folder) for config in configs.values()]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_policy_is_recorded_while_copy_engines_gather(tmp_path):
    """Recording on rank 0 gives memory back there alone; what NCCL knows stays."""
    policy = ["method.kind=lelora", "method.rank=4"]
    ddp, fsdp2 = trained_on_two(tmp_path, {
        "ddp": [*policy, "engine.kind=ddp"],
        "fsdp2": [*policy, "engine.kind=fsdp2", "engine.copy_engines=true", "engine.unsharded_blocks=0"],
    })  # fmt: skip
    assert fsdp2 == pytest.approx(ddp, rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_split_moments_are_gathered_in_place(tmp_path):
    """NCCL writes into the buffer that it reads from; units go before step 4, others grow."""
    grown = ["engine.kind=fsdp2", "method.kind=weightlora_plus", "method.warmup_steps=4"]
    whole, split = trained_on_two(tmp_path, {
        "whole": [*grown, "optim.shard_state=false"], "split": [*grown, "optim.shard_state=true"],
    })  # fmt: skip
    assert split == pytest.approx(whole, rel=1e-4)
