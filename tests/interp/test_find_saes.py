"""Names of autoencoders' folders, and what * and {seed} in them stand for."""

import pytest

from nanorlhf.errors import InputError
from nanorlhf.interp.sae_files import CONFIG, find_saes


@pytest.fixture
def folders(tmp_path):
    """run_0/ and run_1/ with two autoencoders each, one beside them with a [ in its name."""
    names = ["run_0/a", "run_0/b", "run_1/a", "run_1/b", "odd[1]/a"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / CONFIG).write_text("{}")
    (tmp_path / "run_0/notes").mkdir()  # holds no autoencoder
    return tmp_path


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("run_0/a", ["run_0/a"]),
        ("run_0/*", ["run_0/a", "run_0/b"]),
        ("run_{seed}/b", ["run_0/b", "run_1/b"]),
        ("odd[1]/*", ["odd[1]/a"]),
    ],
)
def test_what_a_pattern_stands_for(folders, pattern, expected):
    found = find_saes([str(folders / pattern)])
    assert found == [str(folders / name) for name in expected]


def test_a_folder_that_is_named_twice_is_there_once(folders):
    twice = [str(folders / "run_0/a"), str(folders / "run_0/*")]
    assert find_saes(twice) == [str(folders / "run_0/a"), str(folders / "run_0/b")]


def test_a_name_of_no_autoencoder_is_refused(folders):
    with pytest.raises(InputError, match="no sparse autoencoder here"):
        find_saes([str(folders / "run_2/*")])
