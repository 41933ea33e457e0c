"""What a user did that cannot work, said in one sentence."""


class InputError(ValueError):
    """Bad input: what was received, where, and how to mend it.

    Raised at the public edge, before tracing and before anything expensive. The command line prints
    it without a traceback and exits with code 2; every other exception is a defect of sdjax.
    """
