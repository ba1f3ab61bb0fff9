"""The documentation is true: its code runs, it names what there is, and it names nothing else.

Python blocks of the README and of the guides are run page by page, each page in one namespace. A block that follows a
line ``<!-- not run: why -->`` is compiled only.
"""

import ast
import contextlib
import importlib.util
import inspect
import itertools
import json
import re
import runpy
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
import transformers
from media import noise
from packaging.version import Version
from tiny_benchmark import write_vsi_bench
from tiny_finetuning import write_config
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from typer.testing import CliRunner
from vlm_families import FAMILIES, MORE_FAMILIES

import spa3r
import spa3r.data
import spa3r.evaluation
import spa3r.rooms
import spa3r.training
from spa3r.cli.main import app
from spa3r.models.spa3_vlm.vlm import TESTED_FAMILIES, UNSUPPORTED_FAMILIES

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "spa3r"
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES, *sorted((ROOT / "examples").glob("*.py"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "reference")

BLOCK = re.compile(r"^(?P<mark><!-- not run: [^>]+ -->\n)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
FORBIDDEN = ("/work/", "/tmp/", "/root/", "/home/", "pypi.org", "pythonhosted", "download.pytorch.org", "localhost")
"""Paths of somebody's machine, and hosts of package registries."""

WORDS = re.compile(r"marr(y|ied|iage)|coupl(e|ed|es)\b|closed doo(r)|held fas(t)|to blam(e)", re.IGNORECASE)
"""Words for which the field has others: combine, Spa3-VLM, unsupported, frozen, cause."""


def read(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[bool, str]]:
    """Of every Python block of a page whether it is to be run, and its code, moved to its line on the page."""
    text = page.read_text(encoding="utf-8")
    return [
        (match["mark"] is None, "\n" * text.count("\n", 0, match.start("code")) + match["code"])
        for match in BLOCK.finditer(text)
    ]


@pytest.fixture
def calm(tmp_path, monkeypatch):
    """An empty folder to work in, and one thread: tiny models gain nothing from more, and lose much to neighbours."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


# Code on pages and in examples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in [ROOT / "README.md", *PAGES] if blocks(page)], ids=name_of)
def test_code_of_a_page_runs(page, calm):
    namespace = {"__name__": page.stem}
    for is_run, code in blocks(page):
        compiled = compile(code, str(page), "exec")
        if is_run:
            exec(compiled, namespace)


def test_blocks_that_are_not_run_tell_the_reader_why():
    for page in [ROOT / "README.md", *PAGES]:
        text = page.read_text(encoding="utf-8")
        for why, first_line in re.findall(r"^<!-- not run: (.+) -->\n```\w+\n(.*)$", text, re.MULTILINE):
            assert first_line == f"# {why}", name_of(page)


def test_every_python_block_is_found():
    for page in [ROOT / "README.md", *PAGES]:
        assert len(blocks(page)) == len(re.findall(r"^\s*```\s*{?python", page.read_text(encoding="utf-8"), re.M)), page


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_runs(example, calm, monkeypatch, capsys):
    steps = ["--steps", "2"] if "--steps" in example.read_text(encoding="utf-8") else []
    monkeypatch.setattr(sys, "argv", [str(example), *steps])
    monkeypatch.syspath_prepend(example.parent)  # as Python does for a script
    runpy.run_path(str(example), run_name="__main__")
    output = capsys.readouterr().out
    assert output.strip()
    assert ("untrained" in output) == (example.stem == "compose_vlm")
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60
    with pytest.raises(SystemExit) as stopped:
        sys.argv[1:] = ["--help"]
        runpy.run_path(str(example), run_name="__main__")
    assert stopped.value.code == 0 and "--model" in capsys.readouterr().out


def test_ci_and_readme_share_their_commands():
    readme = read("README.md")
    for step in ("set-up", "demo", "tests"):
        assert len(re.findall(rf"^<!-- ci: {step} -->\n```bash\n(.+?)^```$", readme, re.DOTALL | re.MULTILINE)) == 1
        assert re.search(rf"\breadme {step}\b", read(".ci", "run"))
    assert len(re.search(r"<!-- ci: set-up -->\n```bash\n(.+?)```", readme, re.DOTALL)[1].splitlines()) == 2


# Public names ---------------------------------------------------------------------------------------------------------


def public_names() -> list[tuple[str, object]]:
    return [
        (f"{module.__name__}.{name}", getattr(module, name))
        for module in (spa3r, spa3r.data, spa3r.evaluation, spa3r.rooms, spa3r.training)
        for name in module.__all__
    ]


def documented_constants(module: str) -> set[str]:
    """Names that are followed by a string, as constants are documented."""
    folder = SOURCE.joinpath(*module.split(".")[1:])
    found = set()
    for file in folder.glob("*.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        for statement, following in itertools.pairwise(body):
            is_text = isinstance(following, ast.Expr) and isinstance(getattr(following.value, "value", None), str)
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            if isinstance(statement, ast.Assign | ast.AnnAssign) and is_text:
                found |= {target.id for target in targets}
    return found


@pytest.mark.parametrize(("path", "value"), [pytest.param(*pair, id=pair[0]) for pair in public_names()])
def test_public_name_is_documented(path, value):
    directive = rf"^\.\. (auto(class|function|data)|py:data):: {re.escape(path)}$"
    assert re.search(directive, REFERENCE, re.MULTILINE), f"{path} is missing in docs/reference"
    module, _, name = path.rpartition(".")
    if inspect.isclass(value) or inspect.isfunction(value):
        # A dataclass without a docstring is given its signature for one.
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{path} has no docstring"
    elif name != "__version__":
        assert name in documented_constants(module), f"{path} has no docstring below it"


@pytest.mark.parametrize(
    ("path", "cls"),
    [pytest.param(path, value, id=path) for path, value in public_names() if inspect.isclass(value)],
)
def test_public_methods_are_documented(path, cls):
    ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "spa3r"]
    silent = [
        name
        for base in ours
        for name, member in vars(base).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, classmethod | staticmethod | property))
        and not inspect.getdoc(getattr(cls, name))
    ]
    assert not silent, f"{path} has methods without docstrings: {silent}"


def test_readme_names_what_is_public():
    table = read("README.md").partition("## Public names")[2].partition("\n## ")[0]
    assert {name for name in spa3r.__all__ if not name.startswith("_")} <= set(re.findall(r"`(\w+)`", table))


# Tables ---------------------------------------------------------------------------------------------------------------


def table_below(text: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading."""
    lines = f"\n{text}".partition(f"\n{heading}\n")[2].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_families_are_those_that_are_run():
    page = read("docs", "guides", "compose.md")
    for heading, families in (("## Tested families", FAMILIES), ("### More families", MORE_FAMILIES)):
        told = {row[0].strip("`"): row[2].strip("`") for row in table_below(page, heading)}
        assert told == {name: family.processor[0] for name, family in families.items()}
    run = {family.model_type or name for name, family in (FAMILIES | MORE_FAMILIES).items()}
    assert run == TESTED_FAMILIES
    refused = {row[0].strip("`"): row[1] for row in table_below(page, "## Unsupported families")}
    assert refused == UNSUPPORTED_FAMILIES
    assert page.count("tests/models/test_spa3_vlm_families.py") == 1
    assert (ROOT / "tests" / "models" / "test_spa3_vlm_families.py").is_file()


def test_the_other_families_are_untested_or_refused():
    """Read from the source of transformers: importing each model takes long."""
    untested = read("docs", "guides", "compose.md").partition("## Untested families")[2].partition("\n## ")[0]
    version, count = re.search(r"In transformers (\d+\.\d+), (\d+) families", untested).groups()
    if Version(transformers.__version__).release[:2] != Version(version).release:
        pytest.skip(f"the page is about transformers {version}")
    classes: dict[str, str] = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        parts = re.split(r"^class (\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        classes |= zip(parts[1::2], parts[2::2], strict=True)
    takes = {
        family
        for family, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if "mm_encoder_outputs" in re.search(r"def forward\(.*?\)( ->.*?)?:\n|$", classes[name], re.DOTALL)[0]
    }
    listed = set(re.findall(r"`(\w+)`", untested.rpartition("Untested are:")[2]))
    assert len(takes) == int(count)
    assert listed == takes - TESTED_FAMILIES - UNSUPPORTED_FAMILIES.keys()
    assert takes >= TESTED_FAMILIES | UNSUPPORTED_FAMILIES.keys()


def test_commands_are_all_told():
    page = read("docs", "guides", "command_line.md")
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for group in app.registered_groups:
        commands |= {f"{group.name} {command.name}" for command in group.typer_instance.registered_commands}
    told = [re.match(r"`spa3r (eval [\w-]+|\w+)", row[0])[1] for row in table_below(page, "# Command line")]
    assert commands == set(told)


def test_levels_are_those_of_the_rooms():
    rows = table_below(read("docs", "guides", "rooms.md"), "## Levels")
    told = {int(row[0]): tuple(int(count) for count in row[1].split("–")) for row in rows}
    assert told == {index: level.num_objects for index, level in enumerate(spa3r.rooms.LEVELS)}


# Structure ------------------------------------------------------------------------------------------------------------


def structure() -> list[str]:
    """Files and folders of the package, in the order of the page: imports go downwards."""
    return [row[0].strip("`") for row in table_below(read("docs", "structure.md"), "# Structure")]


def row_of(file: str) -> int:
    rows = [index for index, row in enumerate(structure()) if file == row or (row[-1] == "/" and file.startswith(row))]
    assert rows, f"src/spa3r/{file} has no row in docs/structure.md: add one where its imports allow"
    return rows[0]


def imported_files(file: Path) -> set[str]:
    """Files of the package that a file imports from, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "spa3r":
            for name in node.names:
                parts = node.module.split(".")[1:]
                places = (SOURCE.joinpath(*path) for path in ([*parts, name.name], parts))
                files = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
                found.add(next(file for file in files if file.is_file()).relative_to(SOURCE).as_posix())
        elif isinstance(node, ast.Import):
            assert all(name.name.partition(".")[0] != "spa3r" for name in node.names), f"{file}: use `from spa3r ...`"
    return found


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_imports_go_one_way(file):
    name = file.relative_to(SOURCE).as_posix()
    row = row_of(name)
    for imported in imported_files(file) - {"__init__.py"}:  # names of the package itself stand for those below
        assert row_of(imported) > row or (structure()[row].endswith("/") and row_of(imported) == row), (
            f"{name} imports {imported}, which stands above it in docs/structure.md"
        )
    if file.name.startswith("configuration_"):
        assert "import torch" not in file.read_text(encoding="utf-8")


def test_structure_names_nothing_that_is_gone():
    assert [row for row in structure() if not (SOURCE / row).exists()] == []


WALKS = ("A photo in `spa3r ask`", "A training row in `spa3r finetune`", "A question in `spa3r eval vsi-bench`")


def walk(heading: str) -> list[tuple[str, str]]:
    """Files and functions of a walk."""
    rows = table_below(read("docs", "structure.md"), f"### {heading}")
    return [tuple(re.fullmatch(r"`([\w/.]+)` `([\w.]+)`", row[0]).groups()) for row in rows]


@pytest.mark.parametrize("heading", (*WALKS, "A request in the app"))
def test_a_walk_passes_three_folders_behind_its_command(heading):
    folders = set()
    for file, function in walk(heading):
        body = ast.parse((SOURCE / file).read_text(encoding="utf-8")).body
        for name in function.split("."):
            (found,) = (node for node in body if getattr(node, "name", None) == name)
            body = found.body
        folders |= {Path(file).parts[0]} if "/" in file else set()
    assert len(folders - {"cli"}) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("heading", WALKS)
def test_a_walk_is_as_the_page_tells_it(heading, tmp_path):
    """The command runs, and its functions are called first in this order."""
    noise(56, 56, 0).save(tmp_path / "0.png")
    if heading == WALKS[0]:
        arguments = ["ask", tmp_path / "0.png", "What?", "--max-new-tokens", 1]
    elif heading == WALKS[1]:
        said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "3"}]
        (tmp_path / "rows.jsonl").write_text((json.dumps({"image": "0.png", "conversations": said}) + "\n") * 4)
        train = {"annotations": str(tmp_path / "rows.jsonl"), "media_root": str(tmp_path), "name": "files"}
        file = write_config(tmp_path / "config.yaml", max_steps=1)
        arguments = ["finetune", file, "--data.train", json.dumps(train)]
    else:
        arguments = ["eval", "vsi-bench", "--data", write_vsi_bench(tmp_path / "data", (1,)), "--model", "embedded"]
        arguments += ["--num-frames", 2, "--output", tmp_path / "run", "--max-new-tokens", 1]
    called: dict[tuple[str, str], int] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(SOURCE)):
            called.setdefault((Path(file).relative_to(SOURCE).as_posix(), frame.f_code.co_qualname), len(called))

    sys.setprofile(note)
    try:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        sys.setprofile(None)
    assert result.exit_code == 0, result.output
    steps = walk(heading)
    assert [step for step in steps if step not in called] == []
    assert sorted(steps, key=lambda step: called[step]) == steps


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_texts_name_no_machine_and_no_registry(text):
    content = text.read_text(encoding="utf-8")
    assert [word for word in FORBIDDEN if word in content] == []


def test_words_are_those_of_the_field():
    folders = (ROOT / name for name in ("src", "docs", "examples", "benchmarks", "tests"))
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".md", ".yaml", ".sh")]
    files = [file for file in [*files, *ROOT.glob("*.md")] if "_build" not in file.parts and file != Path(__file__)]
    assert len(files) > 200
    found = {name_of(file): WORDS.search(file.read_text(encoding="utf-8")) for file in files}
    assert {name: match.group() for name, match in found.items() if match} == {}


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=name_of)
def test_links_and_objects_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"
    for path in re.findall(r"{(?:class|func|meth)}`(?:[^`<]*<)?~?(spa3r[\w.]*)", text):
        if path.startswith("spa3r.app.") and importlib.util.find_spec("gradio") is None:  # it can't be imported
            assert f"\ndef {path.rpartition('.')[2]}(" in (SOURCE / "app.py").read_text(encoding="utf-8")
            continue
        module, value = path.split("."), None
        for cut in range(len(module), 0, -1):
            with contextlib.suppress(ModuleNotFoundError):
                value = importlib.import_module(".".join(module[:cut]))
                break
        for name in module[cut:]:
            value = getattr(value, name)
