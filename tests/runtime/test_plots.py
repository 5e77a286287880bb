"""Pictures: which runs belong together and what they are called, that the lines drawn are theirs, and that files are real PNGs."""

import json
import math
import runpy
import sys

import numpy as np
import pytest

from nanorlhf.runtime import plots

pytestmark = pytest.mark.usefixtures("pictures")

Figure = pytest.importorskip("matplotlib.figure").Figure
STUDY = {
    "single": (1, "mean"),
    "mean": (3, "mean"),
    "wco": (3, "wco"),
    "uwo": (3, "uwo"),
}  # members and objective


def write(run, config, name, text):
    """A run folder with one file beside its config."""
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"output_dir": str(run), "resume": False, **config})
    )
    (run / name).write_text(text)
    return str(run)


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def ppo_run(
    run,
    seed,
    kl_coef,
    reward_model,
    gold=lambda step, seed: -step,
    kl=lambda step, seed: step,
    **config,
):
    """Evaluations at steps 0, 2, 4, ..., 8; by default kl = step and gold = -step."""
    rows = []
    for s in range(9):
        rows.append({"step": s, "score_mean": s, "kl": 7})
        if s % 2 == 0:
            g = gold(s, seed)
            rows[-1] |= {"eval/proxy": s + seed, "eval/proxy_se": 0.2, "eval/kl": kl(s, seed)}
            rows[-1] |= {} if g is None else {"eval/gold": g, "eval/gold_se": 0.1}
    config = {"seed": seed, "kl_coef": kl_coef, "lr": 0.1, "reward_model": reward_model, **config}
    return write(run, config, "metrics.jsonl", as_lines(rows))


@pytest.fixture
def runs(tmp_path):
    """Of before there were ensembles: two KL coefficients, two seeds."""
    return [
        ppo_run(tmp_path / f"kl{kl}_{s}", s, kl, f"runs/rm/seed_{s}")
        for kl in (0.0, 0.05)
        for s in (0, 1)
    ]


@pytest.fixture
def study(tmp_path):
    """Two noise levels, two KL coefficients, four objectives, three seeds; gold depends on all of them."""
    paths = []
    for noise in (0.0, 0.25):
        for kl_coef in (0.0, 0.01):
            for i, (name, (k, objective)) in enumerate(STUDY.items()):
                for seed in range(3):
                    rms = [f"runs/study/rm_noise{noise}/seed_{seed}/seed_{m}" for m in range(k)]
                    run, start = (
                        tmp_path / f"{noise}_{kl_coef}_{name}_{seed}",
                        100 * noise + 1000 * kl_coef + i,
                    )
                    curves = {
                        "gold": lambda s, seed, at=start: at - s * s * (1 + seed),
                        "kl": lambda s, seed: s * (1 + seed),
                    }
                    paths.append(
                        ppo_run(
                            run, seed, kl_coef, rms, **curves, objective=objective, uwo_lambda=0.1
                        )
                    )
    return paths


NS = [1, 2, 4, 64, 1024]


def bon_run(run, seed, k, offset=0.0, gold=True, noise=0.25):
    """Gold is exactly offset + m / 10 + d (1 - b d), b = 0.3 for members m, 0.1 for ensembles; proxy is 2 d."""
    results = {}
    for name in [f"seed_{m}" for m in range(k)] + (["mean", "wco", "uwo_0.5"] if k > 1 else []):
        points = results.setdefault(name, [])
        for n in NS:
            kl = math.log(n) - (n - 1) / n
            d, m = kl**0.5, int(name[5:]) if name.startswith("seed") else 0
            g = (
                offset + m / 10 + d * (1 - (0.3 if name.startswith("seed") else 0.1) * d)
                if gold
                else None
            )
            points.append(
                {
                    "n": n,
                    "kl": kl,
                    "proxy_score": 2 * d,
                    "proxy_se": 0.01,
                    "proxy_interval": [2 * d - 0.1, 2 * d + 0.3],
                }
            )
            points[-1] |= {
                "gold_score": g,
                "gold_se": 0.02 if gold else None,
                "gold_interval": [g - 0.1, g + 0.2] if gold else None,
            }
    config = {
        "seed": seed,
        "n": NS,
        "objective": "uwo",
        "uwo_lambda": [0.5],
    }  # sample_bon.py: what --save_best goes by
    config["reward_model"] = [f"rm_noise{noise}/seed_{seed}/seed_{m}" for m in range(k)]
    return write(run, config, "bon_results.json", json.dumps(results))


def is_picture(path):
    with open(path, "rb") as f:
        return f.read(8) == b"\x89PNG\r\n\x1a\n" and len(f.read()) > 5000


def draw(draw, what):
    figure = Figure()
    draw(figure, what)
    return figure


def lines(axis):
    """(colour, style) -> x, y; a fit is ("black", ":")."""
    return {(line.get_color(), line.get_linestyle()): line.get_data() for line in axis.lines}


def band(axis, i):
    """x, low, high of the i-th band."""
    points = axis.collections[i].get_paths()[0].vertices
    x = np.unique(points[:, 0])
    return (
        x,
        [points[points[:, 0] == v, 1].min() for v in x],
        [points[points[:, 0] == v, 1].max() for v in x],
    )


def test_names_without_what_all_have():
    cut = plots.without_common_ends
    paths = {
        "runs/study/rm_noise0.0/seed_*/seed_*": "noise0.0",
        "runs/study/rm_noise0.25/seed_*/seed_*": "noise0.25",
    }
    assert cut(set(paths)) == paths
    assert cut({"runs/rm", "runs/rm_noisy"}) == {
        "runs/rm": "rm",
        "runs/rm_noisy": "rm_noisy",
    }  # something stays
    assert cut({"a/b", "a/b/b"}) == {"a/b": "b", "a/b/b": "b/b"}
    assert cut({"0.0", "0.05"}) == {"0.0": "0.0", "0.05": "0.05"} and cut({"only/one"}) == {
        "only/one": "one"
    }


def test_cells_are_what_differs_besides_seeds_and_objectives():
    def config(seed, noise, k=1, **other):
        paths = [f"runs/rm_{noise}/seed_{seed}/seed_{m}" for m in range(k)]
        return {
            "seed": seed,
            "reward_model": paths,
            "model": f"runs/sft/seed_{seed}",
            "output_dir": f"{seed}{noise}{k}",
            **other,
        }

    configs = [
        config(0, "a", kl_coef=0.0, objective="wco", k=5),
        config(1, "a", kl_coef=0.0, uwo_lambda=3),
        config(0, "b", kl_coef=0.1),
    ]
    assert plots.cells_of(configs) == [
        "reward_model a, kl_coef 0.0",
        "reward_model a, kl_coef 0.0",
        "reward_model b, kl_coef 0.1",
    ]
    assert plots.cells_of(configs[:2]) == ["", ""]
    assert plots.cells_of([config(0, "a"), config(0, "a", steps=5)]) == [
        "steps None",
        "steps 5",
    ]  # a key that one of them lacks


def test_objectives_name_lambda_and_members_where_these_differ():
    def config(objective, k, uwo_lambda=0.1):
        return {
            "reward_model": [f"rm/seed_{m}" for m in range(k)],
            "objective": objective,
            "uwo_lambda": uwo_lambda,
        }

    four = [config("mean", 1), config("mean", 5), config("wco", 5, 9.0), config("uwo", 5)]
    assert plots.objectives_of(four) == ["single", "mean", "wco", "uwo"]
    assert plots.objectives_of(four + [config("uwo", 5, 0.5)]) == [
        "single",
        "mean",
        "wco",
        "uwo 0.1",
        "uwo 0.5",
    ]
    assert plots.objectives_of(four + [config("wco", 2)]) == [
        "single",
        "mean of 5",
        "wco of 5",
        "uwo of 5",
        "wco of 2",
    ]
    assert plots.objectives_of([{"reward_model": ["rm"]}]) == [
        "single"
    ]  # of before there were ensembles


def test_colours_of_objectives_are_the_same_in_all_pictures():
    assert plots.colours_of(["uwo", "wco", "single"]) == {"single": "C0", "wco": "C2", "uwo": "C3"}
    assert (
        plots.colours_of(["single (mean of 5 members)", "mean", "uwo_0.5"])[
            "single (mean of 5 members)"
        ]
        == "C0"
    )
    groups = [f"kl_coef {i}" for i in range(12)]
    assert list(plots.colours_of(groups).values()) == [f"C{i % 10}" for i in range(12)]


def test_runs_that_differ_in_seed_belong_together(runs, study):
    rows = plots.arrange([*runs, runs[0] + "/."])  # one named twice counts once
    assert list(rows) == [""] and {label: len(group) for label, group in rows[""].items()} == {
        "kl_coef 0.0": 2,
        "kl_coef 0.05": 2,
    }
    assert rows[""]["kl_coef 0.0"][1]["proxy"].tolist() == [1, 3, 5, 7, 9]
    assert list(plots.arrange(runs[:2])[""]) == ["single"]
    rows = plots.arrange(study)
    assert list(rows) == [
        f"kl_coef {kl}, reward_model noise{noise}"
        for noise in ("0.0", "0.25")
        for kl in ("0.0", "0.01")
    ]
    assert all(
        {label: len(group) for label, group in row.items()} == dict.fromkeys(STUDY, 3)
        for row in rows.values()
    )
    assert rows["kl_coef 0.01, reward_model noise0.25"]["wco"][0]["gold"][0] == 25 + 10 + 2


def test_a_study_is_drawn_as_rows_of_cells_with_bands_over_seeds(study):
    axes = draw(plots.comparison_figure, study).axes
    assert len(axes) == 8 and axes[2].get_title(loc="left") == "kl_coef 0.01, reward_model noise0.0"
    assert (axes[6].get_xlabel(), axes[7].get_xlabel()) == (
        "PPO steps",
        "d = sqrt(KL to the SFT policy in nats)",
    )
    step = np.array([0.0, 2, 4, 6, 8])
    left, right = lines(axes[6]), lines(axes[7])  # noise 0.25, kl_coef 0.01
    for i in range(
        4
    ):  # seeds have gold at - s^2 (1, 2, 3): mean 2, standard deviation 1, standard error 1 / sqrt(3)
        x, y = left[f"C{i}", "-"]
        np.testing.assert_allclose([x, y], [step, 35 + i - 2 * step**2])
        np.testing.assert_allclose(left[f"C{i}", "--"], [step, step + 1])
        np.testing.assert_allclose(right[f"C{i}", "-"][0], (step**0.5) * (1 + 2**0.5 + 3**0.5) / 3)
        x, low, high = band(axes[6], i)
        np.testing.assert_allclose(low, 35 + i - step**2 * (2 + 3**-0.5))
        np.testing.assert_allclose(high, 35 + i - step**2 * (2 - 3**-0.5))
    assert axes[0].get_ylim() == axes[7].get_ylim() and len(axes[7].lines) == 12


def test_fitted_curves_are_drawn_over_gold(tmp_path):
    def gold(step, seed):  # a = 2, b = 0.5, from its own start for each seed
        return seed + (step**0.5 * (2 - 0.5 * math.log(step**0.5)) if step else 0.0)

    # the first KL as bfloat16 would see it
    runs = [
        ppo_run(tmp_path / str(s), s, 0.0, f"rm/seed_{s}", gold, lambda s, seed: s or 1e-3 * seed)
        for s in (0, 1)
    ]
    x, y = lines(draw(plots.comparison_figure, runs).axes[1])["black", ":"]
    np.testing.assert_allclose(y[1:], 0.5 + x[1:] * (2 - 0.5 * np.log(x[1:])), rtol=1e-6)
    assert x[0] == 0 and y[0] == 0.5 and x[-1] == pytest.approx(8**0.5)
    still = [ppo_run(tmp_path / "still", 0, 0.0, "rm", kl=lambda s, seed: 0.0)]
    assert ("black", ":") not in lines(
        draw(plots.comparison_figure, still).axes[1]
    )  # nothing to fit


def test_best_of_n_of_members_and_ensembles(tmp_path):
    run = bon_run(tmp_path / "run", 0, 3, offset=-1.0)
    figure = draw(plots.comparison_figure, [run])
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert (
        labels == ["single (mean of 3 members)", "mean", "wco", "uwo_0.5"]
        and "mean of members: range" in figure.get_supxlabel()
    )
    left, right = (lines(axis) for axis in figure.axes)
    d = np.array([(math.log(n) - (n - 1) / n) ** 0.5 for n in NS])
    single = -1 + 0.1 + d * (1 - 0.3 * d)
    np.testing.assert_allclose(left["C0", "-"], [NS, single])
    np.testing.assert_allclose(right["C0", "-"], [d, single])
    np.testing.assert_allclose(right["C2", "-"], [d, -1 + d * (1 - 0.1 * d)])
    np.testing.assert_allclose(right["C3", "--"], [d, 2 * d])
    assert figure.axes[0].get_xscale() == "log"
    _, low, high = band(figure.axes[0], 0)  # from the lowest to the highest member
    np.testing.assert_allclose([low, high], [single - 0.1, single + 0.1])
    _, low, high = band(figure.axes[0], 2)  # an ensemble's interval
    np.testing.assert_allclose(
        [low, high], [-1 + d * (1 - 0.1 * d) - 0.1, -1 + d * (1 - 0.1 * d) + 0.2]
    )
    x, y = figure.axes[1].lines[2].get_data()  # after proxy and gold of single: its fit
    np.testing.assert_allclose(y, -0.9 + x * (1 - 0.3 * x), atol=1e-6)
    assert is_picture(plots.plot_run(run)) and (tmp_path / "run" / "bon.png").is_file()


def test_best_of_n_of_one_model_and_without_gold(tmp_path):
    figure = draw(plots.comparison_figure, [bon_run(tmp_path / "one", 0, 1)])
    assert [text.get_text() for text in figure.legends[0].texts] == ["single"] and len(
        figure.axes[0].lines
    ) == 2
    _, low, high = band(figure.axes[0], 0)
    np.testing.assert_allclose(np.subtract(high, low), 0.3)
    run = bon_run(tmp_path / "no_gold", 0, 3, gold=False)
    axes = draw(plots.comparison_figure, [run]).axes
    x, low, high = band(axes[1], 1)  # the proxy has the bands then
    np.testing.assert_allclose([low, high], [2 * x - 0.1, 2 * x + 0.3])
    assert ("black", ":") not in lines(axes[1]) and is_picture(plots.plot_run(run))


def test_best_of_n_runs_that_differ_in_seed_or_noise(tmp_path):
    runs = [
        bon_run(tmp_path / f"{noise}{s}", s, 2, offset=s, noise=noise)
        for noise in (0.0, 0.25)
        for s in (0, 1, 2)
    ]
    figure = draw(plots.comparison_figure, runs)
    assert [axis.get_title(loc="left") for axis in figure.axes[::2]] == [
        "reward_model noise0.0",
        "reward_model noise0.25",
    ]
    assert (
        figure.legends[0].texts[0].get_text() == "single (mean of 2 members), 3 runs"
        and "over runs" in figure.get_supxlabel()
    )
    assert lines(figure.axes[0])["C1", "-"][1][0] == 1.0
    _, low, high = band(figure.axes[0], 1)  # offsets 0, 1, 2: standard error 1 / sqrt(3)
    np.testing.assert_allclose(np.subtract(high, low), 2 / 3**0.5)
    rows = plots.arrange([bon_run(tmp_path / f"{k}", 0, k) for k in (1, 3)])
    assert {title: list(row)[0] for title, row in rows.items()} == {
        "members 1": "single",
        "members 3": "single (mean of 3 members)",
    }


def test_unfinished_runs_and_gold_that_comes_later(tmp_path):
    runs = [ppo_run(tmp_path / str(s), s, 0.0, ["rm"], gold=lambda s, seed: None) for s in (0, 1)]
    path = tmp_path / "1" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))  # killed after step 4
    axes = draw(plots.comparison_figure, runs).axes
    np.testing.assert_allclose(lines(axes[0])["C0", "--"], [[0, 2, 4], [0.5, 2.5, 4.5]])
    np.testing.assert_allclose(band(axes[0], 0), [[0, 2, 4], [0, 2, 4], [1, 3, 5]])


def test_curves_have_a_panel_for_the_members_variance(tmp_path):
    rows = [
        {
            "step": s,
            "score_variance": s / 10,
            **({"eval/variance": s, "eval/score/seed_0": 1.0} if s % 2 else {}),
        }
        for s in range(4)
    ]
    run = write(tmp_path / "run", {}, "metrics.jsonl", as_lines(rows))
    (axis,) = draw(plots.curves_figure, run).axes
    assert axis.get_title() == "variance over reward models" and axis.lines[
        0
    ].get_ydata().tolist() == [1, 3]
    for row in rows:
        row.pop("eval/variance", None)
    (tmp_path / "run" / "metrics.jsonl").write_text(as_lines(rows))
    assert draw(plots.curves_figure, run).axes[0].lines[0].get_ydata().tolist() == [
        0,
        0.1,
        0.2,
        pytest.approx(0.3),
    ]


def test_curves_of_further_splits_stand_beside_the_first(tmp_path):
    rows = [{"step": s, "score_mean": s, "eval/proxy": s, "eval/proxy_se": 0.1, "eval/score/rm": 1.0, "ood/proxy": -s, "ood/proxy_se": 0.3}
            for s in range(4)]  # fmt: skip
    figure = draw(plots.curves_figure, write(tmp_path / "run", {}, "metrics.jsonl", as_lines(rows)))
    proxy, score = figure.axes
    assert (
        [line.get_label() for line in proxy.lines] == ["first split", "ood"]
        and len(score.lines) == 1
        and score.get_legend() is None
    )
    assert (
        proxy.lines[1].get_ydata().tolist() == [0, -1, -2, -3]
        and len(proxy.get_legend().get_texts()) == 2
    )


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, args)])
    runpy.run_module("nanorlhf.runtime.plots", run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_commands(runs, study, tmp_path, monkeypatch, capsys):
    bon = bon_run(tmp_path / "bon", 0, 2)
    command(monkeypatch, runs[0], bon)
    command(monkeypatch, "--compare", tmp_path / "study.png", *study)
    pictures = capsys.readouterr().out.split()
    assert pictures == [
        f"{runs[0]}/curves.png",
        f"{bon}/bon.png",
        str(tmp_path / "study.png"),
    ] and all(map(is_picture, pictures))
    rm = write(tmp_path / "rm", {}, "metrics.jsonl", as_lines([{"step": 1, "loss": 0.5}]))
    nothing = write(tmp_path / "nothing", {}, "metrics.jsonl", "")
    (tmp_path / "empty").mkdir()
    for args, message in (
        ([tmp_path / "empty"], "no run here (no metrics.jsonl, no bon_results.json)"),
        (["--compare", tmp_path / "x.png", runs[0], bon], "compare each kind on its own"),
        (["--compare", tmp_path / "x.png", rm], "no PPO run here"),
        (["--compare", tmp_path / "no" / "x.png", *runs], "No such file"),
        ([nothing], "nothing to draw"),
    ):
        with pytest.raises(SystemExit) as end:
            command(monkeypatch, *args)
        error = capsys.readouterr().err
        assert (
            end.value.code == 2
            and message in error
            and error.count("\n") == 1
            and not (tmp_path / "x.png").exists()
        )


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_comparison_writes_over_pictures_alone(study, tmp_path, monkeypatch, capsys):
    """Of any kind that matplotlib draws; not over data, though they speak of Matplotlib, nor over another picture."""
    data, photo = '{"prompt": "Matplotlib"}\n'.encode(), b"\x89PNG\r\n\x1a\n a photo"
    for name, content in (("sft.jsonl", data), ("photo.png", photo)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit) as end:
            command(monkeypatch, "--compare", tmp_path / name, *study)
        error = capsys.readouterr().err
        assert (
            end.value.code == 2
            and f"{name} is there already and is not a picture" in error
            and error.count("\n") == 1
        )
        assert (tmp_path / name).read_bytes() == content
    for name in ("x.png", "x.pdf", "x.svg"):
        for _ in range(2):
            command(monkeypatch, "--compare", tmp_path / name, *study[:2])
            assert capsys.readouterr().out == f"{tmp_path / name}\n"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_no_matplotlib_no_picture(runs, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert plots.plot_run(runs[0]) is None
    command(monkeypatch, "--compare", tmp_path / "x.png", *runs)
    assert capsys.readouterr().out == "matplotlib is not installed: pip install matplotlib\n"
