"""Pictures, depth and instance ids of a room by ray casting.

Embree finds the triangle that a ray hits; everything else is plain numpy on the parameters of the triangle: depth from
its plane (so depth is exact to float32 and does not depend on Embree's arithmetic), the pattern from its surface
coordinates, light from Lambert's law with hard shadows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spa3r.checks import check_count
from spa3r.rooms.finishes import PATTERNS
from spa3r.rooms.room import Room
from spa3r.rooms.walk import Cameras

_EDGE = 0.1  # color difference between neighboring pixels above which a pixel is supersampled
_SKY = np.array([0.12, 0.08, 0.26], np.float32)  # main direction of ambient light: shadowed faces stay distinct
_REACH = 4.0  # meters at which the lamp's light has fallen to half


@dataclass(frozen=True)
class RoomViews:
    """Rendered views of a room.

    Attributes:
        images: (V, H, W, 3) uint8, RGB.
        depth: (V, H, W) float32, meters along the camera's optical axis (z-depth), at pixel centers.
        instance_ids: (V, H, W) int32, at pixel centers; 0 = walls, floor, ceiling and what hangs on them,
            k = the room's `objects[k - 1]`.
        extrinsics: (V, 4, 4) float32, camera-from-world; world = the room's frame.
        intrinsics: (V, 3, 3) float32, pixels; pixel centers at +0.5.
    """

    images: np.ndarray
    depth: np.ndarray
    instance_ids: np.ndarray
    extrinsics: np.ndarray
    intrinsics: np.ndarray


def render(room: Room, cameras: Cameras, antialias: int = 2) -> RoomViews:
    """Render a room from given cameras.

    Args:
        room: the room to render.
        cameras: the cameras; they must be inside the room.
        antialias: pixels at edges are the mean of antialias x antialias rays; 1 = one ray per pixel. Depth and
            instance ids are never averaged.
    """
    check_count("antialias", antialias, cure="1 turns it off, 2 is the default.")
    height, width = cameras.size
    centers, rays_from_pixels, pixels = _rays(room, cameras)
    scene = _Scene(room)
    images = np.empty((len(centers), height, width, 3), np.uint8)
    depth = np.empty((len(centers), height, width), np.float32)
    instance_ids = np.empty((len(centers), height, width), np.int32)
    for i, (center, to_ray) in enumerate(zip(centers, rays_from_pixels, strict=True)):
        # A ray advances 1 meter of depth per unit of its length: the ray caster returns z-depth.
        rgb, z, ids = scene.look(center, pixels @ to_ray.T)
        depth[i], instance_ids[i] = z.reshape(height, width), ids.reshape(height, width)
        if antialias > 1:
            edges = np.flatnonzero(_edges(rgb.reshape(3, height, width)))
            grid = (np.arange(antialias) + 0.5) / antialias - 0.5
            shifts = np.stack([*np.meshgrid(grid, grid), np.zeros((antialias, antialias))], axis=-1).reshape(-1, 1, 3)
            samples = (pixels[edges] + shifts).reshape(-1, 3)  # (antialias^2 * edges, 3)
            rgb[:, edges] = scene.look(center, samples @ to_ray.T)[0].reshape(3, antialias**2, -1).mean(axis=1)
        images[i] = np.rint(255 * rgb).T.reshape(height, width, 3)
    return RoomViews(images, depth, instance_ids, cameras.extrinsics, cameras.intrinsics)


def render_instance_ids(room: Room, cameras: Cameras) -> np.ndarray:
    """Render only the `instance_ids` that `render` returns, without light and patterns.

    Args:
        room: the room to render.
        cameras: the cameras; they must be inside the room.

    Returns:
        (V, H, W) int32; 0 = background, k = the room's `objects[k - 1]`.
    """
    scene = _Scene(room)
    centers, rays_from_pixels, pixels = _rays(room, cameras)
    ids = [scene.ids.take(scene.hit(center, pixels @ to_ray.T)) for center, to_ray in zip(centers, rays_from_pixels)]
    return np.stack(ids).reshape(-1, *cameras.size)


def _rays(room: Room, cameras: Cameras) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centers (V, 3) of cameras, their room-from-pixel matrices (V, 3, 3), and homogeneous pixel centers (H * W, 3)."""
    extrinsics = np.asarray(cameras.extrinsics, np.float64)
    world_from_camera = extrinsics[:, :3, :3].transpose(0, 2, 1)
    centers = -np.einsum("vij,vj->vi", world_from_camera, extrinsics[:, :3, 3])
    half = np.array(room.size) / 2
    outside = np.flatnonzero((np.abs(centers - [0, 0, half[2]]) >= half).any(axis=1))
    if len(outside):
        raise ValueError(
            f"extrinsics: wanted cameras inside the room of {room.size} meters, got view {outside[0]} at "
            f"{centers[outside[0]].round(3).tolist()}; the world is the room's frame, origin mid-floor."
        )
    height, width = cameras.size
    rays_from_pixels = world_from_camera @ np.linalg.inv(np.asarray(cameras.intrinsics, np.float64))
    v, u = np.mgrid[:height, :width] + 0.5
    pixels = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)
    return centers, rays_from_pixels, pixels


def _edges(rgb: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool of rgb (3, H, W) whose color differs from a neighbor's: outlines, shadows and patterns."""
    edges = np.zeros(rgb.shape[1:], bool)
    across = np.abs(np.diff(rgb, axis=2)).max(axis=0) > _EDGE
    down = np.abs(np.diff(rgb, axis=1)).max(axis=0) > _EDGE
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges


class _Scene:
    """A room as triangles, with the data that a ray needs of the triangle it hits."""

    def __init__(self, room: Room) -> None:
        try:
            from embreex.mesh_construction import TriangleMesh  # ty: ignore[import-not-found]  # compiled, no stubs
            from embreex.rtcore_scene import EmbreeScene  # ty: ignore[import-not-found]
        except ImportError as error:
            raise ImportError(
                "embreex: wanted for rendering rooms, got no such package; install it with `pip install embreex`."
            ) from error

        placed = [(part, np.eye(3), np.zeros(3), 0) for part in room.background()]
        for k, item in enumerate(room.objects, start=1):
            origin = np.array([item.center[0], item.center[1], item.center[2] - item.size[2] / 2])
            placed += [(part, item.rotation, origin, k) for part in item.parts()]
        counts = [len(part.triangles) for part, *_ in placed]
        names = list(PATTERNS)
        looks = [part.finish for part, *_ in placed]
        self.ids = np.repeat([k for *_, k in placed], counts).astype(np.int32)
        self.rgb = np.repeat([look.rgb for look in looks], counts, axis=0).T.astype(np.float32, order="C")
        self.pattern = np.repeat([names.index(look.pattern) if look.contrast else -1 for look in looks], counts)
        self.contrast = np.repeat([look.contrast for look in looks], counts).astype(np.float32)

        local = np.concatenate([part.triangles for part, *_ in placed])  # (T, 3, 3)
        rotation = np.repeat([r for _, r, *_ in placed], counts, axis=0)
        origin = np.repeat([o for *_, o, _ in placed], counts, axis=0)
        triangles = np.einsum("tij,tcj->tci", rotation, local) + origin[:, None]
        normal = np.cross(local[:, 1] - local[:, 0], local[:, 2] - local[:, 0])
        # Surface coordinates are along the two axes of the object to which a face is most parallel, in periods.
        tangents = np.array([[1, 2], [0, 2], [0, 1]])[np.abs(normal).argmax(axis=1)]
        period = np.repeat([look.period for look in looks], counts)[:, None, None]
        axes = np.take_along_axis(rotation, tangents[:, None], axis=2).transpose(0, 2, 1) / period  # (T, 2, 3)
        uv = np.concatenate([axes, -np.einsum("tij,tj->ti", axes, origin)[..., None]], axis=2)  # (T, 2, 4)
        self.uv = uv.transpose(1, 2, 0).astype(np.float32, order="C")
        self.normal = np.einsum("tij,tj->ti", rotation, normal / np.linalg.norm(normal, axis=1, keepdims=True))
        self.plane = np.einsum("ti,ti->t", self.normal, triangles[:, 0])  # normal . any point on the plane
        self.light = room.light
        # Robust: rays that hit an edge between two triangles never pass through.
        self.embree = EmbreeScene(robust=True)
        TriangleMesh(self.embree, triangles.astype(np.float32))

    def hit(self, center: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Indices (N,) of the first triangles that rays (N, 3) hit."""
        return self.embree.run(np.tile(center.astype(np.float32), (len(rays), 1)), rays.astype(np.float32))

    def look(self, center: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Color (3, N) float32 in 0..1, distance (N,) in units of each ray and instance id (N,) along rays (N, 3)."""
        hit = self.hit(center, rays)
        normal = self.normal.take(hit, axis=0)
        facing = np.einsum("ni,ni->n", normal, rays)
        distance = (self.plane - self.normal @ center).take(hit) / facing
        # Float32 and channels first from here on: colors need no more precision, and numpy is several times faster.
        points = (center[:, None] + distance * rays.T).astype(np.float32)
        # Toward the camera, whichever side of the triangle is visible.
        normal = (normal.T * -np.sign(facing)).astype(np.float32)
        rgb = self.rgb.take(hit, axis=1)
        rgb *= self._darkness(hit, points)
        rgb *= self._light(points, normal)
        return np.minimum(rgb, 1, out=rgb), distance, self.ids.take(hit)

    def _darkness(self, hit: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Factor (N,) in 0..1 by which the patterns darken the colors of points (3, N)."""
        factor = np.ones(len(hit), np.float32)
        pattern = self.pattern.take(hit)
        for index, darkness in enumerate(PATTERNS.values()):
            chosen = np.flatnonzero(pattern == index)
            if len(chosen):
                triangles = hit.take(chosen)
                uv = self.uv.take(triangles, axis=2)
                u, v = np.einsum("ijn,jn->in", uv[:, :3], points.take(chosen, axis=1)) + uv[:, 3]
                factor[chosen] -= self.contrast.take(triangles) * darkness(u, v)
        return factor

    def _light(self, points: np.ndarray, normal: np.ndarray) -> np.ndarray:
        """Light (3, N) that arrives at points (3, N): ambient light, plus the lamp's where nothing blocks it."""
        start = points + np.float32(1e-3) * normal  # off the surface, to avoid self-shadowing
        to_light = np.array(self.light.position, np.float32)[:, None] - start
        squared = np.einsum("in,in->n", to_light, to_light)
        lamp = np.maximum(np.einsum("in,in->n", normal, to_light), 0) / np.sqrt(squared)
        lit = np.flatnonzero(lamp)
        blocked = self.embree.run(
            np.ascontiguousarray(start.T.take(lit, axis=0)),
            np.ascontiguousarray(to_light.T.take(lit, axis=0)),  # ends at the lamp: length 1
            np.ones(len(lit), np.float32),
            query="OCCLUDED",
        )
        lamp[lit[blocked >= 0]] = 0
        lamp *= np.float32(2 * (1 - self.light.ambient)) / (1 + squared / np.float32(_REACH**2))
        ambient = self.light.ambient * (1 + _SKY @ normal)
        return ambient + np.array(self.light.rgb, np.float32)[:, None] * lamp
