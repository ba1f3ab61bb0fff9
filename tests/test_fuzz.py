"""Malformed configurations, calls, messages and files, with a fixed seed: each is refused in words, or comes out right.

What counts as refused: an exception whose class is or derives from ValueError, TypeError or OSError and whose words
name the thing, by one of the names that the case gives. Everything else is a raw error: another class (AttributeError,
KeyError, IndexError, RuntimeError, ...), an error of a library underneath that merely derives from ValueError
(UnicodeDecodeError, JSONDecodeError), one without words, or one of more than a page. A case that is not refused must
be one that is right: `is_right` says so; without it, being accepted is the fault.
"""

import copy
import json
import math
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import alive, pretraining_config, spa3r_config, vggt_config, view_inputs
from vlm_families import build

from spa3r import (
    EncodedScene,
    Spa3RConfig,
    Spa3RForPreTraining,
    Spa3RImageProcessor,
    Spa3RModel,
    Spa3VLM,
    Spa3VLMConfig,
    Spa3VLMProcessor,
    VggtConfig,
    VggtModel,
)
from spa3r.models.cameras import pose_encoding_to_cameras

pytestmark = pytest.mark.slow

SEED = 20_25
SECONDS = 20
"""For one case; most take milliseconds."""

MEMORY = 4 * 2**30
"""Growth of the process over all cases of a kind."""

RAW = (UnicodeError, json.JSONDecodeError)
JUNK = (None, True, False, 0, -1, 1.5, math.nan, math.inf, 10**9, 10**30, "", "3", "abc", b"x", [], [1], {}, {"a": 1})


@dataclass
class Case:
    """One malformed thing.

    Attributes:
        name: For the report.
        run: What is tried.
        words: Any of these must be in the error.
        is_right: Whether a result is right; None: there must be none.
    """

    name: str
    run: Callable
    words: tuple[str, ...]
    is_right: Callable | None = None


def outcome(case: Case) -> str | None:
    """What is wrong with how a case ended; None: nothing."""

    def too_long(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        result = case.run()
    except TimeoutError:
        return f"took more than {SECONDS} seconds"
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
        if isinstance(error, RAW):
            return f"raw {type(error).__name__}: {text[:150]}"
        if not 10 <= len(text) <= 1500:
            return f"an error of {len(text)} characters: {text[:150]}"
        if not any(word in text for word in case.words):
            return f"an error that names none of {case.words}: {type(error).__name__}: {text[:200]}"
        return None
    except Exception as error:
        return f"raw {type(error).__name__}: {str(error)[:150]}"
    finally:
        signal.alarm(0)
    if case.is_right is None or not case.is_right(result):
        return f"accepted: {str(result)[:100]}"
    return None


def check(cases: list[Case], at_least: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults = {case.name: fault for case in cases if (fault := outcome(case)) is not None}
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())
    assert len(cases) >= at_least
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@pytest.fixture
def dice() -> random.Random:
    return random.Random(SEED)


@dataclass
class Composed:
    model: Spa3VLM
    processor: Spa3VLMProcessor


@pytest.fixture(scope="module")
def composed() -> Composed:
    vlm, vlm_processor = build("qwen2_5_vl")
    sizes = {"patch_size": 14, "image_size": 56}
    model = Spa3VLM.from_vlm_and_spa3r(vlm, alive(Spa3RModel(spa3r_config(backbone_config=vggt_config(**sizes)))))
    views = Spa3RImageProcessor(size=56)
    return Composed(model, Spa3VLMProcessor(vlm_processor, views, image_token_id=vlm.config.image_token_id))


# Configurations -------------------------------------------------------------------------------------------------------


def test_configurations(dice):
    cases = []
    for cls in (VggtConfig, Spa3RConfig, Spa3VLMConfig):
        own = [name for name in cls.__annotations__ if name not in ("model_type", "sub_configs")]
        for name in own:
            for value in dice.sample(JUNK, 8):

                def is_right(config, name=name, value=value):
                    """The value was meant: it is kept, and the configuration can be written and read again."""
                    kept = getattr(config, name)
                    same = type(config)(**config.to_dict()).to_dict() == config.to_dict()
                    return same and (kept == value or value is None or isinstance(value, dict))

                cases.append(
                    Case(
                        f"{cls.__name__}({name}={value!r})",
                        lambda c=cls, k=name, v=value: c(**{k: v}),
                        (name,),
                        is_right,
                    )
                )
    for _ in range(60):  # several at once, in a file's form
        fields = {name: dice.choice(JUNK) for name in dice.sample(list(VggtConfig.__annotations__)[1:], 3)}
        cases.append(
            Case(
                f"backbone {fields}",
                lambda f=fields: Spa3RConfig(backbone_config=dict(f)),
                tuple(fields),
                lambda c: c.backbone_config.num_hidden_layers < 1000,
            )
        )
    check(cases, 250)


def test_image_processors(dice, tmp_path):
    fine, cases = Spa3RImageProcessor().to_dict(), []
    for index in range(60):
        name = dice.choice(("size", "patch_size", "mode", "image_mean", "image_std"))
        value = dice.choice(
            [value for value in JUNK if not isinstance(value, bytes)] + [[0, 0, 0], [1, 1, math.nan], [1, 1]]
        )
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "preprocessor_config.json").write_text(json.dumps(fine | {name: value}))
        is_right = (lambda p, n=name: len(getattr(p, n)) == 3) if name == "image_mean" else None
        cases.append(
            Case(f"{name}={value!r}", lambda f=folder: Spa3RImageProcessor.from_pretrained(f), (name,), is_right)
        )
    check(cases, 60)


# Calls ----------------------------------------------------------------------------------------------------------------


def wrong_tensors(value: torch.Tensor, dice: random.Random) -> list:
    """Things that stand where a tensor of this kind belongs."""
    flat = value.flatten()
    return [
        *(None, "tensor", 2.5, {}, [], [None], value.tolist() if value.is_floating_point() else [1.5], object()),
        *(value[:0], value[:-1], value[None], value.bool(), value.to("meta"), torch.cat([value, value])),
        *((value.int(), value * math.nan) if value.is_floating_point() else (value.float(), value.long() * -1)),
        flat[: dice.randrange(len(flat))],
    ]


@torch.no_grad()
def test_model_calls(dice):
    inputs = view_inputs([[(2, 3), (2, 2)], [(1, 2)]])
    pose = torch.randn(3, 9)
    pose[:, 7:] = 0.8
    cameras = dict(zip(("extrinsics", "intrinsics"), pose_encoding_to_cameras(pose, [(8, 12), (8, 8), (4, 8)])))
    vggt, spa3r = alive(VggtModel(vggt_config())), alive(Spa3RModel(spa3r_config()))
    pretraining = alive(Spa3RForPreTraining(pretraining_config()))
    layout = {key: inputs[key] for key in ("view_grid_hw", "views_per_scene")}
    ways = {
        "vggt": (vggt, inputs, ()),
        "encode": (spa3r.encode, inputs, ()),
        "features": (spa3r.backbone_features, inputs, ()),
        "spa3r": (spa3r, inputs | cameras, ("extrinsics", "intrinsics")),
        "decode": (spa3r.decode, {"latents": spa3r.encode(**inputs)} | cameras | layout, ()),
        "pretraining": (
            pretraining,
            inputs | cameras | {"target_mask": torch.tensor([False, True, False])},
            ("extrinsics", "intrinsics", "target_mask"),
        ),
    }
    cases = []
    for way, (call, right, optional) in ways.items():
        for name, value in right.items():
            for index, wrong in enumerate(wrong_tensors(value, dice)):
                if (
                    name in ("view_pixel_values", "latents")
                    and isinstance(wrong, torch.Tensor)
                    and wrong.is_floating_point()
                    and wrong.shape == value.shape
                    and not wrong.is_meta
                ):
                    continue  # values of features are not looked at
                if name in ("extrinsics", "intrinsics") and isinstance(wrong, list) and wrong == value.tolist():
                    continue  # nested lists are cameras
                if (name == "intrinsics" and wrong is not None and index == 14) or (
                    name == "target_mask" and index == 11
                ):
                    continue  # whole pixels are intrinsics too, and a mask of truth values is itself
                is_right = (lambda out: True) if name == "target_mask" and wrong is None else None
                words = (
                    (name, *optional)
                    if wrong is None
                    else (name, "views", "`target_mask`")
                    if "view" in name
                    else (name,)
                )
                cases.append(
                    Case(
                        f"{way}({name}: {index})",
                        lambda c=call, r=right, n=name, w=wrong: c(**{**r, n: w}),
                        words,
                        is_right,
                    )
                )
        cases.append(Case(f"{way}(unknown)", lambda c=call, r=right: c(**r, view_grid=3), ("view_grid",)))
    check(cases, 150)


@torch.no_grad()
def test_calls_of_the_whole(composed, dice):
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": PIL.Image.new("RGB", (56, 56), (9, 99, 200))},
                    {"type": "text", "text": "Where?"},
                ],
            }
        ]
    ]
    right = dict(composed.processor.apply_chat_template(messages, tokenize=True, return_dict=True))
    cases = []
    for name in ("views_per_scene", "view_grid_hw", "view_pixel_values", "image_tokens_per_scene", "input_ids"):
        for index, wrong in enumerate(wrong_tensors(right[name], dice)):
            if (name == "image_tokens_per_scene" and wrong is None) or (
                name == "input_ids" and index in (13, 14, 15, 16)
            ):
                continue  # counted; other words are words
            if (
                name == "view_pixel_values"
                and isinstance(wrong, torch.Tensor)
                and wrong.is_floating_point()
                and wrong.shape == right[name].shape
                and not wrong.is_meta
            ):
                continue
            words = (name, "view", "image placeholders", "image tokens", "`input_ids`")
            cases.append(
                Case(f"forward({name}: {index})", lambda n=name, w=wrong: composed.model(**{**right, n: w}), words)
            )
    check(cases, 50)


# Messages -------------------------------------------------------------------------------------------------------------


def test_messages(composed, dice, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    cases = []
    contents = [*JUNK, [None], [3], ["text"], [[]], [{}], [{"type": None}], [{"type": "audio", "audio": "a.wav"}]]
    contents += [[{"type": "text", "text": value}] for value in (None, 3, b"x", ["a"], {})]
    contents += [
        [{"type": kind, kind: value}]
        for kind in ("image", "video")
        for value in (3, 1.5, {}, b"", b"x", "", "nowhere.bin", True)
    ]
    contents += [
        [{"type": "image", key: value}]
        for key in ("url", "path", "base64")
        for value in (3, {}, "", "%%%", str(tmp_path))
    ]
    contents += [[{"type": "image_url", "image_url": value}] for value in (None, 3, {}, {"url": None}, "", [1])]
    for content in contents:
        for message in ({"role": "user", "content": content},):
            cases.append(
                Case(
                    f"content {str(content)[:60]}",
                    lambda m=message: composed.processor.apply_chat_template([m], tokenize=True, return_dict=True),
                    ("essage", "content", "item", "picture", "video", "image"),
                    (lambda out, c=content: isinstance(c, str)),
                )
            )
    for conversation in (
        *JUNK,
        [None],
        [[None]],
        [{}],
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": 3, "content": "a"}],
    ):
        cases.append(
            Case(
                f"conversation {conversation!r}",
                lambda c=conversation: composed.processor.apply_chat_template(c, tokenize=True, return_dict=True),
                ("essage", "onversation"),
            )
        )
    check(cases, 80)


# Files ----------------------------------------------------------------------------------------------------------------


def damaged(content: bytes, dice: random.Random) -> bytes:
    """A file cut, with other bytes, or with something in front."""
    place = dice.randrange(len(content))
    how = dice.randrange(4)
    if how == 0:
        return content[:place]
    if how == 1:
        return content[:place] + bytes(dice.randrange(256) for _ in range(16)) + content[place + 16 :]
    if how == 2:
        return bytes(dice.randrange(256) for _ in range(64)) + content
    return content[:place] + content[place + 1 :]


def test_pictures(dice, tmp_path):
    noise = np.random.default_rng(SEED).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    processor, cases = Spa3RImageProcessor(size=56), []
    for index in range(60):
        ending = dice.choice(("png", "jpg", "webp", "gif", "tiff", "bmp"))
        file = tmp_path / f"{index}.{ending}"
        PIL.Image.fromarray(noise).save(file)
        file.write_bytes(damaged(file.read_bytes(), dice))

        # Decoders repair what they can: then it is a picture, of any content.
        def is_right(batch) -> bool:
            return len(batch["view_pixel_values"]) > 0 and bool(batch["view_pixel_values"].isfinite().all())

        cases.append(Case(file.name, lambda f=file: processor(f), (file.name,), is_right))
    check(cases, 60)


def test_scenes(composed, dice, tmp_path):
    scene = composed.model.encode_scene(
        composed.processor, [PIL.Image.new("RGB", (56, 56), color) for color in ("red", "blue")]
    )
    whole = tmp_path / "whole.safetensors"
    scene.save(whole)
    tensors = load_file(whole)
    with safe_open(whole, framework="pt") as content:
        metadata = content.metadata()
    about = json.loads(metadata["scene"])
    files: dict[str, Path] = {}

    def write(name: str, tensors=tensors, about=about, **more) -> None:
        files[name] = tmp_path / f"{len(files)}.safetensors"
        save_file(tensors, files[name], metadata | {"scene": json.dumps(about)} | more)

    for name, tensor in tensors.items():
        write(f"without {name}", {k: t for k, t in tensors.items() if k != name})
        write(f"short {name}", tensors | {name: tensor[..., :-1].contiguous()})
        write(f"other values of {name}", tensors | {name: (tensor + 1).contiguous()})
        write(f"another type of {name}", tensors | {name: tensor.double()})
        if tensor.ndim > 2:
            write(f"fewer tokens of {name}", tensors | {name: tensor[:, :, :1].contiguous()})
    for name in (
        "cache.0.update",
        "cache.0.__class__",
        "cache.0.dtype",
        "cache.9.keys",
        "views.99",
        "stranger",
        "cache.0.keys.x",
    ):
        write(f"injected {name}", tensors | {name: torch.zeros(1, 1, 1, 1)})
    for key in about:
        write(f"about without {key}", about={k: v for k, v in about.items() if k != key})
        for value in dice.sample([v for v in JUNK if not isinstance(v, bytes)], 4):
            if value != about[key]:
                write(f"about {key}={value!r}", about=about | {key: value})
    for injected in ({"update": 1}, {"dtype": 1}, {"keys": 0}, {"is_initialized": "yes"}, {"__class__": 1}, {"x.y": 2}):
        layers = copy.deepcopy(about["layers"])
        layers[0][1] |= injected
        write(f"layer {injected}", about=about | {"layers": layers})
    write("injected entry", about=about | {"num_bytes": 3})
    write("another version", format="spa3r scene 0")
    write("no JSON", scene="{")
    for index in range(20):
        files[f"damaged {index}"] = tmp_path / f"damaged_{index}.safetensors"
        files[f"damaged {index}"].write_bytes(damaged(whole.read_bytes(), dice))

    def same(loaded) -> bool:
        return torch.equal(loaded.image_tokens, scene.image_tokens) and torch.equal(loaded.input_ids, scene.input_ids)

    load = EncodedScene.load
    assert same(load(whole, composed.model, composed.processor))
    check([Case(n, lambda f=f: load(f, composed.model, composed.processor), (f.name,)) for n, f in files.items()], 80)


def test_checkpoints(dice, tmp_path):
    model = alive(Spa3RModel(spa3r_config()))
    model.save_pretrained(tmp_path / "whole")
    config = (tmp_path / "whole" / "config.json").read_bytes()
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    cases = []
    names = [
        "num_latents",
        "hidden_size",
        "backbone_config",
        "targets",
        "model_type",
        "dtype",
        "rope_theta",
        "mlp_ratio",
    ]
    for index in range(50):
        folder = tmp_path / str(index)
        folder.mkdir()
        field, value = dice.choice(names), dice.choice([v for v in JUNK if not isinstance(v, bytes)])
        how = dice.randrange(3)
        changed = json.dumps(json.loads(config) | {field: value}).encode()
        (folder / "config.json").write_bytes((config, damaged(config, dice), changed)[how])
        # The weights' values are anyone's; the header is checked.
        (folder / "model.safetensors").write_bytes(weights[: dice.randrange(len(weights))] if how == 0 else weights)

        def is_right(loaded) -> bool:
            return all(torch.equal(loaded.state_dict()[k], t) for k, t in model.state_dict().items())

        words = (field, str(folder), "config", "Spa3RConfig", "Spa3RModel")
        cases.append(
            Case(
                f"{index}: {('weights', 'config', f'{field}={value!r}')[how]}",
                lambda f=folder: Spa3RModel.from_pretrained(f),
                words,
                is_right,
            )
        )
    check(cases, 50)


def test_processors_of_a_folder(composed, dice, tmp_path):
    composed.processor.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "processor_config.json"
    content, cases = file.read_bytes(), []
    for index in range(25):
        field = dice.choice(
            (
                "images",
                "num_frames",
                "image_token_id",
                "spatial_tokens",
                "spatial_token",
                "view_image_processor",
                "processor_class",
            )
        )
        value = dice.choice([v for v in JUNK if not isinstance(v, bytes)])
        changed = (
            damaged(content, dice) if index % 3 == 0 else json.dumps(json.loads(content) | {field: value}).encode()
        )

        def load(changed=changed):
            file.write_bytes(changed)
            return Spa3VLMProcessor.from_pretrained(tmp_path / "whole")

        cases.append(
            Case(
                f"{index}: {field}={value!r}",
                load,
                (field, "processor_config.json", "size", "image"),
                lambda p: p.image_mode in ("aligned", "native") and not isinstance(p.num_frames, bool),
            )
        )
    check(cases, 25)
