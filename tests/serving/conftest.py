"""Really started servers, in threads of this process."""

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

collect_ignore_glob = []
if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai", "prometheus_client")):
    collect_ignore_glob = ["test_*.py"]  # pip install -e '.[test]'


@contextmanager
def served(model, processor, name: str = "embedded", **settings) -> Iterator[SimpleNamespace]:
    """A server: its address, its app, the model, and `stop`."""
    from spa3r.serving.metrics import Metrics
    from spa3r.serving.server import build_server, listening_socket, server_of
    from spa3r.serving.service import ServerSettings
    from spa3r.serving.transformers_engine import TransformersEngine

    limits, metrics = ServerSettings(**settings), Metrics()
    engine = TransformersEngine(model, processor, limits.max_running, metrics.step.observe)
    app = build_server(engine, name, limits, processor.view_image_processor.process_view, metrics)
    listening = listening_socket("127.0.0.1", 0)
    server = server_of(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{listening.getsockname()[1]}",
            app=app,
            service=app.state.service,
            engine=engine,
            model=model,
            processor=processor,
            stop=server.stop,
            thread=thread,
        )
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def start():
    """The function that starts a server."""
    return served


@pytest.fixture(scope="session")
def embedded():
    from spa3r.rooms.embedded import embedded_model

    return embedded_model()


@pytest.fixture(scope="module")
def server(embedded):
    with served(*embedded) as server:
        yield server


@pytest.fixture(scope="module")
def talkative():
    """A tiny model with random weights, whose answers have all the tokens that they may have."""
    from tiny_spa3_vlm import make

    composed = make()
    composed.model.vlm.generation_config.eos_token_id = None
    torch.manual_seed(0)
    with served(composed.model, composed.processor, "tiny", grace=0.0, max_tokens=3000) as server:
        yield server
