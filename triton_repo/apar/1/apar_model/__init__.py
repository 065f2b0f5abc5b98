"""The inside of model.py, under a name of its own: nothing in the folder that the server runs in can take its place."""
