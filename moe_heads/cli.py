"""Command line: ``moe-heads analyze`` and ``moe-heads compare``."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_heads.commands.errors import CommandError, one_sentence

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]

# Options of the callbacks that apply to a training or to the Trainer.
_OF_TRAININGS = {"stages", "every_n_epochs", "every_n_train_steps", "max_overhead", "weights", "on_error", "name"}

_UNPICKLE = "load objects other than tensors and plain data from checkpoints, which can run any code"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 if some analyses failed, or 2 after wrong input.

    Args:
        args: Arguments; by default those of the process.
    """
    try:
        import jsonargparse  # noqa: F401
    except ModuleNotFoundError:
        print('moe-heads: jsonargparse is not installed: run `pip install "moe-heads[cli]"`.', file=sys.stderr)
        return 2
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        return _run(_parser().parse_args(None if args is None else list(args)))
    except (argparse.ArgumentError, ValueError, MisconfigurationException) as error:
        print(f"moe-heads: {one_sentence(error)}", file=sys.stderr)
        return 2


def _parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    from moe_heads.commands.analyze import ANALYSES, AnalyzeOptions
    from moe_heads.commands.compare import CompareOptions

    parser = ArgumentParser(prog="moe-heads", description="Analyze and compare checkpoints.", exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    analyze = ArgumentParser(description="Run analyses of a checkpoint and store their results.", exit_on_error=False)
    analyze.add_class_arguments(AnalyzeOptions, skip={"unpickle", "overwrite"})
    _add_flags(analyze, unpickle=_UNPICKLE, overwrite="replace earlier results")
    for name, callback in ANALYSES.items():
        analyze.add_class_arguments(callback, name, skip=_OF_TRAININGS)
    commands.add_subcommand("analyze", analyze, help="run analyses of a checkpoint")
    compare = ArgumentParser(description="Compare analyzed checkpoints on one page.", exit_on_error=False)
    compare.add_argument("dirs", nargs="+", help="folders that `moe-heads analyze` has written")
    compare.add_class_arguments(CompareOptions, skip={"dirs", "no_barriers", "unpickle", "overwrite"})
    _add_flags(
        compare,
        no_barriers="skip the loss barriers, for which the models are loaded again",
        unpickle=_UNPICKLE,
        overwrite="replace an earlier page",
    )
    commands.add_subcommand("compare", compare, help="compare analyzed checkpoints on one page")
    return parser


def _add_flags(parser: "ArgumentParser", **descriptions: str) -> None:
    for name, description in descriptions.items():
        parser.add_argument(f"--{name}", action="store_true", help=description)


def _run(parsed: Any) -> int:
    from moe_heads.commands.analyze import ANALYSES, AnalyzeOptions, analyze_checkpoint
    from moe_heads.commands.compare import CompareOptions, compare_results

    options = parsed[parsed.command].as_dict()
    if parsed.command == "compare":
        print(compare_results(CompareOptions(**options)))
        return 0
    arguments = {name: options.pop(name) for name in ANALYSES}
    _check_unused(arguments, options["analyses"])
    done = analyze_checkpoint(AnalyzeOptions(**options), arguments)
    for name, error in done.failed.items():
        traceback.print_exception(error)
        print(f"moe-heads: {name} failed: {one_sentence(error)}", file=sys.stderr)
    print(done.folder)
    return 1 if done.failed else 0


def _check_unused(arguments: dict[str, Any], analyses: str) -> None:
    """Raise an error if an option of an analysis was given that does not run.

    Raises:
        CommandError: If there is such an option.
    """
    from jsonargparse import ArgumentParser

    from moe_heads.commands.analyze import ANALYSES

    for name in arguments.keys() - {each.strip() for each in analyses.split(",")}:
        parser = ArgumentParser()
        parser.add_class_arguments(ANALYSES[name], skip=_OF_TRAININGS)
        defaults = parser.get_defaults().as_dict()
        # the options of all analyses have no default here
        changed = [key for key, value in arguments[name].items() if key not in defaults or value != defaults[key]]
        if changed:
            raise CommandError(
                f"--{name}.{changed[0]}: expected an option of an analysis that runs, got --analyses {analyses}."
            )


if __name__ == "__main__":
    sys.exit(main())
