"""Data: folders of files, batches of mixed sizes that fill a token budget, video and image files."""

from .folder import FolderSource
from .media import MediaError
from .metadata import read_comment
from .sample import Batch, Repeated, Sample, Source
from .sampler import PackedSampler
from .video_io import probe, read_video
from .writing import contact_sheet, write_video

__all__ = [
    "Batch",
    "FolderSource",
    "MediaError",
    "PackedSampler",
    "Repeated",
    "Sample",
    "Source",
    "contact_sheet",
    "probe",
    "read_comment",
    "read_video",
    "write_video",
]
