"""Data: a procedural world with ground truth, folders of files, and batches of mixed sizes that fill a token budget."""

from sora_model.data.folder import FolderSource
from sora_model.data.judge import judge
from sora_model.data.media import MediaError
from sora_model.data.sampler import Batch, PackedSampler, Repeated, Sample, Source, WorldSource
from sora_model.data.scene import ObjectTruth, Scene, Truth
from sora_model.data.video_io import probe, read_video
from sora_model.data.world import World, WorldConfig, held_out
from sora_model.data.writing import contact_sheet, write_video

__all__ = [
    "Batch",
    "FolderSource",
    "MediaError",
    "ObjectTruth",
    "PackedSampler",
    "Repeated",
    "Sample",
    "Scene",
    "Source",
    "Truth",
    "World",
    "WorldConfig",
    "WorldSource",
    "contact_sheet",
    "held_out",
    "judge",
    "probe",
    "read_video",
    "write_video",
]
