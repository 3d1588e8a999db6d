"""Losses and metrics against references computed by hand, labels, and encodings."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as scores
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trainer.errors import UserError
from trainer.tasks.base import IGNORED, Example, Record
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.sequence_classification import (
    SequenceClassification,
    SequenceClassificationOptions,
)


def classifier(tokenizer, labels: list | None = None) -> SequenceClassification:
    """For classes where `labels` are given, else for numbers."""
    problem = "classification" if labels is not None else "regression"
    task = SequenceClassification(SequenceClassificationOptions(problem=problem), tokenizer)
    task.learn_labels(labels or [])
    return task


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# --- metrics


def test_scores_of_two_classes(tokenizer) -> None:
    truth = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    guess = [
        1,
        1,
        1,
        0,
        1,
        1,
        0,
        0,
        0,
        0,
    ]  # 3 true and 2 false positives, 1 false, 4 true negatives
    found = classifier(tokenizer, [0, 1]).metrics(guess, [float(label) for label in truth])
    assert found == pytest.approx(
        {"accuracy": 0.7, "f1": 6 / (6 + 2 + 1), "matthews": (3 * 4 - 2 * 1) / 600**0.5}
    )
    assert found["f1"] == pytest.approx(scores.f1_score(truth, guess))
    assert found["matthews"] == pytest.approx(scores.matthews_corrcoef(truth, guess))


def test_scores_of_three_classes(tokenizer) -> None:
    truth = [0, 0, 0, 1, 1, 2, 2, 2]
    guess = [0, 0, 1, 1, 2, 2, 2, 0]
    found = classifier(tokenizer, ["a", "b", "c"]).metrics(guess, truth)
    each = [2 * 2 / (3 + 3), 2 * 1 / (2 + 2), 2 * 2 / (3 + 3)]  # 2 TP / (guessed + true)
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["f1"] == pytest.approx(np.mean(each))
    assert found["matthews"] == pytest.approx(scores.matthews_corrcoef(truth, guess))


@pytest.mark.parametrize("constant", [0, 1])
def test_one_class_is_always_predicted(tokenizer, constant: int) -> None:
    truth = [1, 0, 1, 1]
    found = classifier(tokenizer, [0, 1]).metrics([constant] * 4, truth)
    expected = {"accuracy": 0.75, "f1": 6 / 7} if constant else {"accuracy": 0.25, "f1": 0.0}
    assert found == pytest.approx({**expected, "matthews": 0.0})


@pytest.mark.filterwarnings("ignore:A single label")  # sklearn's, of the Matthews score
def test_evaluation_data_of_one_class(tokenizer) -> None:
    found = classifier(tokenizer, [0, 1]).metrics([0, 0], [0, 0])
    assert (found["accuracy"], found["f1"]) == (1.0, 0.0)


def test_correlations(tokenizer) -> None:
    guess, truth = [1.0, 2.0, 2.0, 4.0, 30.0], [0.5, 3.0, 1.0, 2.0, 5.0]
    found = classifier(tokenizer).metrics(guess, truth)
    ranks = ([1, 2.5, 2.5, 4, 5], [1, 4, 2, 3, 5])
    assert found["pearson"] == pytest.approx(np.corrcoef(guess, truth)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["spearman"] == pytest.approx(stats.spearmanr(guess, truth).statistic)
    assert found["pearson"] != pytest.approx(found["spearman"], abs=0.02)
    reversed_ = classifier(tokenizer).metrics([-value for value in truth], truth)
    assert reversed_ == pytest.approx({"pearson": -1.0, "spearman": -1.0})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("guess", "truth"),
    [([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0], [1.0])],
)
def test_a_constant_has_no_correlation(tokenizer, guess: list, truth: list) -> None:
    found = classifier(tokenizer).metrics(guess, truth)
    assert sorted(found) == ["pearson", "spearman"]
    assert all(np.isnan(value) for value in found.values())


# --- labels


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (["10", "9", "-1", "10"], ["-1", "9", "10"]),
        ([1, 0, 1, 2], ["0", "1", "2"]),
        (["not_entailment", "entailment"], ["entailment", "not_entailment"]),
        (["b", "3", "a", "20"], ["3", "20", "a", "b"]),
        (["1", "01", "001", "0"], ["0", "001", "01", "1"]),  # one value: by name, on every rank
        (["--5", "²", "5"], ["5", "--5", "²"]),  # only digits are numbers
        (["0.5", "-"], ["-", "0.5"]),
    ],
)
def test_order_of_labels(tokenizer, raw: list, expected: list[str]) -> None:
    for labels in (raw, raw[::-1]):
        assert classifier(tokenizer, labels).labels == expected


def test_labels_are_stored_and_restored(tokenizer) -> None:
    task = classifier(tokenizer, ["b", "a"])
    other = SequenceClassification(SequenceClassificationOptions(), tokenizer)
    other.load_labels_state(task.labels_state())
    assert other.labels == ["a", "b"]
    records = [Record([("x", False)], label=label) for label in ("b", "a")]
    assert [example.label for example in other.encode(records, 9)] == [1.0, 0.0]
    assert classifier(tokenizer).labels_state() == {}


def test_one_label_is_refused(tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.label: one label only .*\(a\).*two or more"):
        classifier(tokenizer, ["a", "a"])
    assert classifier(tokenizer).is_regression  # which looks at no labels


def test_model_configuration(tokenizer, llama_config) -> None:
    config = llama_config()
    task = classifier(tokenizer, ["x", "y", "z"])
    task.configure(config)
    assert (config.num_labels, config.problem_type) == (3, "single_label_classification")
    assert config.id2label == {0: "x", 1: "y", 2: "z"}
    assert config.label2id == {"x": 0, "y": 1, "z": 2}
    assert config.pad_token_id == tokenizer.pad_token_id == 0
    model = LlamaForSequenceClassification(config)
    assert model.score.out_features == 3
    assert task.trained_modules(model) == ["score"]
    classifier(tokenizer).configure(config)
    assert (config.num_labels, config.problem_type) == (1, "regression")


# --- encoding


@pytest.fixture(scope="module")
def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Words, [CLS] and [SEP], and a type for each text of a pair, as BERT has them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def pair(first: str, second: str, label: str = "0") -> Record:
    return Record([(first, False), (second, False)], label=label)


def test_pairs_with_a_separator(bert_tokenizer) -> None:
    task = classifier(bert_tokenizer, [0, 1])
    records = [pair("a b", "c"), pair("a b c d", "e f"), Record([("f", False)], label=1)]
    whole, cut, single = task.encode(records, 7)
    assert (list(whole.input_ids), whole.truncated) == ([2, 4, 5, 3, 6, 3], False)
    assert list(whole.token_type_ids) == [0, 0, 0, 0, 1, 1]
    assert (list(cut.input_ids), cut.truncated) == ([2, 4, 5, 3, 8, 9, 3], True)  # the longer text
    assert list(single.input_ids) == [2, 9, 3]
    batch = task.collate([[whole], [single]])
    assert batch.inputs["input_ids"].tolist() == [[2, 4, 5, 3, 6, 3], [2, 9, 3, 0, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]
    assert (batch.targets.tolist(), batch.weight, batch.tokens) == ([0, 1], 2, 9)


def test_empty_text_without_special_tokens_is_refused(tokenizer) -> None:
    assert classifier(tokenizer, [0, 1]).encode([Record([("", False)], label=0)], 9) == ["no text"]


def test_no_records_are_no_examples(tokenizer) -> None:
    assert CausalLM(CausalLMOptions(), tokenizer).encode([], 9) == []
    assert classifier(tokenizer, [0, 1]).encode([], 9) == []


# --- the classification losses


def classify(tokenizer, llama_config, labels: list | None):
    """A task, its model and three encoded records of different lengths."""
    task = classifier(tokenizer, labels)
    config = llama_config()
    task.configure(config)
    model = LlamaForSequenceClassification(config).eval()
    raw = ["1", "0", "2"] if labels is not None else ["1.5", "-2", "0.25"]
    texts = ["one two three four", "five", "six seven"]
    records = [Record([(text, False)], label=y) for text, y in zip(texts, raw, strict=True)]
    return task, model, task.encode(records, 64)


def logits_of(model, example: Example) -> np.ndarray:
    """Without padding: one record alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(example.input_ids)])).logits[0].numpy()


@pytest.mark.parametrize("labels", [[0, 1, 2], None])
@pytest.mark.parametrize("width", [0, 40])
def test_records_of_one_row_have_the_scores_that_they_have_alone(
    tokenizer, llama_config, labels, width: int
) -> None:
    task, model, examples = classify(tokenizer, llama_config, labels)
    alone = torch.tensor(np.stack([logits_of(model, example) for example in examples]))
    batch = task.collate([examples], width=width)
    rows, length = batch.inputs["input_ids"].shape
    assert rows == 1 and length == max(width, sum(len(e.input_ids) for e in examples))
    assert (batch.tokens, batch.weight) == (sum(len(e.input_ids) for e in examples), 3)
    loss, predicted, each = task.scored(model, batch)
    if labels is None:
        expected, guesses = (alone.squeeze(-1) - batch.targets).square(), alone.squeeze(-1)
    else:
        expected = -alone.log_softmax(-1)[range(3), batch.targets]
        guesses = alone.argmax(-1)
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predicted, guesses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-5, atol=1e-5)
    gradients = []
    for made in (batch, task.collate([[example] for example in examples])):
        model.zero_grad()
        task.loss(model, made)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 5
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_classification_loss(tokenizer, llama_config) -> None:
    task, model, examples = classify(tokenizer, llama_config, [0, 1, 2])
    loss, guesses = task.loss(model, task.collate([[example] for example in examples]))
    logits = np.stack([logits_of(model, example) for example in examples])
    expected = -log_softmax(logits)[[0, 1, 2], [1, 0, 2]].sum()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert guesses.tolist() == logits.argmax(-1).tolist()


def test_regression_loss(tokenizer, llama_config) -> None:
    task, model, examples = classify(tokenizer, llama_config, None)
    loss, guesses = task.loss(model, task.collate([[example] for example in examples]))
    predicted = np.array([logits_of(model, example)[0] for example in examples])
    assert float(loss.detach()) == pytest.approx(
        ((predicted - [1.5, -2, 0.25]) ** 2).sum(), rel=1e-5
    )
    assert guesses.tolist() == pytest.approx(predicted.tolist(), rel=1e-5)


@pytest.mark.parametrize("labels", [None, [0, 1, 2]], ids=["regression", "classification"])
def test_empty_batch_adds_nothing(tokenizer, llama_config, labels) -> None:
    task, model, examples = classify(tokenizer, llama_config, labels)
    batch = task.collate([[examples[0]]], empty=True)
    assert (batch.weight, batch.tokens) == (0, 0)
    loss, _ = task.loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(model.score.weight.grad.abs().max()) == 0.0  # neither NaN nor missing


# --- the causal loss


@pytest.fixture(scope="module")
def llama(llama_config):
    torch.manual_seed(1)
    return LlamaForCausalLM(llama_config()).eval()


def prompt_completion(prompt: str, completion: str) -> Record:
    return Record([(prompt, False), (completion, True)])


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_causal_loss(tokenizer, llama, loss_on: str) -> None:
    task = CausalLM(CausalLMOptions(loss_on=loss_on), tokenizer)
    records = [prompt_completion("what is one and one?", "two"), prompt_completion("a", "b c d e")]
    examples = task.encode(records, 64)
    batch = task.collate([[example] for example in examples])
    loss, predictions = task.loss(llama, batch)
    expected, terms = 0.0, 0
    for record, example in zip(records, examples, strict=True):
        (prompt, _), (completion, _) = record.segments
        given = tokenizer(prompt)["input_ids"]  # this tokenizer adds no <s>, and merges no border
        learned = [*tokenizer(completion)["input_ids"], 2]
        assert list(example.input_ids) == given + learned
        with torch.no_grad():
            logits = llama(input_ids=torch.tensor([given + learned])).logits[0].numpy()
        first = len(given) if loss_on == "completion" else 1
        for position, (_, token) in enumerate(pairwise(given + learned), 1):
            if position >= first:
                expected -= log_softmax(logits[position - 1])[token]
                terms += 1
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert batch.weight == terms == sum(example.weight for example in examples)
    assert predictions is None
    assert loss.dtype == torch.float32


def test_empty_causal_batch_adds_nothing(tokenizer, llama) -> None:
    task = CausalLM(CausalLMOptions(), tokenizer)
    batch = task.collate([task.encode([prompt_completion("a b", "c")], 64)], empty=True)
    assert (batch.weight, batch.tokens, set(batch.targets.flatten().tolist())) == (0, 0, {IGNORED})
    llama.zero_grad()
    loss, _ = task.loss(llama, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(llama.lm_head.weight.grad.abs().max()) == 0.0
    llama.zero_grad(set_to_none=True)


def test_the_first_token_is_never_learned(tokenizer) -> None:
    task = CausalLM(CausalLMOptions(loss_on="all"), tokenizer)
    (example,) = task.encode([Record([("a b c", True)], add_bos=False, add_eos=False)], 64)
    assert list(example.loss_mask) == [0] + [1] * (len(example.input_ids) - 1)
    (reason,) = task.encode([Record([("", True)], add_bos=False, add_eos=False)], 64)
    assert "no token to learn" in reason
