import dataclasses
import hashlib
import json
import random
import subprocess

import pytest

from checkpoint import manifest
from checkpoint.manifest import Manifest
from errors import RunError, UserError
from tests.checkpoint import tiny_run


@pytest.fixture
def full() -> Manifest:
    return dataclasses.replace(
        tiny_run.manifest("series", 7, parent="006", parent_sha256="a" * 64),
        tensors={"params/norm": {"shape": [4], "dtype": "float32"}},
        files={"params/norm/c/0": {"bytes": 16, "sha256": "b" * 64}},
    )


def sealed(**body) -> str:
    """A manifest file with this content and the right SHA-256."""
    canonical = lambda d: json.dumps(d, sort_keys=True, separators=(",", ":"))  # noqa: E731
    return canonical(body | {"sha256": hashlib.sha256(canonical(body).encode()).hexdigest()}) + "\n"


def test_round_trip(full):
    assert Manifest.from_json(full.to_json()) == full
    assert sealed(**json.loads(json.dumps(dataclasses.asdict(full)))) == full.to_json()


def test_every_changed_byte_is_detected(full):
    raw = full.to_json().encode()
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << random.Random(place).randrange(8)
        with pytest.raises(RunError, match=r"x/manifest\.json: damaged"):
            Manifest.from_json(bytes(changed), "x/manifest.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"sha256": "0", "version": 1}', " {} "])
def test_what_is_not_a_manifest_is_damaged(text):
    with pytest.raises(RunError, match=r"damaged .*; put back an intact copy of this checkpoint, or remove its folder"):
        Manifest.from_json(text)


def test_truncated(full):
    with pytest.raises(RunError, match="damaged"):
        Manifest.from_json(full.to_json()[:-20])


def test_a_newer_version_is_the_users_to_solve(full, tmp_path):
    body = dataclasses.asdict(full) | {"version": 99, "digest": "of the future"}
    (tmp_path / "manifest.json").write_text(sealed(**body))
    with pytest.raises(UserError, match="version 99, but this code reads up to 4; update the code"):
        manifest.read(tmp_path)


def test_version_1_is_still_read(full, tmp_path):
    body = dataclasses.asdict(full) | {"version": 1}
    del body["origin"]
    (tmp_path / "manifest.json").write_text(sealed(**body))
    old = manifest.read(tmp_path)
    assert old == dataclasses.replace(full, version=1)
    assert old.origin is None


def test_imported_weights_have_an_origin_digests_and_no_data(full):
    tensors = {"params/norm": full.tensors["params/norm"] | {"digest": "e" * 32}}
    origin = {"format": "safetensors", "files": {"a": {"bytes": 1, "sha256": "f" * 64}}}
    imported = dataclasses.replace(full, data_sha256=None, origin=origin, tensors=tensors)
    assert Manifest.from_json(imported.to_json()) == imported


def test_missing_and_unknown_fields_are_named(full):
    body = dataclasses.asdict(full)
    with pytest.raises(RunError, match=r"damaged.*surprise"):
        Manifest.from_json(sealed(**body, surprise=1))
    del body["step"]
    with pytest.raises(RunError, match=r"damaged.*step"):
        Manifest.from_json(sealed(**body))


def test_no_manifest(tmp_path):
    with pytest.raises(RunError, match=r"manifest\.json: cannot be read \(No such file or directory\)"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kind": "daily"}, UserError, "kind 'daily' is none of series, early, rolling"),
        ({"index": -2}, UserError, "index -2 or step 80 is out of range"),
        ({"step": -1}, UserError, "index 7 or step -1 is out of range"),
        ({"name": "7"}, UserError, "name '7', but series index 7 at step 80 is '007'"),
        ({"loss": {"mean": float("nan")}}, RunError, "is not finite: {'mean': nan}"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(full, fields, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(full, **fields)


def test_names():
    assert manifest.checkpoint_name("series", -1, 0) == "init"
    assert manifest.checkpoint_name("series", 1234, 99) == "1234"
    assert manifest.checkpoint_name("rolling", 3, 1234) == "00001234"


def test_environment_has_what_decides_a_step():
    assert {"python", "jax", "jaxlib", "optax", "orbax-checkpoint", "numpy"} <= manifest.environment().keys()


def test_code_version_is_the_commit_or_the_package_version(tmp_path, monkeypatch):
    def version_at(root):
        (root / "checkpoint").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(manifest, "__file__", str(root / "checkpoint" / "manifest.py"))
        return manifest.code_version()

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    assert "-" not in version_at(tmp_path)  # no repository
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert version_at(tmp_path) == commit
    (tmp_path / "untracked").write_text("1")
    assert version_at(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert version_at(tmp_path) == commit + "-dirty"
    assert commit not in version_at(tmp_path / "site-packages")  # installed inside some other repository
    monkeypatch.setenv("PATH", "")
    assert commit not in version_at(tmp_path)  # no git
