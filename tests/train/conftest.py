"""Trainings on a fifth of the digits: most of the time of a tiny training goes into its images."""

from multiprocessing import get_context

import pytest

get_context("forkserver").set_forkserver_preload(["riformer.train.loop"])  # children that need not import torch


@pytest.fixture(autouse=True, scope="module")
def _fast(_few_digits):
    pass
