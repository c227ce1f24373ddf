"""The command line: Hydra composes, `config` converts and checks, `pipeline.run` works."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from compress.config import compose_config, conf_dir, load_config, to_config
from compress.errors import CompressError, DistributedError, Interrupted
from compress.settings import Stage

EXIT_ERROR, EXIT_INTERRUPTED = 2, 75  # 75 is EX_TEMPFAIL: run the same command again
_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c",
               "--info", "-i", "--experimental-rerun")  # fmt: skip

log = logging.getLogger("compress")


def main() -> None:
    # Before torch is imported: nothing of the teacher or the text may run as code, and no telemetry leaves.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.argv[1:] = _checked_command_line(sys.argv[1:])
        _hydra_main()
    except CompressError as error:
        _fail(error)
    except BrokenPipeError:  # as in `python -m compress --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def _hydra_main(composed: DictConfig) -> None:
    try:
        config = to_config(composed)
        _start_logging()
        import torch

        from compress import pipeline

        if config.threads:
            torch.set_num_threads(config.threads)
        pipeline.run(config)
        if os.environ.get("RANK", "0") == "0" and config.stage is not Stage.doctor:  # who comes before a job's stage
            _tell("done")
    except CompressError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(Interrupted("stopped by Ctrl-C; what is committed is kept, and the same command goes on"))


def _tell(outcome: str) -> None:
    """To a job script, which can't trust the exit code of the launchers between: "done", why another try is vain, or
    which nodes another one should leave out."""
    path = os.environ.get("COMPRESS_OUTCOME_FILE")
    if path:
        Path(path).write_text(outcome + "\n")


def _checked_command_line(arguments: Sequence[str]) -> list[str]:
    """The arguments with the settings last, as Hydra wants them.

    Raises CompressError that names the key that was meant, before Hydra answers with a remedy that isn't ours.
    """
    options: list[str] = []
    overrides: list[str] = []
    config_dir, rest = None, iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        options.append(argument)
        if argument in _WITH_VALUE:
            options += [value := next(rest, "")]
            config_dir = value if argument in ("--config-dir", "-cd") else config_dir
        elif argument.startswith(("--config-dir=", "-cd=")):
            config_dir = argument.partition("=")[2]
    if config_dir is not None and not Path(config_dir).is_dir():
        raise CompressError(f"--config-dir {config_dir} is not a folder; give the one that holds recipe/NAME.yaml")
    names = {option.partition("=")[0] for option in options}
    for name in sorted(names & {"--config-name", "-cn", "--config-path", "-cp"}):
        raise CompressError(f"{name} isn't used here: your own recipes are DIR/recipe/NAME.yaml with --config-dir DIR")
    if names & {"--help", "-h", "--hydra-help", "--version", "--info", "-i"}:
        pass
    elif names & {"--multirun", "-m"}:
        for job in _sweep(overrides):
            load_config(*job, config_dir=config_dir)
    elif names & {"--cfg", "-c"}:
        compose_config(*overrides, config_dir=config_dir)
    else:
        load_config(*overrides, config_dir=config_dir)
    return options + overrides


def _sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """For each value of a sweep (`name=a,b`) the settings of a job that has it: as many as show every value once."""
    values = []
    for override in overrides:
        try:
            [parsed] = OverridesParser.create().parse_overrides([override])
            values.append(list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [override])
        except HydraException:  # said better by load_config
            values.append([override])
            continue
        if parsed.is_sweep_override():
            values[-1] = [f"{parsed.get_key_element()}={value}" for value in values[-1]]
    for index in range(max(map(len, values), default=1)):
        yield [found[min(index, len(found) - 1)] for found in values]


def _start_logging() -> None:
    from rich.logging import RichHandler

    from compress.progress import console

    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="[%X]", markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:  # a file or a pipe: one line a message, whatever its length
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger("compress")
    root.handlers, root.propagate = [handler], False
    root.setLevel(logging.INFO)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks, the others only of trouble
        console.quiet = True
        root.setLevel(logging.ERROR)


def _fail(error: CompressError) -> None:
    interrupted = isinstance(error, Interrupted)
    print(f"compress: {'' if interrupted else 'error: '}{error}", file=sys.stderr)
    if not interrupted:
        kind = f"unfit {','.join(error.nodes)}" if isinstance(error, DistributedError) else "refused"
        _tell(f"{kind}: {error}")
    sys.exit(EXIT_INTERRUPTED if interrupted else EXIT_ERROR)


if __name__ == "__main__":
    main()
