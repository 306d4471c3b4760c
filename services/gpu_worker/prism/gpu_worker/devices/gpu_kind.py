"""Which cost profile a GPU has, by the name that its driver tells."""

PROFILES = {"H200": "h200", "H100 80GB": "h100-80gb"}
"""Part of the driver's name of a GPU, and the profile that comes with Prism for such ones."""


def profile_of(gpu_name: str) -> str:
    """The profile's name, empty where none is known: a scheduler then goes by measured rates alone."""
    return next((profile for part, profile in PROFILES.items() if part in gpu_name), "")
