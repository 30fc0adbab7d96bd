"""`embedjax plan`: the real training step compiled ahead for devices that are not here; its memory, FLOPs, traffic and time."""
