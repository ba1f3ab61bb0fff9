"""`spa3r serve` with the embedded model: latency and throughput of 1, 4 and 16 clients, and memory over many requests.

The server is a process of its own; the clients are threads of this one. Each client asks about one of four uploaded
scenes, again and again. The numbers of clients take turns, and the medians of the rounds are printed, with ratios to
one client in the same run. Then the clients ask `--requests` times more, while every tenth stream is closed after its
first piece, and the resident memory and the threads of the server are printed. The exit code is 1 if an answer differs
from that of `model.ask`, or if memory grows by more than 5 % between the first fifth of these requests and the last.

    python benchmarks/serving.py
    python benchmarks/serving.py --requests 100 --rounds 1   # quick

With several engines, each has a server, and they take turns, too. Ratios are to one client of the first engine, whose
memory is measured:

    spa3r export embedded vlm
    vllm serve vlm --enable-mm-embeds --limit-mm-per-prompt '{"image": 8}' --dtype float32 --port 8001
    python benchmarks/serving.py --engine transformers --engine http://127.0.0.1:8001
"""

import argparse
import base64
import json
import statistics
import subprocess
import sys
import threading
import time
from importlib import metadata
from io import BytesIO

import httpx
import PIL.Image
import psutil
from common import machine

from spa3r.rooms import camera_walk, generate_room, render
from spa3r.rooms.embedded import embedded_model
from spa3r.tables import Table

CLIENTS = (1, 4, 16)
QUESTIONS = ("What do you see?", "How many chairs are there?", "Is there a bed?", "How far is the table from the lamp?")


def photos(seed: int) -> list[PIL.Image.Image]:
    room = generate_room(seed, level=0)
    return [PIL.Image.fromarray(image) for image in render(room, camera_walk(room, 32)[::4]).images]


def data_url(photo: PIL.Image.Image) -> str:
    file = BytesIO()
    photo.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Clients:
    """Clients of one server, and what is right.

    Args:
        url: The server.
        scenes: Ids of the uploaded scenes.
        wanted: The answers of `model.ask` about each scene.
    """

    def __init__(self, url: str, scenes: list[str], wanted: list[list[str]]):
        self.url, self.scenes, self.wanted = url, scenes, wanted
        self.wrong = 0

    def ask(self, client: httpx.Client, number: int, leave: bool = False) -> tuple[float, float]:
        """Ask one question as a stream: seconds to the first piece and to the end."""
        scene, question = number % len(self.scenes), number // len(self.scenes) % len(QUESTIONS)
        content = [{"type": "scene", "id": self.scenes[scene]}, {"type": "text", "text": QUESTIONS[question]}]
        body = {"model": "embedded", "messages": [{"role": "user", "content": content}], "stream": True}
        start, first, text = time.perf_counter(), 0.0, ""
        with client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                piece = json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content")
                if piece:
                    first = first or time.perf_counter() - start
                    text += piece
                    if leave:
                        return first, time.perf_counter() - start
        self.wrong += text != self.wanted[scene][question]
        return first, time.perf_counter() - start

    def run(self, clients: int, requests: int, leave_every: int = 0) -> tuple[list[tuple[float, float]], float]:
        """All requests by this number of clients: their seconds, and the seconds of all together."""
        seconds: list[tuple[float, float]] = []

        def ask_share(number: int) -> None:
            with httpx.Client(timeout=300) as client:
                for request in range(number, requests, clients):
                    leave = bool(leave_every) and request % leave_every == leave_every - 1
                    seconds.append(self.ask(client, request, leave))

        threads = [threading.Thread(target=ask_share, args=(number,)) for number in range(clients)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return seconds, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the table (3)")
    parser.add_argument("--per-round", type=int, default=48, help="requests of each number of clients in a round (48)")
    parser.add_argument("--engine", action="append", help="`--engine` of spa3r serve; may be repeated (transformers)")
    parser.add_argument("--requests", type=int, default=1000, help="requests whose memory is measured (1000)")
    arguments = parser.parse_args()

    model, processor = embedded_model()
    rooms = [photos(seed) for seed in range(4)]
    wanted = [model.ask(model.encode_scene(processor, room), list(QUESTIONS)) for room in rooms]
    print(f"{machine()}, fastapi {metadata.version('fastapi')}, uvicorn {metadata.version('uvicorn')}")
    servers, clients = [], {}
    try:
        for engine in arguments.engine or ["transformers"]:
            command = [sys.executable, "-m", "spa3r", "serve", "--json", "--port", "0", "--engine", engine]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            servers.append(server)
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            scenes = []
            for room in rooms:
                content = [{"type": "image_url", "image_url": {"url": data_url(photo)}} for photo in room]
                made = httpx.post(f"{url}/scenes", json={"content": content}, timeout=300).raise_for_status().json()
                scenes.append(made["id"])
            name = "vllm" if "://" in engine else engine
            clients[name] = Clients(url, scenes, wanted)
            clients[name].run(max(CLIENTS), 2 * max(CLIENTS))  # warm
        print(f"4 scenes of {made['views']} views, {made['prompt_tokens']} tokens each\n")
        print(measured(clients, arguments.rounds, arguments.per_round))
        first = next(iter(clients))
        print(f"\n{first}: ", end="")
        grown = memory(clients[first], servers[0].pid, arguments.requests)
        for server in servers:
            server.terminate()
        codes = [server.wait(60) for server in servers]
    finally:
        for server in servers:
            server.kill()
    wrong = sum(each.wrong for each in clients.values())
    codes_shown = ", ".join(map(str, codes))
    print(f"\nanswers that differ from model.ask: {wrong}; exit code after SIGTERM: {codes_shown}")
    return int(wrong > 0 or grown > 0.05 or any(codes))


def measured(clients: dict[str, Clients], rounds: int, requests: int) -> str:
    """The table of latency and throughput, by engine."""
    runs: dict[tuple[str, int], list[tuple[float, float, float]]] = {
        (engine, count): [] for engine in clients for count in CLIENTS
    }
    for _ in range(rounds):
        for engine, count in runs:
            seconds, total = clients[engine].run(count, requests)
            firsts, wholes = zip(*seconds)
            runs[engine, count].append((statistics.median(firsts), statistics.median(wholes), requests / total))
    rows: list[list[str]] = []
    medians = {key: [statistics.median(column) for column in zip(*found)] for key, found in runs.items()}
    base = next(iter(medians.values()))
    for (engine, count), (first, whole, rate) in medians.items():
        cells = [f"{1000 * first:.0f}", f"{1000 * whole:.0f}", f"{whole / base[1]:.2f}", f"{rate:.1f}"]
        rows.append([engine, str(count), *cells, f"{rate / base[2]:.2f}"])
    head = ["engine", "clients", "first text, ms", "answer, ms", "ratio", "answers per s", "ratio"]
    return str(Table(head, rows))


def memory(clients: Clients, server: int, requests: int) -> float:
    """Print the server's memory and threads after each fifth of the requests; returns how much memory grew."""
    process, sizes = psutil.Process(server), []
    print(f"{requests} requests of 16 clients, every tenth left after its first piece")
    for part in range(1, 6):
        clients.run(16, requests // 5, leave_every=10)
        time.sleep(0.5)
        sizes.append(process.memory_info().rss)
        print(f"  after {part * requests // 5}: {sizes[-1] / 2**20:.0f} MiB, {process.num_threads()} threads")
    grown = sizes[-1] / sizes[0] - 1
    print(f"  grown by {100 * grown:.1f} % after the first fifth")
    return grown


if __name__ == "__main__":
    sys.exit(main())
