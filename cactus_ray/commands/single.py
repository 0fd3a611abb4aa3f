"""``cactus-ray train`` and ``cactus-ray verify``: one network, without a search and without Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import rich.box
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cactus_ray.commands.families import FamilyOptions
from cactus_ray.commands.pick import stages
from cactus_ray.commands.remarks import print_remarks
from cactus_ray.commands.report import space_of
from cactus_ray.commands.results import Results, open_results
from cactus_ray.commands.samples import Job, print_radii, radius_rows, summary_row
from cactus_ray.commands.sources import Deployed, Files, deployed_files
from cactus_ray.compression.family import Family
from cactus_ray.config import RunConfig, ThreatConfig, parse, to_dict
from cactus_ray.data import load
from cactus_ray.deploy.document import versions
from cactus_ray.deploy.members import words
from cactus_ray.errors import ConfigError, RunFailedError, UserError
from cactus_ray.models import checked
from cactus_ray.models.network import load as load_network
from cactus_ray.models.network import pack, save
from cactus_ray.outputs import try_files, unwritable
from cactus_ray.search.space import check_read, load_space
from cactus_ray.search.store import read_records
from cactus_ray.training.loop import EpochReport, NonFiniteLossError
from cactus_ray.training.loop import train as run_loop
from cactus_ray.verification.cascade import SoundnessError, VerificationSettings

DEVICES = ("cpu", "cuda")
BATCH_OF_RESULTS = 20
"""Samples at once where results are recorded: what a killed run loses at most."""


@dataclass(frozen=True, slots=True)
class Training:
    """One configuration to train, on so many threads. ``sha256``: of the network that a study made of it, or None;
    ``device``: where it was trained, or where a network is trained unless somebody says otherwise."""

    config: RunConfig
    threads: int
    sha256: str | None = None
    device: str = "cpu"


def of_space(space_file: Path, overrides: Mapping[str, str]) -> Training:
    """The one configuration that a space with every parameter fixed describes. UserError naming those that are not,
    and where nothing would read one."""
    space = load_space(space_file, overrides)
    if space.parameters:
        names = ", ".join(parameter.name for parameter in space.parameters)
        raise UserError(f"{space_file}: no value for {names}; give each one with --set NAME=VALUE")
    check_read(space, str(space_file))
    return Training(space.configuration({}, 0), space.resources.threads)


def of_trial(text: str, init: Path | None) -> Training:
    """The configuration of a trial, named RUN/TRIAL, such as runs/digits/t0007.

    Raises UserError where there is no such trial, and where ``init`` is not the network that its study started from, or
    the data are not those that it was begun with.
    """
    run, name = Path(text).parent, Path(text).name
    records, space = read_records(run), space_of(run)
    trial = records.trials.get(name)
    if trial is None or not trial.config:
        raise UserError(f"--trial: got {text!r}; expected RUN/TRIAL with a trial of {run}: {', '.join(records.trials)}")
    wanted = records.study.get("init")
    found = None if init is None else hashlib.sha256(pack(load_network(init))).hexdigest()
    if found != wanted:
        what = "no --init" if wanted is None else f"--init with the network of SHA-256 {wanted}"
        raise UserError(f"--init: got {init and str(init)!r}; expected {what}, as the study of {text} was started")
    config = parse(RunConfig, trial.config)
    records.refuse_other_data(run, load(config.data, ("train", "selection")))
    device = "cuda" if space.resources.gpus_per_worker > 0 else "cpu"
    return Training(config, space.resources.threads, trial.sha256, device)


def device_of(asked: str | None, training: Training) -> str:
    """Where to train: what was asked for, else where the study did. ConfigError for a device that is not there."""
    if asked not in (None, *DEVICES):
        raise ConfigError("--device", asked, " or ".join(DEVICES))
    device = asked or training.device
    if device == "cuda" and not torch.cuda.is_available():
        why = "torch sees no CUDA device" if asked else "the study trained on GPUs, and torch sees no CUDA device here"
        raise ConfigError("--device", device, f"cpu: {why}")
    return device


def train(
    console: Console, training: Training, to: Path, *, init: Path | None, trust_code: bool, as_json: bool,
    device: str | None = None,
) -> None:  # fmt: skip
    """Train one configuration and write its network files: ``to`` as ``train.keep`` says, and beside it the best (on
    selection) or the last one. Of a trial, say whether the network is the study's, byte by byte. ``device``: cpu or
    cuda (``device_of``).

    Raises UserError, before anything is trained, where ``to`` cannot be written; RunFailedError where the loss is not
    finite.
    """
    config = training.config
    if to.suffix != ".safetensors":
        raise UserError(f"--out: got {str(to)!r}; expected a file name that ends in .safetensors")
    other = "best" if config.train.keep == "last" else "last"
    beside = to.with_suffix(f".{other}.safetensors")
    written = [file.with_name(file.name + end) for file in (to, beside) for end in ("", ".part")]
    try_files(to, *written)
    place = device_of(device, training)
    start = load_network(init) if init else None
    data = load(config.data, ("train", "selection"))
    data.refuse_outside(config.threat.domain)
    torch.set_num_threads(training.threads)
    if config.model.factory is not None:
        untrained = checked(config, data.input_shape, data.classes, trust_code=trust_code)
        print_remarks(untrained, config.train, replaced=start is not None)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=as_json) as progress:
        task = progress.add_task("epochs", total=config.train.epochs)

        def report(epoch: EpochReport) -> bool:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in epoch.metrics.items())
            progress.update(task, completed=epoch.epoch, description=f"epoch  {figures}")
            return True

        try:
            result = run_loop(config, data, report=report, init=start, trust_code=trust_code, device=place)
        except NonFiniteLossError as error:
            raise RunFailedError(f"training: {error}") from error
    for network, file in ((result.network, to), (result.best if other == "best" else result.last, beside)):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save(network, file)
        except OSError as error:
            raise unwritable(file, error) from error
    same = training.sha256 and hashlib.sha256(pack(result.network)).hexdigest() == training.sha256
    summary_ = {"network": str(to), "config_hash": config.config_hash, **result.history[-1], "seconds": result.seconds}
    summary_["device"] = place
    summary_ |= {} if same is None else {"same_network": same}
    if as_json:
        console.print_json(json.dumps(summary_))
        return
    console.print(f"wrote {to} ({config.config_hash}) after {result.seconds:.1f} s on {place}", highlight=False)
    if same is not None:
        differs = "another network than the study's: the same bytes need its machine type, device, threads and workers"
        console.print("the network of the study, byte by byte" if same else differs, highlight=False)


def verify(
    console: Console, network: Path, *, data: str | None, root: Path | None, split: str, epsilon: str | None,
    levels: str | None, samples: int | None, bound: str | None, seconds_per_sample: float, radius: bool,
    to: Path | None, as_json: bool, family: FamilyOptions | None = None,
) -> None:  # fmt: skip
    """Verdict counts for every level and radius, always of the ONNX file that is or would be deployed.

    ``radius``: instead the largest certified radius of every sample, up to the largest of ``epsilon``. ``to``: a file
    of results that are appended as they come; a second run with the same settings goes on where it ends. ``family``:
    verdicts on every rounding of a level's weights at once. Raises
    UserError for bad input, RunFailedError where a certified sample is falsified.
    """
    deployed = deployed_files(network, levels, data, root, split)
    source, domain, files = deployed.data, deployed.domain, deployed.files
    effort = {"seconds_per_sample": seconds_per_sample} | ({} if bound is None else {"bound": bound})
    settings = parse(VerificationSettings, effort, "verification")
    if family is not None and radius:
        raise ConfigError("--radius", True, "one of --radius and --family")
    radii = [domain[1] - domain[0]] if radius and epsilon is None else _radii(epsilon, deployed.epsilon)
    largest = max(radii) if radius else None
    if largest == 0.0:
        raise ConfigError("--epsilon", epsilon, "more than 0 with --radius: radii are sought up to the largest")
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        progress = stack.enter_context(stages(console, not as_json))
        if to is not None or family is not None:
            files = list(files)
        around = {} if family is None else {level: family.at(level) for level, _ in files}
        if to is not None:
            settings = replace(settings, batch_size=min(settings.batch_size, BATCH_OF_RESULTS))
        asked = radii if largest is None else largest
        record = stack.enter_context(_record(to, files, deployed, split, settings, asked, family))
        for level, file in files:
            job = Job(level, file, source, split, domain, settings, samples, record, around.get(level))
            try:
                if largest is not None:
                    show = partial(_relabelled, progress, level)
                    rows += radius_rows(job, largest, show)
                    continue
                for epsilon_ in radii:
                    show = partial(_relabelled, progress, f"{level}, epsilon {epsilon_:g}")
                    rows.append(summary_row(job, epsilon_, show))
            except SoundnessError as error:
                raise RunFailedError(f"{network}: {error}") from error
    if largest is None:
        _print(console, rows, as_json)
    else:
        print_radii(console, rows, largest, as_json=as_json)


def _record(
    to: Path | None, files: Files, deployed: Deployed, split: str, settings: VerificationSettings, radii: Any,
    family: FamilyOptions | None,
) -> AbstractContextManager[Results | None]:  # fmt: skip
    """The file of results, for exactly these files, data and settings; None where none is wanted."""
    if to is None:
        return nullcontext()
    hashes = {level: hashlib.sha256(file).hexdigest() for level, file in files}
    digest = load(deployed.data, (split,)).digests[split]
    what = {"radius": radii} if isinstance(radii, float) else {"epsilon": radii}
    what |= {} if family is None else {"family": asdict(family)}
    what |= {f"verification.{key}": value for key, value in to_dict(settings).items()}
    # another version may answer otherwise, and a mended verifier must not go on from what it was mended for
    what |= {"domain": deployed.domain, "versions": versions()}
    return open_results(to, {"files": hashes, "data": deployed.data.name, "split": split, "digest": digest} | what)


def _relabelled(progress: Callable[[str, int, int], None], label: str, stage: str, done: int, total: int) -> None:
    progress(f"{label}: {stage}", done, total)


def _radii(text: str | None, trained: float | None) -> list[float]:
    if text is None:
        if trained is None:
            raise UserError("--epsilon: an ONNX file does not say which radius; give one, such as --epsilon 0.1")
        return [trained]
    parts = [part.strip() for part in text.split(",")]
    try:
        values = [part if "/" in part else float(part) for part in parts]
    except ValueError:
        expected = "a number or several separated by commas, such as 0.05,0.1 or 8/255"
        raise ConfigError("--epsilon", text, expected) from None
    try:
        return [parse(ThreatConfig, {"epsilon": value}).epsilon for value in values]
    except ConfigError as error:
        raise ConfigError("--epsilon", error.value, error.expected) from None


def _print(console: Console, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(rows))
        return
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("level", "epsilon", "standard", "certified", "falsified", "unknown", "95 %"):
        table.add_column(heading, justify="left" if heading == "level" else "right", no_wrap=True)
    for row in rows:
        low, high = row["certified_interval"]
        table.add_row(
            row["level"], f"{row['epsilon']:g}", f"{row['standard_accuracy']:.1%}", str(row["n_certified"]),
            str(row["n_falsified"]), str(row["n_unknown"]), f"{100 * low:.1f}-{high:.1%}",
        )  # fmt: skip
    console.print(table)
    first = rows[0]
    low, high = first["domain"]
    where = f"{first['samples']} samples of the {first['split']} split, pixels from {low:g} to {high:g}"
    console.print(f"{where}; bound {first['bound']}, {first['arithmetic']} arithmetic", highlight=False)
    for family in dict.fromkeys(parse(Family, row["family"]) for row in rows if "family" in row):
        console.print(f"every verdict is about {words(family)}", highlight=False, soft_wrap=True)
