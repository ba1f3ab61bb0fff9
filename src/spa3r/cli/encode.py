"""``spa3r encode``: write the latents of scenes."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from spa3r.checkpoints import EMBEDDED
from spa3r.console import (
    AsJson,
    Attention,
    ChoiceOfFrames,
    Compiled,
    Device,
    Dtype,
    Frames,
    Int8,
    Model,
    NumFrames,
    Report,
    Verbose,
    WeightType,
    check_model,
    compile_spa3r,
    embedded_note,
    in_int8,
    load_vlm,
    loading_arguments,
    one_line,
    plural,
    read_views,
    reporting,
    torch_device,
    with_default_dtype,
)
from spa3r.disk import write_whole
from spa3r.media.files import VIDEOS, is_url
from spa3r.processes import end_processes, is_alone, processes
from spa3r.secret import hidden, hide

if TYPE_CHECKING:
    import PIL.Image

    from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
    from spa3r.models.spa3r.modeling_spa3r import Spa3RModel


def _load_spa3r(
    name: str,
    device: str,
    dtype: Dtype,
    attention: str | None,
    note: Callable[[str], None] | None = None,
    int8: bool = False,
) -> tuple[Spa3RModel, Spa3RImageProcessor]:
    """A Spa3R, on its own or out of a Spa3-VLM."""
    from transformers import AutoConfig

    from spa3r import Spa3RImageProcessor, Spa3RModel
    from spa3r.hub import naming_missing
    from spa3r.models.released import find_released

    arguments, place = loading_arguments(dtype, attention), torch_device(device)
    if name != EMBEDDED:
        check_model(name)
        with naming_missing(name):
            released = find_released(name, ("spa3r", "spa3-vlm"), "`--model`")
            kind = "spa3r" if released is not None else AutoConfig.from_pretrained(name).model_type
        if kind == "spa3r":
            model = Spa3RModel.from_pretrained(name, **arguments)
            model = with_default_dtype(model, dtype, place, note)
            if int8:
                in_int8(model)
            return model, Spa3RImageProcessor.from_pretrained(name)
        if kind != "spa3_vlm":
            raise ValueError(f"`--model` must be a Spa3R or a Spa3-VLM to encode with, and {name} is a {kind}.")
    model, processor = load_vlm(name, device, dtype, attention, note, int8)
    if model.spa3r is None:
        raise ValueError(f"`--model` must hold a Spa3R to encode with, and {name} has `spatial_source` 'none'.")
    return model.spa3r, processor.view_image_processor


def encode(
    photos: Annotated[
        list[str] | None,
        typer.Argument(metavar="PHOTOS...", help="Pictures, videos, folders of them, or URLs.", show_default=False),
    ] = None,
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
            help="Every argument, such as a folder, is a scene with its own file. A scene is skipped if its file was "
            "made from the same photos by the same model and options.",
        ),
    ] = False,
    scenes: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="As --scene-per-folder, with every folder and video in this folder; without PHOTOS.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Scenes encoded at once.")] = 8,
    model: Model = EMBEDDED,
    num_frames: NumFrames = None,
    frames: ChoiceOfFrames = Frames.uniform,
    device: Device = "auto",
    dtype: WeightType = Dtype.auto,
    attention: Attention = None,
    int8: Int8 = False,
    compiled: Compiled = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Encode photos of a scene, or of many, into latents: a safetensors file of (1, L, D) for each scene."""
    photos = photos or []
    if bool(photos) == (scenes is not None):
        raise typer.BadParameter(
            "Give either photos or a folder of scenes, --scenes DIR.", param_hint="PHOTOS... or --scenes"
        )
    scene_per_folder = scene_per_folder or scenes is not None
    with reporting(as_json, verbose, resumable=scene_per_folder) as report:
        if scenes is not None:
            photos = _scenes_in(scenes, output or Path("latents"))
        if model == EMBEDDED:
            report.note(embedded_note())

        def load() -> tuple[Spa3RModel, Spa3RImageProcessor]:
            place = str(processes().device) if device == "auto" and not is_alone() else device
            with report.status(f"Loading {model}"):
                spa3r, processor = _load_spa3r(model, place, dtype, attention, report.note, int8)
                if compiled:
                    compile_spa3r(spa3r)
                return spa3r, processor

        if scene_per_folder:
            about = {"num_frames": num_frames, "frames": frames, "attn": attention, "int8": int8}
            options = json.dumps(about | {"dtype": _dtype_here(dtype, device)})
            _encode_many(
                report, load, model, photos, output or Path("latents"), batch_size, num_frames, frames, options
            )
            return
        if output is not None and output.is_dir():
            raise ValueError(
                f"`--output` must be a file, and {output} is a folder: give {output / 'latents.safetensors'}."
            )
        names, views = read_views(photos, num_frames, frames=frames)
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


def _scenes_in(folder: Path, output: Path) -> list[str]:
    """The folders and videos in a folder, by name, without the folder of the output."""
    if not folder.is_dir():
        raise ValueError(f"`--scenes` must be a folder, and {folder} is {'a file' if folder.exists() else 'missing'}.")
    found = [path for path in folder.iterdir() if path.is_dir() or path.suffix.lower() in VIDEOS]
    found = [path for path in found if not path.name.startswith(".") and path.resolve() != output.resolve()]
    found = sorted(map(str, found))
    if not found:
        raise ValueError(f"`--scenes` must hold folders of photos, or videos, and {folder} has neither.")
    return found


def _dtype_here(dtype: Dtype, device: str) -> str:
    """The option, and whether ``auto`` may mean another dtype on this machine."""
    from spa3r.models.precision import cpu_has_bfloat16

    depends = dtype == Dtype.auto and torch_device(device).type == "cpu" and cpu_has_bfloat16()
    return f"{dtype.value}, bfloat16 if large" if depends else dtype.value


def _encode_many(
    report: Report,
    load: Callable[[], tuple[Spa3RModel, Spa3RImageProcessor]],
    model: str,
    sources: list[str],
    folder: Path,
    batch_size: int,
    num_frames: int | None,
    frames: Frames,
    options: str,
) -> None:
    """Encode every source as a scene. Scenes that can't be read are named and counted, and the others are encoded."""
    scenes = _scene_files(sources, folder)
    made_from = {file: options + _fingerprint(source) + _fingerprint(model) for file, source in scenes.items()}
    rank, count = (0, 1) if is_alone() else (processes().process_index, processes().num_processes)
    mine = list(scenes.items())[rank::count]  # before the first file is written, so that all have the same list
    waiting = [(file, source) for file, source in mine if not _is_encoded(file, model, made_from[file])]
    failed: dict[str, str] = {}
    if waiting:
        spa3r, processor = load()
    with report.progress() as progress:
        task = progress.add_task(
            "Encoding scenes" if count == 1 else "Encoding scenes (the first process's share)", total=len(waiting)
        )
        for start in range(0, len(waiting), batch_size):
            batch = []
            for file, source in waiting[start : start + batch_size]:
                try:
                    names, views = read_views([source], num_frames, None, processor.process_view, frames)
                    about = {"views": json.dumps(hidden(names)), "made_from": made_from[file]}
                    batch.append((file, about, views))
                except (ValueError, OSError) as error:
                    failed[source] = one_line(error)
                    report.error(f"{source}: {failed[source]}")
            if batch:
                _encode_and_save(spa3r, processor, model, batch)
            progress.advance(task, min(batch_size, len(waiting) - start))
    skipped = len(mine) - len(waiting)
    if count > 1:
        from accelerate.utils import gather_object

        shares = gather_object([(failed, skipped)])
        failed = {source: reason for share, _ in shares for source, reason in share.items()}
        skipped = sum(number for _, number in shares)
        end_processes()
        if rank:
            raise typer.Exit(int(bool(failed)))
    encoded = len(scenes) - skipped - len(failed)
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
                f"Scenes must have different names, and {files[file]} and {source} would both become {file}. "
                "Rename one, or encode them into two folders."
            )
        files[file] = source
    return files


def _fingerprint(source: str) -> str:
    """The files of a photo, folder or model by name, size and time of change; latents are made again if it changes."""
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
    """Encode scenes (file, its metadata, processed views) in one batch; each file appears whole or not at all.

    Returns:
        Shape of the latents in each file, [1, L, D].
    """
    import torch
    from safetensors.torch import save

    with torch.inference_mode():
        latents = spa3r.encode(**processor.pack([views for _, _, views in scenes]).to(spa3r.device)).cpu()
    versions = {name: metadata.version(name) for name in ("spa3r", "torch", "transformers")}
    for (file, metadata_of_scene, _), scene in zip(scenes, latents.split(1)):
        about = {"model": hide(model), "versions": json.dumps(versions)} | metadata_of_scene
        write_whole(file, save({"latents": scene.clone()}, metadata=about))
    return [1, *latents.shape[1:]]
