"""Several recipes and other quantizers on one model and text, in one go: what `compress.eval.compare --recipes` runs.

Every recipe is a run of its own, in a fresh process and with its own directory, so that a comparison that was stopped
goes on where it was. Plain round-to-nearest at every number of bits and group size in the table is run too, because
that is what every method has to beat.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compress
from compress.config import RunConfig
from compress.errors import CompressError, ConfigError
from compress.eval.peers import Peer, PeerTask, installed_version, run_peer, wanted_peers
from compress.models import choose_device, load_model
from compress.record import RECORD_NAME, read_record
from compress.run import compute_dtype, load_tokenizer
from compress.texts import calibration_set, evaluation_set

log = logging.getLogger(__name__)


@dataclass
class Request:
    """What to compare. overrides: settings of every recipe, as on the command line of `python -m compress`; packages:
    other quantizers to run, each at every scheme such as 4g128, AutoRound for so many iterations."""

    recipes: list[str]
    overrides: list[str]
    out: Path
    packages: list[str] = field(default_factory=list)
    schemes: list[str] = field(default_factory=lambda: ["4g128"])
    pythons: dict[str, str] = field(default_factory=dict)
    iterations: int = 200


@dataclass
class Outcome:
    """records: of our runs. peers: rows of the others. not_installed: packages. failed: what was asked for and did not
    finish, with the reason."""

    records: list[dict[str, Any]] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)
    not_installed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run_side_by_side(request: Request) -> Outcome:
    """Everything of a request; a failure of one part is kept and the others still run.

    Raises:
        ConfigError: settings that no run could take.
    """
    config = composed_config([f"recipe={request.recipes[0]}", *request.overrides])
    peers = wanted_peers(request.packages, request.schemes)
    outcome = Outcome()
    for package in request.packages:
        if installed_version(package, request.pythons.get(package, sys.executable)) is None:
            outcome.not_installed.append(package)
    for recipe in request.recipes:
        _run_recipe(request, recipe, [f"recipe={recipe}"], outcome)
    there = [peer for peer in peers if peer.package not in outcome.not_installed]
    for bits, group in _missing_baselines(outcome.records, there):
        settings = ["recipe=rtn4", f"quant.scheme.bits={bits}", f"quant.scheme.group_size={group}"]
        _run_recipe(request, f"rtn{bits}_g{group}", settings, outcome)
    if there:
        task = _peer_task(request, config)
        for peer in there:
            log.info("%s: running", peer.name)
            try:
                outcome.peers.append(run_peer(peer, task))
            except CompressError as error:
                outcome.failed[peer.name] = str(error)
                log.error("%s", error)
    return outcome


def composed_config(settings: list[str]) -> RunConfig:
    """The settings of `python -m compress` with this command line.

    Raises:
        ConfigError: a recipe, key or value that is none.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from compress.cli import as_config_error  # registers the schema too

    try:
        with initialize_config_module("compress.recipes", version_base="1.3"):
            config = OmegaConf.to_object(compose("config", overrides=settings))
    except (HydraException, OmegaConfBaseException) as error:
        raise as_config_error(error) from error
    assert isinstance(config, RunConfig)
    return config


def _run_recipe(request: Request, name: str, settings: list[str], outcome: Outcome) -> None:
    """One run of ours; its record goes into the outcome, or why there is none."""
    run_dir = request.out / "runs" / name
    # the settings of a baseline win over those of the user
    arguments = [settings[0], *request.overrides, *settings[1:], f"name={name}", f"run_dir={run_dir}"]
    root = str(Path(compress.__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    log.info("%s: running", name)
    # its summary goes where its log goes: stdout is for the table
    done = subprocess.run(
        [sys.executable, "-m", "compress", *arguments], stdout=2, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode:
        outcome.failed[name] = f"python -m compress {' '.join(arguments)} ended with exit code {done.returncode}"
        return
    record = read_record(run_dir / RECORD_NAME)
    if record["quality"] is None:
        raise ConfigError("eval.enabled=false leaves nothing to compare; leave it out")
    outcome.records.append(record)


def _missing_baselines(records: list[dict[str, Any]], peers: list[Peer]) -> list[tuple[int, int]]:
    """Bits and group size of uniform schemes in the table at which no run was plain, symmetric round-to-nearest."""
    wanted = [(peer.scheme.bits, peer.scheme.group_size) for peer in peers]
    there = set()
    for record in records:
        match = re.fullmatch(r"w(\d)g(\d+) (a?sym)", record["scheme"])
        if match is None:
            continue
        key = int(match[1]), int(match[2])
        wanted.append(key)
        if (record["transform"], record["rounding"], match[3]) == ("none", "rtn", "sym"):
            there.add(key)
    return sorted(set(wanted) - there)


def _peer_task(request: Request, config: RunConfig) -> PeerTask:
    loaded = load_model(config.model, config.revision, config.trust_remote_code, config.quant.blocks)
    tokenizer = load_tokenizer(loaded.source.path, config.trust_remote_code)
    device = choose_device(config.device)
    return PeerTask(
        loaded.source.path,
        calibration_set(config.calibration, loaded, tokenizer),
        evaluation_set(config.eval, loaded, tokenizer),
        device,
        compute_dtype(config.compute_dtype, device, loaded.dtype),
        request.out / "peers",
        request.iterations,
        config.eval.batch_size,
        request.pythons,
        config.trust_remote_code,
    )
