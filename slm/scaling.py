"""A scaling law of one's own: `python -m slm.scaling [FLAGS]` trains a ladder of models, fits the law and draws it.

Models of several sizes are trained on several numbers of tokens, each token seen once. The largest model on the most
tokens comes last: what it will reach is predicted from all others, and kept, before it is trained. On the default data
the loss that no model gets below is known, so the law's own estimate of it can be seen to be right or wrong; with
`--data.path FOLDER` it is a text's. The flags are those of `train.py`; the same command goes on with a ladder that was
stopped.
"""

import json
import math
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slm.command.exit_codes import ends_in_one_line
from slm.durable import replace_file, replacing
from slm.errors import InputError, check
from slm.hardware import prepare_cpu
from slm.messages import say, silence_notices
from slm.research.law import EXPONENTS, FLOPS_PER_WEIGHT, Fit, Law, fit
from slm.research.points import Flags, Point, Points, Result, grid, key_of, runs_of
from slm.research.runs import read_run
from slm.sweep import cost_table, options_and_flags, stopping_goes_on, train_all

HEAD_DIM = 8
"""Of every size of model: more heads, not larger ones."""
RATE_TIMES_ROOT_OF_WIDTH = 0.02
"""Wider models want a smaller learning rate; this one was the best of three at 16 and 64, on the default data."""
WARMUP = 1 / 20
"""Of a run's steps."""
VARIED = {"model.embed_dim", "trainer.max_steps"}
USUAL = {"accumulate_grad_batches": 1, "max_time": None, "fast_dev_run": False, "overfit_batches": 0.0} | dict.fromkeys(
    ("limit_train_batches", "limit_val_batches")
)
"""Settings of the Trainer that would change how many tokens a run sees, or keep its loss from being known."""
HELD_OUT = 0.04
"""Of the default data."""


@dataclass(frozen=True)
class Ladder:
    """The models that a law is fitted to: every size with every number of tokens.

    Args:
        embed_dims: the sizes, by the width of the residual stream; the feed-forward layer is four times as wide.
        tokens: how many tokens a run trains on.
        dry_run: only says what it will cost.
    """

    embed_dims: Sequence[int] = (16, 24, 32, 48, 64)
    tokens: Sequence[int] = (500_000, 1_000_000, 2_000_000, 4_000_000)
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name, values in (("embed_dims", self.embed_dims), ("tokens", self.tokens)):
            check(len(set(values)) >= 3, f"{name}={list(values)}: a law is seen in three different values or more")
        odd = [dim for dim in self.embed_dims if dim < 1 or (dim > HEAD_DIM and dim % HEAD_DIM)]
        check(not odd, f"embed_dims={odd}: a head has {HEAD_DIM} values, give multiples of that")

    def points(self, flags: Flags) -> dict[tuple[int, int], Point]:
        """By size and tokens, the cheapest first; the largest on the most tokens is last."""
        several = [f"{name} {' '.join(values)}" for name, values in flags if len(values) > 1]
        check(not several, f"{several and several[0]}: the ladder takes one value of each flag")
        [base] = grid(flags)
        taken = [name for name, _ in flags if name.removeprefix("--") in self._flags(1, 1).keys() | VARIED]
        check(not taken, f"{', '.join(taken)}: the ladder sets that, leave it out")
        if any(name in ("--config", "-c") for name, _ in flags):
            say(f"whatever --config says, the ladder sets {', '.join(sorted(self._flags(1, 1).keys() | VARIED))}")
        settings = base.command().settings
        changed = [f"trainer.{name}" for name, usual in USUAL.items() if settings.trainer[name] not in (usual, None)]
        check(not changed, f"{', '.join(changed)}: every model of the ladder trains on its tokens, leave it out")
        batch = settings.data.init_args["batch_size"] * settings.model.max_seq_len
        found = {}
        for dim in self.embed_dims:
            for tokens in self.tokens:
                steps = tokens // batch
                check(steps >= 2, f"tokens={tokens} are {steps} batches of {batch}: give more, or a smaller batch_size")
                ours = self._flags(dim, steps)
                if "--model.learning_rate" not in dict(flags):
                    ours["model.learning_rate"] = f"{RATE_TIMES_ROOT_OF_WIDTH / math.sqrt(dim):.3g}"
                if settings.data.class_path.endswith(".DummyData"):
                    ours["data.num_tokens"] = math.ceil((max(self.tokens) + batch) / (1 - HELD_OUT))
                    ours["data.val_fraction"] = HELD_OUT
                varied = (f"--model.embed_dim={dim}", f"--trainer.max_steps={steps}")
                others = (f"--{name}={value}" for name, value in ours.items())
                found[dim, tokens] = Point((*base.argv, *others, *varied), varied)
        return dict(sorted(found.items(), key=lambda item: math.prod(item[0])))

    def _flags(self, embed_dim: int, steps: int) -> dict[str, Any]:
        """What a size of model, and a number of steps, settle."""
        return {
            "model.num_heads": max(1, embed_dim // HEAD_DIM),
            "model.hidden_dim": 4 * embed_dim,
            "model.schedule": "cosine",
            "model.warmup_steps": max(1, round(WARMUP * steps)),
            "trainer.max_epochs": -1,
            "trainer.val_check_interval": steps,
            "trainer.check_val_every_n_epoch": "null",
        }


@dataclass(frozen=True)
class Reached:
    """What a model of N parameters reached after D tokens, in nats per token, and the data's optimum if it is known."""

    parameters: int
    tokens: int
    loss: float
    optimum: float | None


def reached(result: Result) -> Reached:
    """Of a run that has ended; raises InputError where it has no validation."""
    run = read_run(result.run)
    loss, settings = run.best("val/loss"), run.settings
    if loss is None:
        raise InputError(f"{result.run} has no validation: leave out what limits it")
    tokens = settings["trainer.max_steps"] * settings["data.batch_size"] * settings["model.max_seq_len"]
    return Reached(run.num_parameters(), tokens, loss, run.best("val/optimum"))


def check_each_token_is_new(point: Point) -> None:
    """Raise InputError where the data is too short for the longest run to see each of its tokens once."""
    command = point.command()
    data = command.new_data(command.new_model(on_meta=True))
    data.setup()
    assert data.train_windows is not None
    steps, batch_size = command.settings.trainer.max_steps, data.hparams["batch_size"]
    there, seq_len = len(data.train_windows) // batch_size, data.hparams["max_seq_len"]
    check(
        steps <= there,
        f"the data has {there * batch_size * seq_len:,} tokens to train on, and the ladder needs {steps} batches of "
        f"{batch_size * seq_len:,}, each token once: give more data, or fewer --tokens",
    )


def fit_law(models: Sequence[Reached]) -> Fit:
    """The law of what models reached."""
    return fit(
        [model.parameters for model in models], [model.tokens for model in models], [model.loss for model in models]
    )


@dataclass(frozen=True)
class Prediction:
    """What the largest model is expected to reach, in nats per token: the law's, and the ends of 90 % of resamplings.

    It is written down before that model is trained.
    """

    loss: float
    low: float
    high: float


def predict(file: Path, models: Sequence[Reached], parameters: int, tokens: int) -> Prediction:
    """What all other models foretell of the largest; that of an earlier start of the command stands."""
    if not file.is_file():
        law = fit_law(models)
        ends = law.interval(lambda other: other.loss(parameters, tokens))
        content = {"loss": law.law.loss(parameters, tokens), "low": ends[0], "high": ends[1]}
        replace_file(file, json.dumps(content).encode())
    return Prediction(**json.loads(file.read_text()))


def climb(ladder: Ladder, flags: Flags) -> None:
    """Train the ladder, predict its last model, train that too, and print and draw the law."""
    points = list(ladder.points(flags).values())
    folder = Points(runs_of(points[-1].command()))
    folder.make_folder()
    check_each_token_is_new(points[-1])
    keys = {folder.key(point): point for point in points}
    *below, largest = keys
    file = folder.folder / f"prediction-{key_of({'of': largest, 'from': below})}.json"
    check(
        file.is_file() or folder.result(largest) is None,
        f"the largest model is trained already, in {folder.runs}: a prediction would come too late, give more --tokens",
    )
    models = [reached(result) for result in trained(folder, {key: keys[key] for key in below})]
    command = keys[largest].command()
    parameters = sum(weight.numel() for weight in command.new_model(on_meta=True).transformer.parameters())
    data, settings = command.settings.data.init_args, command.settings
    tokens = settings.trainer.max_steps * data["batch_size"] * settings.model.max_seq_len
    prediction = predict(file, models, parameters, tokens)
    size = f"{parameters:,} parameters on {tokens:,} tokens"
    say(f"the largest model, of {size}, is expected to reach {_around(prediction)}")
    [last] = [reached(result) for result in trained(folder, {largest: keys[largest]})]
    law = fit_law([*models, last])
    print(*report([*models, last], law, prediction), sep="\n")
    from slm.watch.pictures import law_figure  # which imports matplotlib

    figure = folder.runs / "law.png"
    limits = {"E of the law": law.law.irreducible} | ({} if last.optimum is None else {"E in truth": last.optimum})
    drawn = law_figure(
        [(m.parameters, m.tokens, m.loss) for m in [*models, last]],
        law.law.loss,
        limits,
        (prediction.loss, prediction.low, prediction.high),
    )
    with replacing(figure) as content:
        drawn.savefig(content, format="png")
    say(f"the law is drawn in {figure}")


def trained(folder: Points, points: Mapping[str, Point]) -> list[Result]:
    """What models reach, which are trained if they are not yet; raises InputError where one fails."""
    results, failed = train_all(folder, points)
    check(not failed, f"{failed} models failed: see above; the same command tries them again")
    return results


def report(models: Sequence[Reached], fitted: Fit, prediction: Prediction) -> Iterator[str]:
    """What the models reached, the law, its E beside the true one, the prediction, and what to spend compute on."""
    law, last = fitted.law, models[-1]
    sizes, tokens = (sorted({getattr(model, name) for model in models}) for name in ("parameters", "tokens"))
    losses = {(model.parameters, model.tokens): model.loss for model in models}
    yield f"| parameters | {' | '.join(f'{number:,} tokens' for number in tokens)} |"
    yield f"|---{'|---' * len(tokens)}|"
    for size in sizes:
        yield f"| {size:,} | {' | '.join(f'{losses[size, number]:.3f}' for number in tokens)} |"
    yield ""
    from_size = f"{law.of_parameters:.3g} / N^{law.parameters_exponent:.2f}"
    from_tokens = f"{law.of_tokens:.3g} / D^{law.tokens_exponent:.2f}"
    yield f"L = {law.irreducible:.3f} + {from_size} + {from_tokens} nats per token"
    yield f"root mean square of its relative errors: {_miss(models, law):.2%}"
    if law.irreducible < 1e-3 or max(law.parameters_exponent, law.tokens_exponent) >= EXPONENTS[-1]:
        yield "the best law lies at the border of those that are possible: these losses do not follow one"
    constants = {
        "E": ("irreducible", ".3f"),
        "a": ("parameters_exponent", ".2f"),
        "b": ("tokens_exponent", ".2f"),
    }
    for symbol, (name, style) in constants.items():
        low, high = fitted.interval(operator.attrgetter(name))
        yield f"{symbol} = {getattr(law, name):{style}}, {low:{style}} to {high:{style}} in 90 % of resamplings"
    if last.optimum is not None:
        yield f"in truth E = {last.optimum:.3f}"
    error = last.loss - prediction.loss
    yield f"the largest model was predicted to reach {_around(prediction)}, and reached {last.loss:.3f} ({error:+.3f})"
    yield ""
    most = FLOPS_PER_WEIGHT * last.parameters * last.tokens
    rows = []
    for flops in (most * 10 ** (step / 2) for step in range(-6, 4)):
        best = law.best_parameters(flops)
        seen = flops / FLOPS_PER_WEIGHT / best
        if _is_near(best, sizes) and _is_near(seen, tokens):
            low, high = fitted.interval(partial(_tokens_per_parameter, flops))
            each = f"{seen / best:.1f} ({low:.1f} to {high:.1f})"
            rows.append(f"| {flops:.1e} | {best:,.0f} | {seen:,.0f} | {each} | {law.loss(best, seen):.3f} |")
    if not rows:
        yield "what the law would spend compute on lies far from all that was trained: nothing is known of it"
        return
    yield "| compute, FLOP | best parameters | tokens | tokens per parameter (90 %) | loss |"
    yield "|---|---|---|---|---|"
    yield from rows


def _is_near(value: float, rungs: Sequence[int]) -> bool:
    """Whether a value lies on a ladder, or at most a step beyond it."""
    return rungs[0] ** 2 / rungs[1] <= value <= rungs[-1] ** 2 / rungs[-2]


def _tokens_per_parameter(flops: float, law: Law) -> float:
    return flops / FLOPS_PER_WEIGHT / law.best_parameters(flops) ** 2


def _miss(models: Sequence[Reached], law: Law) -> float:
    squares = [(law.loss(model.parameters, model.tokens) / model.loss - 1) ** 2 for model in models]
    return math.sqrt(sum(squares) / len(squares))


def _around(prediction: Prediction) -> str:
    return f"{prediction.loss:.3f} ({prediction.low:.3f} to {prediction.high:.3f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    silence_notices()
    prepare_cpu()
    with ends_in_one_line():
        ladder, flags = options_and_flags("scaling", Ladder, sys.argv[1:] if argv is None else argv)
        if ladder.dry_run:
            print(cost_table(list(ladder.points(flags).values())))
            return
        with stopping_goes_on():
            climb(ladder, flags)


if __name__ == "__main__":
    main()
