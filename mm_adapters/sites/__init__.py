"""Every site of one model, by its family's record; and the error for a class that no family covers."""
