"""The command line, ``spa3r``: ask about photos, encode scenes, convert checkpoints, and see what works here.

Standard output carries the result alone, as text or with ``--json`` as one JSON object; progress, notes and errors go
to standard error. torch and the models are imported inside the commands.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from spa3r import __version__
from spa3r.checkpoints import EMBEDDED
from spa3r.checks import shorten
from spa3r.cli.evaluate import eval_app
from spa3r.console import (
    AsJson,
    Attention,
    Device,
    Dtype,
    Images,
    Limits,
    Model,
    Report,
    Verbose,
    WeightType,
    check_model,
    embedded_note,
    end_processes,
    load_vlm,
    loading_arguments,
    one_line,
    plural,
    printable,
    read_views,
    reporting,
    torch_device,
)
from spa3r.disk import write_whole, writing
from spa3r.media.files import is_url, read_text
from spa3r.secret import hidden, hide
from spa3r.signals import ending_on_signals

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch
    from torch import Tensor

    from spa3r.evaluation import FieldReport
    from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
    from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
    from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
    from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining, Spa3RForPreTrainingOutput, Spa3RModel
    from spa3r.rooms import Cameras, Room, RoomViews
    from spa3r.rooms.demo import AskedQuestion

    Loaded = tuple[Any, Any]  # a VLM and its processor

PACKAGES = (
    *("spa3r", "torch", "torchvision", "transformers", "xformers", "flash-attn", "accelerate", "peft", "safetensors"),
    *("huggingface-hub", "tokenizers", "numpy", "pillow", "av", "matplotlib", "embreex", "typer"),
)

app = typer.Typer(
    name="spa3r",
    help="Spatial representations from unposed photos, and vision-language models that see space.",
    epilog="Without --model a small embedded model runs, which learnt from rendered rooms only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(eval_app, name="eval")


class Kind(StrEnum):
    vggt = "vggt"
    spa3r = "spa3r"
    spa3_vlm = "spa3-vlm"


NumFrames = Annotated[
    int | None, typer.Option(min=1, help="Frames of each video, uniformly sampled; by its length if not given (4-8).")
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Sections model, data, evaluation, training.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: delete the checkpoints, model and logs of the run.")]
ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": True}
"""Settings of commands that take `--section.key value`."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"spa3r {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


# Models


def _load_spa3r(name: str, device: str, dtype: Dtype, attention: str | None) -> tuple[Spa3RModel, Spa3RImageProcessor]:
    """A Spa3R, on its own or out of a Spa3-VLM."""
    from transformers import AutoConfig

    from spa3r import Spa3RImageProcessor, Spa3RModel
    from spa3r.models.released import find_released

    arguments, place = loading_arguments(dtype, attention), torch_device(device)
    if name != EMBEDDED:
        check_model(name)
        released = find_released(name, ("spa3r", "spa3-vlm"), "`--model`")
        kind = "spa3r" if released is not None else AutoConfig.from_pretrained(name).model_type
        if kind == "spa3r":
            model = Spa3RModel.from_pretrained(name, **arguments).to(place).eval()
            return model, Spa3RImageProcessor.from_pretrained(name)
        if kind != "spa3_vlm":
            raise ValueError(f"`--model` must be a Spa3R or a Spa3-VLM to encode with, and {name} is a {kind}.")
    model, processor = load_vlm(name, device, dtype, attention)
    if model.spa3r is None:
        raise ValueError(f"`--model` must hold a Spa3R to encode with, and {name} has `spatial_source` 'none'.")
    return model.spa3r, processor.view_image_processor


# Commands


@app.command(no_args_is_help=True)
def ask(
    photos_and_question: Annotated[
        list[str],
        typer.Argument(
            metavar="PHOTOS... QUESTION",
            help="Pictures, videos, folders of them, or URLs, all of one scene; and last the question.",
            show_default=False,
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", help="One more question about the same scene, which is encoded once for all."),
    ] = None,
    model: Model = EMBEDDED,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 128,
    num_frames: NumFrames = None,
    images: Annotated[
        Images, typer.Option(help="What the VLM sees: the views as Spa3R sees them, or the pictures as they are.")
    ] = Images.aligned,
    device: Device = "auto",
    dtype: WeightType = Dtype.auto,
    attention: Attention = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Ask a Spa3-VLM questions about photos of a scene."""
    *photos, question = photos_and_question
    if not photos or os.path.exists(question) or not question.strip():
        raise typer.BadParameter(
            f"The last argument must be the question, after at least one photo; got {shorten(question)}.",
            param_hint="PHOTOS... QUESTION",
        )
    questions = [question, *(more or [])]
    with reporting(as_json, verbose) as report:
        with report.status("Reading the photos"):
            names, views = read_views(photos, num_frames)
        with report.status(f"Loading {model}"):
            vlm, processor = load_vlm(model, device, dtype, attention)
        if model == EMBEDDED:
            report.note(embedded_note())
        processor.images = images.value
        with report.status(f"Looking at {plural(len(views), 'view')}"):
            if more:
                answers = vlm.ask(vlm.encode_scene(processor, views), questions, max_new_tokens=max_new_tokens)
            else:
                answers = [_answer(vlm, processor, views, question, max_new_tokens)]
        told = [f"{asked}\n    {printable(answer)}" for asked, answer in zip(questions, answers)]
        report.finish(
            "\n".join(told) if more else printable(answers[0]),
            model=model,
            question=question,
            answer=answers[0],
            answers=[{"question": asked, "answer": answer} for asked, answer in zip(questions, answers)],
            views=names,
            num_views=len(names),
        )


def _answer(
    model: Spa3VLMForConditionalGeneration,
    processor: Spa3VLMProcessor,
    views: list[PIL.Image.Image],
    question: str,
    max_new_tokens: int,
) -> str:
    content = [*({"type": "image", "image": view} for view in views), {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@app.command("app")
def web_demo(
    model: Model = EMBEDDED,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 is reached from other machines.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 on if not given.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Open it to everyone who knows the link, through gradio's servers.")
    ] = False,
    cache_gib: Annotated[float, typer.Option(min=0, help="Memory for encoded scenes.")] = 4,
    max_question: Annotated[int, typer.Option(min=1, help="Characters of a question.")] = Limits.question_length,
    max_views: Annotated[int, typer.Option(min=1, help="Pictures and frames of a place.")] = Limits.views,
    max_mib: Annotated[int, typer.Option(min=1, help="Size of a place's files.")] = Limits.file_bytes // 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a picture.")] = Limits.pixels,
    device: Device = "auto",
    dtype: WeightType = Dtype.auto,
    attention: Attention = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Serve a web page: show a place, by photos, a video or a generated room, and ask about it. Ctrl+C ends it."""
    with reporting(as_json, verbose) as report:
        from spa3r.app import build_app

        with report.status(f"Loading {model}"):
            vlm, processor = load_vlm(model, device, dtype, attention)
        if model == EMBEDDED:
            report.note(embedded_note())
        page = build_app(
            vlm,
            processor,
            about=_about_model(model),
            cache_bytes=int(cache_gib * 2**30),
            limits=Limits(max_question, max_views, max_mib * 2**20, max_pixels),
        )
        try:
            _, local, public = page.launch(
                server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True
            )
        except OSError as error:
            where = f"{host}, port {port or 'any of 7860 to 7959'}"
            raise OSError(
                f"The page can't be served on {where} ({error}). Give another `--host` or `--port`."
            ) from error
        report.finish(f"The page is at {public or local}", model=model, url=public or local)
    sys.stdout.flush()  # a pipe or file would get the address at the end
    with redirect_stdout(sys.stderr):
        page.block_thread()


def _about_model(name: str) -> str:
    """What the page says of a model."""
    return f"Model: `{name}`" + (f"; {embedded_note()}." if name == EMBEDDED else ".")


@app.command(no_args_is_help=True)
def encode(
    photos: Annotated[
        list[str],
        typer.Argument(metavar="PHOTOS...", help="Pictures, videos, folders of them, or URLs.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file; with --scene-per-folder a folder. [default: latents(.safetensors)]"
        ),
    ] = None,
    scene_per_folder: Annotated[
        bool,
        typer.Option(
            "--scene-per-folder",
            help="Every argument, such as a folder, is a scene with a file of its own. A scene whose file was made of "
            "the same photos by the same model and options is left alone.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Scenes encoded at once.")] = 8,
    model: Model = EMBEDDED,
    num_frames: NumFrames = None,
    device: Device = "auto",
    dtype: WeightType = Dtype.auto,
    attention: Attention = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Encode photos of a scene, or of many, into latents: a safetensors file of (1, L, D) for each scene."""
    with reporting(as_json, verbose) as report, ending_on_signals():
        if model == EMBEDDED:
            report.note(embedded_note())

        def load() -> tuple[Spa3RModel, Spa3RImageProcessor]:
            with report.status(f"Loading {model}"):
                return _load_spa3r(model, device, dtype, attention)

        if scene_per_folder:
            options = json.dumps({"num_frames": num_frames, "dtype": dtype, "attn": attention})
            _encode_many(report, load, model, photos, output or Path("latents"), batch_size, num_frames, options)
            return
        if output is not None and output.is_dir():
            raise ValueError(
                f"`--output` must be a file, and {output} is a folder: give {output / 'latents.safetensors'}."
            )
        names, views = read_views(photos, num_frames)
        spa3r, processor = load()
        file = output or Path("latents.safetensors")
        with report.status(f"Encoding {plural(len(views), 'view')}"):
            scene = (file, {"views": json.dumps(hidden(names))}, [processor.process_view(view) for view in views])
            shape = _encode_and_save(spa3r, processor, model, [scene])
        report.finish(
            f"{file}: latents {' x '.join(map(str, shape))} of {plural(len(names), 'view')}",
            model=model,
            output=str(file),
            latents_shape=shape,
            views=names,
            num_views=len(names),
        )


def _encode_many(
    report: Report,
    load: Callable[[], tuple[Spa3RModel, Spa3RImageProcessor]],
    model: str,
    sources: list[str],
    folder: Path,
    batch_size: int,
    num_frames: int | None,
    options: str,
) -> None:
    """Every source is a scene. One that can't be read is named and counted, and all others are done."""
    scenes = _scene_files(sources, folder)
    made_from = {file: options + _fingerprint(source) + _fingerprint(model) for file, source in scenes.items()}
    waiting = [(file, source) for file, source in scenes.items() if not _is_encoded(file, model, made_from[file])]
    failed: dict[str, str] = {}
    if waiting:
        spa3r, processor = load()
    with report.progress() as progress:
        task = progress.add_task("Encoding scenes", total=len(waiting))
        for start in range(0, len(waiting), batch_size):
            batch = []
            for file, source in waiting[start : start + batch_size]:
                try:
                    names, views = read_views([source], num_frames, keep=processor.process_view)
                    about = {"views": json.dumps(hidden(names)), "made_from": made_from[file]}
                    batch.append((file, about, views))
                except (ValueError, OSError) as error:
                    failed[source] = one_line(error)
                    report.error(f"{source}: {failed[source]}")
            if batch:
                _encode_and_save(spa3r, processor, model, batch)
            progress.advance(task, min(batch_size, len(waiting) - start))
    encoded, skipped = len(waiting) - len(failed), len(scenes) - len(waiting)
    report.finish(
        f"{folder}: {plural(encoded, 'scene')} encoded, {skipped} already done, {len(failed)} failed",
        exit_code=int(bool(failed)),
        model=model,
        output=str(folder),
        num_scenes=len(scenes),
        encoded=encoded,
        skipped=skipped,
        failed=failed,
    )


def _scene_files(sources: list[str], folder: Path) -> dict[Path, str]:
    """Where each scene's latents go: a file named like the scene."""
    files: dict[Path, str] = {}
    for source in sources:
        path = Path(urlsplit(source).path if is_url(source) else source).absolute()
        file = folder / f"{path.name if path.is_dir() else path.stem}.safetensors"
        if file in files:
            raise ValueError(
                f"Scenes must have names of their own, and {files[file]} and {source} would both become {file}. "
                "Rename one, or encode them into two folders."
            )
        files[file] = source
    return files


def _fingerprint(source: str) -> str:
    """The files of a photo, folder or model by name, size and time of change: another one means other latents."""
    path = Path(source)
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    return json.dumps(stats)


def _is_encoded(file: Path, model: str, made_from: str) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            about = content.metadata() or {}
            return (about.get("model"), about.get("made_from")) == (hide(model), made_from)
    except (OSError, SafetensorError):
        return False


def _encode_and_save(
    spa3r: Spa3RModel,
    processor: Spa3RImageProcessor,
    model: str,
    scenes: list[tuple[Path, dict[str, str], list[PIL.Image.Image]]],
) -> list[int]:
    """Encode scenes (file, what it is to say, processed views) in one batch; each file appears whole or not at all.

    Returns:
        Shape of the latents in each file, [1, L, D].
    """
    import torch
    from safetensors.torch import save

    with torch.inference_mode():
        latents = spa3r.encode(**processor.pack([views for _, _, views in scenes]).to(spa3r.device)).cpu()
    versions = {name: metadata.version(name) for name in ("spa3r", "torch", "transformers")}
    for (file, told, _), scene in zip(scenes, latents.split(1)):
        about = {"model": hide(model), "versions": json.dumps(versions)} | told
        write_whole(file, save({"latents": scene.clone()}, metadata=about))
    return [1, *latents.shape[1:]]


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[Path, typer.Argument(help="VGGT-1B's file or folder, spa3r.ckpt, or the spa3_vlm folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    kind: Annotated[Kind, typer.Option(help="What the source is.")],
    config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="Fields of the configuration that tensors don't tell: JSON, or a file of it."
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Convert a released research checkpoint into a folder that from_pretrained and --model take."""
    with reporting(as_json, verbose) as report:
        from spa3r import convert_checkpoint

        fields = _read_config(config) if config is not None else None
        with report.status(f"Converting {source}"):
            convert_checkpoint(source, output, kind.value, fields)
        files = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
        report.finish(
            f"{output}: {', '.join(files)}", source=str(source), output=str(output), kind=kind.value, files=files
        )


@app.command(no_args_is_help=True)
def merge(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Folder of a run with low-rank updates, or a checkpoint; or an adapter's hub id."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Merge low-rank updates (LoRA) into the language model: a whole Spa3-VLM with its processor."""
    with reporting(as_json, verbose) as report:
        from spa3r.conversion import save_together
        from spa3r.training import merge_lora

        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"`OUT` must be a new or an empty folder, and {output} holds files. Give another.")
        with report.status(f"Merging {run}"):
            model, processor = merge_lora(run)
            save_together(output, model, processor)
        report.finish(f"{output}: the Spa3-VLM of {run}, merged", run=run, output=str(output))


def _read_config(text: str) -> dict[str, Any]:
    """A JSON object, given as such or in a file."""
    try:
        fields = json.loads(text if text.lstrip()[:1] in ("{", "[") else read_text(text))
    except (OSError, ValueError) as error:
        raise ValueError(f"`--config` must be a JSON object or a file of one, got {text}: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"`--config` must be a JSON object or a file of one, got {text}: no object.")
    return fields


@app.command(
    no_args_is_help=True,
    context_settings=ANY_KEY,
    epilog="Any key of the file can be changed: --training.max_steps 1000 --data.sources.0.root photos",
)
def pretrain(
    context: typer.Context,
    config: ConfigFile,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Pretrain a Spa3R as a configuration file says, or go on with a run that was stopped."""
    with reporting(as_json, verbose) as report:
        from spa3r.training import PretrainingConfig
        from spa3r.training import pretrain as run_pretraining

        settings = PretrainingConfig.from_yaml(config, context.args)
        result = _train(report, settings, run_pretraining, fresh)
        text = f"Of the held-out scenes: {result.held_out_skipped}" if result.held_out_skipped.entries() else ""
        _tell_training(
            report,
            result,
            text,
            pictures=result.skipped.pictures_tried,
            skipped_pictures=result.skipped.pictures_bad,
            held_out_skipped=result.held_out_skipped.entries(),
        )


@app.command(
    no_args_is_help=True,
    context_settings=ANY_KEY,
    epilog="Any key of the file can be changed: --training.policy lora --data.max_length 4096",
)
def finetune(
    context: typer.Context,
    config: ConfigFile,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a VLM with Spa3R on instructions as a configuration file says, or go on with a run that was stopped."""
    with reporting(as_json, verbose) as report:
        from spa3r.training import FinetuningConfig
        from spa3r.training import finetune as run_finetuning

        result = _train(report, FinetuningConfig.from_yaml(config, context.args), run_finetuning, fresh)
        _tell_training(
            report,
            result,
            rows=result.skipped.scenes_tried,
            skipped_rows=result.skipped.scenes_bad,
            parameters=result.parameters,
        )


def _train(report: Report, settings: Any, run: Callable[..., Any], fresh: bool) -> Any:
    """Run a training; only the first process comes back, and speaks for all."""
    is_main_process = os.environ.get("RANK", "0") == "0"
    if is_main_process:
        report.line(settings.to_yaml())
    result = run(settings, fresh=fresh, note=report.note, progress=report.line)
    end_processes()
    if not is_main_process:
        raise typer.Exit
    return result


def _tell_training(report: Report, result: Any, text: str = "", **more: Any) -> None:
    lines = [f"{result.output_dir}: {result.step} of {result.max_steps} steps"]
    lines += [f"  {name} {value:.4g}" for name, value in result.evaluation.items() if value is not None]
    lines.append(str(result.skipped))
    if text:
        lines.append(text)
    if result.nonfinite_steps:
        lines.append(f"{plural(result.nonfinite_steps, 'step')} dropped, their gradient was not finite")
    if not result.is_finished:
        lines.append(f"stopped by {result.interrupted_by}; the same command goes on from {result.checkpoint}")
    report.finish(
        "\n".join(lines),
        exit_code=0 if result.is_finished else 130,
        output_dir=result.output_dir,
        step=result.step,
        max_steps=result.max_steps,
        finished=result.is_finished,
        interrupted_by=result.interrupted_by,
        resumed_from=result.resumed_from,
        checkpoint=result.checkpoint,
        evaluation=result.evaluation,
        nonfinite_steps=result.nonfinite_steps,
        skipped=result.skipped.entries(),
        **more,
    )


@app.command()
def info(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """What is installed, and what works here: devices, types, attention back ends. Each one is tried."""
    with reporting(as_json, verbose) as report:
        versions: dict[str, str | None] = {"python": sys.version.split()[0]}
        for name in PACKAGES:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = None
        device = torch_device("auto")
        devices, dtypes, attention = _devices(), _try_dtypes(device), _try_attention(device)
        sections = {
            "Versions": {name: version or "not installed" for name, version in versions.items()},
            "Devices": devices,
            f"Types on {device}": {name: note for name, (_, note) in dtypes.items()},
            f"Attention on {device}": {name: note for name, (_, note) in attention.items()},
        }
        width = max(len(name) for section in sections.values() for name in section)
        report.finish(
            "\n\n".join(
                "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in section.items())])
                for title, section in sections.items()
            ),
            versions=versions,
            devices=devices,
            device=str(device),
            dtypes={name: {"works": works, "note": note} for name, (works, note) in dtypes.items()},
            attention={name: {"works": works, "note": note} for name, (works, note) in attention.items()},
        )


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": plural(torch.get_num_threads(), "thread")}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute {card.major}.{card.minor}"
        )
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _try_dtypes(device: torch.device) -> dict[str, tuple[bool, str]]:
    """Of every type of weights whether it works, and what there is to say."""
    import torch

    found = {}
    for name in ("float32", "bfloat16", "float16"):
        try:
            square = torch.ones(16, 16, device=device, dtype=getattr(torch, name))
            (square @ square).softmax(-1).sum().item()
            found[name] = (True, "works")
        except RuntimeError as error:
            found[name] = (False, f"fails: {one_line(error)}")
    return found


def _try_attention(device: torch.device) -> dict[str, tuple[bool, str]]:
    """Of every back end whether it works, on segments of unequal lengths and against the definition; and why not."""
    from types import SimpleNamespace

    import torch

    from spa3r.models.attention import Segments, check_attention_implementation, packed_attention, why_unusable

    segments = Segments.within([3, 5, 1])
    tokens = torch.randn(9, 2, 32, generator=torch.Generator().manual_seed(0)).to(device)

    def attend(name: str, dtype: torch.dtype) -> Tensor:
        layer = torch.nn.Module()
        layer.config = SimpleNamespace(_attn_implementation=name)
        layer.is_causal = False
        return packed_attention(layer, *[tokens.to(dtype)] * 3, segments).float()

    found = {}
    for name in ("xformers", "sdpa", "eager", "flash_attention_2"):
        if reason := why_unusable(name):
            found[name] = (False, reason)
            continue
        try:
            half = device.type == "cuda"
            error = (
                (attend(name, torch.float16 if half else torch.float32) - attend("eager", torch.float32)).abs().max()
            )
            note = f"works, within {error:.0e} of the definition"
            if name == "xformers" and not half:
                note += "; here it is PyTorch's SDPA, xformers' own kernels run on CUDA only"
            found[name] = (True, note) if error < (1e-2 if half else 1e-4) else (False, f"is off by {error:.0e}")
        except Exception as error:  # whatever it is, it is the answer
            found[name] = (False, f"fails: {one_line(error)}")
    default = check_attention_implementation(None)
    found[default] = (found[default][0], f"{found[default][1]} (the default)")
    return found


FIRST_UNSEEN_ROOM = 1_000_000
"""Seed of the demo's first room: the embedded models were trained on rooms of smaller seeds only."""

ROOMS_PER_SEED = 100
"""Rooms among which the demo looks for one about which every type of question can be asked."""

WALK = 48
"""Steps of a camera walk that show nearly all of a room."""


def _walk(room: Room, views: int, size: int) -> Cameras:
    """So many places, spread over one walk."""
    from spa3r.rooms import camera_walk

    step = max(1, WALK // views)
    return camera_walk(room, step * views, size=(size, size))[::step]


def _look_around(seed: int, level: int, views: int, size: int) -> RoomViews:
    """A room from so many places, spread over one walk."""
    from spa3r.rooms import generate_room, render

    room = generate_room(seed, level)
    return render(room, _walk(room, views, size))


def _room_of_questions(first: int, level: int, views: int, size: int) -> tuple[Room, list[dict[str, Any]]]:
    """The first room from `first` on that allows a question of every type, and these; else the one that allows most."""
    from spa3r.rooms import generate_room
    from spa3r.rooms.questions import QUESTION_TYPES, RoomWalk, room_questions

    best, most = None, []
    for seed in range(first, first + ROOMS_PER_SEED):
        room = generate_room(seed, level)
        rows = room_questions(RoomWalk.from_cameras(room, _walk(room, views, size)))
        if best is None or len(rows) > len(most):
            best, most = room, rows
        if len(rows) == len(QUESTION_TYPES):
            break
    return best, most


def _embedded_vlms() -> tuple[Loaded, Loaded, str]:
    """The embedded Spa3-VLM, a VLM to compare it with, each with its processor, and what the other one is."""
    from spa3r.rooms.embedded import embedded_model, embedded_vlm

    return embedded_model(), embedded_vlm(), "the same VLM, trained on the same questions without Spa3R"


def _ask_with_and_without(
    rows: list[dict[str, Any]], frames: Sequence[np.ndarray], with_spa3r: Loaded, without: Loaded
) -> tuple[list[AskedQuestion], dict[str, float]]:
    """Two answers to every question, and the overall scores, per cent."""
    import PIL.Image

    from spa3r.evaluation import evaluate_answers
    from spa3r.rooms.demo import AskedQuestion
    from spa3r.vsi_bench.format import make_messages

    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    examples = [{"messages": make_messages(row, pictures), "question_type": row["question_type"]} for row in rows]
    ours, theirs = evaluate_answers(*with_spa3r, examples), evaluate_answers(*without, examples, use_spa3r=False)
    questions = [
        AskedQuestion(
            question_type=row["question_type"],
            question="\n".join((row["question"], *(("Options:", *row["options"]) if row["options"] else ()))),
            answer=our.answer,
            truth=our.truth,
            score=our.score,
            answer_without_spa3r=their.answer,
            score_without_spa3r=their.score,
        )
        for row, our, their in zip(rows, ours.answers, theirs.answers)
    ]
    return questions, {"with_spa3r": ours.scores["overall"], "without_spa3r": theirs.scores["overall"]}


def _told(asked: AskedQuestion) -> str:
    """A question with its answers, for a terminal."""
    question, _, options = asked.question.partition("\nOptions:\n")
    lines = [f"{asked.question_type}: {question}"]
    if options:
        lines.append(f"    {'   '.join(options.splitlines())}")
    answers = (
        ("with Spa3R", asked.answer, asked.score),
        ("without", asked.answer_without_spa3r, asked.score_without_spa3r),
    )
    told = (f"{name} {one_line(printable(answer))!r} (score {score:.2f})" for name, answer, score in answers)
    return "\n".join([*lines, f"    truth {asked.truth!r}, {', '.join(told)}"])


def _predict_held_out(
    model: Spa3RForPreTraining, processor: Spa3RImageProcessor, rooms: list[RoomViews]
) -> tuple[dict[str, Any], Spa3RForPreTrainingOutput, FieldReport]:
    """Every second view is held out, cameras are given: inputs and output of the first room, metrics of all rooms."""
    import torch

    from spa3r.evaluation import evaluate_field

    batches = []
    for room in rooms:
        intrinsics = processor.process_intrinsics(room.intrinsics, room.images.shape[1:3])
        cameras = {"extrinsics": room.extrinsics, "intrinsics": intrinsics}
        cameras = {name: torch.from_numpy(values).float() for name, values in cameras.items()}
        held_out = {"target_mask": torch.arange(len(room.images)) % 2 == 1}
        batches.append({**processor(list(room.images)).to(model.device), **cameras, **held_out})
    with torch.inference_mode():
        output = model(**batches[0])
    return batches[0], output, evaluate_field(model, batches)


@app.command()
def demo(
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help=f"Which room: the first from seed {FIRST_UNSEEN_ROOM} + {ROOMS_PER_SEED} x this on about which every "
            "type of question can be asked. No training saw it.",
        ),
    ] = 0,
    level: Annotated[int, typer.Option(min=0, max=3, help="How varied the room is.")] = 0,
    views: Annotated[
        int, typer.Option(min=2, help="Views of the room; of the field every second one is held out.")
    ] = 8,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for page and pictures.")] = Path("spa3r_demo"),
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """See it all at work without a download: a room, questions with and without Spa3R, the field of held-out views."""
    with reporting(as_json, verbose) as report:
        import PIL.Image

        from spa3r.rooms import render
        from spa3r.rooms.demo import room_report
        from spa3r.rooms.embedded import embedded_spa3r
        from spa3r.rooms.questions import QUESTION_TYPES
        from spa3r.visualization import contact_sheet, field_figure

        photos = output / "photos"
        with writing(output):
            photos.mkdir(parents=True, exist_ok=True)
        with report.status("Making the models"):
            model, processor = embedded_spa3r()
            spa3_vlm, alone, alone_note = _embedded_vlms()
        with report.status("Looking for a room, and rendering it and another one"):
            first = FIRST_UNSEEN_ROOM + ROOMS_PER_SEED * seed
            room, rows = _room_of_questions(first, level, views, processor.size)
            cameras = _walk(room, views, processor.size)
            rooms = [render(room, cameras), _look_around(room.seed + 1, level, views, processor.size)]
        images = list(rooms[0].images)
        with report.status("Encoding, decoding and measuring"):
            inputs, predicted, metrics = _predict_held_out(model, processor, rooms)
        held_out = [view for view, target in enumerate(predicted.target_mask.tolist()) if target]
        context = [view for view in range(views) if view not in held_out]
        with report.status("Answering, with Spa3R and without"):
            questions, scores = _ask_with_and_without(rows, images, spa3_vlm, alone)

        facts = {
            "room": f"seed {room.seed}, level {level}; {views} views",
            "models": embedded_note(),
            "without": alone_note,
            "latents": f"{' x '.join(map(str, predicted.latents.shape))}, of {plural(len(context), 'context view')}",
            "field": f"cameras: given; {plural(len(held_out), 'view')} held out, of this room and of room "
            f"{room.seed + 1}",
        }
        if missing := [name for name in QUESTION_TYPES if name not in [row["question_type"] for row in rows]]:
            facts["not asked"] = f"{', '.join(missing)}: {views} views of no room near allowed it"
        with report.status("Drawing"), writing(output):
            files, page = [output / "views.png", output / "field.png"], output / "report.html"
            for index, image in enumerate(images):  # to go on with: spa3r ask, spa3r encode
                PIL.Image.fromarray(image).save(photos / f"{index}.png")
            contact_sheet(
                images,
                f"Room of seed {room.seed}, level {level}",
                labels=[f"view {view}" + ", held out" * (view in held_out) for view in range(views)],
                marked=held_out,
            ).savefig(files[0])
            figure = field_figure(
                images,
                predicted,
                inputs["view_grid_hw"],
                list(rooms[0].depth),
                title="Feature field of held-out views of an unseen room (cameras: given)",
            )
            figure.savefig(files[1])
            caption = (
                "The same views again, every second one held out: the features that Spa3R predicts for the cameras of "
                "these, beside the true ones. Below: how near they come, on this room and another one, and what comes "
                "as near without the model."
            )
            html = room_report(
                images,
                room,
                cameras,
                questions,
                (scores["with_spa3r"], scores["without_spa3r"]),
                facts,
                figures={caption: figure},
                table=metrics.table(),
                command=f"spa3r demo --seed {seed} --level {level} --views {views}",
            )
            write_whole(page, html)
        facts |= {"page": str(page), "pictures": ", ".join(map(str, files)), "photos": str(photos)}
        total = "overall, of 100: with Spa3R {with_spa3r:.1f}, without {without_spa3r:.1f} (one room is no measurement)"
        parts = [
            "\n".join(f"{name:<10} {text}" for name, text in facts.items()),
            "\n".join(map(_told, questions)),
            total.format(**scores),
            metrics.table(),
        ]
        report.finish(
            "\n\n".join(parts),
            seed=seed,
            room=room.seed,
            level=level,
            num_views=views,
            held_out=held_out,
            cameras="given",
            questions=[vars(asked) for asked in questions],
            scores=scores,
            latents_shape=list(predicted.latents.shape),
            field=metrics.to_dict(),
            report=str(page),
            pictures=[str(file) for file in files],
            photos=str(photos),
        )
