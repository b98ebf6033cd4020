"""The socket types of this pack, and what travels through the first."""

from dataclasses import dataclass

from comfy_api.latest import io

from ..pulid.networks import PhotoNetworks, PulidWeights

PulidSocket = io.Custom("PULID_SDXL")  # a LoadedPulid
IdentitySocket = io.Custom("PULID_IDENTITY")  # an IdEmbedding
PlaceSocket = io.Custom("PULID_PLACE")  # a list of closeup.Place, one for each picture


@dataclass(frozen=True, eq=False)
class LoadedPulid:
    """What Load PuLID gives: what a PuLID file holds, and what sees a photograph."""

    weights: PulidWeights
    networks: PhotoNetworks
