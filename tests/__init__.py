"""A package, because kronfluence installs one of this name too, which would hide a plain folder."""
