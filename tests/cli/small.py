"""Functions that are not what the commands ask for."""

number = 7


def nothing():
    return None


def asking(size):
    raise AssertionError("never called")


def broken():
    raise KeyError("of the user's own")
