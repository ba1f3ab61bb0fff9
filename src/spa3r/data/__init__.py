"""Scenes for pretraining: where they come from, what is drawn of them, and how they become batches.

source = FolderScenes("photos")                  # a folder for every scene
batches = SceneBatches(source, Spa3RImageProcessor(mode="pretraining"))
loader = DataLoader(batches, batch_size=None, num_workers=4)
"""

from spa3r.data.batches import SceneBatches
from spa3r.data.folders import FolderScenes
from spa3r.data.room_scenes import RoomScenes
from spa3r.data.sampling import sample_frames
from spa3r.data.skipped import SkippedReport
from spa3r.data.source import LoadedScene, SceneError, SceneSource

__all__ = [
    "FolderScenes",
    "LoadedScene",
    "RoomScenes",
    "SceneBatches",
    "SceneError",
    "SceneSource",
    "SkippedReport",
    "sample_frames",
]
