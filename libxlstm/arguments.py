"""Numbers that Python functions are given, before C++ takes them."""

import numbers


def integer(name, value, low=-(2**63), high=2**63 - 1):
    """value; a ValueError that names it where it is no integer from low to high."""
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {value}")
    return value


def number(name, value):
    """value as a float; a ValueError that names it where it is none."""
    try:
        return float(value if not isinstance(value, str) else None)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None
