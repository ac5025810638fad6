"""The harness's requests: the same numbers as its own Hugging Face model, whatever the order, batch or window."""

import dataclasses
import json
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="hf-"))

import numpy as np
import pytest

import models
import run as command
from analysis.evaluate import Evaluate
from analysis.harness import check_ties, open_lm
from analysis.subject import Subject, Target
from checkpoint.series import Series
from data.tokenizer import load, train_tokenizer
from errors import RunError, UserError
from inference.score import TokenScores
from training.datasets import open_data

from .test_evaluate import BENCHMARKS, needs_benchmarks

CONTEXT = 24
TEXT = "The quick brown fox jumps over the lazy dog. Äpfel, 12 of them,\n\n  are in a box. "


@dataclasses.dataclass
class Request:
    """As the harness makes them."""

    args: tuple
    request_type: str = "loglikelihood"


@dataclasses.dataclass
class Uniform:
    """A model to which all of a vocabulary is equally likely; it remembers what it was asked."""

    vocab: int
    rows: list = dataclasses.field(default_factory=list)

    def score(self, rows):
        self.rows += [list(map(int, row)) for row in rows]
        return [
            TokenScores(np.full(len(r) - 1, -np.log(self.vocab), np.float32), np.zeros(len(r) - 1, int)) for r in rows
        ]

    def generate(self, prompts, sampling, seeds=None):
        self.rows += [list(prompt) for prompt in prompts]
        return [prompt[-sampling.max_new_tokens :] for prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    pytest.importorskip("lm_eval.api.task", reason="asks the harness; pip install -e '.[analysis]'")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([TEXT * 20], 320, path)
    return load(path)


@pytest.fixture
def lm(tokenizer):
    made = open_lm(tokenizer, CONTEXT, add_bos=True)
    made.subject = Uniform(tokenizer.vocab_size)
    return made


def test_context_and_continuation_are_encoded_together(lm, tokenizer):
    (whole,) = [tokenizer.encode("The quick brown fox")]
    for context, continuation in [("The quick", " brown fox"), ("The quick ", "brown fox")]:
        (e,) = lm.encode([(context, continuation)])
        assert e.row.tolist() == [tokenizer.bos_id, *whole]
        assert e.scored == len(whole) - len(tokenizer.encode("The quick"))
    without = open_lm(tokenizer, CONTEXT, add_bos=False)
    assert without.encode([("The quick", " brown fox")])[0].row.tolist() == whole
    for empty in ("", "  "):
        (e,) = without.encode([(empty, "fox")])
        assert e.row[0] == tokenizer.bos_id, "a model needs something to begin with"
        assert e.scored == len(e.row) - 1


def test_what_does_not_fit_is_cut_from_the_left(lm, tokenizer):
    request = Request((TEXT, " fox"))
    e = lm.encode([request.args])[0]
    whole = tokenizer.encode(TEXT.rstrip() + "  fox")
    assert e.row.tolist() == whole[-CONTEXT - 1 :]
    assert e.cut == len(whole) + 1 - CONTEXT - 1
    assert lm.cut([request, Request(("a", " b"))]) == 1
    with pytest.raises(UserError, match=f"has .* tokens, and the model's context {CONTEXT}"):
        lm.encode([("a", TEXT)])
    with pytest.raises(UserError, match="is empty"):
        lm.encode([("a", "")])


@pytest.mark.parametrize("text", ["a", TEXT, TEXT * 3])
def test_rolling_windows_score_every_token_once(lm, tokenizer, text):
    """A uniform model says log2(vocabulary) bits per token, however many windows there are."""
    ids = tokenizer.encode(text)
    windows = lm.windows(text)
    assert [int(t) for w in windows for t in w.row[-w.scored :]] == ids
    assert max(len(w.row) for w in windows) <= CONTEXT + 1
    (found,) = lm.loglikelihood_rolling([Request((text,))])
    assert found == pytest.approx(-len(ids) * np.log(tokenizer.vocab_size))
    assert lm.loglikelihood_rolling([Request(("",))]) == [0.0]


def test_generation_groups_settings_cuts_prompts_and_stops(lm, tokenizer):
    ask = {"until": ["brown"], "max_gen_toks": 8}
    prompts = [(TEXT, ask), ("quick brown fox", ask), ("quick brown fox", {"max_gen_toks": 4, "until": []})]
    found = lm.generate_until([Request(p, "generate_until") for p in prompts])
    assert [len(row) for row in lm.subject.rows[:1]] == [CONTEXT - 8]
    repeated = tokenizer.decode(tokenizer.encode("quick brown fox")[-8:])
    assert "brown" in repeated
    assert found[1] == repeated.split("brown")[0], "the model repeats its prompt, and it is cut before the stop"
    assert found[2] == tokenizer.decode(tokenizer.encode("quick brown fox")[-4:])
    assert lm.cut([Request(p, "generate_until") for p in prompts]) == 1
    with pytest.raises(UserError, match="24 new tokens are asked for"):
        lm.generate_until([Request(("a", {"max_gen_toks": CONTEXT}), "generate_until")])


def test_sampling_does_not_depend_on_the_order(lm):
    seen = []
    lm.subject.generate = lambda prompts, sampling, seeds: seen.append(
        (sampling, dict(zip(map(tuple, prompts), seeds)))
    )
    ask = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_gen_toks": 4}
    for texts in (["a", "b", "c"], ["c", "a", "b"]):
        with pytest.raises(TypeError):  # this model says nothing
            lm.generate_until([Request((t, ask)) for t in texts])
    assert seen[0] == seen[1]
    assert (seen[0][0].temperature, seen[0][0].top_p) == (0.5, 0.9)


def test_numbers_that_are_none_and_choices_that_are_one_are_refused(lm):
    lm.subject.score = lambda rows: [TokenScores(np.full(len(r) - 1, np.nan), np.zeros(len(r) - 1)) for r in rows]
    with pytest.raises(RunError, match="not finite"):
        lm.loglikelihood([Request(("a", " b"))])
    one, several, longer = [1, 1], [2, 2], [2, 4]
    apart, same, uniform = [0.0, -1.0], [-1.0, -1.0], [-3.4, -6.8]
    for scores, tokens, ties in (
        ([same] * 3 + [apart] * 7, several, 3),
        ([same] * 9 + [apart] * 91, one, 9),  # single tokens tie by chance in bfloat16
        ([uniform] * 3 + [apart] * 7, several, 0),
        ([uniform] * 3 + [apart] * 7, longer, 3),
        ([same], one, 1),
        ([[-1.0]] * 5, [3], 0),
    ):
        assert check_ties(scores, [tokens] * len(scores)) == ties
    for scores, tokens in (
        ([same] * 9 + [apart] * 91, several),
        ([same] * 11 + [apart] * 89, one),
        ([same] * 2, one),
        ([uniform] * 2, longer),
        ([uniform] * 9 + [apart] * 91, longer),
    ):
        with pytest.raises(RunError, match=f"all choices score the same in .* of {len(scores)} rows"):
            check_ties(scores, [tokens] * len(scores))


# ---- parity --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A random Llama that transformers saved, with LLaMA's tokenizer, as the harness's own model and as ours."""
    pytest.importorskip("lm_eval.api.task", reason="asks the harness; pip install -e '.[analysis]'")
    pytest.importorskip("torch", reason="compares with the harness's model; pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="compares with it; pip install -e '.[parity]'")
    pytest.importorskip("accelerate", reason="the harness's own model needs it; pip install accelerate")
    import torch
    from lm_eval.models.huggingface import HFLM

    file = BENCHMARKS.parent / "tokenizers" / "llama.model"
    if not file.exists():
        pytest.skip(f"compares with LLaMA's tokenizer, which is not at {file}")
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=192,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder / "hf")
    (folder / "hf" / "tokenizer.model").write_bytes(file.read_bytes())
    theirs = transformers.LlamaTokenizer(str(file), legacy=True)
    assert command.main(["import", str(folder / "hf"), "--run", str(folder / "run")]) == 0
    target = Target(f"{folder}/run@0", models.families(), open_data)
    entry = Series(folder / "run").resolve("0")[0]
    subject = Subject(target, entry, target.load(entry))
    return subject, lambda bos=None: HFLM(pretrained=model, tokenizer=theirs, batch_size=8, add_bos_token=bos)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The first rows of real benchmarks."""
    folder = tmp_path_factory.mktemp("few")
    names = {
        "arc/arc_challenge.jsonl": 5,
        "hellaswag/hellaswag_val_subset1000.jsonl": 4,
        "winogrande/winogrande.jsonl": 6,
        "lambada/lambada_openai.jsonl": 3,
        "crows_pairs/crows_pairs_anonymized.csv": 6,
    }
    for name, rows in names.items():
        (folder / name).parent.mkdir(exist_ok=True)
        lines = (BENCHMARKS / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:rows]))
    (folder / "truthfulqa").mkdir()
    listed = json.loads((BENCHMARKS / "truthfulqa" / "mc_task.json").read_text())[:3]
    (folder / "truthfulqa" / "mc_task.json").write_text(json.dumps(listed))
    return folder


@needs_benchmarks
def test_the_same_scores_as_the_harness_s_own_model(both, few):
    import lm_eval
    from lm_eval.api.model import LM

    class Said(LM):
        """What the harness's model has answered."""

        def __init__(self, answers):
            super().__init__()
            self.answers = answers

        def loglikelihood(self, requests):
            return [self.answers[r.args] for r in requests]

        def loglikelihood_rolling(self, requests):
            raise AssertionError("no task asks for it")

        generate_until = loglikelihood_rolling

    subject, hf = both
    names = ("arc_challenge@0", "hellaswag@1", "truthfulqa_mc2", "crows_pairs", "winogrande@1", "lambada")
    studies = Evaluate(names, few).open(subject.target, print)
    theirs, largest, cut = hf(), 0.0, 0
    for study in studies:
        scored = study.score(subject)
        requests = [r for part in study._built for item in part.items for r in item.requests]
        study._lm.subject = subject
        ours = study._lm.loglikelihood(requests)
        expected = theirs.loglikelihood(requests, disable_tqdm=True)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
        largest = max(largest, *(abs(a - b) for (a, _), (b, _) in zip(ours, expected, strict=True)))
        cut += scored.summary["cut"]["requests"]
        if study.shots == 0 and study.task.output == "multiple_choice":
            task = study._built[0].task
            said = Said(dict(zip([r.args for r in requests], expected, strict=True)))
            out = lm_eval.evaluate(said, {task.config.task: task}, bootstrap_iters=1)["results"][task.config.task]
            for metric in study.task.metrics:
                assert scored.summary[metric]["value"] == pytest.approx(out[f"{metric},none"], rel=1e-5), metric
                assert scored.summary[metric]["stderr"] == pytest.approx(out[f"{metric}_stderr,none"], rel=1e-4)
    print(f"largest difference of a log-likelihood: {largest:.2g}; {cut} prompts were cut")
    assert largest < 1e-4
    assert cut > 5, "also of prompts that are longer than the context"


@needs_benchmarks
def test_the_same_rolling_scores_and_the_same_text(both):
    subject, hf = both
    texts = [json.loads(line)["context"] for line in (BENCHMARKS / "lambada/lambada_openai.jsonl").open()][:2]
    requests = [Request((text,)) for text in [*texts, " ".join(texts)]]
    lm = open_lm(subject.target.tokenizer, 192, add_bos=False)
    lm.subject = subject
    theirs = hf(False)
    np.testing.assert_allclose(lm.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests), rtol=1e-6)
    ask = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    requests = [Request((text, ask), "generate_until") for text in [*texts, " ".join(texts)]]
    assert lm.generate_until(requests) == theirs.generate_until(requests)


@needs_benchmarks
def test_scores_depend_neither_on_order_nor_on_the_batch(both, few):
    subject, _ = both
    (study,) = Evaluate(("arc_challenge@0",), few).open(subject.target, print)
    requests = [r for part in study._build() for item in part.items for r in item.requests]
    study._lm.subject = subject
    together = np.array([score for score, _ in study._lm.loglikelihood(requests)])
    order = np.random.default_rng(1).permutation(len(requests))
    permuted = study._lm.loglikelihood([requests[n] for n in order])
    np.testing.assert_allclose([score for score, _ in permuted], together[order], rtol=0, atol=1e-5)
    alone = [study._lm.loglikelihood([r])[0][0] for r in requests[:3]]
    np.testing.assert_allclose(alone, together[:3], rtol=0, atol=1e-4)
