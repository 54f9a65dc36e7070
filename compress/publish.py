"""Where a verified artifact goes: a directory, a Hugging Face repository, or both.

Nothing leaves that was not verified: the record must say that the artifact was reloaded and agreed with the
in-memory model, and its files must still have the hashes of its manifest. Nothing of the user's is deleted
or overwritten on disk: the copy is made beside the destination and renamed into place.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compress.atomic import sync_directory
from compress.card import model_card
from compress.config import PublishConfig
from compress.errors import ArtifactError, ConfigError, EnvironmentProblem, VerifyError
from compress.record import Record

__all__ = ["HubApi", "Published", "check_destination", "model_card", "publish"]

MANIFEST = "manifest.json"


class HubApi(Protocol):
    """The part of `huggingface_hub.HfApi` that publishing uses."""

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> Any: ...

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str | None = None) -> Any: ...


@dataclass(frozen=True)
class Published:
    """Where the artifact now is. `copied` is False when `dest` already held exactly this artifact."""

    dest: str | None = None
    copied: bool = False
    repo_url: str | None = None


def publish(record: Record, config: PublishConfig, api: HubApi | None = None) -> Published:
    """Copies the artifact to `config.dest`, uploads it to `config.repo_id`, or both.

    Args:
        api: used in place of `huggingface_hub.HfApi()`.

    Raises:
        VerifyError: the artifact was not verified, or its files no longer match its manifest.
        ConfigError: `dest` holds something else, or `repo_id` is not a valid name.
        EnvironmentProblem: disk, network or login.
    """
    artifact = _verified_artifact(record)
    dest, copied, repo_url = None, False, None
    if config.dest is not None:
        dest = os.path.abspath(os.path.expanduser(config.dest))
        copied = _copy_artifact(artifact, Path(dest))
    if config.repo_id is not None:
        repo_url = _upload(record, artifact, config.repo_id, config.private, api)
    return Published(dest, copied, repo_url)


def _verified_artifact(record: Record) -> Path:
    if record["artifact"] is None:
        raise VerifyError(f"run {record['name']} has no artifact to publish; run it again without skipping the save")
    if record["verified"] is not True:
        raise VerifyError(
            f"{record['artifact']} was not verified (verified={record['verified']}); only an artifact that reloads to "
            "the same logits is published; run the recipe again"
        )
    artifact = Path(record["artifact"])
    problem = _manifest_problem(artifact)
    if problem is not None:
        raise VerifyError(f"{artifact} changed after it was verified: {problem}; run the recipe again")
    return artifact


def _manifest_problem(path: Path) -> str | None:
    """What is wrong with the files under `path`, or None when they match their manifest."""
    from compress.artifact import check_manifest  # imports torch

    try:
        check_manifest(path)
    except ArtifactError as error:
        return str(error)
    return None


def check_destination(dest: Path) -> None:
    """That an artifact may be put at `dest`: nothing is there, an empty directory, or an earlier artifact, which is
    looked into once it can be compared.

    Raises:
        ConfigError: something else is there.
    """
    dest = Path(os.path.abspath(dest.expanduser()))
    if dest.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise ConfigError(f"publish.dest={dest} is not a directory; choose a path that does not exist")
    if dest.is_dir() and any(dest.iterdir()) and not (dest / MANIFEST).is_file():
        raise ConfigError(
            f"publish.dest={dest} already holds something else, which is never overwritten; "
            "choose a path that does not exist or move it away"
        )


def _copy_artifact(artifact: Path, dest: Path) -> bool:
    """Copy, check and rename into place; False when `dest` is this very artifact already."""
    source, target = artifact.resolve(), dest.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ConfigError(
            f"publish.dest={dest} and the artifact {artifact} lie inside each other; choose another place"
        )
    check_destination(dest)
    if dest.is_dir() and any(dest.iterdir()):
        if _same_artifact(artifact, dest):
            return False
        raise ConfigError(
            f"publish.dest={dest} already holds something else, which is never overwritten; "
            "choose a path that does not exist or move it away"
        )
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}."))
    except OSError as error:
        raise EnvironmentProblem(f"publish.dest={dest} cannot be written: {error.strerror or error}") from error
    try:
        _copy_tree(artifact, temporary)
        problem = _manifest_problem(temporary)
        if problem is not None:
            raise EnvironmentProblem(f"the copy for publish.dest={dest} came out different: {problem}; check the disk")
        os.rename(temporary, dest)  # refuses a directory that filled up in the meantime
        sync_directory(dest.parent)
    except OSError as error:
        raise EnvironmentProblem(
            f"publish.dest={dest} cannot be written: {error.strerror or error}; check space and rights"
        ) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return True


def _copy_tree(source: Path, target: Path) -> None:
    """All files, each flushed to disk; `target` is an empty directory."""
    os.chmod(target, os.stat(source).st_mode & 0o777)
    for folder, _, names in os.walk(source):
        copy = target / Path(folder).relative_to(source)
        copy.mkdir(exist_ok=True)
        for name in names:
            shutil.copyfile(Path(folder) / name, copy / name)
            with open(copy / name, "rb") as stream:
                os.fsync(stream.fileno())
        sync_directory(copy)


def _same_artifact(artifact: Path, dest: Path) -> bool:
    """`dest` carries the same manifest and its files still match it."""
    manifest = dest / MANIFEST
    if not manifest.is_file() or manifest.read_bytes() != (artifact / MANIFEST).read_bytes():
        return False
    return _manifest_problem(dest) is None


def _upload(record: Record, artifact: Path, repo_id: str, private: bool, api: HubApi | None) -> str:
    from huggingface_hub import errors as hub

    # HfHubHTTPError derives from the HTTP library's own error, whichever that is in this version, and connection
    # failures are that library's too
    connection = [base for base in hub.HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    network: tuple[type[Exception], ...] = (OSError, *connection)
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        message = f"{record['name']} of {record['model']} ({record['scheme']}), compress {record['compress_version']}"
        api.upload_folder(repo_id=repo_id, folder_path=str(artifact), commit_message=message)
    except hub.HFValidationError as error:
        raise ConfigError(f"publish.repo_id={repo_id!r} is not a repository name: {error}; use owner/name") from error
    except network as error:
        raise EnvironmentProblem(
            f"publish.repo_id={repo_id}: the Hub cannot be used ({type(error).__name__}: {error}); "
            "log in with `hf auth login`, check the network, or use publish.dest=<directory>"
        ) from error
    return str(url)
