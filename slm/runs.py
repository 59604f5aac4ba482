"""What the runs of a folder reached, side by side: `python -m slm.runs`; drawn with `--figure runs.png`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from slm.command.exit_codes import ends_in_one_line, python_name
from slm.command.flags import new_parser, parse_flags
from slm.messages import say, silence_notices
from slm.research.runs import best_first, draw, group_table, read_runs, table
from slm.run.checkpoint import RUNS


def show(runs: Path = RUNS, figure: Path | None = None) -> None:
    """Print what the runs of a folder reached, side by side, the best first.

    Args:
        runs: the folder that they are in.
        figure: a file to draw their validation losses into, such as runs.png. Runs that differ in nothing but their
            seeds then have one curve and one row, with their mean and spread.
    """
    found = read_runs(runs)
    if figure is not None:
        draw(found, figure)
    print(table(found) if figure is None else group_table(found))
    if (best := best_first(found)[0]).best_step is not None:
        command = [python_name(), "-m", "slm.look", "--ckpt_path", str(best.path)]
        say(f"look inside the best with {shlex.join(command)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = new_parser("runs")
    parser.add_function_arguments(show)
    parser.add_argument("folder", nargs="?", type=Path | None, help="the same as --runs")
    silence_notices()
    with ends_in_one_line():
        settings = parse_flags(parser, argv)
        show(settings.folder or settings.runs, settings.figure)


if __name__ == "__main__":
    main()
