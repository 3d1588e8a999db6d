"""Classified records end to end in rows on a GPU: decoders and encoders, against padded rows."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from tests.gpu.without_waiting import loss_without_waiting
from tests.helpers import losses, quick_config, save_random_model
from tests.unit.trainer.tasks.test_encoders_end_to_end import encoder, examples, task
from trainer.config.config import Config
from trainer.distributed import process_group
from trainer.model.attention import register_attention
from trainer.model.compilations import Compilations
from trainer.run.run import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

WITHOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PARTS = {
    "decoder": [],
    "decoder-nf4": ["model.quantization=nf4", "engine.compile=true"],
    "decoder-regression": ["task.problem=regression"],
    "bert": ["model.id=ENCODERS/bert", "method.targets=all-linear"],
    "roberta": ["model.id=ENCODERS/roberta", "method.targets=all-linear", "engine.compile=true"],
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    for kind in ("bert", "roberta"):
        auto = AutoModelForSequenceClassification
        save_random_model(folder / kind, kind, auto, **WITHOUT)
        save_random_model(folder / f"{kind}-drops", kind, auto)
    return folder


def configuration(tmp_path, encoders, name: str, *changes: str) -> Config:
    lines = ["text\tlabel", *(f"{'one more ' * (n % 7)}{n}\t{n % 2}" for n in range(80))]
    (tmp_path / "numbers.tsv").write_text("\n".join(lines))
    return quick_config(
        tmp_path, f"run.name={name}", "engine.device=cuda", "model.dtype=bfloat16",
        "task.kind=sequence_classification", "data.format=classification", "data.text=text",
        "data.label=label", f"data.train={tmp_path}/numbers.tsv", "data.train_records=null",
        "data.eval=left_out", "data.leave_out=16", "data.eval_records=null", "data.max_length=64",
        "data.batch_size=8", "data.micro_batch_size=4", "run.steps=12", "run.verify=full",
        *(change.replace("ENCODERS", str(encoders)) for change in changes),
    )  # fmt: skip


@pytest.mark.parametrize("graphs", ["false", "true"])
@pytest.mark.parametrize("part", PARTS)
def test_losses_of_padded_rows(tmp_path, encoders, part: str, graphs: str, capsys) -> None:
    """With `run.verify=full`: every record's hidden states in a row are those of it alone. Graphs
    are captured for rows end to end alone."""
    found = []
    for free in ("true", "false"):
        of_graphs = ["engine.activation_checkpointing=false"]
        if free == "true" and graphs == "true":
            of_graphs += ["engine.cuda_graphs=true", "engine.compile=true"]
        else:
            of_graphs += ["engine.cuda_graphs=false"]
        config = configuration(
            tmp_path, encoders, f"free-{free}", f"data.padding_free={free}", "log.progress=plain",
            *PARTS[part], *of_graphs,
        )  # fmt: skip
        run(config, process_group.start("cuda"))
        found.append(losses(config.run_folder))
    said = capsys.readouterr().out
    assert said.count("end to end in one row") == 1 and "varlen" in said
    assert said.count("CUDA graphs of") == (graphs == "true")
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-2)
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_encoders_end_to_end_learn_and_compile_nothing_later(tmp_path, encoders, capsys) -> None:
    """With their usual dropout, which the kernel draws: no step compiles after the first ones."""
    counted, seen = Compilations(), []

    class Watch:
        def on_step(self, step) -> None:
            seen.append(counted.total)

    config = configuration(
        tmp_path, encoders, "rows", "model.id=ENCODERS/bert-drops",
        "engine.compile=true", "run.steps=60", "log.progress=plain", "method.targets=all-linear",
    )  # fmt: skip
    with counted:
        run(config, process_group.start("cuda"), callbacks=[Watch()])
    said = capsys.readouterr().out
    assert "end to end in one row" in said and "varlen" in said
    assert seen[-1] == seen[len(seen) // 2]
    values = losses(config.run_folder)
    assert sum(values[-10:]) < sum(values[:10])


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta"])
def test_each_text_as_alone(kind: str) -> None:
    """bfloat16 end to end by varlen against float32 alone; nothing synchronises."""
    register_attention()
    model, given = encoder(kind, attn_implementation="sdpa").cuda(), examples(kind)
    alone = []
    for example in given:
        types = {"token_type_ids": torch.tensor([example.token_type_ids]).cuda()}
        ids = {"input_ids": torch.tensor([example.input_ids]).cuda()}
        alone.append(model(**ids, **(types if example.token_type_ids else {})).logits[0])
    expected = F.cross_entropy(
        torch.stack(alone), torch.tensor([int(e.label) for e in given]).cuda(), reduction="sum"
    )
    loss = loss_without_waiting(task(), model, given)
    assert loss == pytest.approx(float(expected.detach()), rel=5e-2)
