"""Reference trainers, one flat script a method; what they share lies in the modules whose names begin with ``_``."""


class TrainError(Exception):
    """A mistake that the person at the command line can mend; shown as one line, without a traceback."""
