"""Checks that a network's sizes fit each other; each message begins with the name of an option."""

from collections.abc import Iterator, Mapping, Sequence


def sides(shape: tuple[int, ...]) -> dict[str, int]:
    """The height and width of images [H, W, C], by the names that messages use."""
    return {"the data's height": shape[0], "the data's width": shape[1]}


def undivided(option: str, number: int, wholes: Mapping[str, int]) -> Iterator[str]:
    """Yields a message for each of `wholes`, by name, that the option's number doesn't divide."""
    for name, whole in wholes.items():
        if whole % number:
            yield (
                f"{option} is {number}, which doesn't divide {name}, {whole}: choose a number that does"
            )


def misfit_groups(groups: int, channels: Sequence[int]) -> Iterator[str]:
    """Yields a message for each level whose channels norm_num_groups doesn't divide."""
    named = {f"block_out_channels[{level}]": each for level, each in enumerate(channels)}
    yield from undivided("norm_num_groups", groups, named)


def misfit_levels(option: str, chosen: Sequence[int], channels: Sequence[int]) -> Iterator[str]:
    """Yields a message for each of the option's levels that block_out_channels doesn't have."""
    for level in chosen:
        if level >= len(channels):
            yield f"{option} holds {level}, but the levels are 0 to {len(channels) - 1}: remove it"
