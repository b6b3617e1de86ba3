"""The verbs of ``model-foundry``, over Plait: python -m plait.compat.foundry.cli VERB CONFIG.

    train-tokenizer, tokenize-dataset, preprocess-data, generate-checkpoints, run [--resume], validate-config, info

Paths in a config are relative to the current folder. ``preprocess``, the linguistic changes of a corpus by spaCy, was
not taken over and says so. What goes wrong is one line, with exit status 1.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from plait.compat.foundry.architectures import get_registered_architectures
from plait.compat.foundry.config import ExperimentConfig, LoggingConfig, load_experiment
from plait.compat.foundry.trainer import Trainer, run_config
from plait.config.errors import ConfigError, DataError
from plait.config.lazy import load_object
from plait.config.load import read_config_file
from plait.config.schema import Config
from plait.config.text import to_yaml
from plait.config.timetable import CheckpointSchedule
from plait.config.words import counted
from plait.data import open_data, read_documents
from plait.data.shards import TokenShards
from plait.models.model import Model
from plait.tokenizers import load_tokenizer, train_tokenizer
from plait.tokenizers.files import write_file
from plait.training.horizon import horizon
from plait.training.objectives import make_objective
from plait.training.timetable import Epochs, scheduled_steps

app = typer.Typer(
    name="model-foundry",
    add_completion=False,
    no_args_is_help=True,
    help="The commands of Model Foundry, over Plait.",
)
Config_ = Annotated[str, typer.Argument(metavar="CONFIG", help="An experiment's YAML file")]


@app.callback()
def options(
    ctx: typer.Context,
    log_dir: Annotated[
        str | None, typer.Option(help="The folder of log files; by default the config's")
    ] = None,
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None,
        typer.Option(help="What the console shows; by default the config's"),
    ] = None,
    experiment_name: Annotated[str | None, typer.Option(help="Instead of the config's")] = None,
) -> None:
    """The commands of Model Foundry, over Plait."""
    given = {"dir": log_dir, "console_level": log_level}
    ctx.obj = ({name: value for name, value in given.items() if value is not None}, experiment_name)


@app.command()
def run(
    ctx: typer.Context,
    config: Config_,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest checkpoint")] = False,
) -> None:
    """Train the experiment."""
    experiment = _experiment(ctx, config)
    if resume:
        experiment = experiment.replace(training=experiment.training.replace(resume_from_checkpoint=True))
    result = Trainer(experiment).train()
    typer.echo(f"next: plait generate {result.run} PROMPT")
    if result.stopped == "signal":
        raise typer.Exit(130)


@app.command()
def validate_config(ctx: typer.Context, config: Config_) -> None:
    """Check a config, that its model can be built, and what is there of its files."""
    experiment = _experiment(ctx, config)
    settings = run_config(experiment)
    model = Model(settings.model.replace(vocab_size=experiment.tokenizer.vocab_size), device="meta")
    training, told = experiment.training, settings.training
    length = counted(told.epochs, "epoch") if told.epochs else counted(told.steps, "step")
    typer.echo(f"{config} is valid")
    typer.echo(f"  experiment   {experiment.experiment_name}")
    typer.echo(f"  architecture {experiment.model.architecture}, {counted(len(model.blocks), 'layer')}")
    typer.echo(f"  parameters   {model.parameter_counts()['total']:,} at a vocabulary of {model.vocab_size}")
    typer.echo(f"  training     {training.objective}, {length}, {told.batch_tokens:,} tokens a step")
    for what, path in (
        ("corpus", settings.data.train),
        ("test corpus", settings.data.validation),
        ("tokenizer", settings.tokenizer.path),
    ):
        if isinstance(path, str):
            typer.echo(f"  {what:<12} {path}{'' if Path(path).exists() else ': not there yet'}")


@app.command("train-tokenizer")
def train_tokenizer_(ctx: typer.Context, config: Config_) -> None:
    """Train the tokenizer on the training corpus and save it in tokenizer.output_dir."""
    settings = run_config(_experiment(ctx, config))
    folder = settings.tokenizer.path
    if folder is None:
        raise ConfigError(
            "it says where the tokenizer is saved; without it `run` trains one and keeps it in its own folder",
            ("tokenizer", "output_dir"),
        )
    data = settings.data
    texts = (document.text for document in read_documents(_corpus(settings), data.format, data.field))
    trained = train_tokenizer(settings.tokenizer.replace(path=None), texts)
    trained.save(folder)
    typer.echo(f"{trained.type}, {trained.vocab_size} ids, saved in {folder}")


@app.command()
def tokenize_dataset(ctx: typer.Context, config: Config_) -> None:
    """Turn the corpora into token shards, which `run` finds again."""
    for name, shards in _shards(run_config(_experiment(ctx, config))):
        documents, tokens = counted(shards.n_documents, "document"), counted(shards.n_tokens, "token")
        typer.echo(f"{name}: {documents}, {tokens} in {shards.folder}")


@app.command()
def preprocess_data(
    ctx: typer.Context,
    config: Config_,
    force: Annotated[bool, typer.Option("--force", help="Make the token shards anew")] = False,
) -> None:
    """Prepare the data and tell how many sequences it gives; they are cut out of the shards while training."""
    settings = run_config(_experiment(ctx, config))
    if force:
        for _, shards in _shards(settings):
            shutil.rmtree(shards.folder)
    length = settings.data.sequence_length
    for name, shards in _shards(settings):
        typer.echo(f"{name}: {counted(shards.n_tokens // length, 'sequence')} of {length} tokens")


@app.command()
def generate_checkpoints(
    ctx: typer.Context,
    config: Config_,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The new config; by default CONFIG is replaced")
    ] = None,
    first_epoch: Annotated[int, typer.Option(min=1, help="Checkpoints in the first epoch")] = 20,
    spacing: Annotated[Literal["log", "linear"], typer.Option(help="Of later epochs")] = "log",
    log_base: Annotated[float, typer.Option(help="Base of log spacing")] = 2,
    linear_interval: Annotated[
        int | None, typer.Option(min=1, help="Steps between, for linear spacing")
    ] = None,
    min_interval: Annotated[int, typer.Option(min=1, help="Least steps between two")] = 100,
    min_per_epoch: Annotated[int, typer.Option(min=0, help="Least checkpoints in each later epoch")] = 5,
) -> None:
    """Write the config with training.checkpoint_schedule: the steps to save at, from the size of the data.

    The written file keeps every value and no comments.
    """
    experiment = _experiment(ctx, config)
    schedule = CheckpointSchedule(
        first_epoch=first_epoch,
        later_epochs=spacing,
        base=log_base,
        interval=linear_interval,
        min_interval=min_interval,
        min_per_epoch=min_per_epoch,
    )
    steps = _scheduled(run_config(experiment), schedule)
    values: dict[str, Any] = read_config_file(Path(config))
    values["training"] = {**(values.get("training") or {}), "checkpoint_schedule": steps}
    write_file(Path(output or config), to_yaml(values).encode())
    typer.echo(
        f"{counted(len(steps), 'checkpoint')}, from step {steps[0]} to {steps[-1]}: {output or config}"
    )


@app.command()
def preprocess(
    ctx: typer.Context,
    config: Config_,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the steps")] = False,
) -> None:
    """Not taken over: the linguistic changes of a corpus (dataset_manipulation)."""
    manipulations = _experiment(ctx, config).dataset_manipulation or []
    for number, step in enumerate(manipulations, 1):
        typer.echo(f"step {number}: {step.type}, {step.input_path} -> {step.output_path}")
    if manipulations and not dry_run:
        raise ConfigError(
            "Plait does not change corpora: make the text with Foundry's own preprocess (spaCy) and name it as "
            "data.training_corpus",
            ("dataset_manipulation",),
        )
    if not manipulations:
        typer.echo("the config has no dataset_manipulation; nothing is to be done")


@app.command()
def info() -> None:
    """Name the architectures and the commands."""
    typer.echo("Model Foundry's commands, over Plait")
    typer.echo(f"architectures: {', '.join(get_registered_architectures())}")
    command: Any = typer.main.get_command(app)
    width = max(map(len, command.commands))
    for name, entry in command.commands.items():
        typer.echo(f"  {name:<{width}}  {entry.get_short_help_str(limit=90)}")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line ``words`` (default: the process's own) and return its exit status."""
    status: int = load_object("plait.cli.entry:guarded")(
        lambda: _call(list(sys.argv[1:] if words is None else words))
    )
    return status


def _call(words: list[str]) -> int:
    command: Any = typer.main.get_command(app)
    try:
        status = command.main(words or ["--help"], prog_name="model-foundry", standalone_mode=False)
    except typer.TyperException as error:
        raise ConfigError(" ".join(error.format_message().split())) from None
    except typer.Abort:
        return 130
    return status if isinstance(status, int) else 0


def _experiment(ctx: typer.Context, path: str) -> ExperimentConfig:
    """The experiment in a file, with what the options before the verb change."""
    experiment = load_experiment(path)
    logging, name = ctx.obj
    if logging:
        given = experiment.logging.model_dump(exclude_unset=True)
        experiment = experiment.replace(logging=LoggingConfig(**{**given, **logging}))
    return experiment if name is None else experiment.replace(experiment_name=name)


def _corpus(settings: Config) -> str | list[str]:
    if settings.data.train is None:
        raise DataError("data.training_corpus: no text is named to train on")
    return settings.data.train


def _shards(settings: Config) -> list[tuple[str, TokenShards]]:
    """The training and test data as shards, made if need be."""
    _corpus(settings)
    if settings.tokenizer.path is None:
        raise ConfigError(
            "it names the tokenizer that train-tokenizer has made; without it `run` trains one",
            ("tokenizer", "output_dir"),
        )
    train, test = open_data(settings.data, load_tokenizer(settings.tokenizer))
    return [("train", train), *([] if test is None else [("test", test)])]


def _scheduled(settings: Config, schedule: CheckpointSchedule) -> list[int]:
    tokenizer = load_tokenizer(settings.tokenizer)
    shards = _shards(settings)[0][1]
    rows = make_objective(settings, tokenizer).samples(shards).count
    length = settings.data.sequence_length
    batch_rows = max(1, settings.training.batch_tokens // length)
    model = Model(settings.model.replace(vocab_size=tokenizer.vocab_size), device="meta")
    steps = horizon(settings.training, model, length, batch_rows, rows)
    assert steps is not None  # the rows of an epoch are known
    return scheduled_steps(schedule, steps.steps, Epochs(rows, batch_rows))


if __name__ == "__main__":
    sys.exit(main())
