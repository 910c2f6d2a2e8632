"""Writes docs/evidence.md."""

import textwrap
from collections.abc import Iterable, Sequence

from lightning_aux.comparison import VariantSummary
from lightning_aux.report.units import MISSING, Unit
from lightning_aux.report.wording import cells, value_and_difference
from recipes.evidence.results import Measured, machines, measured
from recipes.evidence.tasks import SHARED, TASKS

COMMANDS = """```sh
make evidence               # trains what is not in runs/evidence, and writes this page
python -m recipes.evidence  # writes this page from the results in docs/evidence
```
"""
GLANCE = """Difference to the baseline in the metric that decides: test accuracy in points, and for
calibration the expected calibration error in points, where less is better. **Bold**: better.
*Italic*: worse. Both by the paired t test, corrected for the number of methods of the task."""
ALL = """Times are per training step, relative to the baseline; `generations` takes twice as many
steps."""
OTHERS = """What each task is, how to run it, and of all its metrics the mean and the paired
difference to the baseline with its interval. `test_aurc` is the share of errors among the most
confident predictions, averaged over coverages; `test_pass16` the chance that one of 16 answers
drawn from the prediction is right; `test_within` how far features of one class lie apart."""
NOT_MEASURED = """## Not measured

- What the papers did at their scale; nothing here says anything about it. Learning from weak labels
  in particular is about pre-trained models, and these begin from nothing.
- ELR+ (two networks, mixup), teachers of different tasks for images,
  distillation of language models.
- The conflict of gradients that `DualHeadDistillation` is there to avoid, and the sharpness that
  voting teachers are said to reduce.
- Attention logits and other instabilities of transformers, beyond the sweep of learning rates of a
  small network.
- The entropy bonus beside an anchor in reinforcement learning.
- Closed forms (kernel ridge regression over generations, label smoothing and MaxSup as one term
  where the prediction is right, limits of divergences): they are tests, in `tests/functional`.
"""


def page() -> str:
    """The page, from the recipes and the kept results.

    Raises:
        ValueError: When the results of a task are not those of its recipe.
    """
    tasks = [measured(task) for task in TASKS]
    parts = [
        "# Evidence\n",
        _paragraph(_summary(tasks)),
        _paragraph(_circumstances(tasks)),
        COMMANDS,
        "## At a glance\n",
        _paragraph(GLANCE),
        _glance(tasks[: len(SHARED)]),
        "## All comparisons\n",
        _paragraph(ALL),
        _table(tasks),
        "## Task by task\n",
        _paragraph(OTHERS),
        *map(_section, tasks),
        NOT_MEASURED,
    ]
    return "\n".join(parts)


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False) + "\n"


def _summary(tasks: Sequence[Measured]) -> str:
    verdicts = [row.verdict for each in tasks for row in each.methods]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    paired = [row.paired for each in tasks for row in each.methods if row.paired]
    outside = sum(not each.low <= 0 <= each.high for each in paired)
    return f"""What the objectives did on small tasks that train in seconds, losses included. Every
        comparison was written down before it was run: settings are defaults of the class or of its
        paper, nothing was tuned on these tasks, and data and seeds are others than those of any
        other recipe. (Temperature and weight of self-distillation from a moving average are those
        of another recipe, chosen on another draw of MNIST-1D.) So a method that needs tuning looks
        worse here than it can be, and a baseline
        without early stopping worse than in practice. Of {len(verdicts)} comparisons {better} were
        better than their baseline by the metric that decides, {worse} worse, and in
        {len(verdicts) - better - worse} no difference was shown. Intervals are 95 % intervals of
        Student's t over differences that are paired by seed, and not corrected for their number:
        {outside} of {len(verdicts)} leave out zero, and about {len(verdicts) / 20:.0f} would where
        nothing differs. Better and worse are said where the p value of the paired t test, by Holm's
        method corrected for the number of variants of the task, is below 0.05. Seeds are few: no
        difference shown does not mean that there is none."""


def _circumstances(tasks: Sequence[Measured]) -> str:
    known = [machines()[each.task.name] for each in tasks]
    days = sorted({each["date"] for each in known})
    loads = [load for each in known for load in each["load"]]
    kinds = sorted({f"{each['machine']}, torch with {each['threads']} thread" for each in known})
    versions = sorted({f"torch {each['torch']}, lightning {each['lightning']}" for each in known})
    runs = [run for each in tasks for run in each.results]
    return f"""Measured on {" to ".join(dict.fromkeys([days[0], days[-1]]))}: {len(runs)} runs in
        {sum(run.seconds for run in runs) / 60:.0f} minutes, one after the other, with
        {"; ".join(versions)}, on {"; ".join(kinds)}, while others used the same cores (load
        {min(loads)} to {max(loads)}). Times per step are medians over seeds of the ratio to the
        baseline of the same seed; on such a machine they are rough, and half as much again may mean
        nothing."""


def _glance(tasks: Sequence[Measured]) -> str:
    by_name = [{row.name: row for row in each.methods} for each in tasks]
    names = dict.fromkeys(name for each in by_name for name in each)
    lines = [_row(["method", *(each.task.label for each in tasks)]), _rule("<" + ">" * len(tasks))]
    for name in names:
        if sum(name in each for each in by_name) > 1:
            lines.append(_row([_said(name), *(_marked(each.get(name)) for each in by_name)]))
    return "\n".join(lines) + "\n"


def _marked(row: VariantSummary | None) -> str:
    if row is None or row.paired is None:
        return ""
    mark = {"better": "**", "worse": "*"}.get(str(row.verdict), "")
    return f"{mark}{Unit(row.measure.unit).signed(row.paired.mean)}{mark}"


def _table(tasks: Sequence[Measured]) -> str:
    heads = ("task", "method", "metric", "baseline → method", "difference [95 % interval]", "shown")
    lines = [_row([*heads, "seeds", "time"]), _rule("<<<>><>>")]
    for each in tasks:
        for row in each.methods:
            unit = Unit(row.measure.unit)
            change = f"{unit.number(each.reference.mean)} → {unit.number(row.mean)}"
            _, _, difference, verdict, ratio, *_ = cells(row, each.comparison)
            measured = [_said(row.name), unit.label(row.measure.metric), change, difference]
            lines.append(
                _row([each.task.label, *measured, verdict, str(len(row.differences)), ratio])
            )
    return "\n".join(lines) + "\n"


def _section(each: Measured) -> str:
    task, comparison = each.task, each.comparison
    seeds = ", ".join(map(str, comparison.seeds))
    data_seed = comparison.variants["baseline"].resolved["data"]["init_args"]["data_seed"]
    parts = [
        f"### {task.label}\n",
        _paragraph(
            f"{comparison.description} Seeds {seeds}; data_seed {data_seed}; "
            f"[results of each run](evidence/{task.name}.csv)."
        ),
        f"```sh\n{' '.join(['lightning-aux', *task.arguments])}\n```\n",
    ]
    if task.note is not None:
        parts.append(_paragraph(task.note(each.values)))
    labels = [Unit(measure.unit).label(measure.metric) for measure in comparison.measures]
    lines = [_row(["variant", *labels]), _rule("<" + ">" * len(labels))]
    for row in each.summaries:
        lines.append(_row([_said(row.name), *map(_mean_and_difference, (row, *row.also))]))
    return "\n".join([*parts, *lines]) + "\n"


def _mean_and_difference(row: VariantSummary) -> str:
    _, difference = value_and_difference(row)
    mean = Unit(row.measure.unit).number(row.mean)
    return mean if difference == MISSING else f"{mean}, {difference}"


def _said(name: str) -> str:
    return name.replace("_", " ")


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _rule(sides: str) -> str:
    """The line below the head of a table, with `<` and `>` for columns to the left and right."""
    return f"|{'|'.join('---:' if side == '>' else '---' for side in sides)}|"
