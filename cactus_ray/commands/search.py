"""``cactus-ray search``: a space in, a run's folder out."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cactus_ray.cluster.driver import DriverOptions, run_study
from cactus_ray.commands.estimate import estimate, print_estimate, refuse_full_disk
from cactus_ray.commands.folder import opened, refuse_other_init, write_space
from cactus_ray.commands.remarks import print_remarks
from cactus_ray.config import ModelConfig, RunConfig
from cactus_ray.data import DataSet, load, subset
from cactus_ray.errors import UserError
from cactus_ray.models import Untrained, checked
from cactus_ray.models.network import Network, pack
from cactus_ray.models.network import load as load_network
from cactus_ray.outputs import local_folder
from cactus_ray.report.page import write_page
from cactus_ray.report.terminal import StudyProgress
from cactus_ray.report.tracking_process import tracking
from cactus_ray.search.evaluate import at_level
from cactus_ray.search.fresh import fresh_samples
from cactus_ray.search.rungs import epoch_costs
from cactus_ray.search.space import NAME, Space, check_launch, load_space
from cactus_ray.search.store import Records, read_records, write_tables
from cactus_ray.search.study import Study
from cactus_ray.search.upkeep import Upkeep
from cactus_ray.search.warm import past_of
from cactus_ray.training.run import check_trainable

LIBRARIES = ("torch", "ray", "optuna", "onnx", "onnxruntime", "wandb", "numpy", "scikit-learn")
WORST_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Where and how a search runs; what it searches is the space. ``source``: a run or an Optuna storage whose
    completed trials are told first, ``source_study`` the name of the study in a storage."""

    run: Path
    from_scratch: bool = False
    progress: bool = True
    source: str | None = None
    source_study: str | None = None
    driver: DriverOptions = field(default_factory=DriverOptions)


def search(space: Space, options: SearchOptions) -> Records:
    """Run or continue the study in ``options.run`` and write its tables and its page.

    Raises UserError for bad input; KeyboardInterrupt and SoundnessError pass through after the records are closed.
    """
    example = example_configuration(space)
    data, untrained = prepared(space, options)
    refuse_full_disk(space, data, untrained, options.run)
    folder = opened(space, options.run, from_scratch=options.from_scratch, source=options.source)
    with folder as (store, replaced):
        records = read_records(store.path, verdicts=False) if store.file.exists() else Records()
        records.refuse_other_data(options.run, data, ", or another --name")
        refuse_other_init(options.run, records.study, _digest(options.driver.init))
        reference = records.study.get("reference_point") or reference_point(space, untrained)
        past = _past(space, options, records, reference)
        upkeep = Upkeep(space, store, records)
        count = None if space.samples == "selection" else int(space.samples)
        samples = subset(len(data.labels["selection"]), count).tolist()
        fresh, none_fresh = fresh_samples(space, len(data.labels["selection"]))
        with StudyProgress(space, records, enabled=options.progress) as progress:
            study = Study(
                space, store, records, samples, [progress.event, upkeep.event, replaced.event],
                epoch_costs(example, lambda run: _untrained(run, data, options).network), fresh,
            )  # fmt: skip
            write_space(space, store.path / "space.yaml")
            if not records.study:
                warm = {"source": options.source, "study": options.source_study} if options.source else None
                begin = {"init": _digest(options.driver.init), "from": warm, "none_fresh": none_fresh}
                study.begin(describe(space, data) | begin, reference)
            if past is not None:
                study.work()
                study.warm(past)
            try:
                if not study.done:
                    with upkeep.writing():
                        run_study(study, options.driver, lambda: tracking(space, store.path, progress.say))
                elif records.finished is None:  # the last driver died before its last word
                    study.end("completed", 0.0)
            finally:  # also for what a study that was interrupted or failed has finished
                records = read_records(store.path, verdicts=False)
                write_tables(store.path, records, space.front)
                write_page(store.path)
        return records


def _untrained(run: RunConfig, data: DataSet, options: SearchOptions) -> Untrained:
    return checked(run, data.input_shape, data.classes, data.class_names, options.driver.trust_code)


def prepared(space: Space, options: SearchOptions) -> tuple[DataSet, Network]:
    """The data, and an untrained network of the space's largest model."""
    data = load(space.data, ("train", "selection"))
    data.refuse_outside(space.threat.domain)
    # A network that cannot be bounded, or code that is not trusted, is refused before anything starts.
    example = example_configuration(space)
    models = {example.model: _untrained(example, data, options)}
    if options.from_scratch or not (options.run / "trials.jsonl").exists():
        _refuse_untrainable(space, data, models, lambda run: _untrained(run, data, options))
    for untrained in models.values():
        print_remarks(untrained, example.train, replaced=options.driver.init is not None)
    return data, models[example.model].network


_EXTREMES = {"train.batch_size": min, "train.crop_padding": max, "compression_set.member_fraction": min}
_ALL = ("model.name", "model.factory", "model.batch_norm", "method", "certified_loss", "tail_layers")


def _refuse_untrainable(
    space: Space, data: DataSet, models: dict[ModelConfig, Untrained], make: Callable[[RunConfig], Untrained]
) -> None:
    """Raise ConfigError for what can be drawn and no trial could train: whatever fits no network, tried at its ends.

    ``models``: networks that are there already; those that ``make`` gives are added.
    What depends on conditions on other parameters than these may still fail at the draw.
    """
    ends = {p.name: p.domain.ends() for p in space.parameters}
    first = {name: _EXTREMES[name](e) if name in _EXTREMES else e[0] for name, e in ends.items()}
    images, workers = len(data.labels["train"]), space.resources.workers
    seen = set()
    names = [name for name in _ALL if name in ends]
    for values in itertools.product(*(ends[name] for name in names)):
        run = space.configuration(first | dict(zip(names, values, strict=True)), 1)
        fraction = None if run.compression_set is None else run.compression_set.member_fraction
        case = (run.model, run.method, run.tail_layers, run.train.batch_size, run.train.crop_padding, fraction)
        if case not in seen:
            seen.add(case)
            if run.model not in models:
                models[run.model] = make(run)
            model = models[run.model]
            check_trainable(run, model.network.graph, min(run.train.batch_size, images) // workers, model.frozen)


def dry_run(console: Console, space: Space, options: SearchOptions, *, as_json: bool) -> None:
    """Print what the study would cost; nothing is written."""
    data, untrained = prepared(space, options)
    found = estimate(space, data, untrained, options.run, options.driver)
    print_estimate(console, found, as_json=as_json)
    if space.constraints and space.search.scheduler.name != "none" and not as_json:
        text = "constraints guide the sampler and mark trials; rungs compare trials without them"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _digest(init: bytes | None) -> str | None:
    return None if init is None else hashlib.sha256(init).hexdigest()


def _past(
    space: Space, options: SearchOptions, records: Records, reference: Mapping[str, float]
) -> dict[str, Any] | None:
    """What ``--from`` brings; None without it, and where the records have it already.

    A driver that was killed before it had taken that up has left its name in the records.
    """
    asked = records.study.get("from")
    if asked and not records.past and not records.trials and options.source in (None, asked["source"]):
        try:
            return past_of(asked["source"], asked["study"], space, reference)
        except UserError as error:
            raise UserError(
                f"{options.run}: begun with --from {asked['source']}, which its driver had not taken up when it was "
                f"killed, and which cannot be taken up now: {error} (--from-scratch begins anew)"
            ) from error
    if options.source is None or any(event["source"] == options.source for event in records.past):
        return None
    if records.trials:
        raise UserError(
            f"--from: {options.run} has {len(records.trials)} trials already; a warm start comes before the first one "
            "(choose another --name)"
        )
    return past_of(options.source, options.source_study, space, reference)


def example_configuration(space: Space) -> RunConfig:
    """A configuration of the space, with the largest model that it allows."""
    ends = {p.name: p.domain.ends() for p in space.parameters}
    return space.configuration({name: e[-1] if name.startswith("model.") else e[0] for name, e in ends.items()}, 1)


def anchored(space: Space) -> Space:
    """The space with an absolute ``data.root``: workers run in other folders."""
    root = space.base["data"].get("root")
    if root is None:
        return space
    data = {**space.base["data"], "root": str(Path(root).expanduser().resolve())}
    return replace(space, base={**space.base, "data": data})


def settings(
    space_file: Path, overrides: Mapping[str, str], *, name: str | None, runs: Path, address: str | None,
    storage: str | None, init: Path | None, from_scratch: bool, trust_code: bool, progress: bool,
    source: str | None = None, source_study: str | None = None,
) -> tuple[Space, SearchOptions]:  # fmt: skip
    """The space and the options that the command line describes. Raises UserError for bad input."""
    space = anchored(load_space(space_file, overrides))
    if name is not None and not re.fullmatch(NAME, name):
        raise UserError(f"--name: got {name!r}; expected letters, digits, '.', '_' and '-'")
    start = pack(load_network(init)) if init is not None else None
    if storage is not None:
        local_folder("--storage", storage)
    driver = DriverOptions(address=address, storage=storage, trust_code=trust_code, init=start)
    run = runs / (name or space.name)
    if from_scratch or not (run / "trials.jsonl").exists():
        check_launch(space, str(space_file))
    if source is None and source_study is not None:
        raise UserError(f"--from-study: got {source_study!r}; expected nothing without --from")
    return space, SearchOptions(
        run=run, from_scratch=from_scratch, progress=progress, source=source, source_study=source_study, driver=driver
    )


def resumed(runs: Path, name: str) -> Path:
    """The space of a run that shall go on. UserError where there is no such run."""
    file = runs / name / "space.yaml"
    if not (runs / name / "trials.jsonl").is_file() or not file.is_file():
        known = sorted(path.parent.name for path in runs.glob("*/trials.jsonl"))
        raise UserError(f"--resume: got {name!r}; expected a run in {runs}: {', '.join(known) or 'there is none'}")
    return file


def describe(space: Space, data: DataSet) -> dict[str, Any]:
    """What a study is, for its first event: name, seed, digests, versions, commit."""
    versions = {"cactus_ray": importlib.metadata.version("cactus-ray")}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "name": space.name, "seed": space.search.seed, "digests": dict(data.digests), "versions": versions,
        "commit": commit(),
    }  # fmt: skip


def commit() -> str | None:
    """The commit of the source tree that this package runs from, or None outside one."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return found.stdout.strip()
    return None


def reference_point(space: Space, untrained: Network) -> dict[str, float]:
    """The point that is worse than any that counts, one value per column of the front.

    Accuracies and counts: 0. Sizes: 1.1 times the dense network of the space's largest model. Seconds: a day.
    """
    dense = at_level(untrained, "dense", space.data, space.threat.domain).measures
    worst = {name: 1.1 * value for name, value in dense.items()}
    return {name: 0.0 if goal == "maximize" else worst.get(name, WORST_SECONDS) for name, goal in space.front.items()}
