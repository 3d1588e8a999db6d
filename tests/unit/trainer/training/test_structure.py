"""What methods do to memory, batches, files and records: freed, grown, written once, left out."""

import gc
import hashlib
import json
import multiprocessing
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from adapters.gated import GatedAdapter
from adapters.layers.linear import AdaptedLinear, Dropout
from adapters.methods.registry import METHODS
from adapters.unit import Unit
from tests.helpers import ROOT, losses, quick_config, save_random_model
from tests.world.cases import ok, run_cases
from tests.world.worker import cut_run, drive, train_only, validation
from trainer.checkpoint.saved import read_saved
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint
from trainer.export.export import export_run
from trainer.loading import spectral_init
from trainer.session import Session, open_session
from trainer.training import step as training_step
from trainer.training.evaluation import evaluate_saved


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a backbone of two layers, 14 units, and what was prepared for it."""
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("small")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    return tmp


def small_config(small, tmp, *overrides: str) -> Config:
    return quick_config(
        tmp, f"model.id={small}/model", f"data.cache={small}/cache", "data.eval=null", *overrides
    )


# --- memory and ranks after selection -------------------------------------------------------------


def live() -> dict[int, int]:
    """Bytes of every storage that a living tensor has, by address."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # fake tensors of other tests have no storage
    tensors = [found for found in gc.get_objects() if type(found) in plain]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def owned(session: Session) -> set[int]:
    """Addresses of what adapters and the optimizer hold."""
    found = [t for t in vars(session.optimizer).values() if isinstance(t, torch.Tensor)]
    for adapter in session.method.adapters.values():
        found += [adapter.A, adapter.g, adapter.B, adapter.mask]
    return {tensor.untyped_storage().data_ptr() for tensor in found}


def test_removal_gives_memory_back(tmp_path):
    """All bytes but the backbone's fall to the share of the units that are kept."""
    config = quick_config(
        tmp_path, "method.kind=weightlora", "method.keep=2", "method.warmup_steps=2",
        "method.targets=[q_proj, o_proj]", "run.steps=6",
    )  # fmt: skip
    session = open_session(config, World())
    backbone = live().keys() - owned(session)
    held = []
    for step, _ in drive(session, copies=False):
        held.append(sum(size for at, size in live().items() if at not in backbone))
        assert len(session.method.adapters) == (8 if step < 2 else 2)
    one_unit = 4 * 8 * (128 + 128) * 4  # values, gradients, two moments in float32
    assert 8 * one_unit <= held[1] <= 8.5 * one_unit
    assert held[2] <= 2.5 * one_unit
    assert held[5] == pytest.approx(held[1] * 2 / 8, rel=0.05)
    for unit in session.method.units:
        host = session.method.adapters.layers[unit.name]
        assert (host.adapter is not None) == (unit.name in session.method.adapters)


def selection(kind: str, tmp) -> tuple[dict, dict]:
    """Every unit's A at the start, and what survivors hold before their first step."""
    config = quick_config(
        tmp, f"method.kind={kind}", "method.warmup_steps=2", "method.expand=reinit", "run.steps=3",
        "data.eval=null",
    )  # fmt: skip
    session = open_session(config, World())
    start = {n: a.A.detach().clone() for n, a in session.method.adapters.items()}
    return start, next(held for step, held in drive(session) if step == 2)


KINDS = {"weightlora": 8, "weightlora_plus": 16}


@pytest.mark.parametrize("kind", list(KINDS))
def test_survivors_begin_without_moments_counts_and_omega(kind, tmp_path):
    """B = 0, one scale α/r of the base rank, an optimizer that knows nothing of phase 1."""
    _, selected = selection(kind, tmp_path)
    names = [key.removesuffix("/A") for key in selected if key.endswith("/A")]
    assert 0 < len(names) <= 14
    for name in names:
        assert len(selected[f"{name}/A"]) == KINDS[kind]
        assert not selected[f"{name}/B"].any()
        assert torch.equal(selected[f"{name}/g"], torch.full((KINDS[kind],), 16 / 8))
        assert selected[f"{name}/mask"].all()
        for role in ("A", "B"):
            for part in ("exp_avg", "exp_avg_sq", "step"):
                assert not selected[f"{name}.{role}/{part}"].any(), f"{part} of phase 1 goes on"


@pytest.mark.parametrize("kind", list(KINDS))
def test_survivors_begin_with_another_A(kind, tmp_path):
    """A is redrawn, not set back to what phase 1 had started from."""
    start, selected = selection(kind, tmp_path)
    for name, A in start.items():
        if f"{name}/A" in selected:
            redrawn = selected[f"{name}/A"]
            assert float(redrawn.std()) == pytest.approx(float(A.std()), rel=0.1)
            assert float((redrawn.flatten()[: A.numel()] == A.flatten()).float().mean()) < 0.01


def lines(run) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


@pytest.mark.parametrize(("keep", "rank"), [(7, 16), (4, 24), (14, 8)])
def test_weightlora_plus_shares_out_the_ranks(keep, rank, small, tmp_path):
    """r ⌊n/K⌋ each; what is left over, and the parameters, are logged."""
    config = small_config(
        small, tmp_path, "method.kind=weightlora_plus", f"method.keep={keep}",
        "method.warmup_steps=2", "run.steps=5",
    )  # fmt: skip
    train_only(World(), config.model_dump())
    selection = json.loads((config.run_folder / "allocation.jsonl").read_text().splitlines()[-1])
    assert set(selection["ranks"].values()) == {rank}
    survivors = len(selection["survivors"])
    assert 0 < survivors <= keep
    sizes = {u["name"]: u["in_features"] + u["out_features"] for u in units(config)}
    last = lines(config.run_folder)[-1]
    assert last["method/rank_left_over"] == 14 * 8 - survivors * rank
    trained = sum(rank * sizes[name] for name in selection["survivors"])
    assert last["trainable_parameters"] == last["active_parameters"] == trained
    assert lines(config.run_folder)[0]["trainable_parameters"] == 8 * sum(sizes.values())


def units(config: Config) -> list[dict]:
    return json.loads((config.run_folder / "units.json").read_text())


def test_larger_micro_batches_after_selection(small, tmp_path, monkeypatch):
    """Other batches for the model, the same step for the optimizer."""
    honest, seen = training_step.accumulate, []

    def watched(session, batch, step):
        seen.append([len(micro_batch.records) for _, micro_batch in batch.micro_batches])
        return honest(session, batch, step)

    monkeypatch.setattr(training_step, "accumulate", watched)
    found = {}
    for size in (None, 4, 8):
        config = small_config(
            small, tmp_path, f"run.name=size-{size}", "method.kind=weightlora", "run.steps=6",
            "method.warmup_steps=2",
            f"method.after_selection.micro_batch_size={'null' if size is None else size}",
        )  # fmt: skip
        train_only(World(), config.model_dump())
        found[size] = losses(config.run_folder)
    assert seen[:6] == [[2, 2, 2, 2]] * 6
    assert seen[6:12] == [[2, 2, 2, 2]] * 2 + [[4, 4]] * 4
    assert seen[12:] == [[2, 2, 2, 2]] * 2 + [[8]] * 4
    for size in (4, 8):
        assert found[size][:2] == found[None][:2]
        assert found[size] == pytest.approx(found[None], rel=1e-5)


# --- draws ----------------------------------------------------------------------------------------


def some_units(count: int = 28) -> list[Unit]:
    return [Unit(i, f"u{i}", i // 7, f"k{i % 7}", 32, 32) for i in range(count)]


def method_of(kind: str, seed: int, **options):
    method = METHODS[kind](METHODS[kind].Options(**options), seed)
    method.adapters.units = some_units()
    return method


SEEDS = [0, 1, 2, 3, 4096, 2**19]


def test_another_seed_keeps_other_random_units():
    """RLoRA is WeightLoRA's ablation over seeds: each must draw anew."""
    kept = [tuple(method_of("rlora", seed).decide(0).survivors) for seed in SEEDS]
    assert len(set(kept)) == len(SEEDS)


def test_another_seed_draws_other_ranks():
    draws = [
        tuple(method_of("dylora", seed).decide(step).ranks["all"] for step in range(40))
        for seed in SEEDS
    ]
    assert len(set(draws)) == len(SEEDS)


def test_another_seed_draws_other_strategies(small, tmp_path):
    """Uniform draws depend on the seed alone."""
    draws = []
    for seed in SEEDS:
        config = small_config(
            small, tmp_path, "method.kind=lelora", "method.policy.mode=uniform", f"run.seed={seed}",
        )  # fmt: skip
        session = open_session(config, World())
        draws.append(json.dumps([session.method.decide(step).to_plain() for step in range(4)]))
    assert len(set(draws)) == len(SEEDS)


def test_every_seed_unit_and_purpose_draws_its_own():
    firsts = [
        torch.rand(4, generator=method_of("lora", seed).generator(unit, purpose)).tolist()
        for seed in SEEDS
        for unit in some_units(3)
        for purpose in (0, 1)
    ]
    assert len({tuple(first) for first in firsts}) == len(firsts)


def test_every_seed_step_and_micro_batch_drops_its_own():
    linear = nn.Linear(256, 8)
    masks = set()
    places = [(0, 0), (0, 1), (1, 0), (65536, 0), (131072, 3)]
    for seed in SEEDS:
        method = method_of("lora", seed)
        host = AdaptedLinear(linear, "none")
        host.adapter = GatedAdapter(
            torch.ones(256, 256).triu(), torch.ones(256), torch.ones(256, 8)
        )
        host.dropout = Dropout(0.5, True, method.adapters._dropout_seed, 0)
        host.train()
        for step, micro_batch in places:
            method.adapters.set_dropout_seed(step, micro_batch)
            masks.add(tuple(host(torch.ones(1, 256)).flatten().tolist()))
    assert len(masks) == len(SEEDS) * len(places)


# --- what a splitting method starts from ----------------------------------------------------------


@pytest.fixture(scope="module")
def split(small):
    """A short run of two splitting methods."""
    for kind in ("lelora", "pissa"):
        train_only(World(), splitting_run(small, kind).model_dump())
    return small


EVAL = "configs/quickstart/eval.jsonl"


def splitting_run(tmp, kind: str, *more: str, name: str = "") -> Config:
    return small_config(
        tmp, tmp, f"run.name={name or kind}", f"method.kind={kind}", f"data.eval={EVAL}",
        "run.steps=4", "checkpoint.every=2", "checkpoint.keep=9", "data.eval_records=4", *more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lelora", "pissa"])
def test_initial_tensors_are_written_once_with_their_checksum(split, kind, monkeypatch):
    run = split / "runs" / kind
    file = run / "initial.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (run / "initial.sha256").read_text() == f"{digest}  initial.safetensors\n"
    for saved in (run / "checkpoints").iterdir():
        assert json.loads((saved / "state.json").read_text())["initial"] == digest
    written = (file.stat().st_ino, file.stat().st_mtime_ns)

    def never(*_):
        raise AssertionError("the decomposition was computed anew")

    monkeypatch.setattr(spectral_init, "singular_triplets", never)
    cache = f"data.cache={split}/another-cache"
    train_only(World(), splitting_run(split, kind, "run.steps=6", cache).model_dump())
    assert len(losses(run)) == 6
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == written, "written again"


def attempts(config: Config, checkpoint, out):
    """Whatever needs the initial tensors."""
    return {
        "evaluate": lambda: evaluate_saved(config, World(), read_saved(checkpoint)),
        "adapter": lambda: export_run(checkpoint, out, World()),
        "merged": lambda: export_run(checkpoint, out, World(), what="merged"),
    }


@pytest.mark.parametrize("what", ["evaluate", "adapter", "merged"])
@pytest.mark.parametrize("harm", ["damaged", "missing", "truncated", "empty"])
def test_initial_tensors_that_are_not_those_written_are_refused(split, harm, what, tmp_path):
    config = splitting_run(split, "pissa", name=f"{harm}-{what}")
    cut_run(split / "runs/pissa", config.run_folder, 2)
    file = config.run_folder / "initial.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "damaged":
        content[-5] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: -9 if harm == "truncated" else 0])
    before = held(config.run_folder)
    checkpoint = config.run_folder / "checkpoints/step-00000002"
    with pytest.raises(Exception) as refusal:
        attempts(config, checkpoint, tmp_path / "out")[what]()
    assert refusal.typename == "BadCheckpoint"
    message = str(refusal.value)
    assert str(file) in message and "\n" not in message
    assert ("missing" if harm == "missing" else "checksum") in message
    assert before == held(config.run_folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("harm", ["damaged", "missing", "empty"])
@pytest.mark.parametrize("kind", ["lelora", "pissa"])
def test_initial_tensors_are_computed_again_where_they_are_damaged(split, harm, kind, tmp_path):
    """From the same backbone, and taken as their digest is that of the checkpoint."""
    config = splitting_run(split, kind, f"data.cache={tmp_path}", name=f"{harm}-again-{kind}")
    cut_run(split / "runs" / kind, config.run_folder, 2)
    file = config.run_folder / "initial.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content if harm == "damaged" else b"")
    if harm == "missing":
        file.unlink()
    train_only(World(), config.model_dump())
    assert file.read_bytes() == (split / "runs" / kind / "initial.safetensors").read_bytes()
    assert losses(config.run_folder) == losses(split / "runs" / kind)[:4]


def test_initial_tensors_of_another_backbone_are_not_taken(split):
    config = splitting_run(split, "pissa", name="not-again")
    cut_run(split / "runs/pissa", config.run_folder, 2)
    file = config.run_folder / "initial.safetensors"
    file.write_bytes(b"")
    other = splitting_run(split, "pissa", "model.id=configs/quickstart/model", name="not-again")
    with pytest.raises(BadCheckpoint, match=r"initial\.safetensors: checksum"):
        train_only(World(), other.model_dump())
    assert file.read_bytes() == b""


def held(folder) -> list[tuple[str, int]]:
    """Files and when they were written, without the lock of whoever looked last."""
    files = (path for path in folder.iterdir() if path.name != ".lock")
    return sorted((path.name, path.stat().st_mtime_ns) for path in files)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["method.targets=all-linear"], "method.targets"),
        (["method.rank=4"], "method.rank"),
        (["method.kind=pissa"], "method.kind"),
        (["method.kind=lora"], "method.kind"),
        (["model.id=configs/quickstart/model"], "another backbone"),
    ],
)
def test_a_resumed_run_that_would_split_otherwise_is_refused(split, changes, key):
    """By the key's name, though the initial tensors do not fit long before keys are compared."""
    first = splitting_run(split, "lelora", "method.targets=[q_proj, o_proj]", name="some")
    if not first.run_folder.exists():
        train_only(World(), first.model_dump())
    name = "other-" + changes[0].replace("=", "-").replace("/", "-")
    kept = [] if "targets" in key else ["method.targets=[q_proj, o_proj]"]
    kind = "lelora" if "kind" not in changes[0] else changes[0].partition("=")[2]
    other = splitting_run(split, kind, *kept, *changes, name=name)
    cut_run(first.run_folder, other.run_folder, 2)
    with pytest.raises(Exception) as refusal:
        train_only(World(), other.model_dump())
    assert refusal.typename == "BadCheckpoint", refusal.value
    assert key in str(refusal.value)


def test_a_run_that_goes_on_from_another_one_is_whole_by_itself(split, tmp_path):
    """`run.resume=PATH` of another run: the initial tensors come along."""
    other = small_config(
        split, tmp_path, "run.name=heir", "method.kind=lelora", "run.steps=6", f"data.eval={EVAL}",
        "data.eval_records=4", f"run.resume={split}/runs/lelora/checkpoints/step-00000002",
    )  # fmt: skip
    train_only(World(), other.model_dump())
    digest = hashlib.sha256((split / "runs/lelora/initial.safetensors").read_bytes()).hexdigest()
    held = other.run_folder / "initial.safetensors"
    assert hashlib.sha256(held.read_bytes()).hexdigest() == digest
    last = other.run_folder / "checkpoints/step-00000006"
    assert json.loads((last / "state.json").read_text())["initial"] == digest
    found = [json.loads(x) for x in (other.run_folder / "metrics.jsonl").read_text().splitlines()]
    scores = evaluate_saved(other, World(), read_saved(last))
    assert scores["eval_loss"] == pytest.approx(found[-1]["eval_loss"], rel=1e-6)


# --- the cache of decompositions ------------------------------------------------------------------


def counted(monkeypatch) -> list:
    calls, honest = [], spectral_init.singular_triplets

    def watched(weight, ranges):
        calls.append(list(ranges))
        return honest(weight, ranges)

    monkeypatch.setattr(spectral_init, "singular_triplets", watched)
    return calls


def started(config: Config) -> dict[str, bytes]:
    """Every initial tensor's bytes."""
    session = open_session(config, World())
    return {
        f"{name}/{part}": tensor.detach().numpy().tobytes()
        for name, start in session.initial_adapters.items()
        for part, tensor in [
            *((role, getattr(start.adapter, role)) for role in ("A", "g", "B")),
            ("spectrum", start.spectrum),
        ]
    }


def test_decompositions_are_computed_once(split, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    cache = f"data.cache={tmp_path}"
    first = started(splitting_run(split, "lelora", cache))
    assert len(calls) == 14
    assert started(splitting_run(split, "lelora", cache)) == first
    assert started(splitting_run(split, "lelora", cache, "model.quantization=nf4")) == first
    assert len(calls) == 14, "the cache was not used"
    started(splitting_run(split, "lelora", cache, "method.rank=4"))
    assert len(calls) == 28, "other slices are another decomposition"
    for file in list((tmp_path / "spectra").iterdir())[::2]:
        file.write_bytes(file.read_bytes()[:-7])
    assert started(splitting_run(split, "lelora", cache)) == first, "a cut file was believed"
    assert len(calls) > 28


def test_a_cached_decomposition_with_other_values_is_a_miss(split, tmp_path):
    """The file is whole, and not what was written."""
    config = splitting_run(split, "pissa", f"data.cache={tmp_path}")
    names = ("U", "S", "V", "spectrum")
    first = open_session(config, World()).initial_adapters
    files = sorted((tmp_path / "spectra").iterdir())
    before = [file.read_bytes() for file in files]
    for file in files:
        held = load_file(file)
        assert held.keys() == set(names)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file(held | {"U": held["U"] * 3}, file, metadata)
    second = open_session(config, World()).initial_adapters
    for name, initial in first.items():
        assert torch.equal(initial.adapter.delta(), second[name].adapter.delta())
    assert [file.read_bytes() for file in files] == before, "they were not written anew"


def test_processes_that_start_at_once_share_a_cold_cache(split, tmp_path):
    config = splitting_run(split, "lelora", f"data.cache={tmp_path}/cold")
    processes = multiprocessing.get_context("fork")
    ready, digests = processes.Barrier(4), processes.Queue()

    def body() -> None:
        ready.wait(60)
        held = started(config)
        digests.put(hashlib.sha256(b"".join(held[name] for name in sorted(held))).hexdigest())

    children = [processes.Process(target=body) for _ in range(4)]
    for child in children:
        child.start()
    found = [digests.get(timeout=120) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(set(found)) == 1
    files = [path.name for path in (tmp_path / "cold/spectra").iterdir()]
    assert len(files) == 14 and all(name.endswith(".safetensors") for name in files)


# --- validation records ---------------------------------------------------------------------------


def validating(small, engine: str, *more: str) -> Config:
    """11 micro-batches of validation: neither 2 nor 3 processes share them evenly."""
    return small_config(
        small, small, f"engine.kind={engine}", "method.kind=lelora", "run.steps=3",
        "method.policy.credit=global", "data.micro_batch_size=3", *more,
    )  # fmt: skip


def test_validation_is_the_same_for_1_2_and_3_processes(small, tmp_path):
    """The very same number before the first update: micro-batches, and the order in which their
    float32 sums are added in float64, do not depend on who computes them. After updates it is what
    the order of the gradient's float32 sum leaves in the adapters: 1e-5 of the loss."""
    expected = validation(World(), validating(small, "single").model_dump())
    assert len(expected["left_out"]) == len(set(expected["left_out"])) == 32
    assert set(expected["seen"]) == set(range(64)) - set(expected["left_out"])
    assert len(set(expected["losses"])) == 4
    found = {}
    for processes, engines in ((2, ["fsdp2"]), (3, ["ddp"])):
        cases = {e: ("validation", validating(small, e).model_dump()) for e in engines}
        results = run_cases(tmp_path / f"work-{processes}", cases, processes)
        found |= {f"{e} x{processes}": ok(ranks) for e, ranks in results.items()}
    for name, ranks in found.items():
        for rank in ranks:
            assert rank["left_out"] == expected["left_out"], name
            assert rank["losses"] == ranks[0]["losses"], f"{name}: ranks differ"
            assert rank["losses"][0] == expected["losses"][0], name
            assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
            assert not set(rank["seen"]) & set(expected["left_out"])
        assert {r for rank in ranks for r in rank["seen"]} == set(expected["seen"])


def test_packing_and_dropout_leave_validation_alone(small):
    plain = validation(World(), validating(small, "single").model_dump())
    other = validating(small, "single", "data.packing=true", "method.dropout=0.3")
    found = validation(World(), other.model_dump())
    assert found["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-6)
    assert found["seen"] == plain["seen"] and found["left_out"] == plain["left_out"]


def test_methods_that_are_compared_leave_the_same_records_out(small, tmp_path):
    """`data.leave_out` gives those of a method that validates; a larger one begins with them."""
    own = open_session(validating(small, "single"), World()).left_out.tolist()
    lora = ["method.kind=lora"]
    for count in (32, 40):
        config = small_config(
            small, tmp_path, *lora, f"data.leave_out={count}", "data.eval=left_out"
        )
        session = open_session(config, World())
        assert len(session.left_out) == count and session.left_out.tolist()[:32] == own
        _, evaluated = session.held_out()
        assert evaluated.tolist() == session.left_out.tolist()
    both = validating(small, "single", "data.leave_out=8", "data.eval=left_out")
    session = open_session(both, World())
    assert session.left_out.tolist() == own and session.held_out()[1].tolist() == own[:8]
    assert open_session(small_config(small, tmp_path, *lora), World()).left_out.tolist() == []
    seeds = [
        tuple(open_session(validating(small, "single", f"run.seed={s}"), World()).left_out)
        for s in (1, 2)
    ]
    assert len({*seeds, tuple(own)}) == 3


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ([], 0),
        (["method.policy.signal=validation"], 32),
        (["method.policy.signal=validation", "method.policy.validation_samples=5"], 5),
        (["method.policy.mode=uniform", "method.policy.credit=global"], 0),
    ],
)
def test_only_a_policy_that_validates_takes_records(changes, count, small):
    config = small_config(small, small, "method.kind=lelora", *changes)
    session = open_session(config, World())
    assert len(session.left_out) == count
