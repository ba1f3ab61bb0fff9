"""What all tests share: nothing is downloaded, nothing is random, golden checkpoints are converted once."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for one another

import pytest
import torch

pytest.register_assert_rewrite("tiny")
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, which processes inherit
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def indices(tmp_path_factory):
    """Indices of data go to a folder of the tests' own, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def golden_folders(tmp_path_factory):
    """Golden weights in every released layout, converted: layout -> folder of ours."""
    from tiny import (
        GOLDEN_DEPTH_ANYTHING_3_FIELDS,
        GOLDEN_SPA3R_FIELDS,
        GOLDEN_VGGT_FIELDS,
        released_checkpoints,
    )

    from spa3r import convert_checkpoint

    root = tmp_path_factory.mktemp("golden")
    folders = {}
    for layout, source in released_checkpoints(root / "released").items():
        kind, fields = {
            "vggt": ("vggt", GOLDEN_VGGT_FIELDS),
            "depth": ("depth-anything-3", GOLDEN_DEPTH_ANYTHING_3_FIELDS),
            "spa3r": ("spa3r", GOLDEN_SPA3R_FIELDS),
        }[layout.partition("-")[0]]
        folders[layout] = convert_checkpoint(source, root / layout, kind, fields)
    return folders
