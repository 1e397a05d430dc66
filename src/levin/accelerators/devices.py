"""The ways in which a user may name GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from levin.utilities.exceptions import MisconfigurationException


def parse_device_indices(devices: object, available: Sequence[int], kind: str = "cuda") -> list[int]:
    """Return the indices of the devices that the user named.

    Args:
        devices: A number of devices (``2``, ``"2"``), all of them (``-1``, ``"-1"``), or indices (``[0, 3]``,
            ``"0,3"``, ``"3,"`` for the single device 3).
        available: Indices of the devices that exist.
        kind: Name of the hardware for messages.

    Raises:
        ValueError: No device is left, one is named twice or does not exist.
        TypeError: ``devices`` is of another form.

    Example:
        >>> parse_device_indices("1,3", available=range(4))
        [1, 3]
        >>> parse_device_indices(2, available=range(4))
        [0, 1]
    """
    requested = _requested(devices, available)
    if not requested:
        raise MisconfigurationException(
            f"devices must name at least one {kind} device, received {devices!r} with {len(available)} available. "
            "Use devices=1 for one device, or accelerator='cpu' to run without."
        )
    if len(set(requested)) != len(requested):
        raise MisconfigurationException(
            f"devices must name each {kind} device once, received {devices!r}. Remove the repeated index."
        )
    missing = [index for index in requested if index not in available]
    if missing:
        raise MisconfigurationException(
            f"devices asks for {kind} devices {requested}, received {devices!r}, but this machine has "
            f"{list(available)}. Choose among these, or use devices=-1 for all of them."
        )
    return requested


def _requested(devices: object, available: Sequence[int]) -> list[int]:
    if isinstance(devices, bool) or devices is None:
        raise _wrong_form(devices)
    if isinstance(devices, str):
        return _requested_by_text(devices, available)
    if isinstance(devices, int):
        return _by_count(devices, devices, available)
    if isinstance(devices, (list, tuple)):
        for index in devices:
            if isinstance(index, bool) or not isinstance(index, int):
                raise _wrong_form(devices)
        return list(devices)
    raise _wrong_form(devices)


def _requested_by_text(devices: str, available: Sequence[int]) -> list[int]:
    text = devices.strip()
    try:
        if "," in text:
            return [int(part) for part in text.split(",") if part.strip()]
        return _by_count(int(text), devices, available)
    except ValueError as error:
        if isinstance(error, MisconfigurationException):
            raise
        raise _wrong_form(devices) from None


def _by_count(count: int, devices: object, available: Sequence[int]) -> list[int]:
    if count == -1:
        return list(available)
    if count < 0:
        raise MisconfigurationException(f"devices must be > 0 or -1 for all devices, received {devices!r}.")
    # Indices beyond those that exist are kept: the caller reports them.
    return list(range(count))


def _wrong_form(devices: object) -> TypeError:
    return TypeError(
        "devices must be a number (2, '2'), -1 for all, or indices ([0, 1], '0,1', '1,'), "
        f"received {devices!r} of type {type(devices).__name__}. Use devices='auto' to let levin choose."
    )
