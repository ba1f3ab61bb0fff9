"""Scenes for pretraining: where they come from, what is drawn of them, and how they become batches.

source = FolderScenes("photos")                  # a folder for every scene
batches = SceneBatches(source, Spa3RImageProcessor(mode="pretraining"))
loader = DataLoader(batches, batch_size=None, num_workers=4)
"""

from spa3r.data.batches import SceneBatches
from spa3r.data.collator import Spa3VLMCollator
from spa3r.data.dataset_scenes import DatasetScenes, StreamedScenes
from spa3r.data.folders import FolderScenes
from spa3r.data.make import make_source
from spa3r.data.room_export import export_rooms
from spa3r.data.room_questions import RoomQuestions
from spa3r.data.room_scenes import RoomScenes
from spa3r.data.sampling import sample_frames
from spa3r.data.scannet import ScanNetPPScenes, ScanNetScenes
from spa3r.data.skipped import SkippedReport
from spa3r.data.source import LoadedScene, SceneError, SceneSource
from spa3r.data.videos import VideoScenes

__all__ = [
    "DatasetScenes",
    "FolderScenes",
    "LoadedScene",
    "RoomQuestions",
    "RoomScenes",
    "ScanNetPPScenes",
    "ScanNetScenes",
    "SceneBatches",
    "SceneError",
    "SceneSource",
    "SkippedReport",
    "Spa3VLMCollator",
    "StreamedScenes",
    "VideoScenes",
    "export_rooms",
    "make_source",
    "sample_frames",
]
