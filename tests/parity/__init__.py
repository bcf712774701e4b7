"""Numbers that other packages gave, and the scripts that asked them."""
