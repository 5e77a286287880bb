"""nanorlhf.runtime.curves and plots: which runs belong together, their names, what is drawn.

Runs are files made by hand, of curves that are known exactly; lines and bands are read back from
matplotlib's figures. Files are real PNGs.
"""

import json
import math
import runpy
import sys

import numpy as np
import pytest

from nanorlhf.ensemble import OBJECTIVES
from nanorlhf.runtime import plots
from nanorlhf.runtime.curves import arrange, cells_of, objectives_of, without_common_ends
from nanorlhf.runtime.results import draw_intervals

pytestmark = pytest.mark.usefixtures("pictures")

Figure = pytest.importorskip("matplotlib.figure").Figure

# ------------------------------------------------------------------------------- runs made by hand


def write_run(folder, config, name, text):
    """A run folder with one file beside its config."""
    folder.mkdir()
    settings = {"output_dir": str(folder), "resume": False, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / name).write_text(text)
    return str(folder)


def as_lines(rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    return "".join(lines)


def member_paths(folder, members):
    """The folders of an ensemble's reward models."""
    return [f"{folder}/seed_{m}" for m in range(members)]


def falls(step, seed):
    return -step


def is_step(step, seed):
    return step


def ppo_run(folder, seed, kl_coef, reward_model, gold=falls, kl=is_step, **config):
    """A PPO run of 8 steps, with an evaluation at every second one.

    Proxy is step + seed; gold(step, seed), which may be None, and kl(step, seed) are given.
    """
    rows = []
    for step in range(9):
        row = {"step": step, "score_mean": step, "kl": 7}
        if step % 2 == 0:
            row["eval/proxy"] = step + seed
            row["eval/proxy_se"] = 0.2
            row["eval/kl"] = kl(step, seed)
            if gold(step, seed) is not None:
                row["eval/gold"] = gold(step, seed)
                row["eval/gold_se"] = 0.1
        rows.append(row)
    settings = {"seed": seed, "kl_coef": kl_coef, "lr": 0.1, "reward_model": reward_model}
    return write_run(folder, {**settings, **config}, "metrics.jsonl", as_lines(rows))


@pytest.fixture
def plain_runs(tmp_path):
    """Runs with one reward model each: two KL coefficients, two seeds."""
    runs = []
    for kl_coef in (0.0, 0.05):
        for seed in (0, 1):
            folder = tmp_path / f"kl{kl_coef}_{seed}"
            runs.append(ppo_run(folder, seed, kl_coef, [f"runs/rm/seed_{seed}"]))
    return runs


# The study's reward models: label, members, objective.
STUDY = [("single", 1, "mean"), ("mean", 3, "mean"), ("wco", 3, "wco"), ("uwo", 3, "uwo")]
STUDY_LABELS = ["single", "mean", "wco", "uwo"]


def study_run(folder, noise, kl_coef, place, seed):
    """A run of the study's place-th objective; its gold depends on all that the run differs in."""
    _, members, objective = STUDY[place]
    paths = member_paths(f"runs/study/rm_noise{noise}/seed_{seed}", members)
    start = 100 * noise + 1000 * kl_coef + place

    def gold(step, seed):
        return start - step * step * (1 + seed)

    def kl(step, seed):
        return step * (1 + seed)

    return ppo_run(folder, seed, kl_coef, paths, gold, kl, objective=objective, uwo_lambda=0.1)


@pytest.fixture
def study(tmp_path):
    """Two noise levels, two KL coefficients, four objectives, three seeds."""
    runs = []
    for noise in (0.0, 0.25):
        for kl_coef in (0.0, 0.01):
            for place, (label, _, _) in enumerate(STUDY):
                for seed in range(3):
                    folder = tmp_path / f"{noise}_{kl_coef}_{label}_{seed}"
                    runs.append(study_run(folder, noise, kl_coef, place, seed))
    return runs


NS = [1, 2, 4, 64, 1024]


def distance(n):
    """d = sqrt(KL) of the best of n: KL = log n - (n - 1) / n."""
    return math.sqrt(math.log(n) - (n - 1) / n)


DISTANCES = np.array([distance(n) for n in NS])


def bon_points(offset, b, knows_gold):
    """A best-of-n curve of gold = offset + d (1 - b d) and proxy = 2 d, with intervals of both."""
    points = []
    for n in NS:
        d = distance(n)
        point = {"n": n, "kl": d**2}
        point |= {"proxy_score": 2 * d, "proxy_se": 0.01}
        point["proxy_interval"] = [2 * d - 0.1, 2 * d + 0.3]
        point |= {"gold_score": None, "gold_se": None, "gold_interval": None}
        if knows_gold:
            gold = offset + d * (1 - b * d)
            point |= {"gold_score": gold, "gold_se": 0.02}
            point["gold_interval"] = [gold - 0.1, gold + 0.2]
        points.append(point)
    return points


def bon_run(folder, seed, members, offset=0.0, knows_gold=True, noise=0.25):
    """A best-of-n run. Member m is better than the first one by m / 10."""
    results = {}
    for m in range(members):
        results[f"seed_{m}"] = bon_points(offset + m / 10, 0.3, knows_gold)
    if members > 1:
        for objective in ("mean", "wco", "uwo_0.5"):
            results[objective] = bon_points(offset, 0.1, knows_gold)
    # The objective is the one that sample_bon.py's --save_best goes by; all are in the results.
    config = {"seed": seed, "n": NS, "objective": "uwo", "uwo_lambda": [0.5]}
    config["reward_model"] = member_paths(f"rm_noise{noise}/seed_{seed}", members)
    return write_run(folder, config, "bon_results.json", json.dumps(results))


# --------------------------------------------------------------------------- what a figure shows


def draw(draw_figure, what):
    figure = Figure()
    draw_figure(figure, what)
    return figure


def compare(runs):
    return draw(plots.comparison_figure, runs)


def lines(axis):
    """(colour, style) -> x, y; a fit is ("black", ":")."""
    found = {}
    for line in axis.lines:
        found[line.get_color(), line.get_linestyle()] = line.get_data()
    return found


def band(axis, i):
    """x, low, high of the i-th band."""
    (path,) = axis.collections[i].get_paths()
    all_x, all_y = path.vertices.T
    x = np.unique(all_x)
    low = [all_y[all_x == place].min() for place in x]
    high = [all_y[all_x == place].max() for place in x]
    return x, low, high


def legend_texts(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.texts]


def is_picture(path):
    with open(path, "rb") as f:
        content = f.read()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 5008


# --------------------------------------------------------------------- which runs belong together


@pytest.mark.parametrize(
    "names",
    [
        {
            "runs/study/rm_noise0.0/seed_*/seed_*": "noise0.0",
            "runs/study/rm_noise0.25/seed_*/seed_*": "noise0.25",
        },
        # Something stays of each.
        {"runs/rm": "rm", "runs/rm_noisy": "rm_noisy"},
        {"a/b": "b", "a/b/b": "b/b"},
        # Parts end at / and _ alone.
        {"0.0": "0.0", "0.05": "0.05"},
        {"only/one": "one"},
    ],
)
def test_names_without_what_all_have(names):
    assert without_common_ends(set(names)) == names


def cell_config(seed, noise, members=1, **other):
    paths = member_paths(f"runs/rm_{noise}/seed_{seed}", members)
    config = {"seed": seed, "reward_model": paths, "model": f"runs/sft/seed_{seed}"}
    return {**config, "output_dir": f"{seed}{noise}{members}", **other}


def test_cells_are_what_differs_besides_seeds_and_objectives():
    configs = [
        cell_config(0, "a", kl_coef=0.0, objective="wco", members=5),
        cell_config(1, "a", kl_coef=0.0, uwo_lambda=3),
        cell_config(0, "b", kl_coef=0.1),
    ]
    first = "reward_model a, kl_coef 0.0"
    assert cells_of(configs) == [first, first, "reward_model b, kl_coef 0.1"]
    assert cells_of(configs[:2]) == ["", ""]


def test_a_setting_that_one_run_lacks_makes_another_cell():
    configs = [cell_config(0, "a"), cell_config(0, "a", steps=5)]
    assert cells_of(configs) == ["steps None", "steps 5"]


def objective_config(objective, members, uwo_lambda=0.1):
    paths = member_paths("rm", members)
    return {"reward_model": paths, "objective": objective, "uwo_lambda": uwo_lambda}


# The lambda of an objective other than UWO means nothing.
FOUR_OBJECTIVES = [
    objective_config("mean", 1),
    objective_config("mean", 5),
    objective_config("wco", 5, 9.0),
    objective_config("uwo", 5),
]


@pytest.mark.parametrize(
    "configs, labels",
    [
        pytest.param(FOUR_OBJECTIVES, ["single", "mean", "wco", "uwo"], id="nothing differs"),
        pytest.param(
            [*FOUR_OBJECTIVES, objective_config("uwo", 5, 0.5)],
            ["single", "mean", "wco", "uwo 0.1", "uwo 0.5"],
            id="lambda differs",
        ),
        pytest.param(
            [*FOUR_OBJECTIVES, objective_config("wco", 2)],
            ["single", "mean of 5", "wco of 5", "uwo of 5", "wco of 2"],
            id="members differ",
        ),
        pytest.param([{"reward_model": ["rm"]}], ["single"], id="a single reward"),
    ],
)
def test_objectives_name_lambda_and_members_where_these_differ(configs, labels):
    assert objectives_of(configs) == labels


# C0 is a single reward model's, then comes an objective each, and uwo is the last.
COLOUR_OF_UWO = f"C{len(OBJECTIVES)}"


def test_colours_of_objectives_are_the_same_in_all_pictures():
    # C1 is kept for the mean.
    colours = plots.colours_of(["uwo", "wco", "single"])
    assert colours == {"single": "C0", "wco": "C2", "uwo": COLOUR_OF_UWO}
    single = "single (mean of 5 members)"
    assert plots.colours_of([single, "mean", "uwo_0.5"])[single] == "C0"


def test_matplotlib_s_ten_colours_come_again():
    cells = list("abcdefghijkl")
    colours = plots.colours_of(cells)
    assert list(colours) == cells
    assert list(colours.values()) == "C0 C1 C2 C3 C4 C5 C6 C7 C8 C9 C0 C1".split()


def sizes(groups):
    return {label: len(group) for label, group in groups.items()}


def test_runs_that_differ_in_seed_belong_together(plain_runs):
    # One that is named twice counts once.
    rows = arrange([*plain_runs, plain_runs[0] + "/."])
    assert list(rows) == [""]
    assert sizes(rows[""]) == {"kl_coef 0.0": 2, "kl_coef 0.05": 2}
    second_seed = rows[""]["kl_coef 0.0"][1]
    assert second_seed["proxy"].tolist() == [1, 3, 5, 7, 9]
    assert list(arrange(plain_runs[:2])[""]) == ["single"]


def test_what_differs_besides_objectives_makes_rows(study):
    rows = arrange(study)
    assert list(rows) == [
        "kl_coef 0.0, reward_model noise0.0",
        "kl_coef 0.01, reward_model noise0.0",
        "kl_coef 0.0, reward_model noise0.25",
        "kl_coef 0.01, reward_model noise0.25",
    ]
    for row in rows.values():
        assert sizes(row) == dict.fromkeys(STUDY_LABELS, 3)
    # Gold at step 0 is 100 * noise + 1000 * kl_coef + the objective's place.
    first = rows["kl_coef 0.01, reward_model noise0.25"]["wco"][0]
    assert first["gold"][0] == 25 + 10 + 2


# ------------------------------------------------------------------------------ a comparison of PPO


def test_a_study_is_drawn_as_rows_of_cells_with_bands_over_seeds(study):
    axes = compare(study).axes
    assert len(axes) == 8
    assert axes[2].get_title(loc="left") == "kl_coef 0.01, reward_model noise0.0"
    assert axes[6].get_xlabel() == "PPO steps"
    assert axes[7].get_xlabel() == "d = sqrt(KL to the SFT policy in nats)"
    assert axes[0].get_ylim() == axes[7].get_ylim()
    # Gold, proxy and the fit of each objective.
    assert len(axes[7].lines) == 12

    # The last row: noise 0.25, kl_coef 0.01, so gold starts at 25 + 10 + the objective's place.
    step = np.array([0.0, 2, 4, 6, 8])
    over_steps = lines(axes[6])
    over_distance = lines(axes[7])
    for place in range(4):
        colour = ["C0", "C1", "C2", COLOUR_OF_UWO][place]
        # Seeds have gold at start - s^2 (1, 2, 3): mean 2, standard deviation 1.
        start = 35 + place
        standard_error = 3**-0.5
        np.testing.assert_allclose(over_steps[colour, "-"], [step, start - 2 * step**2])
        _, low, high = band(axes[6], place)
        np.testing.assert_allclose(low, start - (2 + standard_error) * step**2)
        np.testing.assert_allclose(high, start - (2 - standard_error) * step**2)
        # Proxy is s + seed, whose mean over seeds 0, 1, 2 is s + 1.
        np.testing.assert_allclose(over_steps[colour, "--"], [step, step + 1])
        # KL is s (1, 2, 3), and d is the mean of its square roots.
        d, _ = over_distance[colour, "-"]
        np.testing.assert_allclose(d, step**0.5 * (1 + 2**0.5 + 3**0.5) / 3)


def test_fitted_curves_are_drawn_over_gold(tmp_path):
    """gold = seed + d (a - b log d) with a = 2, b = 0.5: each seed has a start of its own."""

    def gold(step, seed):
        if step == 0:
            return seed
        d = step**0.5
        return seed + d * (2 - 0.5 * math.log(d))

    def kl(step, seed):
        # The first KL is as bfloat16 would see it: not quite 0.
        return step or 1e-3 * seed

    runs = [ppo_run(tmp_path / str(s), s, 0.0, [f"rm/seed_{s}"], gold, kl) for s in (0, 1)]
    x, y = lines(compare(runs).axes[1])["black", ":"]

    # The mean of the two seeds starts at 0.5.
    assert x[0] == 0
    assert y[0] == 0.5
    assert x[-1] == pytest.approx(8**0.5)
    np.testing.assert_allclose(y[1:], 0.5 + x[1:] * (2 - 0.5 * np.log(x[1:])), rtol=1e-6)


def test_a_policy_that_stays_where_it_was_has_no_fit(tmp_path):
    def no_kl(step, seed):
        return 0.0

    still = ppo_run(tmp_path / "still", 0, 0.0, ["rm"], kl=no_kl)
    assert ("black", ":") not in lines(compare([still]).axes[1])


def test_unfinished_runs_are_compared_as_far_as_they_are(tmp_path):
    """One was killed after step 4. Neither knows gold, so the bands are those of proxy."""

    def no_gold(step, seed):
        return None

    runs = [ppo_run(tmp_path / str(s), s, 0.0, ["rm"], gold=no_gold) for s in (0, 1)]
    path = tmp_path / "1/metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:5]))

    axis = compare(runs).axes[0]

    # Proxies s and s + 1: their mean is s + 0.5, their standard error 0.5.
    np.testing.assert_allclose(lines(axis)["C0", "--"], [[0, 2, 4], [0.5, 2.5, 4.5]])
    np.testing.assert_allclose(band(axis, 0), [[0, 2, 4], [0, 2, 4], [1, 3, 5]])


# ------------------------------------------------------------------------ a comparison of best-of-n


def test_best_of_n_of_members_and_ensembles(tmp_path):
    run = bon_run(tmp_path / "run", 0, 3, offset=-1.0)
    figure = compare([run])
    assert legend_texts(figure) == ["single (mean of 3 members)", "mean", "wco", "uwo_0.5"]
    assert "mean of members: range" in figure.get_supxlabel()

    over_n, over_distance = figure.axes
    assert over_n.get_xscale() == "log"
    d = DISTANCES
    single = -1 + 0.1 + d * (1 - 0.3 * d)  # members are at -1, -0.9, -0.8
    ensemble = -1 + d * (1 - 0.1 * d)
    np.testing.assert_allclose(lines(over_n)["C0", "-"], [NS, single])
    np.testing.assert_allclose(lines(over_distance)["C0", "-"], [d, single])
    np.testing.assert_allclose(lines(over_distance)["C2", "-"], [d, ensemble])
    np.testing.assert_allclose(lines(over_distance)[COLOUR_OF_UWO, "--"], [d, 2 * d])

    # The members' band is from the lowest to the highest one.
    _, low, high = band(over_n, 0)
    np.testing.assert_allclose([low, high], [single - 0.1, single + 0.1])
    # An ensemble's band is its interval.
    _, low, high = band(over_n, 2)
    np.testing.assert_allclose([low, high], [ensemble - 0.1, ensemble + 0.2])
    # The third line, after proxy and gold of the members, is the fit of their gold.
    x, y = over_distance.lines[2].get_data()
    np.testing.assert_allclose(y, -0.9 + x * (1 - 0.3 * x), atol=1e-6)


def test_the_picture_of_a_best_of_n_run_lies_in_its_folder(tmp_path):
    run = bon_run(tmp_path / "run", 0, 3, offset=-1.0)
    assert is_picture(plots.plot_run(run))
    assert (tmp_path / "run/bon.png").is_file()


def test_best_of_n_of_one_model(tmp_path):
    figure = compare([bon_run(tmp_path / "one", 0, 1)])
    assert legend_texts(figure) == ["single"]
    assert len(figure.axes[0].lines) == 2
    # Its band is its interval, 0.1 below and 0.2 above.
    _, low, high = band(figure.axes[0], 0)
    np.testing.assert_allclose(np.subtract(high, low), 0.3)


def test_best_of_n_without_gold(tmp_path):
    """The proxy has the bands then, and there is nothing to fit."""
    run = bon_run(tmp_path / "no_gold", 0, 3, knows_gold=False)
    _, over_distance = compare([run]).axes
    x, low, high = band(over_distance, 1)
    np.testing.assert_allclose([low, high], [2 * x - 0.1, 2 * x + 0.3])
    assert ("black", ":") not in lines(over_distance)
    assert is_picture(plots.plot_run(run))


def test_best_of_n_runs_that_differ_in_seed_or_noise(tmp_path):
    runs = []
    for noise in (0.0, 0.25):
        for seed in (0, 1, 2):
            folder = tmp_path / f"{noise}{seed}"
            runs.append(bon_run(folder, seed, 2, offset=seed, noise=noise))
    figure = compare(runs)

    titles = [axis.get_title(loc="left") for axis in figure.axes[::2]]
    assert titles == ["reward_model noise0.0", "reward_model noise0.25"]
    assert legend_texts(figure)[0] == "single (mean of 2 members), 3 runs"
    assert "over runs" in figure.get_supxlabel()
    # At n = 1 gold is the offset: 0, 1, 2 over seeds, whose mean is 1, standard error 1 / sqrt(3).
    _, gold = lines(figure.axes[0])["C1", "-"]
    assert gold[0] == 1.0
    _, low, high = band(figure.axes[0], 1)
    np.testing.assert_allclose(np.subtract(high, low), 2 / 3**0.5)


def test_best_of_n_runs_of_other_members_are_other_rows(tmp_path):
    runs = [bon_run(tmp_path / str(members), 0, members) for members in (1, 3)]
    first_labels = {}
    for title, row in arrange(runs).items():
        first_labels[title] = list(row)[0]
    assert first_labels == {"members 1": "single", "members 3": "single (mean of 3 members)"}


# -------------------------------------------------------------------------------- curves of one run


def test_curves_have_a_panel_for_the_members_variance(tmp_path):
    """It shows the evaluations' variance, where there are some, and the rollouts' otherwise."""
    rollouts = [{"step": step, "score_variance": step / 10} for step in range(4)]
    evaluated = [dict(row) for row in rollouts]
    for row in (evaluated[1], evaluated[3]):
        row |= {"eval/variance": row["step"], "eval/score/seed_0": 1.0}
    run = write_run(tmp_path / "run", {}, "metrics.jsonl", as_lines(evaluated))

    (axis,) = draw(plots.curves_figure, run).axes
    assert axis.get_title() == "variance over reward models"
    assert axis.lines[0].get_ydata().tolist() == [1, 3]

    (tmp_path / "run/metrics.jsonl").write_text(as_lines(rollouts))
    axis = draw(plots.curves_figure, run).axes[0]
    assert axis.lines[0].get_ydata().tolist() == pytest.approx([0, 0.1, 0.2, 0.3])


def test_curves_of_further_splits_stand_beside_the_first(tmp_path):
    rows = []
    for step in range(4):
        row = {"step": step, "score_mean": step, "eval/score/rm": 1.0}
        row |= {"eval/proxy": step, "eval/proxy_se": 0.1}
        row |= {"ood/proxy": -step, "ood/proxy_se": 0.3}
        rows.append(row)
    run = write_run(tmp_path / "run", {}, "metrics.jsonl", as_lines(rows))
    proxy, score = draw(plots.curves_figure, run).axes

    assert [line.get_label() for line in proxy.lines] == ["first split", "ood"]
    assert proxy.lines[1].get_ydata().tolist() == [0, -1, -2, -3]
    assert len(proxy.get_legend().get_texts()) == 2
    # What only one split has needs no legend.
    assert len(score.lines) == 1
    assert score.get_legend() is None


# ------------------------------------------------------------------------------------- the commands

# The module is in sys.modules already when runpy runs it.
IN_THIS_PROCESS = pytest.mark.filterwarnings("ignore:.*found in sys.modules")


def command(monkeypatch, *args):
    """python -m nanorlhf.runtime.plots, in this process."""
    monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, args)])
    runpy.run_module("nanorlhf.runtime.plots", run_name="__main__")


def refused_command(monkeypatch, capsys, *args):
    """A command that must exit with code 2 -> the one line that it says."""
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *args)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.slow
@IN_THIS_PROCESS
def test_commands_print_the_pictures_that_they_make(
    plain_runs, study, tmp_path, monkeypatch, capsys
):
    best_of_n = bon_run(tmp_path / "bon", 0, 2)
    command(monkeypatch, plain_runs[0], best_of_n)
    command(monkeypatch, "--compare", tmp_path / "study.png", *study)
    pictures = capsys.readouterr().out.split()
    assert pictures == [
        f"{plain_runs[0]}/curves.png",
        f"{best_of_n}/bon.png",
        f"{tmp_path}/study.png",
    ]
    for picture in pictures:
        assert is_picture(picture)


@IN_THIS_PROCESS
def test_runs_that_cannot_be_drawn(plain_runs, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = write_run(tmp_path / "nothing", {}, "metrics.jsonl", "")
    error = refused_command(monkeypatch, capsys, empty)
    assert "no run here (no metrics.jsonl, no bon_results.json)" in error
    error = refused_command(monkeypatch, capsys, nothing)
    assert "nothing to draw" in error
    error = refused_command(monkeypatch, capsys)
    assert "required: RUN" in error


@IN_THIS_PROCESS
def test_runs_that_cannot_be_compared(plain_runs, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "x.png"
    best_of_n = bon_run(tmp_path / "bon", 0, 2)
    training = as_lines([{"step": 1, "loss": 0.5}])
    reward_model = write_run(tmp_path / "rm", {}, "metrics.jsonl", training)

    error = refused_command(monkeypatch, capsys, "--compare", picture, plain_runs[0], best_of_n)
    assert "compare each kind on its own" in error
    error = refused_command(monkeypatch, capsys, "--compare", picture, reward_model)
    assert "no PPO run here" in error
    error = refused_command(monkeypatch, capsys, "--compare", tmp_path / "no/x.png", *plain_runs)
    assert "No such file" in error
    assert not picture.exists()


@IN_THIS_PROCESS
@pytest.mark.parametrize(
    "name, content",
    [
        # Data, though they speak of Matplotlib.
        ("sft.jsonl", b'{"prompt": "Matplotlib"}\n'),
        # A picture that matplotlib did not draw.
        ("photo.png", b"\x89PNG\r\n\x1a\n a photo"),
    ],
)
def test_a_comparison_does_not_write_over_other_files(
    plain_runs, tmp_path, monkeypatch, capsys, name, content
):
    (tmp_path / name).write_bytes(content)
    error = refused_command(monkeypatch, capsys, "--compare", tmp_path / name, *plain_runs)
    assert f"{name} is there already and is not a picture" in error
    assert (tmp_path / name).read_bytes() == content


@IN_THIS_PROCESS
@pytest.mark.parametrize("name", ["x.png", "x.pdf", "x.svg"])
def test_a_comparison_writes_over_its_own_pictures(plain_runs, tmp_path, monkeypatch, capsys, name):
    """Of any kind that matplotlib draws."""
    for _ in range(2):
        command(monkeypatch, "--compare", tmp_path / name, *plain_runs[:2])
        assert capsys.readouterr().out == f"{tmp_path / name}\n"


@IN_THIS_PROCESS
def test_no_matplotlib_no_picture(plain_runs, monkeypatch, capsys, tmp_path):
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.plot_run(plain_runs[0]) is None
    command(monkeypatch, "--compare", tmp_path / "x.png", *plain_runs)
    assert capsys.readouterr().out == "matplotlib is not installed: pip install matplotlib\n"


# ------------------------------------------------------------------------------------- intervals


def test_intervals_stand_side_by_side():
    axis = Figure().add_subplot()
    # By rounding the mean of the second lies below its interval: no bar can have a length below 0.
    rows = {
        "edits": {"mean": 1.0, "low": 0.5, "high": 3.0},
        "random": {"mean": 0.0, "low": 1e-9, "high": 2.0},
    }
    draw_intervals(axis, rows, {"edits": "C3"})
    ends = []
    colors = []
    for container in axis.containers:
        dot, _, (bars,) = container.lines
        ends.append(bars.get_segments()[0].tolist())
        colors.append(dot.get_color())
    assert ends == [[[0, 0.5], [0, 3.0]], [[1, 0.0], [1, 2.0]]]
    assert colors == ["C3", "grey"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["edits", "random"]
