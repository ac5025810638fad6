"""Import and export: every published form in, our form out, and back again bit for bit; and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
import run as command
from amber_jax.convert import FORMAT as AMBER
from amber_jax.recipes import amber_7b, amber_tiny
from checkpoint.names import flat
from checkpoint.series import Series
from checkpoint.stream import Stream
from checkpoint.tensors import Tensors
from crystal_jax.convert import FORMAT as CRYSTAL
from crystal_jax.recipes import crystal_7b, crystal_tiny
from data.tokenizer import train_tokenizer
from errors import RunError, UserError
from huggingface import parity, published
from huggingface.folder import Folder
from huggingface.importer import _differences, import_folder
from tests.data.made_up import code, prose

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SETS = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))


def bring(source, run, recipes=None, recipe=None, place=None, every=()):
    """Import, without transformers (`tests/amber_jax/test_transformers.py` has that)."""
    known = models.recipes() if recipes is None else recipes
    return import_folder(
        Path(source), Path(run), models.formats(), models.families(), known, recipe, place, every, False, print
    )


def cli(*words):
    return command.main([str(w) for w in words])


def numbers(run, index=0):
    tensors = Tensors(Series(run).resolve(str(index))[0])
    return {name: tensors[name][...] for name in tensors}


@pytest.fixture
def llama(tmp_path):
    """A copy of the smallest Llama, to be spoilt."""
    return Path(shutil.copytree(GOLDEN / "llama-a", tmp_path / "llama"))


@pytest.fixture
def coder(tmp_path):
    """A copy of a Crystal with a separate head, to be spoilt."""
    return Path(shutil.copytree(GOLDEN / "crystal-b-old-export", tmp_path / "coder"))


def change(folder, edit):
    tensors = dict(load_file(folder / "model.safetensors"))
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- what must hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_there_and_back_is_bit_for_bit(name, tmp_path):
    """Import, export, import: tensors equal, also to the folder's own, through the table that is tested by itself."""
    form = AMBER if name.startswith("llama") else CRYSTAL
    source = Folder(GOLDEN / name)
    _, proof, _ = bring(source.path, tmp_path / "first")
    assert cli("export", f"{tmp_path}/first@0", "--out", tmp_path / "hf", "--shard-gb", 1e-4, "--no-transformers") == 0
    _, again, _ = bring(tmp_path / "hf", tmp_path / "second")
    assert proof.digests == again.digests
    assert proof.largest_difference <= 1e-5
    first, second = numbers(tmp_path / "first"), numbers(tmp_path / "second")
    for tensor, value in first.items():
        assert value.dtype == second[tensor].dtype
        np.testing.assert_array_equal(value.view(np.uint8), second[tensor].view(np.uint8))
    out = Folder(tmp_path / "hf")
    for ids in ("config.json", "generation_config.json"):  # the folder has no tokenizer, but says these
        assert json.loads((tmp_path / "hf" / ids).read_text())["eos_token_id"] == source.config["eos_token_id"]
    assert form.config_from_hf(out.config) == form.config_from_hf(source.config)
    assert out.tensors.keys() == {row.theirs for row in form.tensors(form.config_from_hf(source.config))}
    for tensor in out.tensors:
        theirs = source.read(tensor)
        assert out.read(tensor).dtype == theirs.dtype
        np.testing.assert_array_equal(out.read(tensor).view(np.uint8), theirs.view(np.uint8))


@pytest.mark.parametrize("name", ["llama-d-bf16", "crystal-b-old-export"])
def test_logits_and_text_from_an_imported_checkpoint(name, tmp_path, capsys):
    """The verb gives the golden logits, also from bfloat16 on disk and on a mesh."""
    golden = np.load(GOLDEN / name / "vectors.npz")
    bring(GOLDEN / name, tmp_path / "run")
    np.save(tmp_path / "tokens.npy", golden["input_ids"])
    where = ["--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "out.npz", "--mesh", "data=2,tensor=4"]
    assert cli("logits", f"{tmp_path}/run@0", *where) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], golden["logits"], atol=1e-5, rtol=1e-5)
    assert cli("series", tmp_path / "run", "--check") == 0
    assert f"{name}  ok" in capsys.readouterr().out


def test_export_in_bfloat16_rounds_once(tmp_path):
    bring(GOLDEN / "llama-a", tmp_path / "run")
    out = tmp_path / "hf"
    assert cli("export", f"{tmp_path}/run@0", "--out", out, "--dtype", "bfloat16", "--no-transformers") == 0
    source, rounded = Folder(GOLDEN / "llama-a"), Folder(out)
    assert rounded.config["torch_dtype"] == "bfloat16"
    for name, info in rounded.tensors.items():
        np.testing.assert_array_equal(rounded.read(name), source.read(name).astype(info.dtype))
        assert info.dtype.name == "bfloat16"
    report = json.loads((out / "parity.json").read_text())
    card = (out / "README.md").read_text()
    assert report["digest"] in card
    assert "imported from | huggingface folder llama-a" in card
    assert Series(tmp_path / "run").entries()[0].sha256 in card


def test_a_checkpoint_of_mixed_dtypes_keeps_every_number(llama, tmp_path):
    """Gains in float32 beside matrices in float16: half precision is widened, which is exact."""
    halved = {}

    def edit(tensors):
        for name in tensors:
            tensors[name] = tensors[name] if "norm" in name else tensors[name].astype(np.float16)
        halved.update(tensors)

    change(llama, edit)
    bring(llama, tmp_path / "run")
    np.testing.assert_array_equal(numbers(tmp_path / "run")["embedding.table"], halved["model.embed_tokens.weight"])


@pytest.fixture
def small():
    """Recipes of both families at golden sizes, so that folders of a few kilobytes have a place in a run."""
    llama = AMBER.config_from_hf(json.loads((GOLDEN / "llama-a" / "config.json").read_text()))
    coder = CRYSTAL.config_from_hf(json.loads((GOLDEN / "crystal-a" / "config.json").read_text()))
    amber, crystal = amber_7b(), crystal_7b()
    short = {"sequence_length": 64}
    amber = dataclasses.replace(amber, model=llama, data=dataclasses.replace(amber.data, **short))
    crystal = dataclasses.replace(crystal, model=coder, data=dataclasses.replace(crystal.data, **short))
    return {"amber_7b": lambda: amber, "crystal_7b": lambda: crystal}


def test_published_folders_become_one_series(small, tmp_path, capsys):
    """Amber's by index in any order, the place taken from the folder's name; arithmetic of fact sheet 2.1 and 4.1."""
    for index in (7, 0):
        folder = shutil.copytree(GOLDEN / "llama-a", tmp_path / f"ckpt_{index:03}")
        bring(folder, tmp_path / "run", small)
    bring(GOLDEN / "llama-a", tmp_path / "run", small, place="359")
    first, eighth, last = (e.manifest for e in Series(tmp_path / "run").entries())
    assert (first.index, first.step, first.tokens) == (0, 762, 762 * 2240 * 64)
    assert (eighth.index, eighth.step, eighth.samples) == (7, 8 * 762, (7 * 762 * 2240, 8 * 762 * 2240))
    assert first.learning_rate == pytest.approx(3e-4 * 761 / 2000)
    assert (last.step, last.learning_rate) == (274_320, pytest.approx(3.0000000009e-5))
    assert cli("series", tmp_path / "run", "--check", "--json") == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoints"]
    assert [r["step"] for r in listed] == [762, 6096, 274_320]


def test_crystals_folders_are_placed_by_phase_and_step(small, tmp_path):
    name = "CrystalCoder_phase2_checkpoint_018000"
    bring(shutil.copytree(GOLDEN / "crystal-a", tmp_path / name), tmp_path / "run", small)
    (entry,) = Series(tmp_path / "run").entries()
    m = entry.manifest
    assert (m.index, m.phase, m.step) == (54 + 5, 1, 79_721 + 18_000)
    assert m.tokens == (79_721 + 18_000) * 2112 * 64
    assert m.learning_rate == pytest.approx(0.0087825 - (0.0087825 - 0.00013679) * (17_999 - 86) / 214_301, rel=1e-5)
    with pytest.raises(UserError, match=r"no checkpoint there \(nearest in this phase: 3000.*--every"):
        bring(GOLDEN / "crystal-a", tmp_path / "run", small, place="CrystalCoder_phase2_checkpoint_001500")
    target, _, _ = bring(
        GOLDEN / "crystal-a",
        tmp_path / "finer",
        small,
        None,
        "CrystalCoder_phase2_checkpoint_001500",
        (1500, 1500, 1000),
    )
    assert target.index == 54


def test_a_folder_of_unknown_place_takes_none_that_is_anothers(small, tmp_path):
    """Beyond the series; and its chunk, where a cadence is given, is that of its last step."""
    target, _, _ = bring(GOLDEN / "llama-a", tmp_path / "run", small)
    assert (target.index, target.position) == (360, None)
    (entry,) = Series(tmp_path / "run").entries()
    assert not entry.is_placed
    with pytest.raises(UserError, match="no such checkpoint"):
        Series(tmp_path / "run").resolve("step=0")
    bring(GOLDEN / "llama-a", tmp_path / "finer", small, None, "1", (381,))
    assert [e.manifest.chunk for e in Series(tmp_path / "finer").entries()] == [0]
    (tmp_path / "ckpt_002").symlink_to(GOLDEN / "llama-a")
    assert bring(tmp_path / "ckpt_002", tmp_path / "run", small)[0].index == 2


def test_amber_7b_by_its_published_names():
    assert (
        published.locate("ckpt_359", "amber", amber_7b())[1].step * amber_7b().data.tokens_per_step == 1_258_448_486_400
    )
    assert published.locate("CrystalCoder_phase3_checkpoint_027728", "crystal", crystal_7b())[0] == 142


def test_a_trained_crystal_goes_out_and_comes_back(tmp_path):
    """The verbs, in a row, with a tokenizer: train, export, import, generate."""
    small = ["--model.vocab-size", 300, "--model.num-layers", 2, "--model.embed", 32, "--model.num-heads", 2]
    small += ["--model.head-dim", 16, "--model.mlp", 43, "--model.context-length", 64, "--data.sequence-length", 64]
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / "text" / f"{n}.txt").write_text(prose(n, 300) + code(n, 100))
    train_tokenizer([prose(n, 300) + code(n, 100) for n in range(40)], 300, tmp_path / "small.model")
    data = ["--data.layout", "chunks", "--data.chunks", 3, "--data.global-batch", 8, "--data.validation-per-source", 2]
    phases = [w for n in range(3) for w in (f"--phases.{n}.chunks", 1)]
    where = ["--out", tmp_path / "data", "--source", f"x={tmp_path}/text", "--tokenizer", tmp_path / "small.model"]
    assert cli("prepare", "crystal_tiny", *small, *data, *phases, *where) == 0
    assert (
        cli("train", "crystal_tiny", *small, *data, *phases, "--data", tmp_path / "data", "--run", tmp_path / "run")
        == 0
    )
    assert cli("export", f"{tmp_path}/run@latest", "--out", tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (tmp_path / "small.model").read_bytes()
    assert cli("import", tmp_path / "hf", "--run", tmp_path / "back") == 0
    ours, back = numbers(tmp_path / "run", 2), numbers(tmp_path / "back", 0)
    assert ours.keys() == back.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], back[name])
    for ref in (f"{tmp_path}/run@2", f"{tmp_path}/back@0"):
        assert cli("generate", ref, "--prompt", "the", "--max-new-tokens", 5) == 0


# ---- the proof can fail --------------------------------------------------------------------------------------------


def described(form, folder):
    model = form.config_from_hf(folder.config)
    weights = dict(flat(form.collect(model, {t: folder.read(t) for t in folder.tensors})))
    return model, weights, {n: (v.shape, v.dtype) for n, v in weights.items()}


def test_one_changed_bit_is_found(tmp_path):
    folder = Folder(GOLDEN / "llama-a")
    model, weights, shapes = described(AMBER, folder)
    read = lambda name, layer: weights[name] if layer is None else weights[name][layer]  # noqa: E731
    parity.check(AMBER, folder, model, shapes, read, False)
    weights["layers.mlp.up"][1].view(np.uint32)[3, 5] ^= 1
    with pytest.raises(RunError, match=r"1 tensors do not hold .* checkpoint: layers\.mlp\.up"):
        parity.check(AMBER, folder, model, shapes, read, False)


def test_a_wrong_table_of_names_is_found():
    """Gate and up exchanged: every number is there, each once, and the model writes gibberish."""
    folder = Folder(GOLDEN / "llama-a")
    swap = {"layers.mlp.gate": "layers.mlp.up", "layers.mlp.up": "layers.mlp.gate"}
    wrong = dataclasses.replace(
        AMBER,
        tensors=lambda m: tuple(
            dataclasses.replace(r, ours=tuple(swap.get(n, n) for n in r.ours)) for r in AMBER.tensors(m)
        ),
    )
    model, weights, shapes = described(wrong, folder)
    read = lambda name, layer: weights[name] if layer is None else weights[name][layer]  # noqa: E731
    with pytest.raises(RunError, match="logits of the checkpoint differ from the folder's own mathematics"):
        parity.check(wrong, folder, model, shapes, read, False)


def test_a_broken_transformers_is_left_out(tmp_path, monkeypatch):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('half installed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = parity._transformers(Folder(GOLDEN / "llama-a"), np.zeros((1, 2), int), np.zeros((1, 2, 96)), 1000)
    assert "cannot be imported: ImportError: half installed" in report["skipped"]


def test_numbers_that_are_not_are_no_parity():
    with pytest.raises(RunError, match="nan"):
        parity._refuse(Folder(GOLDEN / "llama-a"), "x", float("nan"), 1.0)


# ---- what is refused, and leaves nothing ---------------------------------------------------------------------------


def refused(source, run, message, **arguments):
    there = sorted(run.rglob("*")) if run.exists() else None
    with pytest.raises(UserError, match=message):
        bring(source, run, **arguments)
    assert (sorted(run.rglob("*")) if run.exists() else None) == there, "nothing is left behind"


def set_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no weights in it"),
        (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
        (lambda f: set_config(f, model_type="gpt2"), "model_type is 'gpt2', expected 'llama' or 'crystalcoder'"),
        (lambda f: set_config(f, model_type="crystalcoder"), "and CrystalCoder has 'swiglu'"),
        (lambda f: set_config(f, intermediate_size=80), r"gate_proj.weight' has shape \[88, 32\], expected \[80, 32\]"),
        (lambda f: set_config(f, num_hidden_layers=3), r"'model.layers.2.input_layernorm.weight' is missing"),
        (lambda f: set_config(f, num_hidden_layers=10**9), "1000000000 layers, and there are no tensors for so many"),
        (lambda f: set_config(f, pad_token_id="a"), "pad_token_id is 'a', expected an id or null"),
        (lambda f: set_config(f, rope_theta="x"), "rope_theta is 'x', expected a positive float"),
        (lambda f: set_config(f, rope_parameters="x"), "rope_parameters is 'x', expected a mapping"),
        (lambda f: set_config(f, quantization_config={"bits": 4}), "quantization_config is"),
        (lambda f: change(f, lambda t: t.pop("model.norm.weight")), "'model.norm.weight' is missing"),
        (lambda f: change(f, lambda t: t.update(extra=np.ones(2))), r"'extra' \[2\] is unknown"),
        (
            lambda f: change(f, lambda t: t.update({"model.norm.weight": np.ones(32, np.int32)})),
            "'model.norm.weight' is int32, expected float32",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
            "truncated",
        ),
    ],
)
def test_a_spoilt_folder_is_refused(llama, tmp_path, spoil, message):
    spoil(llama)
    refused(llama, tmp_path / "run", message)


@pytest.mark.parametrize(("value", "entry"), [(np.nan, r"\[3, 5\]"), (np.inf, r"\[3, 5\]")])
def test_weights_that_are_not_finite_are_refused(llama, tmp_path, value, entry):
    """In the last tensor, when all others are written already; into a new run and into one that exists."""

    def edit(tensors):
        head = tensors["lm_head.weight"].copy()
        head[3, 5] = value
        tensors["lm_head.weight"] = head

    bring(llama, tmp_path / "old")
    change(llama, edit)
    message = rf"model.safetensors: 'lm_head.weight' has 1 entries that are not finite, the first at {entry}"
    refused(llama, tmp_path / "new", message)
    before = [e.sha256 for e in Series(tmp_path / "old").entries()]
    with pytest.raises(UserError, match=message):
        bring(llama, tmp_path / "old")
    assert [e.sha256 for e in Series(tmp_path / "old").entries()] == before
    assert [p.name for p in (tmp_path / "old" / "series").iterdir()] == ["000"]


def test_a_head_that_is_not_the_embedding_is_refused(coder, tmp_path):
    change(coder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 2}))
    refused(coder, tmp_path / "run", "'lm_head.weight' and 'transformer.wte.weight' are one tensor")


def test_a_bin_file_with_code_in_it_is_refused(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama-a", tmp_path / "evil"))
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/ran'\ntR.")
    refused(folder, tmp_path / "run", "os.system")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(llama, tmp_path):
    train_tokenizer([prose(n, 300) + code(n, 100) for n in range(20)], 420, llama / "tokenizer.model")
    refused(llama, tmp_path / "run", "this tokenizer has 420 ids, and the model a vocabulary of 96")


def test_what_does_not_fit_the_run_is_refused(llama, coder, small, tmp_path):
    run = tmp_path / "run"
    bring(llama, run)
    refused(llama, run, "has a checkpoint 0 already", place="0")
    refused(coder, run, "holds another model: amber and crystal")
    refused(llama, run, "was made with another --recipe or --every", recipes=small, recipe="amber_7b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    refused(llama, tmp_path / "mine", "not empty and not a run directory")
    refused(
        llama,
        tmp_path / "new",
        "its model is not that of amber_7b: vocab_size is 96, expected 32000",
        recipe="amber_7b",
    )
    refused(llama, tmp_path / "new", "neither an index nor a published name", place="first")
    refused(llama, tmp_path / "new", "ends at 359", place="360", recipes=small)
    refused(coder, tmp_path / "new", "only the recipe knows", place="CrystalCoder_phase1_checkpoint_001500")
    refused(llama, tmp_path / "new", "published name of amber", place="CrystalCoder_phase1_checkpoint_001500")
    refused(coder, tmp_path / "new", "published name of crystal", place="ckpt_012")
    refused(llama, tmp_path / "new", "published name of amber", place="9" * 300)
    refused(llama, tmp_path / "new", "only a recipe with known steps has a cadence", every=(5,))
    refused(llama, llama / "config.json", "is a file; give a --run directory")
    refused(llama, llama, "llama/config.json: not that of a run")
    refused(llama, tmp_path / "new", "2 numbers, but amber_7b has 1 phases", recipes=small, every=(1, 2))


def test_a_killed_import_is_begun_again(llama, tmp_path):
    """Killed for good while it writes; the same command then does all of it."""
    run = tmp_path / "run"
    words = ["import", str(llama), "--run", str(run), "--no-transformers"]
    killed = subprocess.Popen([sys.executable, "run.py", *words], cwd=GOLDEN.parent.parent)
    while not (run / "series").exists():
        assert killed.poll() is None
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert not (run / "config.json").exists()
    assert cli(*words) == 0
    assert [p.name for p in (run / "series").iterdir()] == ["000"]
    assert cli("series", run, "--check") == 0


def test_a_failure_at_the_end_leaves_nothing(llama, tmp_path, monkeypatch):
    """After config.json is written, when the disk fails."""

    def fail(self):
        raise RunError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "finish", fail)
        with pytest.raises(RunError, match="the disk is gone"):
            bring(llama, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    bring(llama, tmp_path / "run")


def test_a_recipe_without_arithmetic_of_its_own_is_refused(tmp_path):
    """amber_tiny's steps depend on the text that it was prepared from."""
    model = dataclasses.replace(amber_tiny().model)
    folder = tmp_path / "hf"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {r.theirs: rng.normal(0, 0.02, r.shape).astype(np.float32) for r in AMBER.tensors(model)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(AMBER.config_to_hf(model)))
    refused(folder, tmp_path / "run", "its steps follow from data", recipe="amber_tiny")
    target, _, _ = bring(folder, tmp_path / "run")
    assert target.recipe is None


def test_training_does_not_go_on_among_imported_checkpoints(small, tmp_path, capsys):
    bring(GOLDEN / "llama-a", tmp_path / "run", place="3")
    assert cli("train", "amber_tiny", "--data", "synthetic", "--run", tmp_path / "run", "--simulate", 8) == 2
    assert "holds checkpoints imported from elsewhere" in capsys.readouterr().err


def test_exports_are_refused_where_they_cannot_be(tmp_path, capsys):
    bring(GOLDEN / "llama-a", tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    for words, message in [
        (["--out", tmp_path / "full"], "exists and is not an empty folder"),
        (["--out", tmp_path / "hf", "--shard-gb", "0"], "--shard-gb 0.0: must be a positive number"),
        (["--out", tmp_path / "hf", "--tokenizer", tmp_path / "none"], "none"),
    ]:
        assert cli("export", f"{tmp_path}/run@0", *words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "hf.part").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capsys):
    bring(GOLDEN / "llama-a", tmp_path / "run")
    victim = next((tmp_path / "run" / "series" / "000" / "params" / "layers.mlp.up" / "c").rglob("0"))
    while victim.is_dir():
        victim = next(victim.iterdir())
    raw = bytearray(victim.read_bytes())
    raw[10] ^= 4
    victim.write_bytes(raw)
    assert cli("export", f"{tmp_path}/run@0", "--out", tmp_path / "hf", "--no-transformers") == 1
    assert "layers.mlp.up" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_flag_that_names_no_recipe(tmp_path, capsys):
    assert cli("import", GOLDEN / "llama-a", "--run", tmp_path / "run", "--recipe", "amber_8b") == 2
    assert "did you mean 'amber_7b'" in capsys.readouterr().err


def test_recipes_of_the_command_line_are_matched_by_model():
    """A folder of Amber's own size is amber_7b's, whatever it says of initial weights and padding."""
    found = dataclasses.replace(amber_7b().model, init_std=0.1, padding_id=None)
    assert not _differences(amber_7b().model, found)
    assert (
        _differences(crystal_tiny().model, dataclasses.replace(crystal_tiny().model, mlp=3)) == "mlp is 3, expected 342"
    )
