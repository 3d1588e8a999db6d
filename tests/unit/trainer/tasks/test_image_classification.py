"""Image classification: sources, pixels, scores, export."""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPImageProcessor,
)
from transformers.image_utils import load_image

from tests.helpers import TINY, losses, quick_config
from tests.images import BRIGHT, save_images, save_vit
from trainer.checkpoint.saved import read_saved
from trainer.checkpoint.state import load_trained
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run, saved_config
from trainer.memory.estimate import predict
from trainer.model.image_processor import ImageProcessor
from trainer.records.jsonl import read_metrics
from trainer.report.data_view import show
from trainer.run.run import run
from trainer.session import open_data, open_session
from trainer.training.evaluation import evaluate, evaluate_saved


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    save_vit(folder / "vit")
    save_images(folder / "data/train", 30)
    save_images(folder / "data/test", 12)
    return folder


def configured(tmp_path: Path, place: Path, *changes: str) -> Config:
    return quick_config(
        tmp_path, f"model.id={place}/vit", "task.kind=image_classification", "data.packing=false",
        f"data.train={place}/data", f"data.eval={place}/data", "method.targets=all-linear",
        "data.train_records=null", "data.eval_records=null", *changes,
    )  # fmt: skip


def rows(place: Path) -> list[dict]:
    files = sorted(place.glob("data/train/*/*.png"))
    return [{"image": str(file), "label": file.parent.name} for file in files]


def test_a_folder_parquet_and_a_saved_data_set_are_the_same(tmp_path, place):
    """As are file names in a json file. Images are kept as they are encoded."""
    found = rows(place)
    table = datasets.Dataset.from_list(found).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    encoded = [{"bytes": Path(row["image"]).read_bytes(), "path": None} for row in found]
    columns = {"image": encoded, "label": [row["label"] for row in found]}
    pq.write_table(pa.table(columns), tmp_path / "structs.parquet")
    columns["image"] = [one["bytes"] for one in encoded]
    pq.write_table(pa.table(columns), tmp_path / "bytes.parquet")
    datasets.Dataset.from_list(found).to_json(tmp_path / "paths.jsonl")
    sources = ["saved", "structs.parquet", "bytes.parquet", "paths.jsonl"]
    digests = set()
    for source in [f"{place}/data", f"{place}/data/train", *(tmp_path / one for one in sources)]:
        config = configured(tmp_path, place, f"data.train={source}")
        _, task, train, _ = open_data(config, World())
        digests.add(train.digest)
        assert task.labels_state() == {"labels": sorted(BRIGHT)}
    assert len(digests) == 1
    example = train[0]
    assert example.image == encoded[0]["bytes"] and len(example.input_ids) == 17


def test_pixels_loss_and_accuracy_are_those_of_the_plain_model(tmp_path, place):
    session = open_session(configured(tmp_path, place), World())
    model = AutoModelForImageClassification.from_pretrained(f"{place}/vit", num_labels=3).eval()
    head = dict(session.backbone.heads["classifier"].named_parameters())
    for name in ("weight", "bias"):
        value = next(v for k, v in head.items() if k.endswith(name))
        getattr(model.classifier, name).data = value.detach()
    processor = AutoImageProcessor.from_pretrained(f"{place}/vit")
    files = sorted(place.glob("data/test/*/*.png"))
    pixels = processor(images=[Image.open(f) for f in files], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([sorted(BRIGHT).index(file.parent.name) for file in files])
    with torch.no_grad():
        logits = model(pixels).logits
    batch = session.task.collate([[session.eval_data[""][i]] for i in range(len(files))])
    torch.testing.assert_close(batch.inputs["pixel_values"], pixels, rtol=0, atol=0)
    scores = evaluate(session)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert scores["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert scores["eval_accuracy"] == float((logits.argmax(-1) == labels).double().mean())


def test_it_learns_and_exports(tmp_path, place, capsys):
    config = configured(
        tmp_path, place, "run.steps=30", "optim.learning_rate=1e-2", "run.eval_at_start=true",
        "run.verify=auto", "run.name=learns", "method.alpha=16", "data.batch_size=15",
        "data.micro_batch_size=5", "model.quantization=int8",
    )  # fmt: skip
    run(config, World())
    trained = losses(config.run_folder)
    assert trained[-1] < trained[0] / 4
    scores = [s for s in read_metrics(config.run_folder / "metrics.jsonl") if "eval_loss" in s]
    assert scores[0]["eval_accuracy"] < 0.6 and scores[-1]["eval_accuracy"] > 0.9
    saved = read_saved(config.run_folder)
    config = saved_config(saved.state)
    assert evaluate_saved(config, World(), saved)["eval_loss"] == scores[-1]["eval_loss"]

    plain = config.model_copy(
        update={"model": config.model.model_copy(update={"quantization": "none"})}
    )
    session = open_session(plain, World(), saved.initial_adapters)
    load_trained(session, saved.checkpoint, saved.tensors)
    batch = session.task.collate([[session.eval_data[""][i]] for i in range(12)])
    with torch.no_grad(), session.method.inference():
        ours = session.model.eval()(**batch.inputs).logits
    base = AutoModelForImageClassification.from_pretrained(
        config.model.id, num_labels=3, dtype=torch.float32
    )
    theirs = PeftModel.from_pretrained(base, config.run_folder / "adapter").eval()
    export_run(
        config.run_folder, tmp_path / "merged", World(), what="merged", base="original",
        measure=False,
    )  # fmt: skip
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == dict(enumerate(sorted(BRIGHT)))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged")
    files = sorted(place.glob("data/test/*/*.png"))
    pixels = processor(images=[Image.open(f) for f in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        for model in (theirs, merged):
            torch.testing.assert_close(
                model(pixel_values=pixels).logits, ours, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_an_image_is_opened_as_transformers_does_it(tmp_path, place, mode):
    """Turned as its camera noted it, in three colours."""
    config = configured(tmp_path, place)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    file, exif = tmp_path / f"1.{'jpg' if mode == 'CMYK' else 'png'}", Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.fromarray(pixels).convert(mode).save(file, exif=exif)
    found = ImageProcessor(config.model)([file.read_bytes()])
    theirs = AutoImageProcessor.from_pretrained(f"{place}/vit")
    expected = theirs(images=load_image(str(file)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_it_is_estimated_and_shown(tmp_path, place, capsys):
    config = configured(tmp_path, place)
    assert predict(configured(tmp_path, place, "engine.kind=auto"), 1, 2**33).probe is not None
    tokenizer, _, train, _ = open_data(config, World())
    show("train", train, tokenizer, config.data, 2)
    assert "17 tokens, label 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.packing=true"], "data.packing: true given with task.kind=image_classification"),
        (["data.format=text"], "data.format: text given with task.kind=image_classification"),
        (["model.tokenizer=PLACE/vit"], "model.tokenizer: .*/vit given, but images have no tokens"),
        (["model.id=TINY"], "no usable image processor"),
        (["data.train=PLACE/broken"], r"broken:1: image: .*bad.png: no image that can be read"),
        (["data.train=PLACE/deep"], r"deep:1: image: .*deep/a/1.png: an image of more than 8 bits"),
        (["model.id=PLACE/ragged"], r"ragged: its image processor makes images of several sizes"),
        (["data.train=PLACE/text.jsonl"], "text.jsonl:1: image holds a int; accepted: an image as"),
        (
            ["data.train=PLACE/data/train/left"],
            "left: no data file in this folder; accepted: .*, im",
        ),
        (["data.eval=PLACE/other"], "label 'bottom': not in the training data"),
    ],
)
def test_refused(tmp_path, place, changes, message):
    for name in ("good", "bad"):
        (place / "broken" / name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(place / "broken/good/good.png")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(
        whole, "png"
    )
    (place / "broken/bad/bad.png").write_bytes(whole.getvalue()[:2000])
    for name in ("a", "b"):
        (place / "deep" / name).mkdir(parents=True, exist_ok=True)
        deep = np.full((4, 4), 30000, np.uint16)
        Image.fromarray(deep).save(place / "deep" / name / "1.png")
    save_vit(place / "ragged")
    resized = CLIPImageProcessor(size={"shortest_edge": 16}, do_center_crop=False)
    resized.save_pretrained(place / "ragged")
    (place / "other/bottom").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(place / "other/bottom/1.png")
    lines = ['{"image": 3, "label": "a"}', '{"image": 4, "label": "b"}']
    (place / "text.jsonl").write_text("\n".join(lines))
    given = [c.replace("PLACE", str(place)).replace("TINY", str(TINY)) for c in changes]
    with pytest.raises(UserError, match=message):
        open_data(configured(tmp_path, place, *given), World())
