"""What nanorlhf/studies/cue_control_results.py prints and draws, of made-up outcomes."""

from types import SimpleNamespace

from nanorlhf.studies import cue_control_results

LONG_NAME = "named_3_17_indicator"


def test_a_row_may_lack_columns_and_have_a_long_name(capsys):
    cue_control_results.print_table(
        {
            "plain": {"gold": (1.0, 0.5), "kl": (2.0, 0.25)},
            LONG_NAME: {"kl": (3.0, 0.25)},
        }
    )
    head, plain, named = capsys.readouterr().out.splitlines()
    # Columns begin behind the longest name, and are 18 characters wide each.
    width = len(LONG_NAME) + 1
    assert head == " " * width + " " * 14 + "gold" + " " * 16 + "kl"
    assert plain.startswith("plain ")
    assert named.startswith(f"{LONG_NAME} ")
    assert len(plain) == len(named) == width + 2 * 18
    assert named[width : width + 18].strip() == ""
    assert plain[width : width + 18].strip().startswith("1.0")
    assert named[width + 18 :].strip().startswith("3.0")


class Axis:
    """It notes what is drawn on it."""

    def __init__(self):
        self.dots = []  # (x, y, is filled)
        self.bars = []  # (x, from, to)

    def plot(self, x, y, marker=None, color=None, mfc=None, ms=None):
        if marker == "o":
            self.dots.append((x, y, mfc != "white"))
        else:
            self.bars.append((x[0], *y))

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_dots_of_seeds_without_features_are_hollow_and_not_in_the_mean():
    """Seed 2 found no features, so only the arms without control have it."""
    outcomes = {
        "before": {0: {"cue": 0.1}, 1: {"cue": 0.3}, 2: {"cue": 0.9}},
        "clamp": {0: {"cue": 0.2}, 1: {"cue": 0.6}},
    }
    axis = Axis()
    figure = SimpleNamespace(set_size_inches=lambda *size: None, add_subplot=lambda *where: axis)
    cue_control_results.draw(figure, outcomes)

    assert axis.dots == [
        (0.1, -0.25, True),
        (0.3, 0.0, True),
        (0.9, 0.25, False),
        (0.2, 0.75, True),
        (0.6, 1.25, True),
    ]
    assert axis.bars == [(0.2, -0.4, 0.4), (0.4, 0.6, 1.4)]
