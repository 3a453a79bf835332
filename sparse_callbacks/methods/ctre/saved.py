"""What a saved run of CTRE may hold."""

from collections.abc import Mapping

from torch import nn

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.state_claims import Kept, expected_aux
from sparse_callbacks.methods.ctre.ctre import CTRE


@expected_aux.register
def _(method: CTRE, saved: SavedRun, model: nn.Module) -> Mapping[str, Kept]:
    return {
        **{f"similarity/{name}": Kept(tuple(mask.shape)) for name, mask in saved.masks.items()},
        "patience/validated": Kept(dtype="bool"),
        # metrics of the user's, which may be infinite or NaN
        "patience/best": Kept(finite=False, required="patience/count" in saved.aux),
        "patience/pending": Kept((2,), finite=False),
        "patience/count": Kept(dtype="int", low=0, required="patience/best" in saved.aux),
    }
