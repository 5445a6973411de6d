"""The families of pipelines that have an adapter, by the class of the pipeline."""

from minicos.peers.cogvideox import CogVideoX
from minicos.peers.hunyuan import HunyuanVideo
from minicos.peers.ltx2 import LTX2
from minicos.peers.peer import Peer

FAMILIES: dict[str, type[Peer]] = {
    "CogVideoXImageToVideoPipeline": CogVideoX,
    "HunyuanVideoImageToVideoPipeline": HunyuanVideo,
    "LTX2ImageToVideoPipeline": LTX2,
}
