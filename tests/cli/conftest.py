"""What the tests of the command line share."""

from pathlib import Path

import pytest

from spa3r.rooms import embedded


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The embedded model as a folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = embedded.embedded_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
