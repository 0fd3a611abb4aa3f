"""The command line: verbs, their options, and exit statuses. What a verb does is in ``cactus_ray.commands``.

Exit status: 0 done, 1 a run or a check failed, 2 bad input or usage, 3 nothing satisfies the requirements, 130
interrupted.
Modules that import torch or Ray are imported by the verb that needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cactus_ray import __version__, interrupts
from cactus_ray.errors import ConfigError, UserError
from cactus_ray.outputs import local_folder
from cactus_ray.texts import visible

app = typer.Typer(
    name="cactus-ray",
    help="Search for compressed networks that are provably robust; pick one; certify its file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(bench_app, name="bench")
# Recent typer brings its own copy of click, so click's name for the parent of all usage errors may be another class.
UsageError: Any = typer.BadParameter.__mro__[1]
# what is printed quotes names and values, which are no markup and hold no emoji codes
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)


def _folder(option: str) -> Callable[[str | Path], Path]:
    """Reads the folder that an option names. A parser and not a check afterwards: as a Path, s3://x is s3:/x."""

    def parse(value: str | Path) -> Path:
        return Path(local_folder(option, str(value)))

    parse.__name__ = "FOLDER"
    return parse


SpaceFile = Annotated[
    Path, typer.Argument(help="YAML search space, such as search_spaces/digits.yaml.", show_default=False)
]
Run = Annotated[Path, typer.Argument(help="Folder of a run, such as runs/digits.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Fix a parameter or change a key, such as train.epochs=5; repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Import the Python code that model.factory names.")]
Init = Annotated[
    Path | None, typer.Option("--init", help="Start every training from this network file (.safetensors).")
]
Root = Annotated[
    Path | None,
    typer.Option(parser=_folder("--root"), help="Folder of the data set, where it is not inside a package."),
]
Bound = Annotated[
    str | None, typer.Option("--bound", help="Strongest bound that is tried: ibp, crown, alpha or branch.")
]
Samples = Annotated[
    int | None, typer.Option("--samples", min=1, help="Use a fixed random subset of this many samples.")
]
FamilyFormat = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="Certify every rounding of the weights to these integers at once, such as int8 or int4:affine.",
    ),
]
FamilyRadius = Annotated[
    str | None,
    typer.Option(
        help="half (default): rounding to nearest, and noise of half a step; one: also rounding down, up, stochastic."
    ),
]
FamilyZeros = Annotated[
    str | None,
    typer.Option(
        help="Whether weights that are exactly 0 stay 0 in the family: fixed (default where a level prunes) or free."
    ),
]

Transform = Annotated[
    str | None,
    typer.Option(
        help="For --threat semantic: rotation:15 (degrees), brightness:0.2, contrast:0.3, blur:1 (pixels), noise:0.1;"
        " joined by + one after the other; several, separated by commas."
    ),
]
Confidence = Annotated[
    float | None, typer.Option(help="For --threat semantic: probability that a bound is right (default 0.99).")
]
Flip = Annotated[
    float | None,
    typer.Option(help="For --threat semantic: largest probability of a changed prediction (default 0.001)."),
]
Draws = Annotated[
    int | None,
    typer.Option(help="For --threat semantic: transformations per sample; default: so many that all samples can hold."),
]


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(f"cactus-ray {__version__}", highlight=False)
        raise typer.Exit
    del context


def _overrides(pairs: list[str] | None, **options: Any) -> dict[str, str]:
    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set: got {pair!r}; expected KEY=VALUE, such as train.epochs=5")
        found[key.strip()] = value
    return found | {key: str(value) for key, value in options.items() if value is not None}


@app.command()
def search(
    context: typer.Context,
    space: Annotated[Path | None, typer.Argument(help="YAML search space; or --resume.", show_default=False)] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="NAME", help="Go on with this run, with the space that it has.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the name in the space.")] = None,
    runs: Annotated[Path, typer.Option(parser=_folder("--runs"), help="Folder that holds runs.")] = Path("runs"),
    trials: Annotated[int | None, typer.Option(min=1, help="Number of trials.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the study.")] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray that this machine is a node of: auto or HOST:6379.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder for Ray's scratch files, shared by all nodes of a cluster.")
    ] = None,
    set_: Set = None,
    init: Init = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Warm start from another run, or an Optuna storage (URL, journal or SQLite file)."),
    ] = None,
    source_study: Annotated[
        str | None, typer.Option("--from-study", help="Name of the study in an Optuna storage of several.")
    ] = None,
    max_trials: Annotated[int | None, typer.Option(min=1, help="Start no more trials than this.")] = None,
    max_hours: Annotated[
        float | None, typer.Option(help="End after so many hours of work, over all drivers of the run.")
    ] = None,
    max_gpu_hours: Annotated[float | None, typer.Option(help="End after so many hours of GPUs.")] = None,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Replace a run of this name; it is deleted when a new trial starts."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only profile a step of every method and print what the study costs.")
    ] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Run a study, or go on with it: trials, verdicts, the front, and a report that opens offline."""
    # first of all, so that an interrupt finds its words: the imports of the rest take seconds
    from cactus_ray.report.resume import begun_as, go_on, keeps, resume_arguments

    typed = [_program(), *context.obj]
    if not dry_run:
        interrupts.say_last(lambda: go_on(typed))
    from cactus_ray.commands.search import dry_run as print_cost
    from cactus_ray.commands.search import resumed, settings
    from cactus_ray.commands.search import search as run_search

    overrides = _overrides(
        set_,
        **{
            "search.trials": trials, "search.seed": seed, "search.max_trials": max_trials,
            "search.max_hours": max_hours, "search.max_gpu_hours": max_gpu_hours,
        },
    )  # fmt: skip
    if (space is None) == (resume is None):
        raise UserError(f"search: got {'both' if space else 'neither'}; expected a search space or --resume NAME")
    if resume is not None:
        for option, given in (("--name", name), ("--from-scratch", from_scratch or None), ("--from", source)):
            if given is not None:
                raise UserError(f"{option}: got {given}; expected nothing beside --resume, which goes on with a run")
        name = resume
    options = settings(
        space or resumed(runs, str(resume)), overrides,
        name=name, runs=runs, address=address, storage=storage, init=init,
        from_scratch=from_scratch, trust_code=trust_code, progress=not as_json, source=source,
        source_study=source_study,
    )  # fmt: skip
    if dry_run:
        print_cost(out, *options, as_json=as_json)
        return
    run, before = options[1].run, begun_as(options[1].run) if from_scratch else None

    def last_words() -> str:
        if begun_as(run) in (None, before) or not keeps(run, options[0]):
            return go_on(typed)
        more = {"address": address, "storage": storage, "init": init, "trust_code": trust_code, "json": as_json}
        return go_on([_program(), *resume_arguments(run, **more)])

    interrupts.say_last(last_words)
    records = run_search(*options)
    _show_front(options[1].run, records, as_json)
    if not records.points():
        raise typer.Exit(1)


def _show_front(run: Path, records: Any, as_json: bool) -> None:
    from cactus_ray.report.terminal import print_front

    print_front(out, run, records, as_json=as_json)


@app.command()
def suggest(run: Run, set_: Set = None, as_json: Json = False) -> None:
    """Queue a configuration into a study, running or stopped; what --set leaves out is drawn."""
    from cactus_ray.commands.study import queue

    queue(out, run, _overrides(set_), as_json=as_json)


@app.command()
def explain(
    run: Run,
    trial: Annotated[str, typer.Argument(help="A trial, such as t0007.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Say why a trial was stopped or failed, or what dominates its points."""
    from cactus_ray.commands.study import explain as print_explanation

    print_explanation(out, run, trial, as_json=as_json)


@app.command()
def dashboard(run: Run, port: Annotated[int, typer.Option(help="Port on localhost.")] = 8080) -> None:
    """Open a run in optuna-dashboard on localhost, from its records."""
    from cactus_ray.commands.study import dashboard as show

    show(out, run, port)


@app.command()
def status(run: Run, as_json: Json = False) -> None:
    """Show how far a run is, also while it runs or after it died."""
    from cactus_ray.report.terminal import print_status
    from cactus_ray.search.store import read_records

    print_status(out, run, read_records(run), as_json=as_json)


@app.command()
def report(run: Run, as_json: Json = False) -> None:
    """Write the tables and report.html of a run again from its records, and show its front."""
    from cactus_ray.commands.report import rebuild

    records = rebuild(run)
    _show_front(run, records, as_json)


@app.command()
def pick(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run, such as runs/digits; or a network file (.safetensors), with --level.",
            show_default=False,
        ),
    ],
    to: Annotated[Path, typer.Option("--out", help="Folder for model.onnx, certificate.json and card.md.")],
    max_bytes: Annotated[str | None, typer.Option(help="Largest file, such as 40k (k = 1,000 bytes).")] = None,
    min_certified: Annotated[str | None, typer.Option(help="Least certified accuracy, such as 0.8 or 80%.")] = None,
    min_accuracy: Annotated[str | None, typer.Option(help="Least standard accuracy.")] = None,
    prefer: Annotated[
        str, typer.Option(help="What to prefer among those that fit: certified, accuracy or bytes.")
    ] = "certified",
    trial: Annotated[str | None, typer.Option(help="Only this trial, such as t0007.")] = None,
    level: Annotated[str | None, typer.Option(help="Only this level, such as int8.")] = None,
    bound: Bound = None,
    samples: Samples = None,
    root: Root = None,
    family: FamilyFormat = None,
    family_radius: FamilyRadius = None,
    family_zeros: FamilyZeros = None,
    as_json: Json = False,
) -> None:
    """Choose a network on the selection split, write its file, and certify that file on the test split.

    Of a network file, as train writes it, the level is written and certified; there is nothing to choose.
    """
    from cactus_ray.commands.families import FamilyOptions
    from cactus_ray.commands.pick import pick as run_pick
    from cactus_ray.deploy.requirements import Requirements

    requirements = Requirements.parse(
        max_bytes=max_bytes, min_certified=min_certified, min_accuracy=min_accuracy, prefer=prefer,
        trial=trial, level=level,
    )  # fmt: skip
    if not run_pick(
        out, run, to, requirements, bound=bound, samples=samples, root=root, as_json=as_json,
        family=FamilyOptions.of(family, family_radius, family_zeros),
    ):  # fmt: skip
        raise typer.Exit(3)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of a pick.", show_default=False)],
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Verify a certificate again, from the files and the data alone."""
    from cactus_ray.commands.pick import check as run_check

    if not run_check(out, folder, root, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def train(
    space: Annotated[Path | None, typer.Argument(help="YAML search space; or --trial.", show_default=False)] = None,
    trial: Annotated[
        str | None, typer.Option("--trial", metavar="RUN/TRIAL", help="Repeat this trial, such as runs/digits/t0007.")
    ] = None,
    to: Annotated[Path, typer.Option("--out", help="Network file to write (.safetensors).")] = Path(
        "network.safetensors"
    ),
    set_: Set = None,
    init: Init = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: what a study of --trial trained on, else cpu.")
    ] = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Train one configuration without Ray: of a space whose every parameter has a value (--set), or of a trial."""
    from cactus_ray.commands.single import of_space, of_trial
    from cactus_ray.commands.single import train as run_train

    if (space is None) == (trial is None):
        raise UserError(f"train: got {'both' if space else 'neither'}; expected a search space or --trial RUN/TRIAL")
    if trial is not None and set_:
        raise UserError(f"--set: got {set_[0]!r}; expected nothing beside --trial, which repeats a trial as it was")
    training = of_trial(trial, init) if trial is not None else of_space(space or Path(), _overrides(set_))
    run_train(out, training, to, init=init, trust_code=trust_code, as_json=as_json, device=device)


@app.command()
def verify(
    network: Annotated[Path, typer.Argument(help="A network file (.safetensors) or an ONNX file.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="Data set; default: the one it was trained on.")] = None,
    root: Root = None,
    split: Annotated[str, typer.Option(help="train, selection or test.")] = "test",
    epsilon: Annotated[str | None, typer.Option(help="Radius, or several: 0.05,0.1 or 8/255.")] = None,
    levels: Annotated[str | None, typer.Option(help="Levels of a network file, separated by commas.")] = None,
    samples: Samples = None,
    bound: Bound = None,
    seconds_per_sample: Annotated[float, typer.Option(min=0, help="Time limit; 0: none, but 10 for branch.")] = 0.0,
    radius: Annotated[
        bool, typer.Option("--radius", help="Find the largest certified radius per sample, up to --epsilon.")
    ] = False,
    vnnlib: Annotated[
        Path | None, typer.Option(help="Decide this VNN-LIB specification (.vnnlib or .vnnlib.gz) of an ONNX file.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for --vnnlib.")] = 60.0,
    family: FamilyFormat = None,
    family_radius: FamilyRadius = None,
    family_zeros: FamilyZeros = None,
    threat: Annotated[
        str, typer.Option(help="linf: certificates; semantic: confidence bounds under random transformations.")
    ] = "linf",
    transform: Transform = None,
    confidence: Confidence = None,
    flip: Flip = None,
    draws: Draws = None,
    to: Annotated[
        Path | None,
        typer.Option("--out", help="File for the result of --vnnlib, or for results per sample (.jsonl; resumable)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Certify a network: per radius and level, what is certified, falsified and unknown; or decide a specification."""
    if threat not in ("linf", "semantic"):
        raise ConfigError("--threat", threat, "linf or semantic")
    of_linf = {
        "--epsilon": epsilon, "--radius": radius or None, "--bound": bound, "--family": family,
        "--family-radius": family_radius, "--family-zeros": family_zeros,
        "--seconds-per-sample": seconds_per_sample or None,
    }  # fmt: skip
    of_semantic = {"--transform": transform, "--confidence": confidence, "--flip": flip, "--draws": draws}
    if threat == "semantic":
        _refuse(of_linf | {"--vnnlib": vnnlib}, "this is about linf; leave it out, or --threat semantic")
        from cactus_ray.commands.semantic import SemanticOptions, verify_semantic

        verify_semantic(
            out, network, SemanticOptions(transform, confidence, flip, draws), data=data, root=root, split=split,
            levels=levels, samples=samples, to=to, as_json=as_json,
        )  # fmt: skip
        return
    _refuse(of_semantic, "this asks for --threat semantic")
    if vnnlib is not None:
        from cactus_ray.commands.vnnlib import verify_vnnlib

        del of_linf["--seconds-per-sample"]  # never read here
        data_options = {"--data": data, "--root": root, "--levels": levels, "--samples": samples}
        data_options |= {"--split": None if split == "test" else split}
        _refuse(data_options | of_linf, "the specification of --vnnlib says what is asked; give one of the two")
        verify_vnnlib(out, network, vnnlib, timeout=timeout, to=to, as_json=as_json)
        return
    from cactus_ray.commands.families import FamilyOptions
    from cactus_ray.commands.single import verify as run_verify

    run_verify(
        out, network, data=data, root=root, split=split, epsilon=epsilon, levels=levels, samples=samples,
        bound=bound, seconds_per_sample=seconds_per_sample, radius=radius, to=to, as_json=as_json,
        family=FamilyOptions.of(family, family_radius, family_zeros),
    )  # fmt: skip


def _refuse(options: dict[str, Any], reason: str) -> None:
    """Raise UserError for the first option that has a value."""
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name}: {reason}")


@app.command()
def simulate(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run whose curves are replayed; with --synthetic also a space.")
    ],
    sampler: Annotated[str, typer.Option(help="tpe, nsga2, nsga3, gp, cmaes or random.")] = "tpe",
    scheduler: Annotated[str, typer.Option(help="none or asha.")] = "asha",
    reduction: Annotated[float, typer.Option(help="The best 1/reduction at a rung go on.")] = 3.0,
    min_epochs: Annotated[int, typer.Option(min=1, help="No trial is stopped before.")] = 1,
    ranking: Annotated[str, typer.Option(help="hypervolume, crowding or epsilon_net.")] = "hypervolume",
    by: Annotated[str | None, typer.Option(help="Rank at rungs by this one metric of an epoch instead.")] = None,
    promote: Annotated[
        bool | None,
        typer.Option("--promote/--stop", help="Trials that fall behind wait, or stop; default: as the space says."),
    ] = None,
    rest: Annotated[
        str | None, typer.Option(help="stop or promote: what waits at the end; default: as the space says.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Simulated workers.")] = 1,
    trials: Annotated[int | None, typer.Option(min=1, help="Whole trials of the random search beside it.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeats with seeds 0, 1, ...")] = 10,
    synthetic: Annotated[
        int | None, typer.Option(min=1, help="Use this many made-up curves of the space instead of recorded ones.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay recorded learning curves through a sampler and a scheduler, beside random search over whole trials."""
    from cactus_ray.commands.simulate import SimulateOptions, simulate_run
    from cactus_ray.config import parse
    from cactus_ray.search.settings import SchedulerSettings, SearchSettings

    plain = {"name": scheduler, "reduction": reduction, "min_epochs": min_epochs, "ranking": ranking}
    settings = parse(SchedulerSettings, plain, "scheduler")
    parse(SearchSettings, {"sampler": sampler})
    if rest is not None:
        parse(SchedulerSettings, {"rest": rest}, "scheduler")
    options = SimulateOptions(
        sampler=sampler, scheduler=settings, workers=workers, trials=trials, seeds=seeds, by=by, synthetic=synthetic,
        promote=promote, rest=rest,
    )  # fmt: skip
    simulate_run(out, run, options, as_json=as_json)


@bench_app.command("train")
def bench_train(
    model: Annotated[str, typer.Option(help="Architecture, such as cnn_small or cnn7.")] = "cnn_small",
    width: Annotated[float, typer.Option(help="Factor on every width.")] = 1.0,
    batch_norm: Annotated[
        bool | None, typer.Option(help="Batch norm after every hidden layer; default: the model's own.")
    ] = None,
    image: Annotated[str, typer.Option(help="Channels, height and width of an image.")] = "1x28x28",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 128,
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas; default: all.")] = None,
    strategies: Annotated[str | None, typer.Option(help="Of cactus: names, separated by commas; default: all.")] = None,
    attack_steps: Annotated[str, typer.Option(help="Steps of the attacks, such as 1,8.")] = "1,8",
    repeats: Annotated[int, typer.Option(min=1, help="Turns in which all steps are timed.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="With train.compile: step.")] = False,
    as_json: Json = False,
) -> None:
    """Time one training step of every method against a plain forward pass, in turns, on random images."""
    from cactus_ray.commands.bench import BenchOptions
    from cactus_ray.commands.bench import bench_train as run_bench

    options = BenchOptions(
        model, width, batch_norm, image, batch_size, methods, strategies, attack_steps, repeats, threads, device,
        compiled,
    )  # fmt: skip
    run_bench(out, options, as_json=as_json)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; user errors become one line, faults keep their traceback."""
    typed = sys.argv[1:] if arguments is None else arguments
    interrupts.say_last(lambda: "interrupted")
    try:
        status = app(args=typed, standalone_mode=False, obj=typed)
    except typer.Exit as error:
        status = error.exit_code
    except UsageError as error:
        error.show()
        return 2
    except UserError as error:
        return _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        status = interrupts.EXIT_STATUS
    # typer itself takes a KeyboardInterrupt for this status, or for an Abort, as its version has it
    if status == interrupts.EXIT_STATUS:
        words = interrupts.last_words()
        err.print(words, style="yellow" if err.is_terminal else None, highlight=False, soft_wrap=True)
    return status if isinstance(status, int) else 0


def _program() -> str:
    """How this program was called, as a shell would find it again."""
    name = Path(sys.argv[0]).name
    return name if shutil.which(name) == sys.argv[0] else sys.argv[0]


def _fail(error: UserError) -> int:
    code = getattr(error, "exit_status", 2)
    if "--json" in sys.argv:
        out.print(json.dumps({"error": str(error), "status": code}), highlight=False, soft_wrap=True, markup=False)
    # messages quote files and names of strangers: no terminal escape code may pass
    message = visible(f"error: {error}", keep="\n")
    err.print(message, style="red" if err.is_terminal else None, highlight=False, markup=False, soft_wrap=True)
    return int(code)


def main() -> None:
    """Entry point of ``cactus-ray``."""
    # As `python -m` does: model.factory names modules of the folder that the user works in (Ray passes this path on).
    interrupts.install()  # first of all: the imports of a verb take seconds
    sys.path.insert(0, str(Path.cwd()))
    sys.exit(run())
