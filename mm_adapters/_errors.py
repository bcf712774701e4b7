"""The errors this package raises for a user's mistakes, each saying when."""


class MissingSiteError(KeyError):
    """A site, tower or part was asked for that this model does not have."""

    def __str__(self) -> str:
        """The plain message; KeyError alone would show its repr, quotes and all."""
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class UnknownFamilyError(LookupError):
    """No registered family record covers the class of this model."""


class EditNeverFiredError(RuntimeError):
    """A run ended and an edit, or a part of one, had never been applied, so its result would mislead."""


class ReadNeverFiredError(RuntimeError):
    """A run ended and a site that was asked for, or a hook of it, never had a value."""


class AttentionUnreachableError(RuntimeError):
    """The scores or pattern of an attention were asked for, and its kernel cannot be intercepted."""


class InputError(ValueError):
    """An image, a text or a prepared tensor cannot be given to the model as it is."""


class WordNotFoundError(InputError):
    """A word or phrase was looked up in a text that does not have it."""


class HostAssertionError(InputError, AssertionError):
    """What TransformerLens' models refuse by an assertion, so that code that catches theirs goes on."""


class StateDictError(InputError, RuntimeError):
    """A state that is not the tower's was to be loaded strictly; torch raises RuntimeError."""


class CheckpointError(OSError):
    """A checkpoint is missing, truncated, pickled, or not one that this package reads."""


class UnfitCheckpointError(CheckpointError, ValueError):
    """A library takes a checkpoint, but not for what is asked of it; the library raises ValueError."""


class NoSuchClassError(InputError, AttributeError):
    """A class of a library was named that it does not have; to look it up raises AttributeError."""


class StoreError(OSError):
    """A store of activations cannot be written, resumed or read as asked."""


class MetaDeviceError(RuntimeError):
    """A model whose weights are on the meta device, so have no values, was asked to run."""


class ModelStateError(RuntimeError):
    """The model was changed into a state in which a site or weight asked for would not hold what it says."""


class HostMemberError(AttributeError):
    """A member of TransformerLens' models was asked of a tower, which does not have it, for a reason."""


class ModelBusyError(RuntimeError):
    """A run was asked of a model in the middle of another run, which it would mix with."""
