"""A latent model's companions: the diffusers folder, without its denoiser, that a run keeps beside it."""

from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_folder import MODEL_INDEX, copy_folder, weights_files
from guided_distill.storage import whole

COMPANIONS = "companions"
"""The folder's name in a workdir."""


def bring_companions(source: epath.Path, workdir: epath.Path) -> None:
    """Copy the companions of the run `source`, if it has any, to the run `workdir` if it has none."""
    if (source / COMPANIONS / MODEL_INDEX).exists() and not (workdir / COMPANIONS).exists():
        with whole(workdir / COMPANIONS) as part:
            copy_folder(source / COMPANIONS, part)


def check_companions(source: epath.Path, folder: epath.Path) -> None:
    """Raises UserError if `folder` has companions that aren't those of the run `source`."""
    theirs, ours = folder / COMPANIONS, source / COMPANIONS
    if theirs.exists() and not _same_autoencoder(theirs, ours):
        raise UserError(f"{theirs} belongs to another model: choose another folder for --out")


def _same_autoencoder(*companions: epath.Path) -> bool:
    one, other = (weights_files(folder / "vae") for folder in companions)
    return one.keys() == other.keys() and all(
        one[name].read_bytes() == other[name].read_bytes() for name in one
    )
