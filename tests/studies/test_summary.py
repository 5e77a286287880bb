"""The summary.json of a study (nanorlhf/studies/common.py): plain JSON, also without a number."""

import json
import math

from nanorlhf.stats import t_interval
from nanorlhf.studies.common import write_summary


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def test_a_summary_of_one_seed_is_json(tmp_path):
    """A single seed has no interval. Python writes NaN, which other readers of JSON refuse."""
    interval = t_interval([0.25])
    mean, half_width = interval
    assert mean == 0.25
    assert math.isnan(half_width)
    summary = {
        "settings": {"seeds": 1, "quick": True},
        "tables": {"gold": {"policy": interval}},
        "lists": [[float("inf"), 2.0], None, "nan"],
    }

    write_summary(tmp_path / "summary.json", summary)

    text = (tmp_path / "summary.json").read_text()
    read = json.loads(text, parse_constant=refuse)
    assert read["tables"]["gold"]["policy"] == [0.25, None]
    assert read["settings"] == {"seeds": 1, "quick": True}
    assert read["lists"] == [[None, 2.0], None, "nan"]
