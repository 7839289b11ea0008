"""The exceptions of pckernels; every message says what to do next."""


class Unsupported(NotImplementedError):
    """The request is understood, but cannot be carried out here; the message gives the reason and a remedy."""


class InferenceDiverged(RuntimeError):
    """A relaxation grew without bound. `.grad`, parameters and optimiser state are as they were."""
