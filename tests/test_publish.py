"""Publishing: nothing unverified leaves, nothing of the user's is lost, and the card says only what was measured."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import errors as hub
from run_records import make_record
from safetensors.torch import save_file

from compress.artifact import tensor_sha256
from compress.config import PublishConfig
from compress.errors import ConfigError, EnvironmentProblem, VerifyError
from compress.publish import model_card, publish

FILES = {"config.json": b"{}", "original/tokenizer.json": b"{}"}
WEIGHTS = {"model.layers.0.weight": torch.arange(4096, dtype=torch.float32)}


def write_artifact(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    """Weights, companion files and the manifest of their hashes, as compress.artifact lays them out."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    save_file(WEIGHTS, folder / "model.safetensors")
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    tensors = {
        name: {"sha256": tensor_sha256(value), "dtype": str(value.dtype).split(".")[1], "shape": list(value.shape)}
        for name, value in WEIGHTS.items()
    }
    manifest = {"files": hashes, "tensors": tensors, "source_tensors": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    return make_record(artifact=str(write_artifact(tmp_path / "run" / "artifact")), run_dir=str(tmp_path / "run"))


class FakeHub:
    """Keeps what it was asked; raises `error`, when it has one, at the first request."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id} | options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        folder = Path(options["folder_path"])
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        self.calls.append(("upload_folder", options | {"names": names}))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_copies_every_file(record: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the same names and bytes at the destination, and nothing else beside it."""
    done = publish(record, PublishConfig(dest=str(tmp_path / "out" / "model")))
    assert done.copied and done.dest == str(tmp_path / "out" / "model")
    assert tree(tmp_path / "out" / "model") == tree(Path(record["artifact"]))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]


def test_again_is_a_no_op(record: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: inode and time of a file at the destination do not change, and a user's file beside it stays."""
    config = PublishConfig(dest=str(tmp_path / "model"))
    publish(record, config)
    (tmp_path / "model" / "notes.txt").write_text("mine")
    before = os.stat(tmp_path / "model" / "model.safetensors")
    assert not publish(record, config).copied
    after = os.stat(tmp_path / "model" / "model.safetensors")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_empty_directory_is_a_destination(record: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: an existing empty directory holds nothing to lose."""
    (tmp_path / "model").mkdir()
    assert publish(record, PublishConfig(dest=str(tmp_path / "model"))).copied


def other_artifact(dest: Path) -> None:
    write_artifact(dest, FILES | {"config.json": b"{1}"})


def damaged_copy(dest: Path) -> None:
    write_artifact(dest)
    (dest / "config.json").write_bytes(b"damaged")


def users_file(dest: Path) -> None:
    dest.mkdir()
    (dest / "thesis.tex").write_text("ten years")


@pytest.mark.parametrize(
    "occupy",
    [other_artifact, damaged_copy, users_file, lambda d: d.write_text("x"), lambda d: d.symlink_to("/nowhere")],
)
def test_occupied_destination_is_refused_and_untouched(record: dict[str, Any], tmp_path: Path, occupy: Any) -> None:
    """Oracle: ConfigError, and every byte below tmp_path as it was."""
    occupy(tmp_path / "model")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"publish\.dest"):
        publish(record, PublishConfig(dest=str(tmp_path / "model")))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("dest", ["run/artifact", "run/artifact/inside", "run", "."])
def test_destination_inside_or_around_the_artifact(record: dict[str, Any], tmp_path: Path, dest: str) -> None:
    """Oracle: refused, and the artifact is as it was."""
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"publish\.dest"):
        publish(record, PublishConfig(dest=str(tmp_path / dest)))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [({"verified": None}, "not verified"), ({"verified": False}, "not verified"), ({"verified": 1}, "not verified"),
     ({"artifact": None}, "no artifact")],
)  # fmt: skip
def test_unverified_is_refused(record: dict[str, Any], tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """Oracle: VerifyError, no destination, no request to the Hub."""
    api = FakeHub()
    with pytest.raises(VerifyError, match=says):
        publish(record | change, PublishConfig(dest=str(tmp_path / "model"), repo_id="me/model"), api)
    assert not (tmp_path / "model").exists() and not api.calls


def test_artifact_changed_after_verification_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: one flipped byte of the weights; the error names the file."""
    weights = Path(record["artifact"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    api = FakeHub()
    with pytest.raises(VerifyError, match=r"model\.safetensors"):
        publish(record, PublishConfig(dest=str(tmp_path / "model"), repo_id="me/model"), api)
    assert not (tmp_path / "model").exists() and not api.calls


def test_copy_that_came_out_different_is_not_left_behind(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a disk that loses bytes (copyfile that truncates) leaves neither destination nor temporary."""

    def truncate(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:10])

    monkeypatch.setattr("compress.publish.shutil.copyfile", truncate)
    with pytest.raises(EnvironmentProblem):
        publish(record, PublishConfig(dest=str(tmp_path / "out" / "model")))
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk(record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: ENOSPC in the middle of a copy is an EnvironmentProblem and leaves nothing."""

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.publish.shutil.copyfile", full)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        publish(record, PublishConfig(dest=str(tmp_path / "out" / "model")))
    assert list((tmp_path / "out").iterdir()) == []


def test_uploads_to_a_private_repository(record: dict[str, Any]) -> None:
    """Oracle: the fake's log: the repository first, then the folder with every file."""
    api = FakeHub()
    done = publish(record, PublishConfig(repo_id="me/model"), api)
    assert done.repo_url == "https://huggingface.co/me/model"
    (created, create), (uploaded, upload) = api.calls
    assert (created, uploaded) == ("create_repo", "upload_folder")
    assert create == {"repo_id": "me/model", "private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/model"
    assert upload["names"] == sorted([*FILES, "manifest.json", "model.safetensors"])


def http_error() -> Exception:
    """401 as huggingface_hub raises it, without the HTTP library that is behind it."""
    error = hub.HfHubHTTPError.__new__(hub.HfHubHTTPError)
    error.args = ("401 Client Error",)
    return error


@pytest.mark.parametrize(
    "error",
    [
        hub.LocalTokenNotFoundError("Token is required"),
        http_error(),
        hub.HfHubHTTPError.__mro__[1]("connection refused"),
        ConnectionError("no route to host"),
    ],
    ids=["no token", "401", "HTTP library", "no network"],
)
def test_login_and_network_problems_name_the_remedy(record: dict[str, Any], error: Exception) -> None:
    """Oracle: each failure of the Hub is an EnvironmentProblem that says how to log in."""
    with pytest.raises(EnvironmentProblem, match="hf auth login"):
        publish(record, PublishConfig(repo_id="me/model"), FakeHub(error))


def test_real_client_without_network(record: dict[str, Any]) -> None:
    """Oracle: huggingface_hub's own HfApi, which the suite keeps offline."""
    with pytest.raises(EnvironmentProblem, match="hf auth login"):
        publish(record, PublishConfig(repo_id="me/model"))


def test_invalid_repository_name(record: dict[str, Any]) -> None:
    """Oracle: huggingface_hub's own validation error becomes a ConfigError."""
    with pytest.raises(ConfigError, match=r"publish\.repo_id"):
        publish(record, PublishConfig(repo_id="a b"), FakeHub(hub.HFValidationError("Repo id must use ...")))


# -- model card -------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_card_states_the_measurements() -> None:
    """Oracle: the record's figures, each looked up in the text."""
    card = model_card(make_record("gptq4", model="Qwen/Qwen3-8B", kl=0.0351, decode_ms=6.0))
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-8B",
        "base_model_relation": "quantized",
        "tags": ["compress", "compressed-tensors", "gptq4"],
    }
    for fact in (
        "0.03510 ± 0.00042", "44.32 ± 0.60", "AMD EPYC 9R14, 2 threads", "6.00 ms", "1.50x", "c3" * 32, "d4" * 32,
        "a1" * 32, "python -m compress recipe=gptq4 model=Qwen/Qwen3-8B", "vllm serve", "compress.load",
        "damping raised to 0.1", "arc\\_easy acc", "0.598 ± 0.010",
    ):  # fmt: skip
        assert fact in card, fact


def test_card_claims_nothing_that_was_not_measured() -> None:
    """Oracle: without quality, speed and calibration no figure of theirs appears."""
    card = model_card(make_record(quality=None, speed=None, calibration=None))
    assert card.count("Not measured.") == 2
    assert "calibration" not in card and "perplexity" not in card and "tokens/s" not in card and "EPYC" not in card


@pytest.mark.parametrize("model", ["reference", "/data/models/llama", "./llama"])
def test_base_model_is_a_hub_id_or_absent(model: str) -> None:
    """Oracle: the Hub rejects paths as base_model."""
    assert "base_model" not in front_matter(model_card(make_record(model=model)))


def test_local_directory_that_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `models/llama` names a directory here, so it is no hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert "base_model" not in front_matter(model_card(make_record(model="models/llama")))


@pytest.mark.parametrize(("scheme", "serves"), [("w4g128 sym", True), ("w8 channel sym", True), ("w3g128 sym", False)])
def test_vllm_only_where_it_reads_the_scheme(scheme: str, serves: bool) -> None:
    """Oracle: vLLM's kernels for this format take 4 and 8 bits."""
    assert ("vllm serve" in model_card(make_record(scheme=scheme))) == serves


def test_baseline_card_is_not_called_quantized() -> None:
    """Oracle: a bf16 run is the original model, saved again."""
    card = model_card(make_record("bf16", model="a/b", transform="none", rounding="none", scheme="bf16"))
    assert "base_model_relation" not in front_matter(card) and "compressed-tensors" not in card


def test_hostile_names_stay_text() -> None:
    """Oracle: YAML reads back the exact tags, tables keep their columns, and no tag or fence opens."""
    name = 'x"\n- y: |<script>alert(1)</script>```'
    record = make_record(name, model="a|b`<img src=x>")
    record["quality"]["tasks"][0]["task"] = "a|b<script>"
    card = model_card(record)
    assert front_matter(card)["tags"][2] == name
    body = card.split("---\n", 2)[2]
    assert body.count("```") == 2 * 4
    outside = [part for i, part in enumerate(body.split("`")) if i % 2 == 0]
    assert not any("<script>" in part.replace("\\<", "") for part in outside)
    columns = {line.replace("\\|", "").count("|") for line in body.splitlines() if line.startswith("|")}
    assert columns == {4, 8}


def test_card_of_an_asymmetric_artifact_names_the_option_its_reader_needs() -> None:
    """Oracle: transformers reads packed zero points with dequantize=True (tests/test_artifact.py)."""
    assert "dequantize=True" in model_card(make_record(scheme="w4g128 asym"))
    assert "dequantize" not in model_card(make_record(scheme="w4g128 sym"))
