"""`lightning-aux schedule`: what is shown is what training would use."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from lightning_aux.cli import main
from lightning_aux.cli.schedule import HEIGHT, chart_rows, events
from lightning_aux.report.figures import LIGHT
from lightning_aux.schedule import Division, Horizon, Schedule

EARLY = "early(0.1, until=50ep, shape=linear)"
CURVE = "chain(linear(0, 1, until=2ep), cosine(1, 0.25, until=50%), late(0.7, start=38%))"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def shown(capsys):
    """What the command prints for some arguments."""

    def run(*arguments):
        assert main(["schedule", *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """What the command says of arguments that end with status 2 and without a chart."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["schedule", *arguments])
        output = capsys.readouterr()
        assert stop.value.code == 2
        assert output.out == ""
        assert "Traceback" not in output.err
        return output.err

    return run


def chart(text):
    """The rows of the first chart, without the axis."""
    rows = [re.split("[┤│]", line, maxsplit=1) for line in text.splitlines()]
    return [row[1] for row in rows if len(row) == 2][:HEIGHT]


def table(text):
    """Step to value and what is said of it, of every table."""
    pattern = r"^ +(\d+) +(?:[\d.]+ +)?(\S+)   (\S.*?) *$"
    return {int(step): (float(v), said) for step, v, said in re.findall(pattern, text, re.M)}


def heights(rows):
    """How many cells of each column are filled."""
    return [
        sum(row[column : column + 1].strip() != "" for row in rows)
        for column in range(len(rows[-1]))
    ]


@pytest.mark.parametrize("spec", [EARLY, CURVE, "0.3", "exponential(1, 0.001)", "linear(-2, 3)"])
def test_printed_values_are_those_of_the_schedule(spec, shown):
    values = Schedule.parse(spec).values(total=6000, steps_per_epoch=20)
    printed = table(shown(spec, "--epochs", "300", "--steps-per-epoch", "20"))
    assert {0, 1500, 3000, 4500, 5999} <= printed.keys()
    for step, (value, _) in printed.items():
        assert value == pytest.approx(values[step], rel=1e-5, abs=1e-300)


def test_the_table_says_where_the_schedule_changes_course(shown):
    printed = table(shown(CURVE, "--epochs", "100"))
    said = {step: text for step, (_, text) in printed.items()}
    assert said == {
        0: "first step; starts to rise",
        200: "starts to fall",
        2500: "25%",
        5000: "50%",
        5200: "jumps from 0.25",
        7500: "75%",
        9000: "jumps from 0",
        9999: "last step",
    }


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("0.5", {}),
        ("sum(linear(0, 0.3), linear(0.3, 0))", {}),  # what is left is rounding
        ("linear(0, 1, after=4, until=8)", {4: "starts to rise", 8: "stays"}),
        ("step(0, 1, 0, at=[5, 6])", {5: "jumps from 0", 6: "jumps from 1"}),
        (
            "chain(constant(0, until=5), linear(1, 0, until=10))",
            {5: "jumps from 0, then falls", 15: "stays"},
        ),
        ("cosine(0, 1)", {0: "starts to rise"}),
    ],
)
def test_events(spec, expected):
    assert events(Schedule.parse(spec).values(total=20)) == expected


def test_many_events_are_counted_and_not_listed(shown):
    saw = "chain(" + ", ".join(["linear(0, 1, until=10%)"] * 10) + ")"
    text = shown(saw, "--epochs", "10")
    assert "It changes course at 10 steps, which are not listed." in text
    assert table(text).keys() == {0, 250, 500, 750, 999}


@pytest.mark.parametrize("total", [3, 69, 70, 1000, 98_765])
def test_a_ramp_is_drawn_monotone_and_from_the_bottom_to_the_top(total):
    rows = chart_rows(Schedule.parse("linear(0, 1)").values(total), width=70)
    filled = heights(rows)
    assert len(rows) == HEIGHT
    assert filled == sorted(filled)
    assert (filled[0], filled[-1]) == (1, HEIGHT)
    assert all(row.lstrip() == row.strip() for row in rows), "no gaps after the line"


def test_the_printed_chart_falls_with_the_schedule(shown):
    rows = chart(shown(EARLY, "--epochs", "300"))
    filled = heights(rows)
    assert len(rows) == HEIGHT
    assert filled == sorted(filled, reverse=True)
    assert filled[0] == HEIGHT
    ends = filled.index(1) / len(filled)
    assert ends == pytest.approx(50 / 300, abs=0.04)


@pytest.mark.parametrize(("before", "spike"), [(0, 1), (1, 0), (-2, -3)])
def test_a_spike_of_one_step_is_seen(before, spike):
    values = [float(before)] * 100_000
    values[77_777] = float(spike)
    rows = chart_rows(values, width=60)
    column = 77_777 * 60 // 100_000
    others = {row[:column] + row[column + 1 :] for row in rows[:-1]}
    assert len(others) == 1, "the other columns are flat"
    assert all(row[column] not in row[:column] for row in rows[:-1])
    assert all(row[column] == "▒" for row in rows[:-1])


def test_a_constant_fills_the_lower_half(shown):
    rows = chart(shown("0.3"))
    width = len(rows[-1])
    assert rows == [""] * (HEIGHT // 2) + ["█" * width] * (HEIGHT // 2)


def test_axes_name_the_range_and_the_length(shown):
    lines = shown(EARLY, "--epochs", "300").splitlines()
    assert lines[0] == "300 epochs of 100 optimizer steps: 30000 steps"
    assert lines[1] == "assumed: 100 optimizer steps per epoch (--steps-per-epoch N)"
    assert [line.split("┤")[0].strip() for line in lines if "┤" in line] == ["0.1", "0"]
    assert any(re.fullmatch(r" +0 +150 +300 epochs", line) for line in lines)
    lines = shown(EARLY.replace("50ep", "50%"), "--steps", "500").splitlines()
    assert lines[0] == "500 optimizer steps"
    assert any(re.fullmatch(r" +0 +250 +500 steps", line) for line in lines)
    lines = shown(EARLY, "--steps", "500", "--steps-per-epoch", "5").splitlines()
    assert lines[0] == "500 optimizer steps, 5 in an epoch"
    assert any(re.fullmatch(r" +0 +50 +100 epochs", line) for line in lines)


@pytest.mark.parametrize("columns", [30, 50, 200])
def test_the_chart_fits_the_terminal(columns, shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown("linear(0, 1)", "--phases", "a: 50%, b: rest")
    drawn = [line for line in text.splitlines() if re.search("[┤│└]", line)]
    assert len(drawn) == HEIGHT + 1
    assert max(map(len, drawn)) == min(columns, 72)
    assert "0.9999 " in text[text.index("value") :], "not cut off"
    scale = next(line for line in text.splitlines() if line.endswith("100 epochs"))
    assert len(scale) == min(columns, 72)


def test_output_that_can_show_ascii_only_gets_ascii(shown, monkeypatch):
    monkeypatch.setattr("rich.console.Console.encoding", "ascii")
    text = shown(EARLY, "--phases", "warmup: 10%, main: rest")
    assert text.isascii()
    assert any(re.fullmatch(r"0\.1 \+#+_* *.*", line) for line in text.splitlines())


def test_phases_are_known_to_schedules_and_named_over_the_chart(shown):
    phases = "warmup: 20%, main: rest"
    text = shown("during(0.5, main)", "--phases", phases, "--epochs", "10")
    horizon = Division(phases).of(Horizon(1000, (100,)))
    value = Schedule.parse("during(0.5, main)").bind(horizon)
    for step, (printed, _) in table(text).items():
        assert printed == value(step)
    assert "phase main: steps 200 to 1000" in text
    names = next(line for line in text.splitlines() if "warmup" in line and "main" in line)
    tick = next(line for line in text.splitlines() if "┴" in line)
    assert names.index("main") == tick.index("┴")


def test_each_schedule_gets_its_chart(shown):
    text = shown("0.3", EARLY, CURVE)
    assert text.count("└") == 3
    assert text.index("\n0.3\n") < text.index(EARLY) < text.index("chain(")


def drawn(picture, colour):
    """Where a picture has a colour."""
    return np.abs(picture - np.array(to_rgb(colour))).max(axis=-1) < 0.02


def axes_of(path):
    """The pixels within the axes, found by their left border; the legend is above them."""
    picture = imread(path)[..., :3]
    faint = drawn(picture, LIGHT.faint)
    left = int(faint.sum(axis=0).argmax())
    rows = np.flatnonzero(faint[:, left])
    return picture[rows[0] : rows[-1], left + 2 :]


def line(path, colour):
    """Lowest and highest pixel of a line by column, counted from the lower border."""
    picture = axes_of(path)
    rows, columns = np.nonzero(drawn(picture, colour))
    low = {int(c): len(picture) - int(rows[columns == c].max()) for c in np.unique(columns)}
    high = {int(c): len(picture) - int(rows[columns == c].min()) for c in np.unique(columns)}
    return low, high


def test_the_picture_shows_the_line_where_the_values_are(shown):
    spec = "chain(linear(0, 1, until=2ep), cosine(1, 0.25, until=50%))"
    text = shown(spec, "--epochs", "10")
    assert "wrote schedule.png" in text
    values = np.array(Schedule.parse(spec).values(1000, 100))
    low, high = line("schedule.png", LIGHT.series[0])
    columns = np.array(sorted(low))
    middle = np.array([(low[c] + high[c]) / 2 for c in columns])
    steps = ((columns - columns[0]) / (columns[-1] - columns[0]) * 999).round().astype(int)
    expected = values[steps]
    scale = np.polyfit(expected, middle, 1)
    assert scale[0] > 300, "pixels between 0 and 1"
    away = np.abs(np.polyval(scale, expected) - middle) / scale[0]
    assert np.median(away) < 0.01
    assert np.quantile(away, 0.95) < 0.05, "more where the line is steep"


def test_a_spike_of_one_step_is_in_the_picture(shown):
    shown("step(0, 1, 0, at=[77777, 77778])", "--steps", "100000")
    low, high = line("schedule.png", LIGHT.series[0])
    columns = [column for column in low if high[column] - low[column] > 300]
    share = (np.mean(columns) - min(low)) / (max(low) - min(low))
    assert columns
    assert share == pytest.approx(0.77777, abs=0.02)


def test_every_schedule_has_its_colour_in_the_picture(shown):
    text = shown("linear(0, 1)", "linear(1, 0)", "--out", "two.png")
    assert "wrote two.png" in text
    assert not Path("schedule.png").exists()
    (rise, _), (fall, _) = (line("two.png", colour) for colour in LIGHT.series[:2])
    first, last = min(rise), max(rise)
    quarter, third = (first + round(share * (last - first)) for share in (0.25, 0.75))
    assert rise[quarter] < rise[third]
    assert fall[quarter] > fall[third]
    assert rise[quarter] == pytest.approx(fall[third], abs=8)
    assert not drawn(imread("two.png")[..., :3], LIGHT.series[2]).any()


def test_phase_borders_are_lines_in_the_picture(shown):
    def border():
        return drawn(axes_of("schedule.png"), LIGHT.reference).sum(axis=0)

    shown("0.3", "--phases", "warmup: 20%, main: rest")
    pixels = border()
    assert pixels.max() > 300
    assert pixels.argmax() / len(pixels) == pytest.approx(0.2, abs=0.02)
    shown("0.3")
    assert border().max() < 50


def test_without_matplotlib_the_chart_is_there_and_a_hint(shown, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lightning_aux.report.figures")

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "matplotlib":
                raise ModuleNotFoundError("No module named 'matplotlib'", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    text = shown(EARLY, "--epochs", "300")
    assert len(chart(text)) == HEIGHT
    assert "last step" in text
    assert "no picture, which needs 'matplotlib': pip install 'lightning-aux[recipes]'" in text
    assert not Path("schedule.png").exists()


def test_a_wrong_schedule_is_shown_with_a_caret(refused):
    said = refused("0.3", "linear(0, 1, untill=30%)")
    place = "  linear(0, 1, untill=30%)\n" + " " * len("  linear(0, 1, ") + "^\n"
    assert place in said
    assert "Did you mean 'until'?" in said
    assert "example: linear(0, 1, until=30%)" in said


def test_an_unknown_phase_names_those_that_are_known(refused):
    said = refused("during(1, mian)", "--phases", "warmup: 10%, main: rest")
    assert "no phase of training is called 'mian'" in said
    assert "Did you mean 'main'?" in said
    assert "warmup, main" in said
    assert "here: --phases" not in said


def test_phases_that_are_not_given_are_asked_for(refused):
    for spec in (
        "during(1, main)",
        "sum(1, during(1, main))",
        "sum(0.1, chain(linear(0, 1, until=main.end), 1))",
    ):
        assert "here: --phases 'warmup: 10%, main: rest'" in refused(spec)


def test_epochs_of_unknown_length_are_asked_for(refused):
    said = refused("linear(0, 1, until=3ep)", "--steps", "1000")
    assert "3ep cannot be turned into optimizer steps" in said
    assert "here: --steps-per-epoch N" in said
    assert "here: --steps-per-epoch N" in refused(
        "1", "--steps", "9", "--phases", "a: 1ep, b: rest"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SPEC"),
        (["1", "--epochs", "0"], "--epochs: expected a whole number from 1 on, not '0'"),
        (["1", "--epochs", "3", "--steps", "3"], "not allowed with argument --epochs"),
        (["1", "--out", "chart.svg"], "name it .png: 'chart.svg'"),
        (["1", "--phases", "warmup 10%"], "'warmup 10%' is not a name and a length"),
        (["1", "--phases", "a: 60%, b: 60%"], "the phases take 120% of training"),
        (["1", "--epochs", "10000000"], "at most at 10000000"),
        (["linear(0, 1, until=2ep, after=5ep)"], "until=2ep (step 200) lies before after=5ep"),
    ],
)
def test_what_does_not_fit_ends_with_a_message(arguments, message, refused):
    assert message in refused(*arguments)


def test_a_folder_that_is_not_there_ends_with_a_message(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["schedule", "1", "--out", "nowhere/chart.png"])
    assert stop.value.code == 2
    assert "cannot write nowhere/chart.png: No such file" in capsys.readouterr().err


def test_the_documentation_shows_the_real_output(shown):
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")
    command = f'lightning-aux schedule "{EARLY}" --epochs 300'
    block = page.split(f"{command}\n```\n\n```text\n")[1].split("```")[0]
    output = shown(EARLY, "--epochs", "300")
    assert block.splitlines() == [line.rstrip() for line in output.splitlines()]
