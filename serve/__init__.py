"""The Ray Serve application that scores texts against a finished run."""
