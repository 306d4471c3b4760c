def describe(version: str) -> dict[str, object]:
    return {}
