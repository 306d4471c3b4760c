"""The inside of an engine host: the only code that imports SGLang."""
