"""Rooms written to disk in every layout that can be read: the same pictures and cameras everywhere."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from media import write_video
from PIL import Image

from spa3r.rooms import RoomViews, camera_walk, generate_room, render

OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


@cache
def look_around(
    seed: int, frames: int = 4, size: tuple[int, int] = (56, 84), level: int = 1, zoom: bool = False
) -> RoomViews:
    """Frames of a walk through a room, each of (height, width); all with one lens unless `zoom`."""
    room = generate_room(seed, level)
    walk = camera_walk(room, 3 * frames, size)[::3]
    intrinsics = walk.intrinsics if zoom else np.repeat(walk.intrinsics[:1], frames, axis=0)
    return render(room, replace(walk, intrinsics=intrinsics))


def write_folders(root: Path, scenes: Sequence[RoomViews], ending: str = ".png", cameras: bool = True) -> Path:
    """A folder for every scene: scene_0/0.png ..., and cameras.json."""
    for number, views in enumerate(scenes):
        folder = root / f"scene_{number}"
        folder.mkdir(parents=True)
        known = {}
        for frame, image in enumerate(views.images):
            Image.fromarray(image).save(folder / f"{frame}{ending}", quality=95)
            known[f"{frame}{ending}"] = {
                "extrinsics": views.extrinsics[frame].tolist(),
                "intrinsics": views.intrinsics[frame].tolist(),
            }
        if cameras:
            (folder / "cameras.json").write_text(json.dumps(known))
    return root


def write_scannet(root: Path, scenes: Sequence[RoomViews], cameras: bool = True) -> Path:
    """<root>/scene0000_00/{color/0.jpg, pose/0.txt, intrinsic/intrinsic_color.txt}, as exported."""
    for number, views in enumerate(scenes):
        folder = root / f"scene{number:04d}_00"
        (folder / "color").mkdir(parents=True)
        for frame, image in enumerate(views.images):
            Image.fromarray(image).save(folder / "color" / f"{frame}.jpg", quality=95)
        if cameras:
            (folder / "pose").mkdir()
            (folder / "intrinsic").mkdir()
            matrix = np.eye(4)
            matrix[:3, :3] = views.intrinsics[0]
            np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", matrix, fmt="%f")
            for frame, extrinsics in enumerate(views.extrinsics.astype(np.float64)):
                np.savetxt(folder / "pose" / f"{frame}.txt", np.linalg.inv(extrinsics), fmt="%.8f")
    return root


def write_scannetpp(
    root: Path, scenes: Sequence[RoomViews], pictures: str = "undistorted_images", cameras: bool = True
) -> Path:
    """<root>/{splits/nvs_sem_train.txt, data/<id>/dslr/{undistorted_images, nerfstudio/...}}."""
    ids = [f"{number:010x}" for number in range(len(scenes))]
    (root / "splits").mkdir(parents=True)
    (root / "splits" / "nvs_sem_train.txt").write_text("\n".join(ids) + "\n")
    (root / "splits" / "nvs_sem_val.txt").write_text("f00dfeed00\n")
    for scene, views in zip(ids, scenes, strict=True):
        folder = root / "data" / scene / "dslr"
        (folder / pictures).mkdir(parents=True)
        frames = []
        for frame, image in enumerate(views.images):
            name = f"DSC{frame + 1:05d}.JPG"
            Image.fromarray(image).save(folder / pictures / name, "JPEG", quality=95)
            world_from_camera = np.linalg.inv(views.extrinsics[frame].astype(np.float64)) @ OPENCV_FROM_OPENGL
            frames.append({"file_path": name, "transform_matrix": world_from_camera.tolist(), "is_bad": False})
        if cameras:
            (fx, _, cx), (_, fy, cy), _ = views.intrinsics[0].tolist()
            height, width = views.images.shape[1:3]
            content = {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": width, "h": height, "camera_model": "PINHOLE"}
            content |= {"frames": frames[:-1], "test_frames": frames[-1:]}
            (folder / "nerfstudio").mkdir()
            (folder / "nerfstudio" / "transforms_undistorted.json").write_text(json.dumps(content))
    return root


def write_videos(root: Path, scenes: Sequence[RoomViews]) -> Path:
    """A video for every scene: scene_0.mp4 ..."""
    root.mkdir(parents=True)
    for number, views in enumerate(scenes):
        write_video(root / f"scene_{number}.mp4", [Image.fromarray(image) for image in views.images])
    return root


def write_gray(folder: Path, count: int, size: tuple[int, int] = (28, 28), first: int = 0) -> Path:
    """Pictures of (width, height), each of one gray level: first, first + 1, ..., as 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (first + number,) * 3).save(folder / f"{number}.png")
    return folder
