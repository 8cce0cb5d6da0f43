"""The one error of this package: what the user asked for cannot be done, said in one sentence."""


class DeployError(ValueError):
    """A model, file, target or input that cannot be used; the message says what is wrong and what would be right."""
