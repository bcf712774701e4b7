"""Sites of convolutional towers: maps, [batch, channel, height, width]."""

from mm_adapters.records import Input, Output

NO_ATTENTION = {"blocks.*.attn.*": "it is convolutional: nothing attends"}


def maps(**paths: str) -> dict[str, Output | Input]:
    """A part that is what a module returns, for each name; "hook_in" is what its module is given."""
    return {name: Input(path, is_map=True) if name == "hook_in" else Output(path, is_map=True)
            for name, path in paths.items()}  # fmt: skip
