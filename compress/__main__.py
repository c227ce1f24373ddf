"""The command line: Hydra composes, `config` converts and checks, `pipeline.run` works."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from compress.config import conf_dir, load_config, to_config
from compress.errors import CompressError, Interrupted

EXIT_ERROR, EXIT_INTERRUPTED = 2, 75  # 75 is EX_TEMPFAIL: run the same command again
_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c",
               "--info", "-i", "--experimental-rerun")  # fmt: skip

log = logging.getLogger("compress")


def main() -> None:
    # Before torch is imported: nothing of the teacher or the text may run as code, and no telemetry leaves.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _check_command_line(sys.argv[1:])
    except CompressError as error:
        _fail(error)
    _hydra_main()


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
    except CompressError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(Interrupted("stopped by Ctrl-C; what is committed is kept, and the same command goes on"))


def _check_command_line(arguments: list[str]) -> None:
    """Answer a typo with the key that was meant, before Hydra answers with a remedy that isn't ours."""
    overrides, config_dir, rest = [], None, iter(arguments)
    for argument in rest:
        if argument in _WITH_VALUE:
            value = next(rest, None)
            config_dir = value if argument in ("--config-dir", "-cd") else config_dir
        elif argument.startswith(("--config-dir=", "-cd=")):
            config_dir = argument.partition("=")[2]
        elif argument in ("--multirun", "-m"):
            return  # each job's settings are checked when it starts
        elif not argument.startswith("-"):
            overrides.append(argument)
    if config_dir is not None and not Path(config_dir).is_dir():
        raise CompressError(f"--config-dir {config_dir} is not a folder")
    if {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"} & set(arguments):
        return
    load_config(*overrides, config_dir=config_dir)


def _start_logging() -> None:
    from rich.logging import RichHandler

    from compress.progress import console

    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="[%X]", markup=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("compress")
    root.handlers, root.propagate = [handler], False
    root.setLevel(logging.INFO)


def _fail(error: CompressError) -> None:
    interrupted = isinstance(error, Interrupted)
    print(f"compress: {'' if interrupted else 'error: '}{error}", file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED if interrupted else EXIT_ERROR)


if __name__ == "__main__":
    main()
