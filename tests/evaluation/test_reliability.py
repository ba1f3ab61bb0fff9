"""What may happen to an evaluation: damage, a second run, a full disk, a signal, a secret in a name, wrong settings."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_benchmark import SETTINGS, build_composed, make_rows, write_vsi_bench

from spa3r.disk import WriteError, alone_in
from spa3r.evaluation import EvaluationRun, EvaluationSettings, RoomsBenchmark, VsiBench, compare_runs, run_benchmark
from spa3r.evaluation.report import make_report
from spa3r.evaluation.run_folder import LineWriter
from spa3r.signals import ending_on_signals

QUESTIONS = (3, 2)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> VsiBench:
    return VsiBench(write_vsi_bench(tmp_path_factory.mktemp("vsi"), QUESTIONS))


@pytest.fixture(scope="module")
def whole(benchmark, tmp_path_factory) -> Path:
    return run_benchmark(*build_composed(), benchmark, tmp_path_factory.mktemp("runs") / "whole", SETTINGS).folder


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """The same run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def go_on(benchmark, folder: Path, **more) -> tuple[EvaluationRun, list[str], list[tuple[int, int]]]:
    """The run, what it noted, and what it asked."""
    notes, asked = [], []
    run = run_benchmark(
        *build_composed(),
        benchmark,
        folder,
        SETTINGS,
        progress=lambda *done: asked.append(done),
        note=notes.append,
        **more,
    )
    return run, notes, asked


# Damage ---------------------------------------------------------------------------------------------------------------


def without(key: str):
    return lambda about: about.pop(key)


def put(section: str, key: str, value):
    return lambda about: about[section].__setitem__(key, value)


TEXTS = (b"", b"{", b"[]", b"null", b"\0\0\0", b'{"benchmark": "\xff"}', b"[" * 100_000, b"{}")
CHANGES = {
    "no benchmark": (without("benchmark"), "`benchmark` must be a dictionary, got None"),
    "no environments": (without("environments"), "`environments` must be a dictionary, got None"),
    "count is text": (put("benchmark", "questions", "5"), "`benchmark.questions` must be a whole number, got '5'"),
    "no hash": (put("model", "weights_sha256", None), "`model.weights_sha256` must be a text, got None"),
    "packages": (
        lambda about: about["environments"][0].pop("packages"),
        "`environments.packages` must be a dictionary",
    ),
    "settings": (put("settings", "num_frames", 1.5), "`settings.num_frames` must be a whole number, got 1.5"),
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_damaged_run_json_is_named_with_a_cure(text, benchmark, finished):
    (finished / "run.json").write_bytes(text)
    for act in (lambda: EvaluationRun.load(finished), lambda: go_on(benchmark, finished)):
        with pytest.raises(ValueError, match=r"run\.json is damaged.*Put an undamaged copy back, .*--fresh"):
            act()
    assert (finished / "run.json").read_bytes() == text and (finished / "answers.jsonl").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_run_json_that_lacks_something(change, benchmark, finished):
    about = json.loads((finished / "run.json").read_text())
    CHANGES[change][0](about)
    (finished / "run.json").write_text(json.dumps(about))
    for act in (lambda: EvaluationRun.load(finished), lambda: go_on(benchmark, finished)):
        with pytest.raises(ValueError) as error:
            act()
        assert "run.json is damaged, or was written by another version: " in str(error.value)
        assert CHANGES[change][1] in str(error.value) and "--fresh" in str(error.value)


def test_answers_without_their_run_json_are_nobodys(benchmark, finished):
    (finished / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json is missing, though \S+answers\.jsonl holds answers\. Put an und"):
        go_on(benchmark, finished)


def test_run_that_was_begun_again_and_killed_is_not_finished(finished):
    about = json.loads((finished / "run.json").read_text())
    for key in ("scores", "intervals", "missing"):
        del about[key]
    (finished / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"is not finished: its run\.json holds no scores\. The command that started"):
        EvaluationRun.load(finished)


DAMAGES = {
    "cut at the end": (lambda lines: [*lines[:-1], lines[-1][:-20]], "line 5 of 5"),
    "cut in the middle": (lambda lines: [lines[0], lines[1][:50], *lines[2:]], "line 2 of 5"),
    "zeros": (lambda lines: [lines[0], "\0" * 300, *lines[2:]], "line 2 of 5"),
    "no object": (lambda lines: [*lines[:4], "[1]"], "must be a JSON object, got list"),
    "lost": (lambda lines: lines[1:], "must hold the answers to all 5 questions, got 4"),
    "lost key": (lambda lines: [lines[0].replace('"score"', '"scare"'), *lines[1:]], "it lacks score"),
    "score": (lambda lines: [changed(lines[0], score=7), *lines[1:]], "`score` must be a number from 0 to 1, got 7"),
    "no score": (
        lambda lines: [changed(lines[0], score=None), *lines[1:]],
        "`score` must be a number from 0 to 1, got",
    ),
    "text": (lambda lines: [changed(lines[0], score="1"), *lines[1:]], "`score` must be a number or None, got '1'"),
    "twice": (lambda lines: [lines[1], *lines[1:]], "holds question 101 more than once"),
    "type": (lambda lines: [changed(lines[0], question_type="x"), *lines[1:]], "line 1 of 5"),
    "empty": (lambda lines: [], "must hold the answers to all 5 questions, got 0"),
}


def changed(line: str, **fields) -> str:
    return json.dumps(json.loads(line) | fields)


@pytest.mark.parametrize("damage", DAMAGES)
def test_scores_are_of_all_answers_or_there_is_an_error(damage, benchmark, whole, finished):
    """What reads a run refuses it; what made it asks again and says so, to the same end."""
    file = finished / "answers.jsonl"
    file.write_text("".join(f"{line}\n" for line in DAMAGES[damage][0](file.read_text().splitlines())))
    with pytest.raises(
        ValueError, match=r"answers\.jsonl is damaged: .*The command that started it asks again"
    ) as error:
        EvaluationRun.load(finished)
    assert DAMAGES[damage][1] in str(error.value)
    _, notes, asked = go_on(benchmark, finished)
    assert any("answers.jsonl" in note for note in notes) and asked
    assert file.read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert EvaluationRun.load(finished).scores == EvaluationRun.load(whole).scores


def test_what_no_longer_fits_its_question_is_asked_again(benchmark, whole, finished):
    """A score that is not that of the words, and a question of another benchmark."""
    file = finished / "answers.jsonl"
    lines = file.read_text().splitlines()
    other = changed(lines[1], ground_truth="other")
    score = 1 - json.loads(lines[4])["score"]
    file.write_text("\n".join([lines[0], other, *lines[2:4], changed(lines[4], score=score)]))
    _, notes, asked = go_on(benchmark, finished)
    assert any("its `ground_truth` is not that of question 101" in note for note in notes)
    assert any("line 5 of 5 (its `score` is not that of its `prediction`)" in note for note in notes)
    assert asked[-1] == (4, 4)  # by batches of two
    assert file.read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_words_that_were_changed_are_told(benchmark, finished, caplog):
    file = finished / "answers.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([changed(lines[0], parsed="changed"), *lines[1:]]))
    EvaluationRun.load(finished)
    assert "answers.jsonl was changed after the run: the scores are those of the answers that" in caplog.text
    assert any("answers.jsonl was changed after the run" in note for note in go_on(benchmark, finished)[1])


def test_line_that_a_kill_cut_is_asked_again_and_said(benchmark, whole, finished):
    os.replace(finished / "answers.jsonl", part := finished / "answers-00000.jsonl")
    part.write_bytes(part.read_bytes()[:-30])
    _, notes, asked = go_on(benchmark, finished)
    (note,) = notes
    assert "answers-00000.jsonl: line 5 of 5 (" in note and "can't be read; what it answered is asked again" in note
    assert asked[-1] == (2, 2) and (finished / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_compare_and_report_read_damaged_runs_as_load_does(whole, finished):
    (finished / "table.md").unlink()  # made of the answers
    run = EvaluationRun.load(finished)
    assert run.table() == (whole / "table.md").read_text().strip()
    assert compare_runs(EvaluationRun.load(whole), run).flips == []


# One run at a time ----------------------------------------------------------------------------------------------------


def test_second_run_is_refused_and_changes_nothing(benchmark, finished):
    refused = []

    def come_in() -> None:
        try:
            go_on(benchmark, finished, fresh=True)
        except ValueError as error:
            refused.append(str(error))

    before = {file: file.read_bytes() for file in finished.iterdir()}
    with alone_in(finished):
        thread = threading.Thread(target=come_in)
        thread.start()
        thread.join()
    assert "Another run is going on in " in refused[0] and "name another folder with `--output`" in refused[0]
    assert {file: file.read_bytes() for file in finished.iterdir()} == before
    assert go_on(benchmark, finished)[1] == [] and not (finished / ".lock").exists()


def test_run_holds_its_folder_until_its_end(benchmark, tmp_path):
    held = []

    def come_in(*done) -> None:
        def act() -> None:
            try:
                with alone_in(tmp_path):
                    held.append(False)
            except ValueError:
                held.append(True)

        thread = threading.Thread(target=act)
        thread.start()
        thread.join()

    run_benchmark(*build_composed(), benchmark, tmp_path, SETTINGS, progress=come_in)
    assert held and all(held)


# The disk and signals -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_answers_that_can_not_be_written_are_told():
    writer = LineWriter(Path("/dev/full"))
    with pytest.raises(WriteError, match=r"/dev/full can't be written: No space .* the same command goes on from what"):
        writer.write([{"id": 1}])
    writer.close()


def run_on_a_disk_that_fills(kind: str, folder: Path, benchmark, told) -> None:
    """A limit on the size of files is refused as a full disk is."""
    import resource

    def fill(done: int, total: int) -> None:
        size = (folder / "answers-00000.jsonl").stat().st_size
        if kind == "answers-00000.jsonl" and done < total:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
        if kind == "answers.jsonl" and done == total:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 10, size - 10))

    if kind == "run.json":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        run_benchmark(*build_composed(), benchmark, folder, SETTINGS, progress=fill)
    except Exception as error:
        told.put((type(error).__name__, str(error)))
    else:
        told.put(None)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ("answers-00000.jsonl", "answers.jsonl", "run.json"))
def test_full_disk_leaves_whole_files_and_the_run_goes_on(kind, benchmark, whole, tmp_path):
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    process = context.Process(target=run_on_a_disk_that_fills, args=(kind, tmp_path / "run", benchmark, told))
    process.start()
    name, words = told.get(timeout=60)
    process.join(60)
    assert name == "WriteError" and f"{kind} can't be written: File too large. Free space" in words
    assert not list((tmp_path / "run").glob(".*")) and not (tmp_path / "run" / "answers.jsonl").exists()
    _, notes, asked = go_on(benchmark, tmp_path / "run")
    assert len(notes) == (kind == "answers-00000.jsonl") and bool(asked) == (kind != "answers.jsonl")
    assert (tmp_path / "run" / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP, signal.SIGINT), ids=lambda number: number.name)
def test_signal_ends_a_run_that_goes_on(number, benchmark, whole, tmp_path):
    def send(done: int, total: int) -> None:
        os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match=f"{number.name}: what is finished stays"), ending_on_signals():
        run_benchmark(*build_composed(), benchmark, tmp_path, SETTINGS, progress=send)
    assert len((tmp_path / "answers-00000.jsonl").read_text().splitlines()) == 2 and not (tmp_path / ".lock").exists()
    assert go_on(benchmark, tmp_path)[2][-1] == (3, 3)
    assert (tmp_path / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


# Secrets --------------------------------------------------------------------------------------------------------------


def test_secrets_reach_no_file(tmp_path, monkeypatch):
    """Of the environment, of addresses; in the names of model and data, in a system's message, in what is missing."""
    token, password = "hf_" + "A1b2" * 6, "correct-horse-battery"
    monkeypatch.setenv("HF_TOKEN", "of-the-environment-9")
    benchmark = VsiBench(write_vsi_bench(tmp_path / token / "of-the-environment-9", QUESTIONS))
    (benchmark.root / "scannet" / "scene0.mp4").write_bytes(b"no video")
    name = f"https://me:{password}@example.org/model?X-Amz-Signature=abcdef0123&token={token}"
    settings = dataclasses.replace(SETTINGS, missing="zero", system=f"Bearer {token}")
    run = run_benchmark(*build_composed(), benchmark, tmp_path / "run", settings, name)
    again = run_benchmark(*build_composed(), benchmark, tmp_path / "run", settings, name)
    assert again.answers == run.answers and run.about["missing"]["questions"] == 3
    page = make_report(again, benchmark, command=f"spa3r eval report {tmp_path / token}")
    texts = [file.read_text() for file in (tmp_path / "run").iterdir()] + [page, json.dumps(again.about)]
    for text in texts:
        assert not any(secret in text for secret in (token, password, "of-the-environment-9", "abcdef0123"))
    assert "https://***@example.org/model?X-Amz-Signature=***" in texts[-1]


# Settings and rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": 1.5}, r"`num_frames` must be a whole number, got 1\.5"),
        ({"num_frames": "4"}, r"`num_frames` must be a whole number, got '4'"),
        ({"num_frames": True}, r"`num_frames` must be a whole number, got True"),
        ({"max_new_tokens": None}, r"`max_new_tokens` must be a whole number, got None"),
        ({"batch_size": float("inf")}, r"`batch_size` must be a whole number, got inf"),
        ({"use_spa3r": "no"}, r"`use_spa3r` must be True or False, got 'no'"),
        ({"system": ["x"]}, r"`system` must be a text or None, got \['x'\]"),
        ({"images": ["aligned"]}, r"`images` must be one of .*, got \['aligned'\]"),
        ({"images": np.ones(2)}, r"`images` must be one of .*, got ndarray of shape \(2,\)"),
        ({"seed": -1}, r"`seed` must be a whole number from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, r"`seed` must be a whole number from 0 to 4294967295, got 4294967296"),
        ({"min_pixels": 9, "max_pixels": 4}, r"`min_pixels` must be at most `max_pixels`, got 9 and 4"),
    ],
    ids=str,
)
def test_settings_of_wrong_types_or_ranges(fields, words):
    with pytest.raises(ValueError, match=words):
        EvaluationSettings(**fields)


@pytest.mark.parametrize(
    "arguments", [{"output": None}, {"settings": {"num_frames": 2}}, {"name": 3}, {"fresh": "no"}], ids=str
)
def test_arguments_of_wrong_types(arguments, benchmark, tmp_path):
    with pytest.raises(ValueError, match=rf"`{next(iter(arguments))}` must be "):
        run_benchmark(*build_composed(), benchmark, **({"output": tmp_path / "run"} | arguments))
    with pytest.raises(ValueError, match="`folder` must be a text or a Path, got None"):
        EvaluationRun.load(None)


def test_numpy_integers_are_written_down_as_numbers():
    assert json.dumps(dataclasses.asdict(EvaluationSettings(num_frames=np.int64(4), seed=np.uint8(3))))


@pytest.mark.parametrize("fields", [{"first_seed": "x"}, {"first_seed": 1e6}, {"size": 10**6}, {"size": 1.5}], ids=str)
def test_rooms_of_wrong_types_or_ranges(fields):
    with pytest.raises(ValueError, match=rf"`{next(iter(fields))}` must be a whole number"):
        RoomsBenchmark(1, **fields)


OUT = ("../../x", "/etc/x", "..\\..\\x", "C:\\x", "a/../../x", "", "a\0b", "//host/share", "..")


def bench_of(folder: Path, **fields) -> VsiBench:
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text(json.dumps(make_rows((1,))[0] | fields))
    return VsiBench(folder)


@pytest.mark.parametrize("key", ("dataset", "scene_name"))
def test_rows_lead_nowhere_but_into_the_folder(key, tmp_path):
    for name in OUT:
        with pytest.raises(ValueError, match=rf"^Row 100 of \S+: `{key}` must be a name below"):
            bench_of(tmp_path / "data", **{key: name})
    assert "File name too long" not in str(bench_of(tmp_path / "data", **{key: "a" * 5000}).missing())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dataset": ["a"]}, "`dataset` must be a text or a whole number, got"),
        ({"scene_name": 1.5}, "`scene_name` must be a text or a whole number, got 1.5"),
        ({"id": [1]}, r"`id` must be a number or a text, got \[1\] in row 0"),
        ({"options": 5}, "`options` must be a list or None, got 5"),
        ({"ground_truth": {}}, "`ground_truth` must be a text or a number, got"),
        ({"ground_truth": float("nan")}, "`ground_truth` must be a text or a number, got nan"),
    ],
    ids=str,
)
def test_rows_of_wrong_types(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        bench_of(tmp_path, **fields)


def test_damaged_data_is_named(tmp_path):
    bench_of(tmp_path)
    (tmp_path / "pruned_ids.txt").write_text("1\nx\n")
    with pytest.raises(ValueError, match=r"pruned_ids\.txt must hold the ids of rows, one a line"):
        VsiBench(tmp_path, "pruned")
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"test\.parquet can't be read as Parquet .*Fetch it again"):
        VsiBench(tmp_path)
    for data in (None, 3, ["a"], b"a"):
        with pytest.raises(ValueError, match="`data` must be a text or a Path, got"):
            VsiBench(data)


@pytest.mark.parametrize("damage", ("deflated", "encrypted"))
def test_damaged_archive_is_named(damage, tmp_path):
    """Python's reader fails with zlib's error or a RuntimeError."""
    benchmark, archive = bench_of(tmp_path), tmp_path / "scannet.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("scannet/scene0.mp4", bytes(range(256)) * 200)
    content = bytearray(archive.read_bytes())
    start = 30 + len("scannet/scene0.mp4")
    if damage == "deflated":
        content[start : start + 8] = b"\xff" * 8
    else:
        content[6] |= 1
        content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"The archive \S+scannet\.zip can't be read \(.*Fetch it again"):
        benchmark.frames("scannet/scene0", 2)
