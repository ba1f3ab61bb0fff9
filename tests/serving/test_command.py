"""`spa3r serve` as a process: its address, its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from typer.testing import CliRunner

from spa3r.cli.main import app
from spa3r.rooms.embedded import ROOMS_NOTE


@pytest.fixture
def command(tmp_path):
    processes = []

    def start(*options: str) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "spa3r", "serve", "--json", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "notes").open("w"),
            text=True,
            env=os.environ | {"SPA3R_API_KEY": "secret"},
        )
        processes.append(process)
        result = json.loads(process.stdout.readline())
        assert result["model"] == "embedded"
        return process, result["url"]

    yield start
    for process in processes:
        process.kill()
        process.wait()


KEY = {"authorization": "Bearer secret"}


def body(question: str, **more) -> dict:
    return {"model": "embedded", "messages": [{"role": "user", "content": question}]} | more


@pytest.mark.slow
def test_every_accepted_request_is_answered_after_sigterm(command, tmp_path):
    """Under load: an answer, an error that says why, or no connection."""
    process, url = command("--max-running", "4")
    statuses: list[int | str] = []
    is_over = threading.Event()

    def ask_on(number: int) -> None:
        with httpx.Client(headers=KEY, timeout=60) as client:
            while not is_over.is_set():
                try:
                    if number % 2:
                        with client.stream(
                            "POST", f"{url}/chat/completions", json=body("Is there a bed?", stream=True)
                        ) as r:
                            events = r.read().decode().strip().split("\n\n")
                        fine = r.status_code == 200 and events[-1] == "data: [DONE]"
                        told = r.status_code == 503 or "shutting_down" in events[-1]
                        statuses.append(200 if fine else 503 if told else f"{r.status_code} {events}")
                    else:
                        response = client.post(f"{url}/chat/completions", json=body("What do you see?"))
                        response.json()
                        statuses.append(response.status_code)
                except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError) as error:
                    statuses.append(type(error).__name__)
                    return

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask_on, number) for number in range(8)]
        while statuses.count(200) < 10:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        is_over.set()
        for future in asked:
            future.result()
    # Idle connections are closed; a request that comes at that moment was not accepted.
    assert set(statuses) <= {200, 503, "ConnectError", "ReadError", "RemoteProtocolError", "WriteError"}
    assert statuses.count(200) >= 10
    notes = " ".join((tmp_path / "notes").read_text().split())
    assert ROOMS_NOTE.split(",")[0] in notes and "Traceback" not in notes and "secret" not in notes


def test_the_command_names_what_is_wrong(monkeypatch):
    run = CliRunner().invoke
    with httpx.Client(), socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run(app, ["serve", "--port", port])
        assert result.exit_code == 1 and "Give another `--host` or `--port`" in " ".join(result.stderr.split())
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "spa3r.serving.server")
    monkeypatch.delattr("spa3r.serving.server")
    result = run(app, ["serve"])
    assert result.exit_code == 1 and 'pip install "spa3r[serve]"' in " ".join(result.stderr.split())
