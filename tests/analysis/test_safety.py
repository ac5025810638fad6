"""BOLD, detection of toxic text and ToxiGen on a tiny run: figures against recomputed ones, formats, and refusals."""

import json
import sys

import numpy as np
import pytest

import run as cli
from analysis import bold, results
from analysis.bold import Bold, sentiment
from analysis.prompts import chosen
from analysis.subject import Subject, Target
from analysis.sweep import sweep
from analysis.toxicity import Toxicity, question, read_labelled
from analysis.toxigen import Toxigen, classifier
from errors import UserError
from inference.sampling import Sampling
from models import families
from training.datasets import open_data

vader = pytest.importorskip("vaderSentiment.vaderSentiment")

SMALL = [
    "--model.vocab-size=300", "--model.num-layers=1", "--model.embed=32", "--model.num-heads=2", "--model.head-dim=16",
    "--model.mlp=32", "--model.context-length=64", "--data.sequence-length=64", "--data.chunks=1",
    "--data.global-batch=8",
    "--data.validation-per-source=2",
]  # fmt: skip
GROUPS = {
    "gender": {"actors": "A wonderful and happy actor ", "actresses": "A brilliant, loved actress "},
    "political_ideology": {"left": "A terrible and horrible idea "},
    "profession": {"smiths": "A smith is somebody who "},
    "race": {"Asians": "She was born in "},
    "religious_ideology": {"islam": "It is the religion of "},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a few steps, and BOLD's files with other prompts."""
    folder = tmp_path_factory.mktemp("safety")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    for n in range(8):
        words = " ".join(rng.choice(["alpha", "beta", "yes", "no", "good", "bad", "\n", "0"], size=300))
        (folder / "text" / f"{n}.txt").write_text(words)
    sources = ["--source", f"words={folder / 'text'}", "--workers", 1]
    call("prepare", "amber_tiny", "--out", folder / "data", *sources, *SMALL)
    train = ["train", "amber_tiny", "--data", folder / "data", "--run", folder / "run", "--mesh=data=4,fsdp=2"]
    call(*train, "--steps=1", *SMALL)
    (folder / "b" / "bold").mkdir(parents=True)
    for domain, groups in GROUPS.items():
        with open(folder / "b" / "bold" / f"{domain}_prompt.jsonl", "w") as file:
            for group, prompt in groups.items():
                for n in range(5):
                    row = {"group": group, "subgroup": f"s{n}", "prompt": f"{prompt}{'x' * n}"}
                    file.write(json.dumps(row) + "\n")
            file.write('{"group": "actors", "subgroup": "nobody", "prompt": ""}\n')
    return folder


def call(*arguments):
    assert cli.main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def target(folder):
    return Target(f"{folder}/run@init", families(), open_data)


@pytest.fixture(scope="module")
def subject(target):
    entry = target.series.entries()[0]
    return Subject(target, entry, target.load(entry))


def silent(_):
    pass


def test_bold_is_the_sentiment_of_prompt_and_continuation(folder, target, subject):
    (study,) = Bold(folder / "b").open(target, silent)
    scored = study.score(subject)
    rows = scored.tables["texts"].to_pylist()
    assert len(rows) == 30
    analyzer = vader.SentimentIntensityAnalyzer()
    compound = [analyzer.polarity_scores(r["prompt"] + r["continuation"])["compound"] for r in rows]
    assert [r["compound"] for r in rows] == compound
    assert compound != [analyzer.polarity_scores(r["continuation"])["compound"] for r in rows]
    assert scored.summary["global"]["compound"]["value"] == pytest.approx(np.mean(compound))
    assert scored.summary["global"]["compound"]["stderr"] == pytest.approx(np.std(compound, ddof=1) / np.sqrt(30))
    left = scored.summary["groups"]["political_ideology/left"]
    assert (left["negative"]["value"], left["positive"]["value"]) == (1.0, 0.0)
    assert left == scored.summary["domains"]["political_ideology"]
    gender = scored.summary["domains"]["gender"]
    assert gender["compound"]["n"] == 10
    assert gender["positive"]["value"] == 1.0
    assert scored.summary["cut"] == 0
    # Drawn prompts are continued as they are among all, whatever is beside them.
    (study,) = Bold(folder / "b", limit=3).open(target, silent)
    few = study.score(subject).tables["texts"].to_pylist()
    assert len(few) == 18
    whole = {(r["domain"], r["number"]): r for r in rows}
    assert few == [whole[r["domain"], r["number"]] for r in few]
    assert len({r["continuation"] for r in rows}) > 9
    (other,) = Bold(folder / "b", limit=3, seed=1).open(target, silent)
    assert other.settings() != study.settings()
    assert other.score(subject).tables["texts"]["continuation"].to_pylist() != [r["continuation"] for r in few]


def test_a_sweep_keeps_what_was_found(folder, target, capsys):
    call("analyze", "bold", f"{folder}/run@init", "--benchmarks", folder / "b", "--limit", 3)
    (result,) = results.of_kind(folder / "run", "bold")
    assert result.summary["global"]["compound"]["n"] == 18
    assert result.table("texts").num_rows == 18
    (study,) = Bold(folder / "b", limit=3).open(target, silent)
    assert len(sweep(target, [study], silent).kept) == 1
    with pytest.raises(UserError, match="limit, prompts"):
        sweep(target, Bold(folder / "b").open(target, silent), silent)


def test_what_is_printed_has_the_figure_that_a_study_is_about(folder, tmp_path, capsys):
    (tmp_path / "few.csv").write_text("text,label\nalpha,yes\nbeta,no\n")
    (tmp_path / "prompts.txt").write_text("alpha\n")
    (tmp_path / "says.py").write_text("def half(texts):\n    return [0.5] * len(texts)\n")
    call("analyze", "toxicity", f"{folder}/run@init", "--sets", f"few={tmp_path / 'few.csv'}", "--name", "few")
    assert "sets.few.error" in capsys.readouterr().out
    classifier = f"{tmp_path / 'says.py'}:half"
    call("analyze", "toxigen", f"{folder}/run@init", "--prompts", f"few={tmp_path / 'prompts.txt'}", "--classifier",
         classifier, "--name", "few")  # fmt: skip
    assert "prompts.few.toxic" in capsys.readouterr().out


def test_rates_of_planted_scores():
    found = sentiment(np.array([0.05, 0.9, 0.0, 0.049, -0.049, -0.05, -1.0, 0.5]))
    assert [found[k]["value"] for k in ("positive", "neutral", "negative")] == [3 / 8, 3 / 8, 2 / 8]
    assert sentiment(np.array([0.3]))["std"] is None


def test_prompts_lose_their_beginning(folder, target, subject, tmp_path):
    (tmp_path / "bold").mkdir()
    for domain in bold.DOMAINS:
        prompts = ["z" * 100 + " the end of it", "the end of it"]
        rows = [{"group": "g", "subgroup": "s", "prompt": p} for p in prompts]
        (tmp_path / "bold" / f"{domain}_prompt.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (study,) = Bold(tmp_path, cap=8, new_tokens=3, temperature=0, top_p=1, add_bos="no").open(target, silent)
    assert study.settings()["prompt_tokens"] == 8
    scored = study.score(subject)
    assert scored.summary["cut"] == 10
    rows = scored.tables["texts"].to_pylist()
    last = target.tokenizer.encode("the end of it")[-8:]
    expected = subject.generate([last] * 10, Sampling(3))[0]
    said = target.tokenizer.decode([*last, *expected], skip_special=True)
    assert [r["continuation"] for r in rows] == [said[len(target.tokenizer.decode(last)) :]] * 10
    assert Bold(tmp_path).open(target, silent)[0].settings()["prompt_tokens"] == 64 - 20 - 1  # and <s>, of Amber
    for fields, message in (
        ({"new_tokens": 64}, "leaves no room for a prompt in a context of 64"),
        ({"cap": 0}, "--cap 0"),
        ({"seed": -1}, "--seed -1"),
    ):
        with pytest.raises(UserError, match=message):
            Bold(tmp_path, **fields).open(target, silent)


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_labelled_files_of_each_form(tmp_path):
    file = write(
        tmp_path,
        "sbf.csv",
        'post,offensiveYN,sexYN\n"two\nlines, &amp;",1.0,0.0\nfine,0.0,0.0\nmaybe,0.5,0.0\nnobody said,,0.0\n',
    )
    assert read_labelled(file) == ("sbf", [("two\nlines, &amp;", True), ("fine", False)], 2)
    file = write(tmp_path, "sbf.jsonl", '{"post": "fine", "offensiveYN": "0.0"}\n{"post": "x", "offensiveYN": 0.5}\n')
    assert read_labelled(file) == ("sbf", [("fine", False)], 1)
    file = write(
        tmp_path, "dyna.csv", ",text,label,split\n1,a,hate,test\n2,b,nothate,test\n3,c,hate,train\n4,d,1,test\n"
    )
    assert read_labelled(file) == ("dynahate", [("a", True), ("b", False), ("d", True)], 1)
    file = write(
        tmp_path, "toxigen.csv", "text,target_group,toxicity_human\na,x,5.0\n\"b'it\\'s b'\",x,1.0\nc,x,3.3\nd,x,1.5\n"
    )
    assert read_labelled(file) == ("toxigen", [("a", True), ("it's b", False)], 2)
    file = write(tmp_path, "plain.jsonl", '{"text": "a", "label": "Yes"}\n\n{"text": "b", "label": 0}\n'
                 '{"text": "c", "label": true}\n{"text": " ", "label": "no"}\n')  # fmt: skip
    assert read_labelled(file) == ("plain", [("a", True), ("b", False), ("c", True)], 1)
    assert read_labelled(tmp_path / "dyna.csv", "plain")[0] == "plain"


@pytest.mark.parametrize(
    ("name", "text", "form", "message"),
    [
        ("x.csv", "", "auto", "is empty"),
        ("x.jsonl", "\n", "auto", "is empty"),
        ("x.jsonl", "{", "auto", r"x\.jsonl:1: not JSON"),
        ("x.jsonl", "[]", "auto", r"x\.jsonl:1: not an object"),
        ("x.csv", "a,b\n1,2\n", "auto", "columns a, b are of no known form"),
        ("x.csv", "text,b\n1,2\n", "plain", "has no column 'label', which form plain needs"),
        ("x.csv", "text,label\na,perhaps\n", "auto", "row 1: label 'perhaps' is none of yes, no"),
        ("x.csv", "text,toxicity_human\na,much\n", "auto", "row 1: could not convert"),
        ("x.csv", "post,offensiveYN\na,0.5\n", "auto", "none of its 1 rows"),
    ],
)
def test_labelled_files_that_are_no_use(tmp_path, name, text, form, message):
    with pytest.raises(UserError, match=message):
        read_labelled(write(tmp_path, name, text), form)


def test_detection_is_compared_with_always_saying_the_same(target, subject, tmp_path):
    rows = [{"text": f"text {n}", "label": "yes" if n % 4 == 0 else "no"} for n in range(8)]
    file = write(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    lines = []
    (study,) = Toxicity((f"mine={file}",)).open(target, lines.append)
    assert lines == ["toxicity: mine: plain, 8 of 8 texts, 0 rows left out"]
    scored = study.score(subject)
    found, answers = scored.summary["sets"]["mine"], scored.tables["answers"].to_pylist()
    wrong = [a["toxic"] != ("yes" in a["answer"].lower()) for a in answers]
    assert found["error"]["value"] == np.mean(wrong)
    assert (found["always_yes"], found["always_no"]) == (0.75, 0.25)
    assert found["missed"]["n"] == 2
    assert found["false_alarms"]["n"] == 6
    assert found["cut"] == 8, "four examples do not fit into 64 tokens"
    # Three greedy tokens, after the end of the prompt.
    tokenizer = target.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(question("text 3", "plain"))[-60:]]
    new = subject.generate([ids] * 8, Sampling(3))[0]
    assert tokenizer.decode([*ids[1:], *new], skip_special=True).endswith(answers[3]["answer"])
    assert len(new) <= 3
    (few,) = Toxicity((f"mine={file}",), limit=5).open(target, silent)
    assert few.settings() != study.settings()
    assert few.score(subject).summary["sets"]["mine"]["error"]["n"] == 5


def test_questions_show_two_of_each_kind():
    prompt = question("Some text", "sbf")
    assert prompt.count("`Yes`") == prompt.count("`No`") == 2
    assert prompt.endswith("Comment: `Some text`\nOffensiveness: `")
    assert "hateful" in question("", "dynahate")


def test_toxigen_counts_continuations(target, subject, tmp_path, monkeypatch):
    write(tmp_path, "flags.py", "def letters(texts):\n    return [float('e' in t) for t in texts]\n")
    monkeypatch.syspath_prepend(tmp_path)
    lines = write(tmp_path, "hate.txt", "- a first one\n\n- a second one\r\n- a third one")
    rows = write(tmp_path, "neutral.jsonl", '{"text": "x"}\n{"prompt": "y"}\n{"prompt": "z"}\n')
    asked = {"prompts": (f"hate={lines}", f"neutral={rows}"), "temperature": 1.0, "top_p": 1.0}
    (study,) = Toxigen(classifier="flags:letters", samples=2, **asked).open(target, silent)
    scored = study.score(subject)
    texts = scored.tables["texts"].to_pylist()
    assert [t["prompt"] for t in texts[:6:2]] == ["- a first one", "- a second one", "- a third one"]
    assert [t["toxic"] for t in texts] == ["e" in t["continuation"] for t in texts]
    of_hate = [t["toxic"] for t in texts if t["key"] == "hate"]
    assert scored.summary["prompts"]["hate"]["toxic"]["value"] == pytest.approx(np.mean(of_hate))
    assert scored.summary["prompts"]["hate"]["toxic"]["n"] == 6, "continuations, not prompts"
    assert texts[0]["continuation"] != texts[1]["continuation"]
    # The same classifier by its file, and the same first continuations of fewer.
    (again,) = Toxigen(classifier=f"{tmp_path / 'flags.py'}:letters", **asked).open(target, silent)
    assert [t["continuation"] for t in again.score(subject).tables["texts"].to_pylist()] == [
        t["continuation"] for t in texts[::2]
    ]
    assert "classifier" in again.settings()
    for code, message in (("[0.5]", "each of 3"), ("[2.0] * len(texts)", "from 0 to 1"), ("['x']", "no numbers")):
        write(tmp_path, "bad.py", f"def f(texts):\n    return {code}\n")
        (study,) = Toxigen(classifier=f"{tmp_path / 'bad.py'}:f", **asked).open(target, silent)
        with pytest.raises(UserError, match=message):
            study.score(subject)


def test_a_hugging_face_classifier(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=7, num_labels=2, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    classify, identity = classifier(str(tmp_path))
    theirs = transformers.pipeline("text-classification", model=str(tmp_path), tokenizer=str(tmp_path))
    texts = ["good", "bad bad good", "good " * 600]
    for score, said in zip(classify(texts), theirs(texts, truncation=True, max_length=512)):
        assert (score >= 0.5) == (said["label"] == "LABEL_1")
        assert max(score, 1 - score) == pytest.approx(said["score"], abs=1e-5)
    assert identity.startswith(tmp_path.name)
    config.num_labels = 3
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 3 labels"):
        classifier(str(tmp_path))


def test_drawing_keeps_the_order():
    rows = list(range(100))
    drawn = chosen(rows, 10, "a")
    assert drawn == sorted(drawn)
    assert drawn == chosen(rows, 10, "a") != chosen(rows, 10, "b")
    assert set(drawn) < set(chosen(rows, 20, "a"))
    assert chosen(rows, None, "a") == chosen(rows, 100, "a") == rows


def test_what_is_asked_wrongly(folder, target, tmp_path, monkeypatch):
    write(tmp_path, "empty.txt", "\n")
    write(tmp_path, "prompts.txt", "x\n")
    write(tmp_path, "t.csv", "text,label\na,yes\n")
    prompts = (f"x={tmp_path / 'prompts.txt'}",)
    for make, message in (
        (lambda: Bold(folder, limit=0), "--limit 0"),
        (lambda: Bold(folder), r"gender_prompt\.jsonl: cannot be read"),
        (lambda: Bold(folder / "b", add_bos="yes"), None),
        (lambda: Toxicity(()), "--sets NAME=FILE"),
        (lambda: Toxicity(("x",)), "--sets x: write NAME=FILE"),
        (lambda: Toxicity((f"x={tmp_path / 't.csv'}",) * 2), "x is named twice"),
        (lambda: Toxicity((f"x={tmp_path / 'none.csv'}",)), "cannot be read"),
        (lambda: Toxigen((), "a:b"), "--prompts KEY=FILE"),
        (lambda: Toxigen(prompts, "a:b", samples=0), "--samples 0"),
        (lambda: Toxigen((f"x={tmp_path / 'empty.txt'}",), "json:dumps"), "has no prompts"),
        (lambda: Toxigen(prompts, "nothing"), "neither a folder nor MODULE:FUNCTION"),
        (lambda: Toxigen(prompts, "no_such_module:f"), "cannot be loaded"),
        (lambda: Toxigen(prompts, "json:no_such_function"), "cannot be loaded"),
        (lambda: Toxigen(prompts, str(tmp_path)), "sequence classifier|needs transformers"),
    ):
        if message is None:
            assert make().open(target, silent)[0].settings()["add_bos"]
            continue
        with pytest.raises(UserError, match=message):
            make().open(target, silent)
    for domain in bold.DOMAINS:
        write(tmp_path, f"{domain}_prompt.jsonl", '{"group": "g", "subgroup": "s", "prompt": " "}\n')
    with pytest.raises(UserError, match="has no prompts"):
        Bold(tmp_path).open(target, silent)
    write(tmp_path, "gender_prompt.jsonl", '{"group": "g", "subgroup": "s"}\n')
    with pytest.raises(UserError, match=r"gender_prompt\.jsonl:1: no text 'prompt'"):
        Bold(tmp_path).open(target, silent)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    bold._vader.cache_clear()
    with pytest.raises(UserError, match=r"pip install '\.\[analysis\]'"):
        Bold(folder / "b").open(target, silent)
