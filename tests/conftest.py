"""Tests run on the CPU, also where there is a GPU, unless pytest is called with --gpu: then those that need one run (and only they should)."""

import os


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let the tests see GPUs")
    parser.addoption("--kills", type=int, default=3, help="how often test_kills.py kills each script at a random moment")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; the tests' own processes inherit it
