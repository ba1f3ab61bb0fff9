"""What `import spa3r` and the help of the command line import, and that transformers knows our types all the same."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "torchvision",
    "transformers",
    "numpy",
    "xformers",
    "matplotlib",
    "einops",
    "av",
    "huggingface_hub",
    "jinja2",
    "fastapi",
    "uvicorn",
)
ALL_HELP = """
import click, sys
from contextlib import redirect_stdout
from io import StringIO
from typer.main import get_command
from spa3r.cli.main import app

def leaves(command, words):
    yield words
    for name, part in getattr(command, "commands", {}).items():
        yield from leaves(part, [*words, name])

seen = list(leaves(get_command(app), []))
for words in seen:
    with redirect_stdout(StringIO()) as text:
        get_command(app)([*words, "--help"], standalone_mode=False)
    assert "Usage" in text.getvalue()
for words in (["eva"], ["ask", "--imges", "x"], ["eval", "vsi-bench", "--benchmrk"]):
    try:
        get_command(app)(words, standalone_mode=False)
    except Exception as error:
        assert "no such" in str(error).lower(), error
    else:
        raise AssertionError(words)
assert len(seen) > 10
"""
USES = {
    "auto": "from transformers import AutoModel, AutoProcessor, pipeline",
    "trainer": "from transformers import Trainer",
    "model": "from spa3r import Spa3RModel",
    "vlm": "from spa3r import Spa3VLM",
    "image-processor": "from spa3r import Spa3RImageProcessor",
    "configuration": "from spa3r import Spa3VLMConfig",
    "peft": "import peft",
    "conversion": "from spa3r import convert_checkpoint",
}
KNOWN = """
import spa3r
from transformers import (
    AttentionInterface, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForPreTraining
)
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.models.auto.processing_auto import processor_class_from_name

assert isinstance(AutoConfig.for_model("spa3_vlm"), spa3r.Spa3VLMConfig)
assert AutoModel._model_mapping[spa3r.VggtConfig] is spa3r.VggtModel
assert AutoModel._model_mapping[spa3r.Spa3RConfig] is spa3r.Spa3RModel
assert spa3r.Spa3RForPreTraining in AutoModelForPreTraining._model_mapping.values()
assert AutoModelForImageTextToText._model_mapping[spa3r.Spa3VLMConfig] is spa3r.Spa3VLM
assert processor_class_from_name("Spa3VLMProcessor") is spa3r.Spa3VLMProcessor
assert get_image_processor_class_from_name("Spa3RImageProcessor") is spa3r.Spa3RImageProcessor
assert "xformers" in AttentionInterface()
"""


def run(code: str) -> str:
    """What a new interpreter prints."""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.mark.parametrize("code", ["import spa3r", ALL_HELP], ids=["package", "help"])
def test_nothing_heavy_is_imported(code):
    loaded = run(f"{code}\nimport sys\nprint(*sys.modules)").split()
    assert "spa3r" in loaded
    assert not {*HEAVY} & {*loaded}


@pytest.mark.slow
@pytest.mark.parametrize("first", (True, False), ids=["spa3r-first", "spa3r-last"])
def test_transformers_knows_the_types_in_any_order_of_imports(first):
    orders = (
        [f"import spa3r\n{use}" for use in USES.values()]
        if first
        else [f"{use}\nimport spa3r" for use in USES.values() if not use.startswith("from spa3r")]
    )
    each_in_a_process = (
        "import os, sys, torch, torchvision\n"  # both know nothing of the types, and take longest to import
        f"for order in {orders!r}:\n"
        "    if not (child := os.fork()):\n"
        f"        exec(order + {KNOWN!r}, {{}})\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, order"
    )
    run(each_in_a_process)


def test_transformers_knows_the_types_right_after_the_import():
    run(KNOWN)


def test_looking_a_type_up_imports_it_and_no_other():
    code = (
        "import sys, spa3r\n"
        "from transformers import AutoConfig, AutoModel\n"
        "assert not [name for name in sys.modules if name.startswith('spa3r.models') and 'modeling' in name]\n"
        "assert AutoModel._model_mapping[type(AutoConfig.for_model('vggt'))].__name__ == 'VggtModel'\n"
        "assert 'spa3r.models.spa3r.modeling_spa3r' not in sys.modules"
    )
    run(code)
