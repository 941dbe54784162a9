"""Every kind of source that can be ingested, by the word for it on the command line."""

from collections.abc import Mapping
from types import MappingProxyType

from mmtrain.data.ingest.chat import Chat
from mmtrain.data.ingest.kind import Kind
from mmtrain.data.ingest.mmc4 import Mmc4
from mmtrain.data.ingest.storyboards import Storyboards
from mmtrain.data.ingest.tables import HuggingFace, Parquet
from mmtrain.data.ingest.text import Text
from mmtrain.data.ingest.webdataset import WebDataset
from mmtrain.data.ingest.webvid import WebVid

KINDS: Mapping[str, type[Kind]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (WebDataset, Parquet, Mmc4, WebVid, Storyboards, Chat, Text, HuggingFace)
    }
)
