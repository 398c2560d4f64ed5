"""Models as programs of other runtimes: written, run there, and compared with the model before they are left."""
