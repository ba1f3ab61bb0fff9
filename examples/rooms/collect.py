"""Pack what `gpu.sh` trained into a few files of half precision, and unpack them into folders of models.

`collect.py pack RUN OUT` writes `frozen.safetensors` (VGGT and teacher), one file for each large Spa3R, the files
`arms-*.safetensors` and `logs.json`. Every file is smaller than 16 MiB. `collect.py unpack OUT RUN` restores the
folders; every Spa3R in them contains its frozen parts, from `frozen.safetensors` or, if it is missing, from RUN.
`collect.py frozen MODEL RUN` writes the VGGT and the teacher of a trained Spa3R into a run's folder.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from spa3r import Spa3RConfig, Spa3RForPreTraining, VggtConfig, VggtModel

LIMIT = 16 * 2**20
FROZEN = {"vggt": (VggtConfig, VggtModel), "teacher": (DINOv3ViTConfig, DINOv3ViTModel)}


def pack(run: Path, output: Path) -> None:
    """Write the trained models of `run` as files of at most 16 MiB."""
    output.mkdir(parents=True, exist_ok=True)
    models: dict[str, list[tuple[str, dict, dict]]] = {"frozen": []}
    for name, (_, model_class) in FROZEN.items():
        if (run / name / "config.json").exists():
            model = model_class.from_pretrained(run / name)
            models["frozen"].append((name, json.loads((run / name / "config.json").read_text()), model.state_dict()))
    arms, size, count = "arms-0", 0, 0
    for folder in sorted(run.glob("spa3r-*")):
        if not (folder / "model.safetensors").exists():
            print(f"{folder.name} is not finished and is left out")
            continue
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
        group = folder.name if "-large-" in folder.name else arms
        if group == arms:
            size += 2 * sum(tensor.numel() for tensor in state.values()) + 20_000
            if size > LIMIT - 200_000:
                count, size = count + 1, 2 * sum(tensor.numel() for tensor in state.values())
                group = arms = f"arms-{count}"
        models.setdefault(group, []).append((folder.name, json.loads((folder / "config.json").read_text()), state))
    for group, members in models.items():
        if not members:
            continue
        tensors = {f"{name}/{key}": t.half().contiguous() for name, _, state in members for key, t in state.items()}
        configs = {name: config for name, config, _ in members}
        file = output / f"{group}.safetensors"
        save_file(tensors, file, metadata={"configs": json.dumps(configs)})
        print(f"{file.name}: {', '.join(configs)}; {file.stat().st_size / 2**20:.1f} MiB", flush=True)
        if file.stat().st_size > LIMIT:
            raise ValueError(f"{file} is larger than {LIMIT} bytes.")
    logs = {str(path.relative_to(run)): path.read_text() for path in sorted(run.rglob("*.jsonl"))}
    (output / "logs.json").write_text(json.dumps(logs))


def unpack(packed: Path, run: Path) -> None:
    """Restore the folders of models."""
    logs = packed / "logs.json"
    for path, text in json.loads(logs.read_text()).items() if logs.exists() else ():
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_text(text)
    parts = {}
    if not (packed / "frozen.safetensors").exists():
        parts = {name: model_class.from_pretrained(run / name) for name, (_, model_class) in FROZEN.items()}
    for file in sorted(packed.glob("*.safetensors"), key=lambda file: file.stem != "frozen"):
        with safe_open(file, framework="pt") as content:
            configs = json.loads(content.metadata()["configs"])
            states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in configs}
            for key in content.keys():
                name, _, rest = key.partition("/")
                states[name][rest] = content.get_tensor(key).float()
        for name, config in configs.items():
            if name in FROZEN:
                config_class, model_class = FROZEN[name]
                model = parts[name] = model_class(config_class(**config))
                model.load_state_dict(states[name])
            else:
                config |= {"backbone_name_or_path": None, "semantic_teacher_name_or_path": None}
                model = Spa3RForPreTraining(Spa3RConfig(**config))
                state = {f"spa3r.backbone.{key}": tensor for key, tensor in parts["vggt"].state_dict().items()}
                if model.semantic_teacher is not None:
                    teacher = parts["teacher"].state_dict().items()
                    state |= {f"semantic_teacher.{key}": tensor for key, tensor in teacher}
                model.load_state_dict(states[name] | state)
            model.save_pretrained(run / name)
            print(f"{run / name}", flush=True)


def frozen(model: Path, run: Path) -> None:
    """Write the VGGT and the teacher of a Spa3RForPreTraining as `train_vggt.py` and `train_teacher.py` do."""
    trained = Spa3RForPreTraining.from_pretrained(str(model))
    trained.spa3r.backbone.save_pretrained(run / "vggt")
    trained.semantic_teacher.save_pretrained(run / "teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("pack", "unpack", "frozen"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    {"pack": pack, "unpack": unpack, "frozen": frozen}[args.what](args.source, args.target)


if __name__ == "__main__":
    main()
