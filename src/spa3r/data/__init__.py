"""Training data: scenes for pretraining, instructions for fine-tuning, and how they are batched.

source = FolderScenes("photos")                  # a folder per scene
batches = SceneBatches(source, Spa3RImageProcessor(mode="pretraining"))
loader = DataLoader(batches, batch_size=None, num_workers=4)

instructions = InstructionDataset("vsi_590k.jsonl")
loader = DataLoader(instructions, batch_size=8, collate_fn=Spa3VLMCollator(processor))
"""

from spa3r.data.batches import SceneBatches, relative_to_first
from spa3r.data.collator import Spa3VLMCollator
from spa3r.data.dataset_scenes import DatasetScenes, StreamedScenes
from spa3r.data.folders import FolderScenes
from spa3r.data.instructions import InstructionDataset, InstructionMixture, StreamedInstructions
from spa3r.data.sampling import sample_frame_indices
from spa3r.data.scannet import ScanNetPPScenes, ScanNetScenes
from spa3r.data.skipped import SkippedReport
from spa3r.data.source import LoadedScene, SceneError, SceneSource
from spa3r.data.videos import VideoScenes

__all__ = [
    "DatasetScenes",
    "FolderScenes",
    "InstructionDataset",
    "InstructionMixture",
    "LoadedScene",
    "ScanNetPPScenes",
    "ScanNetScenes",
    "SceneBatches",
    "SceneError",
    "SceneSource",
    "SkippedReport",
    "Spa3VLMCollator",
    "StreamedInstructions",
    "StreamedScenes",
    "VideoScenes",
    "relative_to_first",
    "sample_frame_indices",
]
